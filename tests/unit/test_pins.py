"""Names are resolved once, against a Hub on 127.0.0.1; what is not pinned is refused before any job, or said in the records."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.fakes.hub import TOKEN, FakeHub, Repository

from psychocounsel.config import about_unpinned, load_study, merged, read_config
from psychocounsel.pins import is_unpinned_source, location, pin_models, pin_sources
from psychocounsel.slices import Slices, Wildcards
from psychocounsel.workflow import Workflow

PAPER = Path("config/config.yaml")
LARGE, SMALL, OWN = b"large file", b"small file", b"a file that only the user has"


def commit(digit: str) -> str:
    return digit * 40


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


MODELS = {
    "open": {"id": "org/open", "revision": None},
    "same-id": {"extends": "open"},
    "known": {"id": "org/known", "revision": commit("9")},
    "closed": {"id": "org/closed", "revision": None},
}
SOURCES = {
    "large": {"hub": {"repository": "org/set", "path": "data/large.parquet"}},
    "small": {"hub": {"repository": "org/set", "path": "small.csv"}, "revision": commit("b")},
    "moved": {"hub": {"repository": "org/set", "path": "gone.csv"}},
    "own": {"file": "own/file.csv", "gated": True, "access": "Sign in there and take it."},
    "settled": {"hub": {"repository": "org/other", "path": "a.csv"}, "revision": commit("8"), "sha256": "7" * 64},
}


@pytest.fixture
def study(tmp_path) -> Path:
    """A study whose registries hold MODELS and SOURCES and whose lock file lies in tmp_path; return its config file."""
    shared = yaml.safe_load(Path("config/models.yaml").read_text())["olmo-7b-0724-instruct-hf"]
    models = {name: entry if "extends" in entry else shared | {"title": name} | entry for name, entry in MODELS.items()}
    shared = {"kind": "speeches", "adapter": "generic", "columns": {"text": "t"}, "licence": "MIT", "quotable": True}
    sources = {name: {"title": name, "file": f"{name}.csv"} | shared | entry for name, entry in SOURCES.items()}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(models))
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    files = {
        "models": ["config/models.yaml", str(tmp_path / "models.yaml")],
        "sources": ["config/sources.yaml", str(tmp_path / "sources.yaml")],
        "pins": str(tmp_path / "pins.lock.yaml"),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"files": files, "source_cache": str(tmp_path / "cache")}))
    return tmp_path / "study.yaml"


@pytest.fixture
def hub():
    """A Hub that has the study's repositories, and of config/models.yaml and sources.yaml none."""
    repositories = {
        "models/org/open": Repository(commit("a")),
        "models/org/closed": Repository(commit("c"), gated=True),
        "datasets/org/set": Repository(commit("b"), {"data/large.parquet": LARGE, "small.csv": SMALL}, {"data/large.parquet"}),
    }
    with FakeHub(repositories) as hub:
        yield hub


def run_pin(study: Path, hub: FakeHub, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Run the program; return it and what the lock file then holds."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE", "PSYCHOCOUNSEL_SOURCES")}
    done = subprocess.run(
        [sys.executable, "scripts/pin_names.py", "--configfile", str(study), *words],
        capture_output=True,
        text=True,
        env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(study.parent / "hf"), **environment},
    )
    lock = study.parent / "pins.lock.yaml"
    return done, yaml.safe_load(lock.read_text()) if lock.exists() else {}


def test_what_can_be_resolved_is_written_and_the_rest_named_with_steps(study, hub):
    done, lock = run_pin(study, hub)
    assert done.returncode == 1
    assert lock == {
        "models": {"org/open": commit("a")},
        "files": {
            "hf://datasets/org/set/data/large.parquet": {"revision": commit("b"), "sha256": sha256(LARGE)},
            "hf://datasets/org/set/small.csv": {"revision": commit("b"), "sha256": sha256(SMALL)},
        },
    }
    assert f"org/closed: gated: accept its terms at {hub.url}/org/closed and set HF_TOKEN" in done.stderr
    assert f"moved: org/set has no file gone.csv at {commit('b')}. It has: data/large.parquet, small.csv." in done.stderr
    assert "own: it has no address, and the source cache does not have it. Sign in there and take it." in done.stderr
    assert "google/gemma-2-9b-it" in done.stderr
    assert "org/known" not in done.stderr + done.stdout
    assert "commit aaaaaaaaaaaa" in done.stdout
    assert not any("large.parquet" in path for path in hub.requests), "the Hub names its sum: no download"
    assert len([path for path in hub.requests if path == "api/models/org/open"]) == 1, "two entries, one name"


def test_a_second_run_asks_for_what_is_missing_alone(study, hub):
    _, first = run_pin(study, hub)
    hub.requests.clear()
    hub.repositories["models/org/open"].commit = commit("d")
    (study.parent / "cache" / "own").mkdir(parents=True)
    (study.parent / "cache" / "own" / "file.csv").write_bytes(OWN)
    done, second = run_pin(study, hub, HF_TOKEN=TOKEN)
    assert second["models"] == first["models"] | {"org/closed": commit("c")}
    assert second["files"] == first["files"] | {"own/file.csv": {"revision": None, "sha256": sha256(OWN)}}
    assert "api/models/org/open" not in hub.requests
    assert TOKEN not in done.stdout + done.stderr + (study.parent / "pins.lock.yaml").read_text()
    written = (study.parent / "pins.lock.yaml").stat().st_mtime_ns
    done, third = run_pin(study, hub, HF_TOKEN=TOKEN)
    assert third == second
    assert "nothing changed" in done.stdout
    assert (study.parent / "pins.lock.yaml").stat().st_mtime_ns == written


def test_update_resolves_again_and_keeps_what_cannot_be(study, hub):
    run_pin(study, hub, HF_TOKEN=TOKEN)
    hub.repositories["models/org/open"].commit = commit("d")
    done, lock = run_pin(study, hub, "--update")  # without the token
    assert lock["models"] == {"org/open": commit("d"), "org/closed": commit("c")}
    assert "commit aaaaaaaaaaaa" in done.stdout
    assert "commit dddddddddddd" in done.stdout
    assert "small.csv" not in done.stdout


def test_without_a_network_it_says_so_once_and_still_sums_the_users_files(study, hub):
    hub.server.server_close()
    (study.parent / "cache" / "own").mkdir(parents=True)
    (study.parent / "cache" / "own" / "file.csv").write_bytes(OWN)
    done, lock = run_pin(study, hub)
    assert done.returncode == 1
    assert lock == {"models": {}, "files": {"own/file.csv": {"revision": None, "sha256": sha256(OWN)}}}
    assert "run this where there is a network" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_papers_config_is_pinned_whole_where_the_hub_has_everything(tmp_path, hub):
    """All of config/models.yaml and sources.yaml, with the one file that the Hub does not have in the source cache."""
    for number, entry in enumerate(yaml.safe_load(Path("config/models.yaml").read_text()).values()):
        hub.repositories.setdefault(f"models/{entry.get('id')}", Repository(f"{number:040x}"))
    for source in yaml.safe_load(Path("config/sources.yaml").read_text()).values():
        if at := source.get("hub"):
            key = f"datasets/{at['repository']}"
            repository = hub.repositories.setdefault(key, Repository(source.get("revision") or sha256(key.encode())[:40]))
            repository.files[at["path"]] = at["path"].encode()
    hub.repositories["datasets/ShenLab/MentalChat16K"].any_revision = True  # of its two files one names a commit
    (tmp_path / "therapistqa").mkdir()
    (tmp_path / "therapistqa" / "Annotated_data.csv").write_bytes(OWN)
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"files": {"pins": str(tmp_path / "pins.lock.yaml")}, "source_cache": str(tmp_path)}))
    done, lock = run_pin(study, hub)
    assert done.returncode == 0, done.stderr
    files = [PAPER, study]
    flow = Workflow(load_study(read_config(files), files))
    assert flow.unpinned() == {}
    assert flow.study.models["gemma-2-9b-it-ranker"]["revision"] == lock["models"]["google/gemma-2-9b-it"]
    mentalagora = flow.study.sources["mentalagora"]
    assert mentalagora["address"].endswith(f"/MentalAgora/TherapyTalk/resolve/{mentalagora['revision']}/data/test-00000-of-00001.parquet")
    assert flow.study.sources["therapistqa"]["sha256"] == sha256(OWN)


def test_a_registry_wins_over_the_lock_file():
    models = {"a": {"id": "org/a", "revision": commit("1")}, "b": {"id": "org/b", "revision": None}}
    pin_models(models, {"org/a": commit("2"), "org/b": commit("3")})
    assert [entry["revision"] for entry in models.values()] == [commit("1"), commit("3")]
    hub = {"repository": "org/s", "path": "f"}
    pin = {"revision": commit("2"), "sha256": "2" * 64}
    for entry, expected in [
        ({}, (commit("2"), "2" * 64)),
        ({"revision": commit("2")}, (commit("2"), "2" * 64)),
        ({"revision": commit("1")}, (commit("1"), None)),  # the sum is that of another commit
        ({"sha256": "1" * 64}, (None, "1" * 64)),
    ]:
        sources = {"s": {"hub": hub, "file": "f", **entry}}
        pin_sources(sources, {location(sources["s"]): pin})
        assert (sources["s"].get("revision"), sources["s"].get("sha256")) == expected
        assert f"/resolve/{expected[0] or 'main'}/f" in sources["s"]["address"]
        assert is_unpinned_source(sources["s"]) == (expected[1] is None)


def paper(**changes) -> Workflow:
    config = merged(read_config([PAPER]), changes)
    return Workflow(load_study(config, [PAPER]))


def test_names_that_a_study_does_not_use_do_not_count():
    assert "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2" in paper().unpinned()
    assert "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2" not in paper(reward_evaluation={"baselines": []}).unpinned()
    assert not [name for name in paper().unpinned() if name.startswith(("gpt", "o1", "command"))], "an API's id is its snapshot"
    files = [PAPER, Path("config/demo.yaml")]
    assert Workflow(load_study(read_config(files), files)).unpinned() == {}


def test_each_unpinned_name_is_listed_with_file_and_key():
    flow = paper()
    said = about_unpinned(flow.unpinned(), flow.config)
    line = next(n for n, text in enumerate(Path("config/models.yaml").read_text().splitlines(), start=1) if text == "gemma-2-9b-it:") + 3
    assert f"config/models.yaml:{line}: models.gemma-2-9b-it.revision: which commit of google/gemma-2-9b-it?" in said
    assert "sources.therapistqa.sha256" in said
    assert "make pin" in said
    assert "allow_unpinned: true" in said


def test_settings_and_report_say_what_is_not_pinned():
    slices = Slices(paper(allow_unpinned=True))
    assert '"unpinned":true' in slices.generate_responses(Wildcards(model="gemma-2-9b-it"))
    assert "unpinned" not in slices.generate_responses(Wildcards(model="gpt-4o"))
    assert "unpinned" not in slices.rate_responses(Wildcards())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["-n", "--quiet", "rules"], 0, ["it can be planned, and will not start", "which commit of google/gemma-2-9b-it?", "fetch_source"]),
        (["--cores", "1", "dataset"], 1, ["names of this run are not pinned", "`make pin`"]),
        (["-n", "--quiet", "rules", "--config", "allow_unpinned=True"], 0, ["the run's records say so"]),
    ],
)
def test_the_papers_run_is_planned_but_not_started(words, status, expected):
    done = subprocess.run([sys.executable, "-m", "snakemake", *words], capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]
    for part in expected:
        assert part in done.stdout + done.stderr
    assert not Path("results/paper").exists()
    assert not Path("work/paper/sources").exists()
