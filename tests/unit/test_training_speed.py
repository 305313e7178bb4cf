"""The benchmark of trainings, in the small: both programs read the same tokens, ours with less padding."""

import importlib
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from fakes.micro_model import build_micro_model
from transformers import AutoTokenizer

from psychocounsel.pairs import pair_record
from psychocounsel.records import dump_records

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers, whose versions are pinned
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    build_micro_model(folder / "base")
    draw = random.Random(5)
    pairs = []
    for number in range(24):
        answers = [" ".join(draw.choices(["I", "hear", "you", "today"], k=draw.randint(2, 60))) for _ in range(2)]
        prompt = [{"role": "user", "content": f"Case {number}: " + "I feel low. " * draw.randint(1, 9)}]
        chosen, rejected = (
            {"id": f"{number}{side}".rjust(16, "0"), "text": t, "model": None, "scores": None} for side, t in enumerate(answers)
        )
        pairs.append(pair_record(f"{number:016x}", "train", prompt, chosen, rejected, None))
    dump_records(folder / "pairs.jsonl", pairs, "pair")
    return folder


def options(micro: Path) -> dict:
    return {
        "weights": micro / "base/manifest.json", "data": [micro / "pairs.jsonl"], "pairs": 16, "batch_size": 16, "at_once": 2,
        "max_length": 256, "checkpointing": None, "peak_tflops": None, "shape": None, "layers": None, "padding": False,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_both_programs_read_the_same_tokens(kind, micro, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("training_speed")
    theirs, ours = (benchmark.measure(Namespace(**options(micro), only=f"{kind} {who}")) for who in ("trl", "ours"))
    assert ours["tokens"] == theirs["tokens"] > 0, "tokens a second mean the same for both"
    assert ours["padding"] / ours["places"] < theirs["padding"] / theirs["places"]
    assert ours["places"] < theirs["places"]
    for found in (theirs, ours):
        assert found["seconds"] > 0
        assert found["bytes"] > 1e8
        assert found["mfu"] is None, "a CPU has no peak to compare with"


def test_the_flops_of_a_batch_by_hand(micro, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("training_speed")
    args = Namespace(**options(micro) | {"pairs": 8, "batch_size": 8}, only="dpo ours")
    tokenizer = AutoTokenizer.from_pretrained(micro / "base")
    folder = micro / "out"
    common = {"output_dir": str(folder), "max_steps": 1, "bf16": False, "gradient_checkpointing": False}
    trainer = benchmark.our_trainer(args, "dpo", tokenizer, benchmark.chosen_pairs(args, tokenizer), common)
    meter = benchmark.Meter(trainer, policy=True, warm_up=0)
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12], "pair": 0}
    meter.count(trainer.data_collator([row]))
    start, chosen, rejected = 2, 3, 4  # the last token of the prompt stands at the head of both ends
    assert (meter.tokens, meter.places, meter.padding, meter.scored) == (3 + 2 + 3 + 3, start + chosen + rejected, 0, 5)
    seen = (1 + 2) + (3 + 4 + 5) + (3 + 4 + 5 + 6)
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)  # two layers: query, key and value, output, three of the MLP
    vocabulary = len(tokenizer)
    forward = 2 * weights * 9 + 4 * 2 * 64 * seen + 2 * 64 * vocabulary * 5
    assert meter.model_flops() == 4 * forward


def test_the_padding_of_orders_and_layouts_is_printed(micro, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("training_speed")
    monkeypatch.setattr(benchmark, "PADDED", ((8, 2), (16, 4)))
    benchmark.print_padding(Namespace(**options(micro) | {"padding": True}))
    title, _, trl, *ours = capsys.readouterr().out.splitlines()
    assert title.startswith("24 pairs of ")
    shares = [float(line.split("%")[0].split()[-1]) for line in (trl, *ours)]
    assert len(ours) == 4
    assert max(shares[3:]) < min(shares[:3]), "one line a pair pads least"


@pytest.mark.slow
def test_the_benchmark_prints_ours_beside_trls(micro):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options(micro).items() if value and not isinstance(value, list)]
    command = [sys.executable, "benchmarks/training_speed.py", *words, "--data", str(micro / "pairs.jsonl"), "--kinds", "rm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, theirs, ours = done.stdout.splitlines()
    assert head.split()[:4] == ["training", "tokens/s", "speed", "padding"]
    assert theirs.startswith("rm trl")
    assert ours.startswith("rm ours")
    assert "x trl" in ours
