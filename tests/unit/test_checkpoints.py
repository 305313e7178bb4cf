"""Checkpoints of a policy: scored on the dev pairs, the best chosen, the others removed by design without a stage that notices."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_training import SPEC, policy_training, program

from psychocounsel import reuse, training
from psychocounsel.checkpoints import Checkpoint, best
from psychocounsel.errors import UserError
from psychocounsel.model_folders import link_model, remove_files
from psychocounsel.records import check_manifest, file_sha256, is_removed, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers

SCORING = {"model": SPEC.model_dump(), "max_length": 320, "batch_size": 4}


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8))
def test_the_earliest_of_the_best_is_chosen(accuracies):
    checkpoints = [Checkpoint(0, k, Path(str(k)), str(k), {"accuracy": accuracy}) for k, accuracy in enumerate(accuracies)]
    chosen = best(checkpoints)
    assert chosen.score["accuracy"] == max(accuracies)
    assert chosen.number == accuracies.index(max(accuracies))


@pytest.fixture
def trained(data, tmp_path) -> Path:
    """A policy of two rounds, results and cache: the base as a round of its own, and a training with three checkpoints."""
    first = tmp_path / "p/iteration-1"
    link_model(data / "base", first / "checkpoints/1")
    write_manifest(first / "checkpoints/1")
    listed = [{"checkpoint": 1, "step": 1, "manifest_sha256": file_sha256(first / "checkpoints/1/manifest.json")}]
    (first / "checkpoints.json").write_text(json.dumps(listed))
    assert program("train_policy", **second_round(data, tmp_path)) == 0
    for number in (1, 2):
        files = {"checkpoints": tmp_path / f"p/iteration-{number}/checkpoints.json", "out": tmp_path / f"p/iteration-{number}/dev.json"}
        arguments = {"weights": data / "base/manifest.json", "dev": data / "dev.jsonl", "settings": SCORING}
        assert program("score_checkpoints", **files, **arguments) == 0
    return tmp_path


def second_round(data: Path, folder: Path) -> dict:
    """Arguments of the training of the second round."""
    arguments = policy_training(data, folder / "p/iteration-2") | {"resume_dir": folder / "work/p.2", "reuse": folder / "cache"}
    return arguments


def rounds(folder: Path) -> dict:
    """Arguments of programs that read both rounds."""
    files = {"checkpoints": "checkpoints.json", "round_scores": "dev.json"}
    return {key: [folder / f"p/iteration-{number}/{name}" for number in (1, 2)] for key, name in files.items()}


def removal(folder: Path, **settings) -> dict:
    """Arguments of remove_checkpoints."""
    places = {"resume_dirs": [folder / "work/p.1", folder / "work/p.2"], "cache": folder / "cache", "out": folder / "removed.json"}
    return rounds(folder) | places | {"settings": settings}


def state(folder: Path) -> dict[str, str]:
    """Say of each checkpoint whether its model is whole or removed."""
    found = {}
    for manifest in sorted(folder.glob("p/*/checkpoints/*/manifest.json")):
        others = [p for p in manifest.parent.rglob("*") if not p.name.startswith("manifest.json")]
        found["/".join(manifest.parts[-4:-1:2])] = "removed" if is_removed(manifest) and not others else str(bool(check_manifest(manifest)))
    return found


def test_a_linked_model_is_whole_and_has_a_manifest_of_its_own(data, tmp_path):
    link_model(data / "base", tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert (tmp_path / "model.safetensors").samefile(data / "base/model.safetensors")
    assert write_manifest(tmp_path).read_bytes() == (data / "base/manifest.json").read_bytes()


def test_the_checkpoint_that_has_learned_is_selected(trained):
    scores = json.loads((trained / "p/iteration-1/dev.json").read_text())
    assert scores[0]["accuracy"] == scores[0]["mean_margin"] == 0.0, "against itself the base prefers nothing"
    out = {"out": trained / "p/model/manifest.json", "scores": trained / "p/dev_scores.json"}
    assert program("select_checkpoint", **rounds(trained), **out, settings={}) == 0
    scores = json.loads((trained / "p/dev_scores.json").read_text())
    chosen = max(scores, key=lambda score: score["accuracy"])
    assert chosen["accuracy"] >= 0.9
    assert "iteration-2" in chosen["checkpoint"]
    assert (trained / "p/model/manifest.json").read_bytes() == Path(chosen["checkpoint"]).read_bytes()


def test_scores_of_another_round_are_refused(trained, capsys):
    mixed = rounds(trained)
    mixed["round_scores"].reverse()
    assert program("select_checkpoint", **mixed, out=trained / "m/manifest.json", scores=trained / "s.json", settings={}) == 1
    assert "not the scores of the checkpoints" in capsys.readouterr().err


def test_only_the_best_stays_wherever_models_lie(trained):
    scores = json.loads((trained / "p/iteration-2/dev.json").read_text())
    chosen = 1 + [score["accuracy"] for score in scores].index(max(score["accuracy"] for score in scores))
    expected = {"iteration-1/1": "removed"} | {f"iteration-2/{k}": "True" if k == chosen else "removed" for k in (1, 2, 3)}
    for _ in range(2):  # to do it again changes nothing
        assert program("remove_checkpoints", **removal(trained)) == 0
        assert state(trained) == expected
        told = json.loads((trained / "removed.json").read_text())
        assert [Path(entry["checkpoint"]).parent.name for entry in told["kept"]] == [str(chosen)]
        assert len(told["removed"]) == 3
        assert min(entry["bytes"] for entry in told["removed"]) > 400_000
        assert [p.name for p in (trained / "work/p.2").glob("model-*")] == [f"model-{chosen}"]
        weights = [p for p in trained.rglob("*.safetensors") if not p.is_relative_to(trained / "p/iteration-2/checkpoints" / str(chosen))]
        assert len(weights) == 2, "the best one's other places, in the cache and the resume folder, take no room: they are links"
        assert all(p.samefile(trained / f"p/iteration-2/checkpoints/{chosen}/model.safetensors") for p in weights)


def test_the_last_stays_where_a_further_round_would_start_from_it(trained):
    assert program("remove_checkpoints", **removal(trained, keep_last=True)) == 0
    assert state(trained)["iteration-2/3"] == "True"
    told = json.loads((trained / "removed.json").read_text())
    assert Path(told["kept"][-1]["checkpoint"]).parts[-3:-1] == ("checkpoints", "3")


def test_a_training_whose_checkpoints_were_removed_is_adopted_in_its_place_alone(trained, data, monkeypatch):
    assert program("remove_checkpoints", **removal(trained)) == 0
    before, listed = state(trained), (trained / "p/iteration-2/checkpoints.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *_, **__: pytest.fail("trained again"))
        assert program("train_policy", **second_round(data, trained)) == 0
    record = json.loads((trained / "p/iteration-2/checkpoints.json.prov.json").read_text())
    assert record["run"]["facts"]["adopted"] is True
    assert state(trained) == before
    for manifest in trained.glob("p/iteration-2/checkpoints/*/manifest.json"):
        assert json.loads(manifest.with_name("manifest.json.prov.json").read_text())["output"]["sha256"] == file_sha256(manifest)
    shutil.rmtree(trained / "p/iteration-2/checkpoints")  # as the message about a removed model says
    assert program("train_policy", **second_round(data, trained)) == 0
    assert set(state(trained).values()) == {"removed", "True"}
    assert [value for key, value in state(trained).items() if key.startswith("iteration-2")] == ["True"] * 3
    assert (trained / "p/iteration-2/checkpoints.json").read_bytes() == listed, "on a CPU the same bytes come again"


def test_a_model_that_another_run_has_too_stays_in_the_cache_that_they_share(trained, data, monkeypatch):
    other = second_round(data, trained / "other") | {"reuse": trained / "cache"}
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *_, **__: pytest.fail("trained again"))
        assert program("train_policy", **other) == 0
        assert program("remove_checkpoints", **removal(trained)) == 0
        assert set(state(trained).values()) == {"removed", "True"}
        shutil.rmtree(trained / "other/p")  # what it adopts once more is whole
        assert program("train_policy", **other) == 0
        assert set(state(trained / "other").values()) == {"True"}
    shutil.rmtree(trained / "other")
    assert program("remove_checkpoints", **removal(trained)) == 0
    assert sorted(is_removed(manifest) for manifest in trained.glob("cache/*/*/manifest.json")) == [False, True, True]


@pytest.mark.parametrize("step", ["before the files are linked", "while they are", "with the whole entry"])
def test_an_entry_that_another_run_removes_meanwhile_is_not_adopted(step, trained, data, monkeypatch, capsys):
    """Neither a part of a model as if it were whole, nor its mark where it was not removed."""
    link, kept = reuse.link_model, sorted(trained.glob("cache/*/*/manifest.json"))

    def link_model(source: Path, target: Path) -> None:
        if step == "with the whole entry":
            shutil.rmtree(source.parent)
        elif step == "while they are":
            (source / "model.safetensors").unlink()
            (source / "manifest.json.removed").touch()
        link(source, target)

    def adopt(*words) -> None:
        if step == "before the files are linked":
            for manifest in kept:
                remove_files(manifest)
        adopts(*words)

    adopts = reuse.adopt
    monkeypatch.setattr(reuse, "link_model", link_model)
    monkeypatch.setattr(reuse, "adopt", adopt)
    other = second_round(data, trained / "other") | {"reuse": trained / "cache"}
    assert program("train_policy", **other) == 1
    assert "another run removed it while it was being adopted; start the program again" in capsys.readouterr().err
    assert not list((trained / "other").rglob("manifest.json*"))


def test_a_removed_model_that_is_needed_says_how_to_train_it_again(trained, data, capsys):
    assert program("remove_checkpoints", **removal(trained)) == 0
    arguments = {"checkpoints": trained / "p/iteration-1/checkpoints.json", "dev": data / "dev.jsonl", "out": trained / "new.json"}
    assert program("score_checkpoints", **arguments, weights=data / "base/manifest.json", settings=SCORING) == 1
    told = capsys.readouterr().err
    assert f"rm -r {trained}/p/iteration-*/checkpoints and then snakemake --forcerun {trained}/p/iteration-1/checkpoints.json" in told


def test_a_removal_that_was_killed_is_ended_by_the_next(trained):
    manifest = trained / "p/iteration-1/checkpoints/1/manifest.json"
    weights = (manifest.with_name("model.safetensors")).read_bytes()
    remove_files(manifest)
    manifest.with_name("model.safetensors").write_bytes(weights)  # as if the kill came after the mark
    with pytest.raises(UserError, match="removed by design"):
        check_manifest(manifest)
    assert program("remove_checkpoints", **removal(trained)) == 0
    assert state(trained)["iteration-1/1"] == "removed"
