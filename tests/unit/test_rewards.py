"""From messages to tokens, and from tokens to rewards and log-probabilities: the same for everybody who reads them."""

import pytest
import torch
from toy_training import SPEC, program, toy_pair
from transformers import AutoModelForSequenceClassification
from trl.trainer.reward_trainer import DataCollatorForPreference

from psychocounsel import rewards

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers, whose versions are pinned


# --- tokens


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


def test_bf16_before_the_head_makes_no_ties(reward_model, tokenizer, conversations):
    """As on GPUs, where rewards are read under autocast; numbers of bf16 lie 1/128 apart here."""
    reading = {"spec": SPEC, "sequences": conversations, "pad_id": tokenizer.pad_token_id, "batch_size": 4}
    exact = rewards.rewards(AutoModelForSequenceClassification.from_pretrained(reward_model / "model").eval(), **reading)
    model = rewards.load_reward_model(SPEC, reward_model / "model", tokenizer.pad_token_id)
    assert rewards.rewards(model, **reading) == pytest.approx(exact, abs=1e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        read = [model(torch.tensor([ids])).logits.item() for ids in conversations]
    assert read == pytest.approx(exact, abs=2e-3)
    assert len(set(read)) == len(conversations)


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
