"""Trainings that are killed, wherever the kill lands, and end with the bytes of those that were not."""

import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
import torch
from toy_training import (
    ONE_THREAD,
    PROMPT,
    ROOT,
    SIGNALLED,
    SPEC,
    a_sample,
    a_speech,
    logged,
    policy_training,
    program,
    reward_training,
    words_of,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerState

from psychocounsel import records, rewards, training
from psychocounsel.errors import UserError
from psychocounsel.records import check_manifest, dump_records, read_records, write_manifest
from psychocounsel.trainers import PolicyTrainer
from psychocounsel.training import MARKER, Watch, Work

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers",  # of trl's use of transformers, whose versions are pinned
    "ignore:This process .* is multi-threaded:DeprecationWarning",  # the child of a fork is killed, or trains on one thread
)
PROGRAMS = {"train_reward_model": (reward_training, "model/manifest.json"), "train_policy": (policy_training, "checkpoints.json")}


# --- SIGTERM


def stop_at(monkeypatch, step: int) -> None:
    """Send SIGTERM to this process during a step of training."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Watch, "on_step_begin", on_step_begin, raising=False)


def no_training(monkeypatch) -> None:
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))


def test_sigterm_saves_and_the_next_start_ends_with_the_same_bytes(reward_model, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert program("train_reward_model", **reward_training(data, tmp_path)) == 75
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "work/checkpoint-3/complete.json").is_file(), "SIGTERM in the third step: it is ended and saved"
    assert program("train_reward_model", **reward_training(data, tmp_path)) == 0
    assert (tmp_path / "model/manifest.json").read_bytes() == (reward_model / "model/manifest.json").read_bytes()
    assert logged(tmp_path) == logged(reward_model)


def reads_of_the_reference(monkeypatch, act) -> None:
    """Call `act` with the number of each reading of the reference, from 1, after it."""
    read, numbers = PolicyTrainer.log_probs, itertools.count(1)

    def log_probs(self, model, batch):
        found = read(self, model, batch)
        if not torch.is_grad_enabled():
            act(next(numbers))
        return found

    monkeypatch.setattr(PolicyTrainer, "log_probs", log_probs)


def test_sigterm_while_the_reference_is_read_keeps_what_was_read(policy, data, tmp_path, monkeypatch):
    read_later = []
    with monkeypatch.context() as patch:
        reads_of_the_reference(patch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 2 else None)
        assert program("train_policy", **policy_training(data, tmp_path)) == 75
    assert [path.name for path in (tmp_path / "work").glob("*") if path.suffix == ".json"] == ["reference.json"]
    assert orjson.loads((tmp_path / "work/reference.json").read_bytes()).count(None) == 21 - 2 * 4
    with monkeypatch.context() as patch:
        reads_of_the_reference(patch, read_later.append)
        assert program("train_policy", **policy_training(data, tmp_path)) == 0
    assert len(read_later) == 4, "21 pairs, 4 at once, less two batches"
    assert (tmp_path / "checkpoints.json").read_bytes() == (policy / "checkpoints.json").read_bytes()
    assert logged(tmp_path) == logged(policy)


# --- kill -9 while files are written


def half_written(folder: Path) -> None:
    """Cut the file that was written last to half its size."""
    newest = max((p for p in folder.rglob("*") if p.is_file() and p.name != "lock"), key=lambda p: p.stat().st_mtime_ns)
    os.truncate(newest, newest.stat().st_size // 2)


def killed_at(name: str, arguments: dict, owner: object, function: str, call: int, when: str) -> None:
    """Run a program in a fork that kills itself at a call of a function: "before" it, "after" it, or with its newest file "torn"."""
    child = os.fork()
    if child == 0:
        try:
            original, calls = getattr(owner, function), []

            def fatal(*words: object, **options: object):
                calls.append(function)
                if len(calls) < call:
                    return original(*words, **options)
                if when != "before":
                    original(*words, **options)
                if when == "torn":
                    half_written(arguments["resume_dir"])
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(owner, function, fatal)
            program(name, **arguments)
        finally:
            os._exit(99)
    for _ in range(1200):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert os.WIFSIGNALED(status), f"the program ended by itself, with {os.waitstatus_to_exitcode(status)}"
            assert os.WTERMSIG(status) == signal.SIGKILL
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the program was not killed within a minute")


# Where a training of six steps is killed that saves after the second and the fourth: function, which call of it, before, after or torn.
CHECKPOINT = {
    "weights half written": (PreTrainedModel, "save_pretrained", 2, "torn"),
    "optimizer half written": (Trainer, "_save_optimizer_and_scheduler", 2, "torn"),
    "no random state": (Trainer, "_save_rng_state", 2, "before"),
    "state half written": (TrainerState, "save_to_json", 2, "torn"),
    "no marker": (training, "_sizes", 2, "before"),
    "marker half written": (Watch, "on_save", 2, "torn"),
    "whole": (Watch, "on_save", 2, "after"),
}
# A policy also saves a model at every second step.
POLICY_CHECKPOINT = CHECKPOINT | {
    "first checkpoint's weights half written": (PreTrainedModel, "save_pretrained", 2, "torn"),
    "weights half written": (PreTrainedModel, "save_pretrained", 4, "torn"),
    "model of the checkpoint half written": (PreTrainedModel, "save_pretrained", 3, "torn"),
    "model of the checkpoint without manifest": (training, "write_manifest", 2, "before"),
    "no reference": (PolicyTrainer, "read_reference", 1, "before"),
    "reference read": (PolicyTrainer, "read_reference", 1, "after"),
}
END = {
    "final model half written": (PreTrainedModel, "save_pretrained", 3, "torn"),
    "final model without manifest": (training, "write_manifest", 1, "before"),
    "its manifest half written": (training, "write_manifest", 1, "torn"),
    "no log": (training.Work, "finish", 1, "before"),
    "log half written": (records.os, "replace", 2, "before"),
    "checkpoints still there": (training, "write_whole", 2, "after"),
    "no outputs": (training, "first_process_only", 1, "after"),
}
POLICY_END = END | {
    "final model half written": (PreTrainedModel, "save_pretrained", 5, "torn"),
    "final model without manifest": (training, "write_manifest", 3, "before"),
    "its manifest half written": (training, "write_manifest", 3, "torn"),
    "log half written": (records.os, "replace", 3, "before"),
}
MOMENTS = {"train_reward_model": CHECKPOINT | END, "train_policy": POLICY_CHECKPOINT | POLICY_END}
QUICK = {
    ("train_reward_model", moment) for moment in ("optimizer half written", "no marker", "final model half written", "log half written")
}


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        pytest.param(name, moment, marks=[] if (name, moment) in QUICK else pytest.mark.slow, id=f"{name}: {moment}")
        for name, moments in MOMENTS.items()
        for moment in moments
    ],
)
def test_a_kill_while_files_are_written_changes_no_byte(name, moment, data, reward_model, policy, tmp_path):
    build, result = PROGRAMS[name]
    whole = {"train_reward_model": reward_model, "train_policy": policy}[name]
    killed_at(name, build(data, tmp_path), *MOMENTS[name][moment])
    assert not (tmp_path / result).exists()
    assert program(name, **build(data, tmp_path)) == 0
    assert (tmp_path / result).read_bytes() == (whole / result).read_bytes()
    assert logged(tmp_path) == logged(whole)
    assert not list((tmp_path / "work").glob("checkpoint-*"))
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bytes(name, data, reward_model, policy, tmp_path):
    build, result = PROGRAMS[name]
    whole = {"train_reward_model": reward_model, "train_policy": policy}[name]
    for moment in ("weights half written", "no marker", "no log"):
        killed_at(name, build(data, tmp_path), *MOMENTS[name][moment][:2], 1, MOMENTS[name][moment][3])
    assert program(name, **build(data, tmp_path)) == 0
    assert (tmp_path / result).read_bytes() == (whole / result).read_bytes()
    assert logged(tmp_path) == logged(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_kill_9_and_resume_give_the_same_bytes(name, data, reward_model, policy, tmp_path):
    """By two processes of their own, killed in a step between two checkpoints."""
    build, result = PROGRAMS[name]
    words, whole = words_of(name, build(data, tmp_path)), {"train_reward_model": reward_model, "train_policy": policy}[name]
    killed = subprocess.run([sys.executable, str(SIGNALLED), "KILL", "4", *words], cwd=ROOT, env=ONE_THREAD)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-2"]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=ONE_THREAD, check=True)
    assert (tmp_path / result).read_bytes() == (whole / result).read_bytes()
    assert logged(tmp_path) == logged(whole)


# --- torn checkpoints


def make_checkpoint(folder: Path) -> None:
    """A checkpoint of some files, as whole as its marker says."""
    folder.mkdir(parents=True)
    for name, size in (("model.safetensors", 900), ("optimizer.pt", 700), ("trainer_state.json", 50), ("empty", 0)):
        (folder / name).write_bytes(b"x" * size)
    (folder / MARKER).write_bytes(orjson.dumps(training._sizes(folder)))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file is cut": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "a file is empty": lambda folder: os.truncate(folder / "model.safetensors", 0),
    "a file is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "an empty file is missing": lambda folder: (folder / "empty").unlink(),
    "a file is longer": lambda folder: os.truncate(folder / "optimizer.pt", 701),
    "a file is too many": lambda folder: (folder / "model.safetensors.tmp").write_bytes(b"x"),
    "the marker is missing": lambda folder: (folder / MARKER).unlink(),
    "the marker is cut": lambda folder: os.truncate(folder / MARKER, 20),
    "the marker is empty": lambda folder: os.truncate(folder / MARKER, 0),
    "nothing but a folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_told_and_the_one_before_is_taken(damage, tmp_path):
    work = Work(tmp_path, "one", models=0)
    for step in (90, 100):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    assert work.newest_checkpoint([]) == tmp_path / "checkpoint-100", "by its step, not by its name"
    DAMAGES[damage](tmp_path / "checkpoint-100")
    assert work.newest_checkpoint([]) == tmp_path / "checkpoint-90"
    assert not (tmp_path / "checkpoint-100").exists()
    DAMAGES[damage](tmp_path / "checkpoint-90")
    assert work.newest_checkpoint([]) is None


def test_a_checkpoint_without_a_whole_model_before_it_is_not_taken(tmp_path):
    work = Work(tmp_path, "one", models=2)
    for step in (4, 8):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    for model in work.models:
        model.mkdir()
        (model / "weights").write_text("w")
        write_manifest(model)
    os.truncate(work.models[1] / "weights", 0)
    assert work.newest_checkpoint([4, 8]) == tmp_path / "checkpoint-4"


def test_a_torn_checkpoint_of_a_real_training_is_passed_over(policy, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert program("train_policy", **policy_training(data, tmp_path)) == 75
    assert sorted(p.name for p in (tmp_path / "work").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    with open(tmp_path / "work/checkpoint-5/optimizer.pt", "r+b") as file:
        file.truncate(100)
    assert program("train_policy", **policy_training(data, tmp_path)) == 0
    assert (tmp_path / "checkpoints.json").read_bytes() == (policy / "checkpoints.json").read_bytes()
    assert logged(tmp_path) == logged(policy)


def test_a_disk_that_is_full_is_told_and_the_training_goes_on_when_there_is_room(reward_model, data, tmp_path, capsys):
    """A limit on the size of files lets the weights be written, and not the optimizer's state, which is twice as large."""
    weights, limits = (data / "base/model.safetensors").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.3 * weights), limits[1]))
    try:
        assert program("train_reward_model", **reward_training(data, tmp_path)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert f"error: {tmp_path / 'work'}: a checkpoint could not be written: the disk is full" in told
    assert "Traceback" not in told
    assert program("train_reward_model", **reward_training(data, tmp_path)) == 0
    assert (tmp_path / "model/manifest.json").read_bytes() == (reward_model / "model/manifest.json").read_bytes()


# --- iterative DPO: each iteration samples from the model of the one before


def sampled(weights: Path, folder: Path) -> None:
    """Four answers of a policy to each of eight speeches, drawn by a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = rewards.load_tokenizer(SPEC, weights)
    model = AutoModelForCausalLM.from_pretrained(weights).eval()
    speeches, samples = [a_speech(number) for number in range(8)], []
    for number, speech in enumerate(speeches):
        messages = rewards.conversation(SPEC, [{"role": "user", "content": PROMPT.replace("{{ client_speech }}", speech["text"])}])
        ids = torch.tensor([rewards.chat_ids(tokenizer, SPEC, messages, add_generation_prompt=True)])
        torch.manual_seed(number)
        written = model.generate(ids, do_sample=True, max_new_tokens=12, num_return_sequences=4, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        samples += [a_sample(number, place, text) for place, text in enumerate(texts)]
    dump_records(folder / "speeches.jsonl", speeches, "speech")
    dump_records(folder / "samples.jsonl", samples, "response")


def iteration(number: int, data: Path, reward_model: Path, folder: Path, before: Path) -> dict:
    """Sample and rank one iteration; return the arguments of its training from the model `before`, which is also the reference."""
    out = folder / str(number)
    sampled(before.parent, out)
    files = {key: out / f"{key}.jsonl" for key in ("speeches", "samples", "pairs", "rewards", "dropped")}
    settings = {"model": SPEC.model_dump(), "prompt": PROMPT, "policy": "p", "max_length": 320, "batch_size": 4}
    assert program("rank_samples", **files, reward_weights=reward_model / "model/manifest.json", settings=settings) == 0
    assert len(read_records(files["pairs"], "pair")) == 8
    changes = {"batch_size": 4, "per_device_batch_size": 2, "epochs": 2, "save_steps": 1}
    return policy_training(data, out, 1, **changes) | {"pairs": files["pairs"], "weights": before}


def chain(data: Path, reward_model: Path, folder: Path, killed: tuple | None = None) -> dict[str, bytes]:
    """Run two iterations, the second one's training killed on the way; return the bytes of all that they made."""
    before = data / "base/manifest.json"
    for number in (1, 2):
        arguments = iteration(number, data, reward_model, folder, before)
        if number == 2 and killed:
            killed_at("train_policy", arguments, *killed)
        assert program("train_policy", **arguments) == 0
        before = folder / f"{number}/checkpoints/1/manifest.json"
        check_manifest(before)
    names = ("samples.jsonl", "pairs.jsonl", "rewards.jsonl", "checkpoints.json", "log.json", "checkpoints/1/model.safetensors")
    return {f"{number}/{name}": (folder / str(number) / name).read_bytes() for number in (1, 2) for name in names}


@pytest.mark.slow
def test_iterative_dpo_killed_in_its_second_iteration_makes_the_same_bytes(data, reward_model, tmp_path):
    whole = chain(data, reward_model, tmp_path / "whole")
    killed = chain(data, reward_model, tmp_path / "killed", killed=CHECKPOINT["optimizer half written"])
    assert killed == whole
    assert whole["1/checkpoints/1/model.safetensors"] != whole["2/checkpoints/1/model.safetensors"]
    assert whole["1/samples.jsonl"] != whole["2/samples.jsonl"], "the second iteration samples from the first one's model"


# --- resume folders


def test_a_finished_training_is_adopted_not_repeated(data, tmp_path, monkeypatch):
    arguments = policy_training(data, tmp_path, 2, epochs=None, max_steps=2)
    assert program("train_policy", **arguments) == 0
    first = (tmp_path / "checkpoints.json").read_bytes()
    no_training(monkeypatch)
    assert program("train_policy", **arguments) == 0
    assert (tmp_path / "checkpoints.json").read_bytes() == first
    check_manifest(tmp_path / "checkpoints/2/manifest.json")


def test_leftovers_of_another_training_are_removed_and_other_files_are_not(data, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/notes.txt").write_text("mine")
    one = Work(tmp_path / "work", "one", models=1)
    one.prepare()
    (one.models[0]).mkdir()
    (one.models[0] / "weights").write_text("w")
    write_manifest(one.models[0])
    one.finish([{"step": 1}])
    assert one.finished()
    other = Work(tmp_path / "work", "other", models=1)
    assert not other.finished()
    other.prepare()
    assert not one.finished()
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["identity.txt", "lock", "notes.txt"]


@pytest.mark.parametrize(
    "other", [{"pairs": ["b"], "dev": ["a"]}, {"pairs": ["a"], "dev": ["b", "c"]}, {"weights": "d", "reference": None}, {"beta": 0.2}]
)
def test_a_training_is_told_by_which_file_is_what(other):
    def identity(pairs=("a", "c"), dev=("b",), weights=None, reference="d", beta=0.1) -> str:
        files = {"pairs": list(map(Path, pairs)), "dev": list(map(Path, dev)), "weights": weights and Path(weights)}
        arguments = SimpleNamespace(**files, reference=reference and Path(reference), settings="{}")
        inputs = {name: {"sha256": name * 64} for name in ("a", "b", "c", "d", "zero2.json")}
        settings = SimpleNamespace(model_dump=lambda mode: {"beta": beta})
        return training.identity(SimpleNamespace(args=arguments, inputs=inputs, settings=settings, program="train_policy"))

    assert identity() == identity()
    assert identity() != identity(**other)


def test_two_trainings_never_share_a_resume_folder(tmp_path, monkeypatch):
    first, second = (Work(tmp_path / "work", "same", models=1) for _ in range(2))
    first.prepare()
    with pytest.raises(UserError, match="another process trains here"):
        second.prepare()
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")  # a further process of the first training
        second.prepare()
    first.finish([{"step": 1}])
    second.prepare()


# --- trainings that come apart


def poisoned(monkeypatch, which: int, harm: Callable[[torch.nn.Module], object]) -> None:
    """Harm the model that is loaded as the which-th (a policy, then its reference)."""
    load, loaded = training.start_model, []

    def start_model(*arguments: object, **options: object):
        model = load(*arguments, **options)
        loaded.append(model)
        if len(loaded) == which:
            with torch.no_grad():
                harm(model)
        return model

    monkeypatch.setattr(training, "start_model", start_model)


def nan_weight(model: torch.nn.Module) -> None:
    model.model.layers[0].mlp.down_proj.weight[3, 5] = torch.nan


def infinite_gradient(model: torch.nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient.fill_(torch.inf))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("harm", "told"), [(nan_weight, "loss nan"), (infinite_gradient, "gradient norm inf")])
def test_a_training_without_finite_numbers_stops_at_its_first_step(name, harm, told, data, tmp_path, monkeypatch, capsys):
    build, result = PROGRAMS[name]
    poisoned(monkeypatch, 1, harm)
    assert program(name, **build(data, tmp_path)) == 1
    message = capsys.readouterr().err
    assert "come apart at step 1 of 6" in message
    assert told in message
    assert "the model that it starts from is broken" in message
    assert not (tmp_path / result).exists()
    assert not list((tmp_path / "work").glob("checkpoint-*")), "nothing to go on from"


def test_a_reference_without_finite_numbers_stops_before_the_first_step(data, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 2, nan_weight)
    assert program("train_policy", **policy_training(data, tmp_path)) == 1
    assert "the reference model gives log-probabilities that are no finite numbers" in capsys.readouterr().err
    assert not (tmp_path / "work/reference.json").exists()


def test_a_later_explosion_names_the_learning_rate(data, tmp_path, capsys):
    assert program("train_policy", **policy_training(data, tmp_path, learning_rate=1e6)) == 1
    message = capsys.readouterr().err
    assert "come apart at step" in message
    assert "lower learning_rate" in message
