"""Reward models and policies, trained by their programs on a micro model that learns in seconds."""

import json
import math
import weakref
from functools import partial

import pytest
import torch
from toy_training import SPEC, logged, policy_training, program, reward_training, toy_pair
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psychocounsel import rewards, training
from psychocounsel.errors import UserError
from psychocounsel.records import check_manifest, file_sha256, read_records

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers, whose versions are pinned


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


def watched(monkeypatch) -> list[weakref.ref]:
    """References to the models from which trainings start; they do not keep them."""
    load, loaded = training.start_model, []

    def start_model(*arguments: object, **options: object):
        model = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(training, "start_model", start_model)
    return loaded


def test_the_trained_model_is_let_go_before_the_saved_one_is_read(data, tmp_path, monkeypatch):
    """Both, with the optimizer's state, would not fit on a GPU."""
    loaded, read = watched(monkeypatch), rewards.load_reward_model

    def load_reward_model(*arguments: object):
        assert [model() for model in loaded] == [None]
        return read(*arguments)

    monkeypatch.setattr(rewards, "load_reward_model", load_reward_model)
    assert program("train_reward_model", **reward_training(data, tmp_path, epochs=None, max_steps=1)) == 0


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


def test_one_step_learns_under_warm_up_too(policy, data, tmp_path):
    assert program("train_policy", **policy_training(data, tmp_path, 1, epochs=None, max_steps=1, warmup_ratio=0.1)) == 0
    assert logged(tmp_path) == logged(policy)[:1]
    assert file_sha256(tmp_path / "checkpoints/1/model.safetensors") != file_sha256(data / "base/model.safetensors")


def test_a_policy_that_differs_from_its_reference_unawares_stops(data, tmp_path, monkeypatch):
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
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if isinstance(message, int):
        assert training.devices() == message
    else:
        with pytest.raises(UserError, match=message):
            training.devices()


@pytest.mark.parametrize(("saved", "now", "fits"), [(0, 0, True), (4, 4, True), (4, 8, False), (4, 0, False), (0, 4, False)])
def test_a_checkpoint_goes_on_in_as_many_processes_of_deepspeed_as_saved_it(tmp_path, saved, now, fits):
    (tmp_path / "checkpoint-2/global_step2").mkdir(parents=True)
    for rank in range(saved):
        (tmp_path / f"checkpoint-2/global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    if fits:
        training.check_processes(tmp_path / "checkpoint-2", now)
    else:
        with pytest.raises(UserError, match="give the training as many GPUs as before"):
            training.check_processes(tmp_path / "checkpoint-2", now)


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


def test_the_seed_draws_the_head(data):
    draw = partial(training.start_model, AutoModelForSequenceClassification, SPEC, data / "base", num_labels=1)
    heads = [draw(seed=seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
