"""Reward models and policies, trained, read and chosen between: with a micro model that learns in seconds."""

import importlib
import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from fakes.micro_model import build_micro_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.reward_trainer import DataCollatorForPreference

from psychocounsel import rewards
from psychocounsel.errors import UserError
from psychocounsel.model_folders import link_model
from psychocounsel.models import ModelSpec
from psychocounsel.recipes import PolicyRecipe, Recipe, accumulation, check_pairs, checkpoint_steps, optimizer_steps, training_order
from psychocounsel.records import check_manifest, content_hash, dump_records, file_sha256, read_records, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers, whose versions are pinned
ROOT = Path(__file__).resolve().parents[2]
SPEC = ModelSpec(name="micro", id="none/micro", instruction="You listen.")
RECIPE = {
    "epochs": 2, "max_steps": None, "batch_size": 8, "per_device_batch_size": 4, "learning_rate": 3e-3, "schedule": "linear",
    "warmup_ratio": 0.0, "weight_decay": 0.0, "max_length": 320, "precision": "fp32", "gradient_checkpointing": False, "deepspeed": None,
    "lora": None, "save_steps": 2,
}  # fmt: skip
PROMPT = "Answer the client.\n\nClient Speech: {{ client_speech }}"


# --- toy pairs: what is right can be learned from a few words


def an_id(*parts: object) -> str:
    return content_hash(*parts, digits=16)


def toy_pair(number: int, split: str = "train") -> dict:
    draw = random.Random(number)
    speech = f"I feel bad about {draw.choice(['work', 'sleep', 'family', 'money'])}, case {number}" + " and it goes on" * draw.randint(0, 6)
    chosen = f"I hear how hard this is. What would help you {draw.choice(['today', 'now', 'first'])}?"
    rejected = f"You must stop it. Just do {draw.choice(['more', 'less', 'better'])}."
    return {
        "pair_id": an_id("pair", number), "speech_id": an_id("speech", number), "split": split,
        "prompt": [{"role": "user", "content": speech}],
        "chosen": [{"role": "assistant", "content": chosen}], "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_id": an_id("chosen", number), "rejected_id": an_id("rejected", number), "chosen_model": None, "rejected_model": None,
        "chosen_scores": None, "rejected_scores": None, "gap": None, "subset": None,
    }  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The micro model and toy pairs: 21 to train on (no multiple of the batch), 16 held out."""
    folder = tmp_path_factory.mktemp("data")
    build_micro_model(folder / "base")
    dump_records(folder / "train.jsonl", [toy_pair(n) for n in range(21)], "pair")
    dump_records(folder / "dev.jsonl", [toy_pair(n, "dev") for n in range(100, 116)], "pair")
    return folder


def program(name: str, **arguments: object) -> int:
    """Run a program in this process as from its command line; return its exit code."""
    words = [f"scripts/{name}.py"]
    for key, value in arguments.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    before, sys.argv = sys.argv, words
    try:
        importlib.import_module(name).main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def reward_training(data: Path, out: Path, **changes: object) -> dict:
    settings = {"model": SPEC.model_dump(), "recipe": RECIPE | changes, "seed": 7}
    return {
        "pairs": data / "train.jsonl", "dev": data / "dev.jsonl", "weights": data / "base/manifest.json", "resume_dir": out / "work",
        "out": out / "model/manifest.json", "log": out / "log.json", "settings": settings,
    }  # fmt: skip


def policy_training(data: Path, out: Path, checkpoints: int = 3, **changes: object) -> dict:
    settings = {"model": SPEC.model_dump(), "recipe": RECIPE | {"beta": 0.1} | changes, "seed": 7, "checkpoints": checkpoints}
    return {
        "pairs": data / "train.jsonl", "weights": data / "base/manifest.json", "resume_dir": out / "work",
        "checkpoints": out / "checkpoints", "out": out / "checkpoints.json", "log": out / "log.json", "settings": settings,
    }  # fmt: skip


@pytest.fixture(scope="session")
def reward_model(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reward_model")
    assert program("train_reward_model", **reward_training(data, out)) == 0
    return out


@pytest.fixture(scope="session")
def policy(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("policy")
    assert program("train_policy", **policy_training(data, out)) == 0
    return out


def logged(out: Path) -> list[dict]:
    return json.loads((out / "log.json").read_text())


# --- recipes: arithmetic


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_accumulation_makes_the_global_batch_exact_or_refuses(batch_size, per_device, devices):
    recipe = Recipe(**RECIPE | {"batch_size": batch_size, "per_device_batch_size": per_device})
    if batch_size % (per_device * devices):
        with pytest.raises(UserError, match="no multiple"):
            accumulation(recipe, devices)
    else:
        assert accumulation(recipe, devices) * per_device * devices == batch_size


@given(st.integers(1, 40), st.integers(1, 10), st.integers(1, 12), st.integers(0, 99))
def test_training_order(pairs, batch_size, steps, seed):
    names, lengths = [f"{n:016x}" for n in range(pairs)], [(n * 7) % 13 for n in range(pairs)]
    order = training_order(names, lengths, steps, batch_size, seed)
    assert len(order) == steps * batch_size, "every step sees the whole batch"
    counts = [order.count(place) for place in range(pairs)]
    assert max(counts) - min(counts) <= 1, "no pair is seen a second time before each was seen once"
    for start in range(0, len(order), batch_size):
        batch = [lengths[place] for place in order[start : start + batch_size]]
        assert batch == sorted(batch, reverse=True), "pairs of like length stand together"
    backwards = training_order(names[::-1], lengths[::-1], steps, batch_size, seed)
    assert [names[::-1][place] for place in backwards] == [names[place] for place in order], "the file's order does not matter"


def test_training_order_follows_the_seed():
    names = [str(n) for n in range(30)]
    assert training_order(names, [1] * 30, 3, 10, seed=1) != training_order(names, [1] * 30, 3, 10, seed=2)


@given(st.integers(1, 50), st.integers(1, 50))
def test_checkpoints_are_evenly_spaced(steps, checkpoints):
    if checkpoints > steps:
        with pytest.raises(UserError, match="checkpoints"):
            checkpoint_steps(steps, checkpoints)
        return
    places = [0, *checkpoint_steps(steps, checkpoints)]
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert places[-1] == steps
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_steps_of_epochs_count_the_last_batch():
    assert optimizer_steps(Recipe(**RECIPE), 21) == 6  # 42 pairs in batches of 8
    assert optimizer_steps(Recipe(**RECIPE | {"epochs": None, "max_steps": 4}), 21) == 4


@pytest.mark.parametrize("change", [{"epochs": None}, {"max_steps": 3}, {"precision": "fp16"}, {"learning_rat": 1}])
def test_a_wrong_recipe_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change)) if "learning_rat" in change else "."):
        Recipe(**RECIPE | change)


def test_every_recipe_of_the_project_fits():
    yaml = pytest.importorskip("yaml")
    for path in sorted((ROOT / "config/train").glob("*.yaml")):
        kind = Recipe if "reward" in path.stem else PolicyRecipe
        kind(**yaml.safe_load(path.read_text()))


def test_pairs_named_twice_and_no_pairs_are_refused():
    with pytest.raises(UserError, match="stands twice"):
        check_pairs([toy_pair(1), toy_pair(1)])
    with pytest.raises(UserError, match="no pairs"):
        check_pairs([])


# --- tokens


@pytest.fixture(scope="session")
def tokenizer(data):
    return rewards.load_tokenizer(SPEC, data / "base")


def test_instruction_stands_in_the_system_message_or_the_first_turn():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert [m["role"] for m in rewards.conversation(SPEC, prompt)] == ["system", "user", "assistant", "user"]
    without = SPEC.model_copy(update={"system_role": False})
    assert rewards.conversation(without, prompt)[0] == {"role": "user", "content": "You listen.\n\na"}
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert rewards.conversation(SPEC, own) == own
    assert rewards.conversation(without, own) == [{"role": "user", "content": "Be brief.\n\na"}]


def test_policy_and_reward_model_see_the_same_tokens(tokenizer):
    pairs = [toy_pair(n) for n in range(8)]
    by_policy, _ = rewards.policy_rows(tokenizer, SPEC, pairs, 320)
    by_reward_model, _ = rewards.reward_rows(tokenizer, SPEC, pairs, 320)
    for one, other, pair in zip(by_policy, by_reward_model, pairs, strict=True):
        assert one["prompt_ids"] + one["chosen_ids"] == other["chosen_ids"]
        assert one["prompt_ids"] + one["rejected_ids"] == other["rejected_ids"]
        speech = pair["prompt"][0]["content"]
        asked = f"<|im_start|>system\nYou listen.<|im_end|>\n<|im_start|>user\n{speech}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(one["prompt_ids"]) == asked
        assert tokenizer.decode(one["chosen_ids"]) == pair["chosen"][0]["content"] + "<|im_end|>\n"


def test_template_arguments_are_pinned(data):
    dated = rewards.load_tokenizer(SPEC, data / "base")
    dated.chat_template = "{{ date_string }} " + dated.chat_template
    spec = SPEC.model_copy(update={"chat_template_kwargs": {"date_string": "26 Jul 2024"}})
    rows, _ = rewards.policy_rows(dated, spec, [toy_pair(1)], 320)
    assert dated.decode(rows[0]["prompt_ids"]).startswith("26 Jul 2024 ")


def test_long_conversations_lose_their_start_and_long_answers_their_end(tokenizer):
    pairs = [toy_pair(n) for n in range(12)]
    whole, none = rewards.reward_rows(tokenizer, SPEC, pairs, 1000)
    roomy, _ = rewards.policy_rows(tokenizer, SPEC, pairs, 1000)
    limit = sorted(len(row["prompt_ids"]) for row in roomy)[6]
    short, cut = rewards.reward_rows(tokenizer, SPEC, pairs, limit)
    assert none == 0
    assert cut == sum(len(row[side]) > limit for row in whole for side in ("chosen_ids", "rejected_ids")) > 0
    assert all(row["chosen_ids"] == before["chosen_ids"][-limit:] for row, before in zip(short, whole, strict=True))

    kept, cut = rewards.policy_rows(tokenizer, SPEC, pairs, limit)
    before = {row["pair_id"]: row for row in roomy}
    assert {row["pair_id"] for row in kept} == {row["pair_id"] for row in roomy if len(row["prompt_ids"]) < limit}
    assert 0 < len(kept) < len(pairs)
    assert cut > 0
    for row in kept:
        assert row["chosen_ids"] == before[row["pair_id"]]["chosen_ids"][: limit - len(row["prompt_ids"])] != []


# --- reading: no reward depends on the company in which it is read


@pytest.fixture(scope="session")
def classifier(reward_model, tokenizer):
    return rewards.load_reward_model(SPEC, reward_model / "model", tokenizer.pad_token_id)


@pytest.fixture(scope="session")
def conversations(tokenizer) -> list[list[int]]:
    return [rewards.answer_ids(tokenizer, SPEC, pair["prompt"], pair["chosen"]) for pair in map(toy_pair, range(9))]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_rewards_do_not_depend_on_the_batch(classifier, tokenizer, conversations, batch_size):
    alone = [classifier(torch.tensor([ids])).logits.item() for ids in conversations]
    assert len({len(ids) for ids in conversations}) > 3
    assert rewards.rewards(classifier, SPEC, conversations, tokenizer.pad_token_id, batch_size) == pytest.approx(alone, abs=1e-4)


def test_rewards_do_not_depend_on_the_side_of_the_padding(classifier, tokenizer, conversations):
    read = {}
    for side in ("left", "right"):
        ids, mask = rewards.pad_batch(conversations, tokenizer.pad_token_id, side)
        read[side] = classifier(ids, attention_mask=mask).logits[:, 0].tolist()
    assert read["left"] == pytest.approx(read["right"], abs=1e-4)


def test_training_and_scoring_read_the_same_reward(classifier, tokenizer):
    rows, _ = rewards.reward_rows(tokenizer, SPEC, [toy_pair(n) for n in range(6)], 320)
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(rows)
    in_training = classifier(**batch).logits[:, 0].tolist()
    scored = rewards.pair_rewards(classifier, SPEC, rows, tokenizer.pad_token_id, batch_size=4)
    assert [c for c, _ in scored] + [r for _, r in scored] == pytest.approx(in_training, abs=1e-4)


def test_the_reward_is_read_at_the_last_token(classifier, tokenizer, conversations):
    hidden = classifier.model(torch.tensor([conversations[0]])).last_hidden_state[0, -1]
    assert classifier.score(hidden).item() == pytest.approx(rewards.rewards(classifier, SPEC, conversations[:3], 0, 3)[0], abs=1e-4)


def test_a_spoken_reward_is_the_logit_of_token_0_at_the_first_place(data, tokenizer):
    """Against the model card of nvidia/Llama-3.1-Nemotron-70B-Reward-HF: one token generated after the conversation, without the head
    of a further turn; its score of token 0 is the reward."""
    spec = SPEC.model_copy(update={"reward_from": "first_token_logit"})
    model = rewards.load_reward_model(spec, data / "base", tokenizer.pad_token_id)
    with torch.no_grad():
        model.lm_head.weight[0] = torch.linspace(-1, 1, model.config.hidden_size)  # token 0 pads here, and its row holds zeros
    pairs = [toy_pair(n) for n in range(5)]
    sequences = [rewards.answer_ids(tokenizer, spec, pair["prompt"], pair["chosen"]) for pair in pairs]
    by_the_card = []
    for pair in pairs:
        messages = rewards.conversation(spec, pair["prompt"]) + pair["chosen"]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_tensors="pt", return_dict=True)
        answer = model.generate(**ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True)
        by_the_card.append(answer["scores"][0][0][0].item())
    assert len({round(reward, 3) for reward in by_the_card}) == 5
    assert rewards.rewards(model, spec, sequences, tokenizer.pad_token_id, 4) == pytest.approx(by_the_card, abs=1e-4)


def test_log_probabilities_against_a_loop(data, tokenizer):
    model = rewards.load_language_model(SPEC, data / "base")
    rows, _ = rewards.policy_rows(tokenizer, SPEC, [toy_pair(n) for n in range(5)], 320)
    answers = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    expected = []
    for prompt, answer in answers:
        logits = model(torch.tensor([prompt + answer])).logits[0]
        expected.append(sum(torch.log_softmax(logits[len(prompt) + i - 1], -1)[token].item() for i, token in enumerate(answer)))
    for batch_size in (1, 3, 5):
        assert rewards.answer_log_probs(model, answers, tokenizer.pad_token_id, batch_size) == pytest.approx(expected, abs=1e-3)


def test_a_chat_model_is_no_reward_model(data, tmp_path, capsys):
    settings = {"model": SPEC.model_dump(), "max_length": 320, "batch_size": 4, "seed": 1}
    done = program(
        "score_pairs", pairs=data / "dev.jsonl", weights=data / "base/manifest.json", out=tmp_path / "p.jsonl", settings=settings
    )
    assert done == 1
    assert "score.weight" in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


# --- training


def test_a_reward_model_learns_what_can_be_learned(reward_model, data, tmp_path):
    *steps, last = logged(reward_model)
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "accuracy", "grad_norm"} <= steps[0].keys()
    assert steps[-1]["loss"] < 0.5 < steps[0]["loss"]
    assert last["dev_pairs"] == 16
    assert last["dev_accuracy"] >= 0.9
    check_manifest(reward_model / "model/manifest.json")

    settings = {"model": SPEC.model_dump(), "max_length": 320, "batch_size": 4, "seed": 1}
    out, weights = tmp_path / "p.jsonl", reward_model / "model/manifest.json"
    assert program("score_pairs", pairs=data / "dev.jsonl", weights=weights, out=out, settings=settings) == 0
    predictions = read_records(out, "prediction")
    assert sum(p["reward_chosen"] > p["reward_rejected"] for p in predictions) / 16 == last["dev_accuracy"]
    assert {p["chosen_first"] for p in predictions} == {True, False}


def test_the_first_dpo_loss_is_ln_2_and_checkpoints_are_whole_models(policy):
    steps = logged(policy)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert steps[-1]["rewards/accuracies"] == 1.0
    listed = json.loads((policy / "checkpoints.json").read_text())
    assert [entry["step"] for entry in listed] == [2, 4, 6]
    for entry in listed:
        manifest = policy / f"checkpoints/{entry['checkpoint']}/manifest.json"
        assert file_sha256(manifest) == entry["manifest_sha256"]
        AutoModelForCausalLM.from_pretrained(check_manifest(manifest))
    assert len({entry["manifest_sha256"] for entry in listed}) == 3


@pytest.mark.parametrize("name", ["train_reward_model", "train_policy"])
def test_the_size_of_the_batches_changes_no_step(name, reward_model, policy, data, tmp_path):
    build, whole = {"train_reward_model": (reward_training, reward_model), "train_policy": (policy_training, policy)}[name]
    assert program(name, **build(data, tmp_path, per_device_batch_size=8)) == 0
    for one, other in zip(logged(whole), logged(tmp_path), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("output", ["model/manifest.json", "checkpoints.json"])
def test_the_record_tells_tokens_and_padding(output, reward_model, policy):
    path = (policy if output == "checkpoints.json" else reward_model) / f"{output}.prov.json"
    facts = json.loads(path.read_text())["run"]["facts"]
    assert 48 * 20 < facts["tokens_read"] < 48 * 200, "48 pairs are read in six steps"
    assert 0 < facts["padding_share"] < 0.15, "lines of like length stand together"


def test_another_reference_is_used(policy, data, tmp_path):
    newest = policy / "checkpoints/3/manifest.json"
    arguments = policy_training(data, tmp_path, 1, epochs=None, max_steps=1) | {"weights": newest, "reference": data / "base/manifest.json"}
    assert program("train_policy", **arguments) == 0
    assert logged(tmp_path)[0]["rewards/margins"] > 0.5, "the start is far from this reference"


def test_a_policy_that_differs_from_its_reference_unawares_stops(data, tmp_path, monkeypatch):
    from psychocounsel import training

    load, loaded = training.start_model, []

    def second_differs(*arguments: object, **options: object):
        model = load(*arguments, **options)
        loaded.append(model)
        if len(loaded) == 2:
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(50)
        return model

    monkeypatch.setattr(training, "start_model", second_differs)
    with pytest.raises(AssertionError, match="first loss"):
        program("train_policy", **policy_training(data, tmp_path))


def test_a_training_that_explodes_stops_with_a_message(data, tmp_path, capsys):
    assert program("train_reward_model", **reward_training(data, tmp_path, learning_rate=1e6)) == 1
    assert "come apart at step" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("variables", "seen", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 0, r"CUDA_VISIBLE_DEVICES=0,1\), but torch .* sees none"),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 2, "4 processes on this node, but torch sees 2 GPUs"),
        ({}, 2, "2 GPUs but one process"),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 4, 8),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, 0, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, 1),
    ],
)
def test_processes_and_gpus_must_go_together(monkeypatch, variables, seen, message):
    from psychocounsel.training import devices

    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if isinstance(message, int):
        assert devices() == message
    else:
        with pytest.raises(UserError, match=message):
            devices()


@pytest.mark.parametrize(("saved", "now", "fits"), [(0, 0, True), (4, 4, True), (4, 8, False), (4, 0, False), (0, 4, False)])
def test_a_checkpoint_goes_on_in_as_many_processes_of_deepspeed_as_saved_it(tmp_path, saved, now, fits):
    from psychocounsel.training import check_processes

    (tmp_path / "checkpoint-2/global_step2").mkdir(parents=True)
    for rank in range(saved):
        (tmp_path / f"checkpoint-2/global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    if fits:
        check_processes(tmp_path / "checkpoint-2", now)
    else:
        with pytest.raises(UserError, match="give the training as many GPUs as before"):
            check_processes(tmp_path / "checkpoint-2", now)


def test_a_batch_that_does_not_divide_is_refused(data, tmp_path, capsys):
    assert program("train_reward_model", **reward_training(data, tmp_path, per_device_batch_size=3)) == 1
    assert "no multiple" in capsys.readouterr().err


def test_more_checkpoints_than_steps_are_refused(data, tmp_path, capsys):
    assert program("train_policy", **policy_training(data, tmp_path, 7)) == 1
    assert "7 checkpoints of 6" in capsys.readouterr().err


def test_prompts_without_room_are_dropped_and_counted(data, tokenizer, tmp_path):
    rows, _ = rewards.policy_rows(tokenizer, SPEC, [toy_pair(n) for n in range(21)], 1000)
    middle = sorted(len(row["prompt_ids"]) for row in rows)[10]
    arguments = policy_training(data, tmp_path, 1, max_length=middle, epochs=None, max_steps=1)
    assert program("train_policy", **arguments) == 0
    account = json.loads((tmp_path / "checkpoints.json.prov.json").read_text())["rows"]["pairs"]
    without_room = sum(len(row["prompt_ids"]) >= middle for row in rows)
    assert account == {
        "in": 21, "out": 8, "dropped": {"not reached in max_steps": 13 - without_room, "prompt fills max_length": without_room},
    }  # fmt: skip


# --- several processes


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def command_of(name: str, arguments: dict) -> list[str]:
    words = [str(ROOT / "scripts" / f"{name}.py")]
    for key, value in arguments.items():
        words += [f"--{key.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


# --- iterative DPO: ranking samples, choosing checkpoints


def a_speech(number: int) -> dict:
    return {
        "speech_id": an_id("speech", number), "text": toy_pair(number)["prompt"][0]["content"], "source": "toy",
        "source_row": number + 1, "source_key": None, "topic": "t", "coarse_topic": "c",
        "topic_from": "source", "cluster_id": an_id("speech", number), "split": "train",
    }  # fmt: skip


def a_sample(number: int, sample: int, text: str) -> dict:
    return {
        "response_id": an_id("response", number, sample), "speech_id": an_id("speech", number), "model": "p", "sample": sample,
        "text": text, "finish_reason": "stop", "usage": None, "request_key": "0" * 64, "served_model": None, "target_words": None,
    }  # fmt: skip


def test_rank_samples_takes_the_best_against_the_worst(reward_model, tmp_path):
    texts = [
        "I hear how hard this is. What would help you now?",
        "You must stop it. Just do more.",
        "You must do less.",
        "What would help you?",
    ]
    samples = [a_sample(n, i, text) for n in range(4) for i, text in enumerate(texts)]
    samples += [a_sample(4, i, "All alike.") for i in range(3)]  # speech 4 makes no pair, and speech 5 has no samples
    dump_records(tmp_path / "speeches.jsonl", [a_speech(n) for n in range(6)], "speech")
    dump_records(tmp_path / "samples.jsonl", samples, "response")
    settings = {"model": SPEC.model_dump(), "prompt": PROMPT, "policy": "p", "max_length": 320, "batch_size": 4}
    out = {key: tmp_path / f"{key}.jsonl" for key in ("pairs", "rewards", "dropped")}
    inputs = {"speeches": tmp_path / "speeches.jsonl", "samples": tmp_path / "samples.jsonl"}
    assert program("rank_samples", **inputs, reward_weights=reward_model / "model/manifest.json", **out, settings=settings) == 0

    reward_of = {row["response_id"]: row["reward"] for row in read_records(out["rewards"], "reward")}
    assert len(reward_of) == len(samples)
    assert len({reward_of[an_id("response", 4, i)] for i in range(3)}) == 1, "equal texts have equal rewards"
    pairs = read_records(out["pairs"], "pair")
    assert {pair["speech_id"] for pair in pairs} == {an_id("speech", n) for n in range(4)}
    for pair in pairs:
        mine = [reward_of[s["response_id"]] for s in samples if s["speech_id"] == pair["speech_id"]]
        assert reward_of[pair["chosen_id"]] == max(mine)
        assert reward_of[pair["rejected_id"]] == min(mine)
        assert pair["gap"] == max(mine) - min(mine) > 0
        assert pair["split"] == "train"
        assert pair["chosen_model"] == pair["rejected_model"] == "p"
        assert pair["prompt"][0]["content"].startswith("Answer the client.\n\nClient Speech: I feel bad")
    dropped = read_records(out["dropped"], "dropped_row")
    reasons = {an_id("speech", 4): "all answers equal", an_id("speech", 5): "no answer: all were empty or failed"}
    assert {row["detail"]: row["reason"] for row in dropped} == reasons


def test_a_reward_model_at_chance_stops_what_would_train_on_it(reward_model, data, tmp_path, capsys, caplog):
    """By the programs: half of the pairs name the other answer the better one, so that no model can rank them."""
    pairs = [toy_pair(n, "test") for n in range(200, 240)]
    for pair in pairs[::2]:
        pair.update(chosen=pair["rejected"], rejected=pair["chosen"])
    dump_records(tmp_path / "test.jsonl", pairs, "pair")
    weights, predictions, metrics = reward_model / "model/manifest.json", tmp_path / "predictions.jsonl", tmp_path / "metrics.json"
    scoring = {"model": SPEC.model_dump(), "max_length": 320, "batch_size": 4}
    assert program("score_pairs", pairs=tmp_path / "test.jsonl", weights=weights, out=predictions, settings={**scoring, "seed": 1}) == 0
    evaluation = {"name": "coin", "bootstrap": 100, "seed": 1}
    assert program("evaluate_rewards", pairs=tmp_path / "test.jsonl", predictions=predictions, out=metrics, settings=evaluation) == 0
    assert json.loads(metrics.read_text())["at_chance"]

    dump_records(tmp_path / "speeches.jsonl", [a_speech(1)], "speech")
    dump_records(tmp_path / "samples.jsonl", [a_sample(1, i, text) for i, text in enumerate(("I hear you.", "You must stop."))], "response")
    ranking = {
        "speeches": tmp_path / "speeches.jsonl", "samples": tmp_path / "samples.jsonl", "reward_weights": weights, "metrics": metrics,
        **{key: tmp_path / f"{key}.jsonl" for key in ("pairs", "rewards", "dropped")},
        "settings": {**scoring, "prompt": PROMPT, "policy": "p"},
    }  # fmt: skip
    capsys.readouterr()
    assert program("rank_samples", **ranking, stop_at_chance=[]) == 1
    told = capsys.readouterr().err
    for words in ("the reward model coin", "0.500", "on 40 test pairs", str(metrics), "reward_evaluation.stop_at_chance to false"):
        assert words in told
    assert not (tmp_path / "pairs.jsonl").exists()
    assert program("rank_samples", **ranking) == 0
    assert "trained on its rewards nevertheless" in caplog.text


def test_samples_with_one_reward_make_no_pair():
    rank_samples = importlib.import_module("rank_samples")
    two = [a_sample(1, 0, "a"), a_sample(1, 1, "b")]
    one, other = (sample["response_id"] for sample in two)
    assert rank_samples.no_pair(two, {one: 0.5, other: 0.5}) == "all rewards equal"
    assert rank_samples.no_pair(two, {one: 0.5, other: 0.4}) is None
    assert rank_samples.no_pair(two[:1], {one: 0.5}) == "one answer alone"


def test_a_linked_model_is_whole_and_has_a_manifest_of_its_own(data, tmp_path):
    link_model(data / "base", tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert (tmp_path / "model.safetensors").samefile(data / "base/model.safetensors")
    assert write_manifest(tmp_path).read_bytes() == (data / "base/manifest.json").read_bytes()


def test_the_seed_draws_the_head(data):
    from psychocounsel.training import start_model

    heads = [start_model(AutoModelForSequenceClassification, SPEC, data / "base", seed, num_labels=1).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
