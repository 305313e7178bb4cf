"""Pairs in one line each: the same losses and gradients as trl's own, with less to read."""

import json
import weakref

import pytest
import torch
from datasets import Dataset
from fakes.micro_model import build_micro_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from psychocounsel.recipes import tokens_and_padding, training_order
from psychocounsel.trainers import (
    PADDING,
    SHARING_MODELS,
    START,
    PairCollator,
    PolicyTrainer,
    RewardModelTrainer,
    line_lengths,
    lines,
    model_inputs,
    parts,
    shares_start,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers, whose versions are pinned
LAYOUTS = pytest.mark.parametrize("shared", [True, False], ids=["one line a pair", "two lines a pair"])


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    build_micro_model(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def tokens(draw: torch.Generator, count: int) -> list[int]:
    return torch.randint(5, 500, (count,), generator=draw).tolist()


def policy_pairs(seed: int, count: int) -> list[dict]:
    """Pairs as rewards.policy_rows makes them, of very different lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count, 3), generator=draw).tolist()
    return [
        {"prompt_ids": tokens(draw, p), "chosen_ids": tokens(draw, c), "rejected_ids": tokens(draw, r), "pair": place}
        for place, (p, c, r) in enumerate(lengths)
    ]


def reward_pairs(seed: int, count: int) -> list[dict]:
    """The same as rewards.reward_rows makes them; one pair shares nothing, as where conversations lost their start."""
    rows = [
        {"chosen_ids": row["prompt_ids"] + row["chosen_ids"], "rejected_ids": row["prompt_ids"] + row["rejected_ids"], "pair": row["pair"]}
        for row in policy_pairs(seed, count)
    ]
    rows[0]["chosen_ids"] = [1, *rows[0]["chosen_ids"]]
    return rows


def options(folder) -> dict:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "remove_unused_columns": False,
    }  # fmt: skip


def small(kind, base, model_type: str, seed: int, **changes: object):
    """A small model of some type with random weights and the micro model's vocabulary."""
    torch.manual_seed(seed)
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    config = AutoConfig.for_model(
        model_type, vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    config._name_or_path = str(base)
    return kind.from_config(config, dtype=torch.float32).train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_steps(ours: tuple, theirs: tuple) -> None:
    (loss, model), (their_loss, their_model) = ours, theirs
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    loss.backward()
    their_loss.backward()
    expected = gradients(their_model)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


@LAYOUTS
@pytest.mark.parametrize("model_type", SHARING_MODELS)
def test_a_reward_model_has_trls_loss_and_gradient(model_type, shared, base, tokenizer, tmp_path):
    rows = reward_pairs(1, 7)
    ours, theirs = (small(AutoModelForSequenceClassification, base, model_type, 2, num_labels=1) for _ in range(2))
    common = {"args": RewardConfig(**options(tmp_path)), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer, rival = RewardModelTrainer(shared=shared, model=ours, **common), RewardTrainer(model=theirs, **common)
    loss = trainer.compute_loss(ours, trainer.data_collator(rows))
    assert_equal_steps((loss, ours), (rival.compute_loss(theirs, rival.data_collator(rows)), theirs))
    for name in ("mean_reward", "accuracy", "margin"):
        assert trainer._metrics["train"][name] == pytest.approx(rival._metrics["train"][name], rel=1e-4), name


@LAYOUTS
@pytest.mark.parametrize("model_type", SHARING_MODELS)
def test_a_policy_has_trls_loss_and_gradient(model_type, shared, base, tokenizer, tmp_path):
    rows = policy_pairs(3, 7)
    ours, theirs = (small(AutoModelForCausalLM, base, model_type, 4) for _ in range(2))
    common = {"args": DPOConfig(**options(tmp_path), beta=0.5), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    references = [small(AutoModelForCausalLM, base, model_type, 5).eval() for _ in range(2)]
    trainer = PolicyTrainer(rows=rows, shared=shared, model=ours, ref_model=references[0], **common)
    trainer.read_reference(tmp_path / "reference.json", lambda: False)
    rival = type("Rival", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})(
        model=theirs, ref_model=references[1], **common
    )
    loss = trainer.compute_loss(ours, trainer.data_collator(rows))
    assert_equal_steps((loss, ours), (rival.compute_loss(theirs, rival.data_collator(rows)), theirs))
    for name in trainer._metrics["train"]:
        assert trainer._metrics["train"][name] == pytest.approx(rival._metrics["train"][name], rel=1e-3, abs=1e-6), name
    assert trainer._metrics["train"]["rewards/margins"] != [0.0]


def test_the_reference_is_read_once_and_let_go(base, tokenizer, tmp_path, monkeypatch):
    rows = policy_pairs(6, 5)
    store, read = tmp_path / "reference.json", []
    for reads in (True, False):
        common = {"args": DPOConfig(**options(tmp_path)), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
        model, frozen = (small(AutoModelForCausalLM, base, "llama", 7) for _ in range(2))
        trainer = PolicyTrainer(rows=rows, shared=True, model=model, ref_model=frozen.eval(), **common)
        reference = weakref.ref(frozen)
        del frozen
        if not reads:
            monkeypatch.setattr(trainer, "log_probs", lambda *_: pytest.fail("read again"))
        assert trainer.read_reference(store, lambda: False)
        assert reference() is None
        read.append(trainer.reference)
    assert torch.equal(*read)
    assert json.loads(store.read_text()) == read[0].tolist()
    assert read[0].shape == (5, 2)


def test_the_tokens_of_answers_alone_are_scored(base, tokenizer, tmp_path, monkeypatch):
    import trl.trainer.utils as trl_utils

    rows, scored = policy_pairs(8, 4), []
    apply = trl_utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl_utils._ChunkedLogProbFunction, "apply", lambda hidden, *rest: scored.append(len(hidden)) or apply(hidden, *rest)
    )
    common = {"args": DPOConfig(**options(tmp_path)), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    model, frozen = (small(AutoModelForCausalLM, base, "llama", 7) for _ in range(2))
    trainer = PolicyTrainer(rows=rows, shared=True, model=model, ref_model=frozen, **common)
    trainer.log_probs(model, trainer.data_collator(rows))
    assert scored == [sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)]


# --- lines

ids = st.lists(st.integers(3, 6), min_size=1, max_size=9)
policies = st.builds(lambda p, c, r: {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "pair": 0}, ids, ids, ids)
classified = st.builds(lambda c, r: {"chosen_ids": c, "rejected_ids": r, "pair": 0}, ids, ids)


@LAYOUTS
@given(row=st.one_of(policies, classified))
def test_lines_hold_both_conversations_at_their_places(shared, row):
    prompt = row.get("prompt_ids", [])
    start, *ends = parts(row)
    made = lines(row, shared)
    assert [len(line[0]) for line in made] == line_lengths(row, shared)
    assert len(made) == (1 if shared else 2)
    for end, side, answer in zip(ends, (1, 2), (row["chosen_ids"], row["rejected_ids"]), strict=True):
        assert start + end == prompt + answer
        assert end
        own = [
            (token, place)
            for token, place, part in zip(*made[0 if shared else side - 1], strict=True)
            if part in (START, side)
        ]  # fmt: skip
        assert own == [(token, place) for place, token in enumerate(prompt + answer)]


@given(rows=st.lists(st.one_of(policies, classified), min_size=1, max_size=4))
def test_every_token_sees_its_own_conversation_alone(rows):
    batch = PairCollator(0, shared=True)(rows)
    mask = model_inputs(batch, shared=True)["attention_mask"]
    width = batch["input_ids"].shape[1]
    assert mask.shape == (len(rows), 1, width, width)
    for number, sides in enumerate(batch["sides"].tolist()):
        for one in range(width):
            if sides[one] != PADDING:
                seen = {other for other in range(one + 1) if sides[other] in (START, sides[one])}
                assert seen == set(mask[number, 0, one].nonzero().flatten().tolist())
            assert mask[number, 0, one].any(), "a softmax over nothing is no number"


@LAYOUTS
@given(rows=st.lists(policies, min_size=2, max_size=12), size=st.integers(1, 4), seed=st.integers(0, 9))
def test_the_noted_padding_is_that_of_the_batches(shared, rows, size, seed):
    lengths = [line_lengths(row, shared) for row in rows]
    order = training_order([str(n) for n in range(len(rows))], [max(pair) for pair in lengths], steps=2, batch_size=2 * size, seed=seed)
    batches = [PairCollator(0, shared)([rows[place] for place in order[at : at + size]]) for at in range(0, len(order), size)]
    padding = sum(int((batch["sides"] == PADDING).sum()) for batch in batches)
    places = sum(batch["sides"].numel() for batch in batches)
    assert tokens_and_padding(lengths, order, size) == (places - padding, padding)


def test_models_that_attend_otherwise_get_two_lines():
    assert shares_start(AutoConfig.for_model("llama"), 2048)
    assert shares_start(AutoConfig.for_model("mistral", sliding_window=4096), 2048)
    assert not shares_start(AutoConfig.for_model("mistral", sliding_window=1024), 2048)
    assert shares_start(AutoConfig.for_model("qwen2", use_sliding_window=False), 2048)
    assert not shares_start(AutoConfig.for_model("gemma2"), 2048)
    assert not shares_start(AutoConfig.for_model("mamba"), 2048)
