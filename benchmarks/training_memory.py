"""Memory that a training takes, worked out from the shapes of the models: the tables of docs/training.md.

Nothing is measured here. Counted are weights, gradients, optimizer, buffers of DeepSpeed, activations and the vocabulary's logits, at
their most, on each GPU; and what the processes of a node read into its own memory. docs/training.md says what each part rests on.

    python benchmarks/training_memory.py                            # the tables of docs/training.md, for GPUs of 80 GiB
    python benchmarks/training_memory.py --pairs 1 --gib 24         # with one pair at a time, for GPUs of 24 GiB
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SPARE = 0.1  # of a GPU: CUDA's own memory and what is lost between blocks
KINDS, WAYS, COUNTS = ("reward model", "DPO"), ("plain", "ZeRO-2", "ZeRO-3", "LoRA"), (1, 4, 8)
TILE = 4096 * 32768  # logits that trl's chunked head holds at once
LIVE = 1_000_000_000  # weights that ZeRO-3 holds whole at once (stage3_max_live_parameters)


@dataclass(frozen=True)
class Shape:
    """A Llama's shape, by the names of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Return (in, out) of the linear layers of one block: query, key, value, output, gate, up, down."""
        hidden, wide = self.hidden_size, self.intermediate_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]

    def parameters(self, kind: str) -> int:
        """Return the number of weights of a reward model or a policy."""
        blocks = self.num_hidden_layers * (sum(a * b for a, b in self.linear) + 2 * self.hidden_size)
        words = self.vocab_size * self.hidden_size
        head = self.hidden_size if kind == "reward model" else 0 if self.tie_word_embeddings else words
        return words + blocks + self.hidden_size + head

    def adapter(self, rank: int) -> int:
        """Return the number of weights of adapters at all linear layers."""
        return self.num_hidden_layers * rank * sum(a + b for a, b in self.linear)


SHAPES = {  # as published: meta-llama/Llama-3.2-3B-Instruct and meta-llama/Llama-3.1-8B-Instruct
    "Llama-3.2-3B": Shape(128256, 3072, 8192, 28, 24, 8, 128, True),
    "Llama-3.1-8B": Shape(128256, 4096, 14336, 32, 32, 8, 128, False),
}


@dataclass(frozen=True)
class Load:
    """What a GPU holds at once: pairs of conversations of so many tokens, under adapters of some rank."""

    pairs: int = 4
    max_length: int = 2048
    rank: int = 16

    @property
    def tokens(self) -> int:
        """Return the tokens of the largest batch: a pair is one line, at its longest with nothing to share."""
        return self.pairs * 2 * self.max_length


def states(shape: Shape, kind: str, way: str, gpus: int, rank: int) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer on each GPU.

    AdamW keeps two moments in float32. Mixed precision has every weight twice, in float32 and in bf16: by autocast, which keeps its
    bf16 copies until a batch has been read, or by DeepSpeed. It turns gradients into float32 for the step, beside the bf16 ones.
    """
    count = shape.parameters(kind)
    if way == "plain":
        reduced = 2 if gpus > 1 else 1  # DDP has gradients a second time, in its buckets
        return {"weights": 6 * count, "gradients": 4 * count * reduced, "optimizer": 8 * count}
    if way == "LoRA":  # frozen weights in bf16; the adapter as above
        small = shape.adapter(rank)
        reduced = 2 if gpus > 1 else 1
        return {"weights": 2 * count + 6 * small, "gradients": 4 * small * reduced, "optimizer": 8 * small}
    share = count / gpus
    weights = 2 * count if way == "ZeRO-2" else 2 * share
    return {"weights": weights, "gradients": 6 * share, "optimizer": 12 * share}


def buffers(shape: Shape, kind: str, way: str) -> float:
    """Return the bytes in which DeepSpeed gathers and reduces: buckets of config/deepspeed for ZeRO-2, whole weights for ZeRO-3."""
    if way == "ZeRO-2":
        zero = json.loads((ROOT / "config/deepspeed/zero2.json").read_text())["zero_optimization"]
        return 2 * (2 * zero["reduce_bucket_size"] + zero["allgather_bucket_size"])  # two for reducing, as they overlap with computing
    return 2 * min(LIVE, shape.parameters(kind)) if way == "ZeRO-3" else 0


def activations(shape: Shape, way: str, load: Load) -> float:
    """Return the bytes of activations with gradient checkpointing: what enters each block, and one block computed again.

    Counted in a block are the inputs of all operations, and as much again for gradients on their way. With float32 weights what
    runs past the blocks is float32, else bf16; norms compute in float32.
    """
    hidden, wide = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    past = 4 if way == "plain" else 2
    block = 4 * 6 * hidden + 2 * (3 * query + 3 * key + 4 * wide)
    mask = 3 * load.pairs * (2 * load.max_length) ** 2  # which token sees which: as bool, and in bf16 for the kernel
    return load.tokens * (shape.num_hidden_layers * hidden * past + 2 * block) + mask


def head(shape: Shape, kind: str) -> float:
    """Return the bytes of DPO's log-probabilities: a tile of logits in float32, its gradient, and that of the head's weights."""
    return 0 if kind == "reward model" else 4 * (2 * TILE + shape.vocab_size * shape.hidden_size)


def whole_logits(shape: Shape, load: Load) -> float:
    """Return the bytes of all logits in float32, with their softmax and gradient: what the chunked head saves."""
    return 3 * 4 * load.tokens * shape.vocab_size


def reading(shape: Shape, kind: str, way: str, gpus: int) -> float:
    """Return the bytes of weights on each GPU while DPO reads its reference, before the first step: it is let go then."""
    if kind == "reward model" or way == "LoRA":  # the adapter switched off is the reference
        return 0
    count = shape.parameters(kind)
    return 8 * count if way == "plain" else 2 * count / (gpus if way == "ZeRO-3" else 1)


def parts(shape: Shape, kind: str, way: str, gpus: int, load: Load) -> dict[str, float]:
    """Return the bytes on each GPU while it trains, by what they hold."""
    return {
        **states(shape, kind, way, gpus, load.rank),
        "buffers": buffers(shape, kind, way),
        "activations": activations(shape, way, load),
        "head": head(shape, kind),
    }


def peak(shape: Shape, kind: str, way: str, gpus: int, load: Load) -> float:
    """Return the most bytes on each GPU, while it trains or while it reads the reference."""
    training = parts(shape, kind, way, gpus, load)
    return max(sum(training.values()), reading(shape, kind, way, gpus) + training["activations"] + training["head"])


def host(shape: Shape, kind: str, way: str, gpus: int) -> float:
    """Return the bytes that the processes of one node read into its memory, and the first one's float32 weights when it saves.

    With ZeRO-3 each process keeps its share of what it reads from the files.
    """
    count, models = shape.parameters(kind), 2 if kind == "DPO" and way != "LoRA" else 1
    read = count * models * (4 if way == "plain" else 2) * (1 if way == "ZeRO-3" else gpus)
    return read + 4 * count


def shown(peak: float, gib: float) -> str:
    """Return a peak in GiB, in bold where it fits."""
    text = f"{peak / GIB:.0f}"
    return f"**{text}**" if fits(peak, gib) else text


def fits(peak: float, gib: float) -> bool:
    """Say whether a GPU of so many GiB has room for a peak of so many bytes."""
    return peak <= gib * GIB * (1 - SPARE)


def fits_table(load: Load, gib: float) -> str:
    """Return the peaks of all models, kinds, ways and numbers of GPUs; those in bold fit."""
    rows = []
    for name, shape in SHAPES.items():
        for kind in KINDS:
            for way in WAYS:
                rows.append([name, kind, way, *(shown(peak(shape, kind, way, gpus, load), gib) for gpus in COUNTS)])
                if "ZeRO" in way:
                    rows[-1][3] = "–"  # DeepSpeed spreads over several GPUs
    return tabulate(
        rows, ["model", "training", "way", *(f"{n} GPU{'s' if n > 1 else ''}" for n in COUNTS)], tablefmt="github", disable_numparse=True
    )


def parts_table(load: Load, gpus: int) -> str:
    """Return what the memory of one of `gpus` GPUs is taken by."""
    rows, names = [], []
    for name, shape in SHAPES.items():
        for kind in KINDS:
            for way in WAYS:
                found = parts(shape, kind, way, gpus, load)
                names = list(found)
                rest = [reading(shape, kind, way, gpus), host(shape, kind, way, gpus)]
                rows.append([name, kind, way, *(f"{value / GIB:.1f}" for value in [*found.values(), *rest])])
    headers = ["model", "training", "way", *names, "reading the reference", "host"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def report(load: Load, gib: float) -> str:
    """Return the tables with a line before each."""
    logits = ", ".join(f"{whole_logits(shape, load) / GIB:.0f} GiB for {name}" for name, shape in SHAPES.items())
    return "\n".join(
        [
            f"GiB on each GPU at the most, {load.pairs} pairs of {load.max_length} tokens a side at a time, adapters of rank {load.rank}; "
            f"bold: fits in {gib:.0f} GiB with {SPARE:.0%} to spare.",
            "",
            fits_table(load, gib),
            "",
            f"The parts on four GPUs, in GiB. All logits at once, which trl's chunked head avoids, would take {logits}.",
            "",
            parts_table(load, 4),
        ]
    )


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--pairs", type=int, default=Load.pairs, help="pairs that a GPU holds at once: per_device_batch_size (default %(default)s)"
    )
    parser.add_argument("--max-length", type=int, default=Load.max_length, help="tokens of a prompt with its answer (default %(default)s)")
    parser.add_argument("--rank", type=int, default=Load.rank, help="rank of LoRA's adapters (default %(default)s)")
    parser.add_argument("--gib", type=float, default=80, help="memory of a GPU (default %(default)s)")
    args = parser.parse_args()
    print(report(Load(args.pairs, args.max_length, args.rank), args.gib))


if __name__ == "__main__":
    main()
