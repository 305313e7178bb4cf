"""LoRA: adapters train in place of the weights, and what is left is a model like any other."""

import math

import pytest
import torch
from safetensors.torch import load_file
from toy_training import RECIPE, ROOT, SPEC, logged, policy_training, program, reward_training
from transformers import AutoModelForCausalLM

from psychocounsel.config import Study
from psychocounsel.errors import UserError
from psychocounsel.recipes import Recipe
from psychocounsel.records import check_manifest, read_records
from test_training_resume import stop_at

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1, "target": "all-linear"}
LEARN = {"lora": LORA, "learning_rate": 1e-2}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_merged(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Only the linear layers differ, each by a matrix of the adapter's rank."""
    for name, weight in before.items():
        moved = after[name] - weight
        if "proj" in name:
            assert 0 < torch.linalg.matrix_rank(moved, atol=1e-6) <= LORA["rank"], name
        else:
            assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_policy_is_its_base_with_the_adapter_in_it(precision, data, tmp_path):
    """In float32 also where the base lies in bf16 while the adapter trains: what was not trained has not changed by a bit."""
    recompute = {"gradient_checkpointing": precision == "bf16"}  # as on GPUs
    assert program("train_policy", **policy_training(data, tmp_path, precision=precision, **recompute, **LEARN)) == 0
    steps = logged(tmp_path)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3), "without its adapter the start is its own reference"
    assert steps[-1]["loss"] < 0.5
    for number in (1, 2, 3):
        folder = check_manifest(tmp_path / f"checkpoints/{number}/manifest.json")
        assert not list(folder.glob("adapter*"))
        assert_merged(weights(data / "base"), weights(folder))
        assert AutoModelForCausalLM.from_pretrained(folder).config.dtype == torch.float32


def test_a_reward_model_learns_its_head_beside_the_adapter(data, tmp_path):
    assert program("train_reward_model", **reward_training(data, tmp_path, gradient_checkpointing=True, **LEARN)) == 0
    assert logged(tmp_path)[-1]["dev_accuracy"] >= 0.9
    after = weights(tmp_path / "model")
    head = after.pop("score.weight")
    assert_merged({name: weight for name, weight in weights(data / "base").items() if name in after}, after)
    from transformers import AutoModelForSequenceClassification

    from psychocounsel.training import start_model

    drawn = start_model(AutoModelForSequenceClassification, SPEC, data / "base", 7, num_labels=1).score.weight
    assert (head - drawn).abs().max() > 1e-3, "the head has learned"

    settings = {"model": SPEC.model_dump(), "max_length": 320, "batch_size": 4, "seed": 1}
    out = tmp_path / "p.jsonl"
    assert program("score_pairs", pairs=data / "dev.jsonl", weights=tmp_path / "model/manifest.json", out=out, settings=settings) == 0
    right = [row["reward_chosen"] > row["reward_rejected"] for row in read_records(out, "prediction")]
    assert sum(right) / 16 == logged(tmp_path)[-1]["dev_accuracy"]


def test_another_reference_is_used(policy, data, tmp_path):
    newest = policy / "checkpoints/3/manifest.json"
    arguments = policy_training(data, tmp_path, 1, epochs=None, max_steps=1, lora=LORA)
    assert program("train_policy", **arguments | {"weights": newest, "reference": data / "base/manifest.json"}) == 0
    assert logged(tmp_path)[0]["rewards/margins"] > 0.5, "the start is far from this reference"


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_ends_with_the_same_bytes(data, tmp_path, monkeypatch):
    """The adapter's dropout goes on where it was, too."""
    whole, broken = (policy_training(data, tmp_path / name, **LEARN) for name in ("whole", "broken"))
    assert program("train_policy", **whole) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert program("train_policy", **broken) == 75
    assert program("train_policy", **broken) == 0
    assert (tmp_path / "broken/checkpoints.json").read_bytes() == (tmp_path / "whole/checkpoints.json").read_bytes()
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")


def test_an_adapter_is_not_spread_over_gpus():
    with pytest.raises(ValueError, match="deepspeed must be null"):
        Recipe(**RECIPE | {"lora": LORA, "deepspeed": "zero2.json"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lora: null", "lora: {rank: 8, alpha: 16, dropout: 0.0}", "lacks the key 'target'"),
        ("lora: null", "lora: {rank: 8, alpha: 16, dropout: 0.0, target: all-linear, r: 4}", r"unknown key lora\.r"),
        ("lora: null", "lora: {rank: 0, alpha: 16, dropout: 0.0, target: all-linear}", r"lora\.rank"),
        ("lora: null", "#", "lacks the key 'lora'"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, old, new, message):
    file = tmp_path / "recipe.yaml"
    file.write_text((ROOT / "config/train/dpo.yaml").read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Study.recipe(str(file))
