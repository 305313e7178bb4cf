"""One conversation has one reward: in every program, in any company, and read as the authors of a published model read it."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toy_training import PROMPT, SPEC, a_sample, a_speech, policy_training, program, reward_training, toy_pair
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from psychocounsel import rewards
from psychocounsel.errors import UserError
from psychocounsel.prompts import client_speech, render
from psychocounsel.records import dump_records, read_records, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
DATED = SPEC.model_copy(update={"chat_template_kwargs": {"date_string": "26 Jul 2024"}})


def our_pair(number: int, split: str) -> dict:
    """A pair whose prompt is the responding prompt around a speech, as the pairs of a run."""
    pair = toy_pair(number, split)
    return pair | {"prompt": [{"role": "user", "content": render(PROMPT, client_speech=pair["prompt"][0]["content"])}]}


@pytest.fixture(scope="module")
def dated(data, tmp_path_factory):
    """The micro model with a chat template that prints a date, and a reward model trained from it; one pair is its dev side."""
    folder = tmp_path_factory.mktemp("dated")
    shutil.copytree(data / "base", folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = "{{ 'Today: ' + date_string }}\n" + tokenizer.chat_template
    tokenizer.save_pretrained(folder / "base")
    write_manifest(folder / "base")
    shutil.copy(data / "train.jsonl", folder / "train.jsonl")
    dump_records(folder / "dev.jsonl", [our_pair(300, "dev")], "pair")
    arguments = reward_training(folder, folder)
    arguments["settings"]["model"] = DATED.model_dump()
    assert program("train_reward_model", **arguments) == 0
    return folder


def test_one_conversation_has_one_reward_in_every_program(dated, policy, data, tmp_path):
    """Training's dev accuracy, score_pairs, rank_samples, assess_checkpoint; and by hand: alone, as text in the template, date pinned."""
    pair = our_pair(300, "dev")
    model = AutoModelForSequenceClassification.from_pretrained(dated / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(dated / "model")
    by_hand = {}
    for side in ("chosen", "rejected"):
        speech, answer = pair["prompt"][0]["content"], pair[side][0]["content"]
        text = (
            "Today: 26 Jul 2024\n<|im_start|>system\nYou listen.<|im_end|>\n"
            f"<|im_start|>user\n{speech}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        )
        by_hand[side] = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
    assert abs(by_hand["chosen"] - by_hand["rejected"]) > 0.1, "the two must be told apart for the test to mean something"

    last = json.loads((dated / "log.json").read_text())[-1]
    assert last["dev_margin"] == pytest.approx(by_hand["chosen"] - by_hand["rejected"], abs=1e-4)

    weights = dated / "model/manifest.json"
    dump_records(tmp_path / "pairs.jsonl", [pair, *(our_pair(n, "dev") for n in range(9))], "pair")
    scoring = {"model": DATED.model_dump(), "max_length": 320, "batch_size": 4}
    files = {"pairs": tmp_path / "pairs.jsonl", "weights": weights, "out": tmp_path / "predictions.jsonl"}
    assert program("score_pairs", **files, settings=scoring | {"seed": 1}) == 0
    scored = next(row for row in read_records(files["out"], "prediction") if row["pair_id"] == pair["pair_id"])
    assert {side: scored[f"reward_{side}"] for side in by_hand} == pytest.approx(by_hand, abs=1e-4)

    samples = [a_sample(300, i, pair[side][0]["content"]) for i, side in enumerate(by_hand)]
    samples += [a_sample(n, i, f"Other words, {i}.") for n in range(3) for i in range(2)]
    dump_records(tmp_path / "speeches.jsonl", [a_speech(n) for n in (300, 0, 1, 2)], "speech")
    dump_records(tmp_path / "samples.jsonl", samples, "response")
    inputs = {"speeches": tmp_path / "speeches.jsonl", "samples": tmp_path / "samples.jsonl", "reward_weights": weights}
    outputs = {name: tmp_path / f"ranked-{name}.jsonl" for name in ("pairs", "rewards", "dropped")}
    assert program("rank_samples", **inputs, **outputs, settings=scoring | {"prompt": PROMPT, "policy": "p"}) == 0
    reward_of = {row["response_id"]: row["reward"] for row in read_records(outputs["rewards"], "reward")}
    ranked = {side: reward_of[sample["response_id"]] for side, sample in zip(by_hand, samples, strict=False)}
    assert ranked == pytest.approx(by_hand, abs=1e-4)

    measured = {"pairs": files["pairs"], "predictions": files["out"], "out": tmp_path / "metrics.json"}
    assert program("evaluate_rewards", **measured, settings={"name": "rm", "seed": 1, "bootstrap": 9}) == 0
    for name, sample in zip(("answers", "opponent"), samples, strict=False):
        dump_records(tmp_path / f"{name}.jsonl", [sample], "response")
    inputs = {name: tmp_path / f"{name}.jsonl" for name in ("speeches", "answers", "opponent")}
    inputs |= {"checkpoints": policy / "checkpoints.json", "weights": policy / "checkpoints/3/manifest.json", "metrics": measured["out"]}
    inputs |= {"base": data / "base/manifest.json", "reward_weights": weights, "out": tmp_path / "assessment.json"}
    facts = {"policy": "p", "checkpoint": 3, "name": "p.checkpoint-3", "prompt": PROMPT, "bootstrap": 9, "seed": 1}
    models = {"model": SPEC.model_dump(), "reward_model": DATED.model_dump()}
    assert program("assess_checkpoint", **inputs, settings=scoring | facts | models) == 0
    (assessed,) = json.loads(inputs["out"].read_text())["answers"]
    assert (assessed["reward"], assessed["opponent_reward"]) == pytest.approx((by_hand["chosen"], by_hand["rejected"]), abs=1e-4)


def test_training_a_policy_and_choosing_its_checkpoint_read_the_same_log_probabilities(data, tmp_path):
    """The first step of DPO logs the mean log-probabilities of its batch under the base; select_checkpoint's reading gives them too."""
    pairs = [our_pair(n, "train") for n in range(8)]  # one batch, whatever its order
    dump_records(tmp_path / "train.jsonl", pairs, "pair")
    arguments = policy_training(data, tmp_path, 1, epochs=None, max_steps=1) | {"pairs": tmp_path / "train.jsonl"}
    assert program("train_policy", **arguments) == 0
    first = json.loads((tmp_path / "log.json").read_text())[0]
    tokenizer = rewards.load_tokenizer(SPEC, data / "base")
    rows, _ = rewards.policy_rows(tokenizer, SPEC, pairs, 320)
    model = rewards.load_language_model(SPEC, data / "base")
    for side in ("chosen", "rejected"):
        read = rewards.answer_log_probs(model, [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows], tokenizer.pad_token_id, 3)
        assert first[f"logps/{side}"] == pytest.approx(sum(read) / len(read), rel=1e-4)


@pytest.fixture(scope="module")
def readings(reward_model, tokenizer, conversations):
    """A reward model, conversations, and the reward of each when it is read alone."""
    model = rewards.load_reward_model(SPEC, reward_model / "model", tokenizer.pad_token_id)
    return model, conversations, [model(torch.tensor([ids])).logits.item() for ids in conversations]


@settings(max_examples=25)
@given(st.data())
def test_a_reward_depends_neither_on_company_nor_on_order_nor_on_padding(readings, tokenizer, data):
    model, conversations, alone = readings
    places = data.draw(st.lists(st.integers(0, len(alone) - 1), min_size=1, max_size=12))
    chosen, expected = [conversations[place] for place in places], [alone[place] for place in places]
    batch_size = data.draw(st.integers(1, 12))
    assert rewards.rewards(model, SPEC, chosen, tokenizer.pad_token_id, batch_size) == pytest.approx(expected, abs=1e-4)
    side, more = data.draw(st.sampled_from(["left", "right"])), data.draw(st.integers(0, 20))
    longer = [*chosen, [tokenizer.eos_token_id] * (max(map(len, chosen)) + more)]  # a longer row, so that all others are padded
    ids, mask = rewards.pad_batch(longer, tokenizer.pad_token_id, side)
    with torch.inference_mode():
        assert model(ids, attention_mask=mask).logits[:-1, 0].tolist() == pytest.approx(expected, abs=1e-4)


# --- published reward models


def published(reward_model, folder, head: str, outputs: int = 1, **config) -> None:
    """Write a reward model's files with its head under another name or of another size, and other entries in its config."""
    shutil.copytree(reward_model / "model", folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{head}.weight"] = weights.pop("score.weight").repeat(outputs, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((folder / "config.json").read_text())
    for name in ("num_labels", "id2label", "label2id"):
        facts.pop(name, None)
    (folder / "config.json").write_text(json.dumps(facts | config))


@pytest.mark.parametrize("head", ["value_head", "score"])
def test_a_reward_model_of_openrlhf_is_read_as_openrlhf_reads_it(reward_model, tokenizer, conversations, tmp_path, head):
    """Either name of its head; its config knows no labels (transformers then takes two), and pads with the token that ends a turn."""
    eos = tokenizer.eos_token_id
    facts = {"architectures": ["RewardModel"], "normalize_reward": False, "mean": 1.5, "std": 2.0, "pad_token_id": eos}
    published(reward_model, tmp_path / "rm", head, **facts)
    spec = SPEC.model_copy(update={"reward_from": "eos_token"})
    model = rewards.load_reward_model(spec, tmp_path / "rm", eos)
    pairs = [toy_pair(n) for n in range(9)]
    sequences = [rewards.answer_ids(tokenizer, spec, pair["prompt"], pair["chosen"]) for pair in pairs]
    assert [len(long) - len(short) for long, short in zip(conversations, sequences, strict=True)] == [1] * 9, "the newline after it"
    assert {ids[-1] for ids in sequences} == {eos}
    expected = [model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() for ids in sequences]
    assert rewards.rewards(model, spec, sequences, eos, 4) == pytest.approx(expected, abs=1e-4)
    as_transformers = rewards.rewards(model, SPEC, sequences, eos, 4)
    assert as_transformers != pytest.approx(expected, abs=1e-3), "by its rule the end of the turn would count as padding"


def test_a_conversation_whose_template_has_no_end_gets_one(data, tmp_path):
    unended = rewards.load_tokenizer(SPEC, data / "base")
    unended.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token if not loop.last }} {% endfor %}"
    spec = SPEC.model_copy(update={"reward_from": "eos_token"})
    ids = rewards.answer_ids(unended, spec, toy_pair(1)["prompt"], toy_pair(1)["chosen"])
    assert unended.decode(ids).endswith(f"{toy_pair(1)['chosen'][0]['content']} <|im_end|>")


@pytest.mark.parametrize(
    ("head", "outputs", "complaint"),
    [("v_head.summary", 1, "lack score.weight"), ("score", 5, "have more than one output: score.weight")],
)
def test_weights_without_a_head_of_one_output_are_refused(reward_model, tokenizer, tmp_path, head, outputs, complaint):
    published(reward_model, tmp_path / "rm", head, outputs)
    with pytest.raises(UserError, match=rf"is no reward model: its weights {complaint}"):
        rewards.load_reward_model(SPEC, tmp_path / "rm", tokenizer.pad_token_id)


def test_a_reward_model_may_read_the_bare_speech(tokenizer):
    pair = our_pair(5, "test")
    assert client_speech(pair["prompt"]) == toy_pair(5)["prompt"][0]["content"]
    bare = SPEC.model_copy(update={"reward_reads": "speech"})
    assert rewards.answer_ids(tokenizer, bare, pair["prompt"], pair["chosen"]) == rewards.answer_ids(
        tokenizer, SPEC, toy_pair(5)["prompt"], pair["chosen"]
    )
    general = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert rewards.answer_ids(tokenizer, bare, general, pair["chosen"]) == rewards.answer_ids(tokenizer, SPEC, general, pair["chosen"])
