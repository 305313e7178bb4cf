"""Training recipes (config/train/*.yaml) and what follows from one by arithmetic: steps, accumulation, the order of the pairs."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from psychocounsel.errors import UserError
from psychocounsel.records import content_hash
from psychocounsel.stage import Settings

DEEPSPEED = Path(__file__).resolve().parents[2] / "config" / "deepspeed"


class Lora(Settings):
    """Low-rank adapters that are trained in place of the weights, and merged into them at the end (Hu et al., arXiv 2106.09685)."""

    rank: int = Field(description="rank of the adapters", ge=1)
    alpha: float = Field(description="the adapters count alpha / rank times", gt=0)
    dropout: float = Field(description="dropout in front of the adapters", ge=0, lt=1)
    target: Literal["all-linear"] | list[str] = Field(description="all-linear, or names of the layers that get an adapter")


class Recipe(Settings):
    """How a reward model is trained (paper, section 4.1)."""

    epochs: float | None = Field(description="passes over the pairs; null where max_steps is set", gt=0)
    max_steps: int | None = Field(description="optimizer steps; null where epochs is set", ge=1)
    batch_size: int = Field(description="pairs a step, over all devices", ge=1)
    per_device_batch_size: int = Field(description="pairs that one device holds at once", ge=1)
    learning_rate: float = Field(description="highest learning rate", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = Field(description="how the learning rate falls after warm-up")
    warmup_ratio: float = Field(description="share of the steps in which the learning rate rises", ge=0, lt=1)
    weight_decay: float = Field(description="decoupled weight decay", ge=0)
    max_length: int = Field(description="most tokens of a prompt with its answer", ge=1)
    precision: Literal["bf16", "fp32"] = Field(description="number format of training")
    gradient_checkpointing: bool = Field(description="compute activations again instead of keeping them")
    deepspeed: str | None = Field(description="file below config/deepspeed, used where there are several devices")
    lora: Lora | None = Field(description="train adapters of low rank, for small GPUs; null trains all weights")
    save_steps: int = Field(description="steps between two checkpoints for resuming", ge=1)

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> "Recipe":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("exactly one of epochs and max_steps must be set, the other null")
        return self

    @model_validator(mode="after")
    def _lora_without_deepspeed(self) -> "Recipe":
        if self.lora and self.deepspeed:
            raise ValueError("deepspeed must be null where lora is set: there is next to nothing to spread over the GPUs")
        return self


class PolicyRecipe(Recipe):
    """How a policy is trained by DPO (paper, section 4.2)."""

    beta: float = Field(description="strength of the tie to the reference model", gt=0)


def deepspeed_files(recipe: Recipe) -> list[Path]:
    """Return the DeepSpeed configuration of a recipe that names one: an input of the training, on any number of devices."""
    return [DEEPSPEED / recipe.deepspeed] if recipe.deepspeed else []


def check_pairs(pairs: list[dict]) -> None:
    """Raise UserError where there is nothing to train on, or a pair stands twice."""
    if not pairs:
        raise UserError("--pairs: no pairs to train on; see what the stage that made them has dropped, and why")
    seen: set[str] = set()
    for pair in pairs:
        if pair["pair_id"] in seen:
            raise UserError(f"--pairs: pair {pair['pair_id']} stands twice; name each file once")
        seen.add(pair["pair_id"])


def optimizer_steps(recipe: Recipe, pairs: int) -> int:
    """Return the number of optimizer steps; a last batch that is not full counts as one (see training_order)."""
    return recipe.max_steps or math.ceil(recipe.epochs * pairs / recipe.batch_size)


def accumulation(recipe: Recipe, devices: int) -> int:
    """Return how many batches each device accumulates, so that one step sees exactly `batch_size` pairs on any number of devices."""
    at_once = recipe.per_device_batch_size * devices
    if recipe.batch_size % at_once:
        raise UserError(
            f"recipe: batch_size {recipe.batch_size} is no multiple of per_device_batch_size ({recipe.per_device_batch_size}) "
            f"times the number of devices ({devices}); "
            "change per_device_batch_size, which changes no result, or the number of devices"
        )
    return recipe.batch_size // at_once


def training_order(pair_ids: list[str], lengths: list[int], steps: int, batch_size: int, seed: int) -> list[int]:
    """Return the places of the pairs in the order in which training sees them, `steps` x `batch_size` of them.

    Each pass is a seeded hash order, so the order depends neither on the file's nor on the number of devices, and a last batch
    that is not full is filled from a further pass: every step sees the whole batch and no pair is left out. Within a batch
    the longest stand first: pairs of like length are padded together, and the gradient of the step is the same.
    """
    order: list[int] = []
    passes = 0
    while len(order) < steps * batch_size:
        order += sorted(range(len(pair_ids)), key=lambda i: content_hash(seed, passes, pair_ids[i]))
        passes += 1
    batches = (order[start : start + batch_size] for start in range(0, steps * batch_size, batch_size))
    return [place for batch in batches for place in sorted(batch, key=lambda i: (-lengths[i], pair_ids[i]))]


def micro_batches(order: list[int], size: int) -> list[list[int]]:
    """Return the places in batches of `size` that a device holds at once."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def tokens_and_padding(lengths: list[list[int]], order: list[int], size: int) -> tuple[int, int]:
    """Return how many tokens a training in this order reads in batches of `size` pairs, and how many places of padding beside them.

    `lengths` holds the lengths of the lines of each pair; a batch is padded to its longest line.
    """
    tokens = places = 0
    for batch in micro_batches(order, size):
        lines = [length for place in batch for length in lengths[place]]
        tokens += sum(lines)
        places += len(lines) * max(lines)
    return tokens, places - tokens


def checkpoint_steps(steps: int, checkpoints: int) -> list[int]:
    """Return the optimizer steps after which the checkpoints are taken: evenly spaced, the last one at the end."""
    if checkpoints > steps:
        raise UserError(
            f"{checkpoints} checkpoints of {steps} optimizer steps: lower `checkpoints`, or train longer (recipe: epochs, max_steps)"
        )
    return [k * steps // checkpoints for k in range(1, checkpoints + 1)]
