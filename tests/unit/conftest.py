"""What tests of trainings share: a micro model, toy pairs, and what was trained on them, made once."""

from pathlib import Path

import pytest
from toy_training import SPEC, policy_training, program, reward_training, toy_pair

from psychocounsel.records import dump_records


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The micro model and toy pairs: 21 to train on (no multiple of the batch), 16 held out. From here on torch has one thread."""
    import torch
    from fakes.micro_model import build_micro_model

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    build_micro_model(folder / "base")
    dump_records(folder / "train.jsonl", [toy_pair(n) for n in range(21)], "pair")
    dump_records(folder / "dev.jsonl", [toy_pair(n, "dev") for n in range(100, 116)], "pair")
    return folder


@pytest.fixture(scope="session")
def tokenizer(data):
    from psychocounsel import rewards

    return rewards.load_tokenizer(SPEC, data / "base")


@pytest.fixture(scope="session")
def conversations(tokenizer) -> list[list[int]]:
    """The token ids of conversations of different lengths."""
    from psychocounsel import rewards

    return [rewards.answer_ids(tokenizer, SPEC, pair["prompt"], pair["chosen"]) for pair in map(toy_pair, range(9))]


@pytest.fixture(scope="session")
def reward_model(data, tmp_path_factory) -> Path:
    """The folder of a reward model's training."""
    out = tmp_path_factory.mktemp("reward_model")
    assert program("train_reward_model", **reward_training(data, out)) == 0
    return out


@pytest.fixture(scope="session")
def policy(data, tmp_path_factory) -> Path:
    """The folder of a policy's training with three checkpoints."""
    out = tmp_path_factory.mktemp("policy")
    assert program("train_policy", **policy_training(data, out)) == 0
    return out
