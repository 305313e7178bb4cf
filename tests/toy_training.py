"""Toy pairs, of which a micro model learns in seconds what is right, and the programs that train on them."""

import importlib
import json
import os
import random
import sys
from pathlib import Path

from psychocounsel.models import ModelSpec
from psychocounsel.records import content_hash

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # the environment of programs that train
SIGNALLED = ROOT / "tests/fakes/signalled.py"

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


# --- programs


def words_of(name: str, arguments: dict) -> list[str]:
    """Return a program's command line, without the interpreter."""
    words = [f"scripts/{name}.py"]
    for key, value in arguments.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


def program(name: str, **arguments: object) -> int:
    """Run a program in this process as from its command line; return its exit code."""
    before, sys.argv = sys.argv, words_of(name, arguments)
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


def logged(out: Path) -> list[dict]:
    return json.loads((out / "log.json").read_text())
