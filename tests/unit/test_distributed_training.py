"""Trainings of several real processes, by the launchers that rules use: gloo on CPUs in place of NCCL on GPUs."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import ONE_THREAD, ROOT, SIGNALLED, SPEC, logged, policy_training, program, reward_training, toy_pair, words_of

from psychocounsel import rewards
from psychocounsel.records import check_manifest
from psychocounsel.site import launcher

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]
SPREAD = [None, "zero2.json", "zero3.json"]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target": "all-linear"}
ENVIRONMENT = ONE_THREAD | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def shell(words: list[str], gpus: int = 2, nodes: int = 1) -> list[str]:
    """Return a training's command as its rule has it, the launcher in front."""
    return ["bash", "-c", f"{launcher(gpus, nodes, threads=1)} {shlex.join(words)}"]


def run(command: list[str], **environment: str) -> str:
    """Run a training to its end; return its log."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def assert_as_alone(alone: Path, together: Path, model: str) -> None:
    """The same losses at every step, and at the end the same weights in a model like any other."""
    for one, other in zip(logged(alone), logged(together), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)
    one, other = (load_file(check_manifest(folder / model / "manifest.json") / "model.safetensors") for folder in (alone, together))
    assert one.keys() == other.keys()
    for weight in one:
        torch.testing.assert_close(other[weight], one[weight], rtol=1e-3, atol=1e-4)
    assert (together / model / "config.json").read_bytes() == (alone / model / "config.json").read_bytes()
    assert not list(together.rglob("*.part"))


@pytest.mark.parametrize("deepspeed", SPREAD)
def test_two_processes_train_a_reward_model_as_one_does(deepspeed, reward_model, data, tokenizer, tmp_path):
    run(shell(words_of("train_reward_model", reward_training(data, tmp_path, deepspeed=deepspeed))))
    assert_as_alone(reward_model, tmp_path, "model")
    rows, _ = rewards.reward_rows(tokenizer, SPEC, [toy_pair(n) for n in range(100, 108)], 320)
    pad = tokenizer.pad_token_id
    models = [rewards.load_reward_model(SPEC, folder / "model", pad) for folder in (reward_model, tmp_path)]
    alone, together = (rewards.pair_rewards(model, SPEC, rows, pad, batch_size=4) for model in models)
    assert sum(together, ()) == pytest.approx(sum(alone, ()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("deepspeed", SPREAD)
def test_two_processes_train_a_policy_as_one_does_after_sigterm_too(deepspeed, policy, data, tmp_path):
    """SIGTERM to the launcher alone: it hands it on and waits; the processes save, and the next start goes on from there.

    With DeepSpeed in as many processes, without it here in one.
    """
    words = words_of("train_policy", policy_training(data, tmp_path, deepspeed=deepspeed))
    stopped = subprocess.run(shell([str(SIGNALLED), "TERM", "3", *words]), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert stopped.returncode != 0
    assert "SIGTERM: saved at step 3 of 6" in stopped.stderr, stopped.stderr[-4000:]
    assert stopped.stderr.count("models in memory: 1") == 2, "the reference has been let go"
    assert "going on from" in run(shell(words) if deepspeed else [sys.executable, *words])
    assert_as_alone(policy, tmp_path, "checkpoints/3")


@pytest.mark.parametrize("deepspeed", SPREAD[1:])
def test_weights_are_saved_in_float32_where_bf16_trains(deepspeed, data, tmp_path):
    """A step of 1e-5 is below what bf16 can tell of most weights, and must not be lost between two rounds of training."""
    small = {"precision": "bf16", "learning_rate": 1e-5, "epochs": None, "max_steps": 2}
    run(shell(words_of("train_policy", policy_training(data, tmp_path, 1, deepspeed=deepspeed, **small))))
    before, after = (load_file(folder / "model.safetensors") for folder in (data / "base", tmp_path / "checkpoints/1"))
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert 0 < (weight - before[name]).abs().max() < 1e-4, name
    assert json.loads((tmp_path / "checkpoints/1/config.json").read_text())["dtype"] == "float32"


def test_two_processes_train_an_adapter_as_one_does(data, tmp_path):
    one, two = (policy_training(data, tmp_path / name, 1, lora=LORA, epochs=None, max_steps=3) for name in ("one", "two"))
    assert program("train_policy", **one) == 0
    run(shell(words_of("train_policy", two)))
    assert_as_alone(tmp_path / "one", tmp_path / "two", "checkpoints/1")


SRUN = """#!/usr/bin/env python3
# Plays srun: starts a command once for each node, all of them on this machine.
import itertools, os, subprocess, sys
options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
nodes = int(dict(word.split("=") for word in options)["--nodes"])
tasks = [
    subprocess.Popen(sys.argv[1 + len(options) :], env=os.environ | {"SLURM_NODEID": str(node), "SLURM_JOB_NODELIST": "nodes[1-2]"})
    for node in range(nodes)
]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = "#!/bin/sh\n[ \"$*\" = 'show hostnames nodes[1-2]' ] && printf '127.0.0.1\\nother\\n'\n"


def test_launchers_of_two_nodes_meet_at_the_first(reward_model, data, tmp_path):
    """Two launchers with one process each, as on two nodes; Slurm's part is played."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    command = shell(words_of("train_reward_model", reward_training(data, tmp_path / "out")), gpus=2, nodes=2)
    run(command, PATH=f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}", SLURM_JOB_ID=str(os.getpid()))
    assert_as_alone(reward_model, tmp_path / "out", "model")
