"""One Slurm, one copy of the project and one eventful run for all tests of the cluster."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml
from tests.cluster.slurm import Cluster, missing
from tests.fakes.openai_server import Reply
from tests.project import Project, project_copy, scripted_answer

STUDY = ("--configfile", "tests/cluster/study.yaml")
OPTIONS = (
    "--slurm-init-seconds-before-status-checks", "14",  # a trivial job takes eight to thirteen seconds here
    "--set-resources", *(f"{rule}:gpu=1" for rule in ("train_reward_model", "train_policy", "score_pairs", "score_checkpoints")),
)  # fmt: skip
BEFORE_THE_GATE = 12  # answers at once: the opponent's eight and some of a pool model's; then silence until the driver has been killed
POLICY = "07_policies/micro-dpo-iter/iteration-1"
ON_NODE = re.compile(r"^on (\w+) gpus=(\S+)$", re.MULTILINE)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm; without its programs tests are skipped, or fail under PSYCHOCOUNSEL_NO_SKIP=1."""
    if reason := missing():
        if os.environ.get("PSYCHOCOUNSEL_NO_SKIP") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


class Gate:
    """The scripted server's mood: a few answers, silence until it is opened, then all answers."""

    def __init__(self) -> None:
        self.opened, self.count = threading.Event(), 0

    def answer(self, body: dict, nth: int) -> Reply:
        """Answer, or wait first."""
        self.count += 1
        if self.count > BEFORE_THE_GATE:
            self.opened.wait(100)
        return scripted_answer(body, nth)


@pytest.fixture(scope="session")
def gate() -> Gate:
    """The server's gate."""
    return Gate()


@pytest.fixture(scope="session")
def project(tmp_path_factory, cluster, gate) -> Iterator[Project]:
    """A copy of the project with a site file for the test cluster; the profile is as it stands."""
    with project_copy(tmp_path_factory.mktemp("cluster"), gate.answer) as project:
        write_site(project.folder / "work/site.yaml")
        project.environment |= {"PSYCHOCOUNSEL_SITE": "work/site.yaml", "PYTHONUNBUFFERED": "1"}
        project.environment["PATH"] = path_without_sacct(project.environment["PATH"], tmp_path_factory.mktemp("bin"))
        yield project


def path_without_sacct(path: str, folder: Path) -> str:
    """Return a PATH of the same programs but `sacct`, which can only fail here: this cluster keeps no accounts.

    The plugin asks it when `scontrol` does not answer once, as while the controller is restarted, and then loses its jobs.
    """
    places = path.split(os.pathsep)
    for number, place in enumerate(places):
        if Path(place, "sacct").exists():
            places[number] = str(folder / str(number))
            Path(places[number]).mkdir()
            for program in Path(place).iterdir():
                if program.name != "sacct":
                    Path(places[number], program.name).symlink_to(program)
    return os.pathsep.join(places)


def write_site(file: Path, **changes: dict) -> Path:
    """Write the repository's site file with what the test cluster needs of it changed; `gpu={"model": …}` changes more."""
    site = yaml.safe_load((Path(__file__).resolve().parents[2] / "profiles/slurm/site.yaml").read_text())
    site["cpu"] |= {"max_mem_mb": 32000, "max_runtime": 60}
    site["gpu"] |= {"max_mem_mb": 32000, "max_runtime": 2, "model": "h100"}
    site |= {"warning_s": 59, "scratch": "$PWD/work/scratch-$SLURM_JOB_ID"}
    site["before_each_job"] = [
        'echo "on $SLURMD_NODENAME gpus=${CUDA_VISIBLE_DEVICES:-none}" >&2',
        "unset CUDA_VISIBLE_DEVICES",  # the GPUs exist by name only, and a training whose torch sees none of them stops
    ]
    for block, values in changes.items():
        site[block] |= values
    file.write_text(yaml.safe_dump(site, sort_keys=False))
    return file


@dataclass
class Run:
    """The eventful run, as the tests look at it."""

    project: Project
    cluster: Cluster
    refused: subprocess.CompletedProcess | None = None  # a second driver while the first was alive
    at_the_kill: list[dict] = field(default_factory=list)  # Slurm's running jobs when the driver was killed
    recovery_s: float = 0.0  # from the start of the second driver to its first own submission, without the wait for orphans
    seconds: float = 0.0
    driver_log: str = ""
    driver_state: str = ""
    whole: Path = Path()  # a copy of the project in which the trainings ran undisturbed

    def log(self, name: str) -> str:
        """Return a rule's log, or an empty text."""
        file = self.project.folder / "logs/cluster" / name
        return file.read_text() if file.is_file() else ""

    def jobs(self, rule: str) -> list[dict]:
        """Return the Slurm jobs of a rule or group, in order."""
        found = [job for job in self.cluster.jobs() if re.match(rf"rule_{rule}(_|$)", job["comment"])]
        return sorted(found, key=lambda job: int(job["id"]))

    def places(self) -> dict[str, set[tuple[str, str]]]:
        """Return where each rule or group ran, from Slurm's own logs: node and CUDA_VISIBLE_DEVICES."""
        found: dict[str, set[tuple[str, str]]] = {}
        logs = self.project.folder / ".snakemake/slurm_logs"
        for file in logs.rglob("*.log"):
            found.setdefault(file.relative_to(logs).parts[0], set()).update(ON_NODE.findall(file.read_text()))
        return found

    def hold_at_step(self, program: str, log: str, step: int) -> None:
        """Let a training pass a step and go no further, however fast it is, until Slurm signals it: Slurm wakes it first."""
        self.cluster.wait(lambda: f"step {step} of" in self.log(log), f"step {step} in {log}", 400)
        here = [one for one in psutil.process_iter(["cmdline", "cwd"]) if one.info["cwd"] == str(self.project.folder)]
        training = [one for one in here if f"scripts/{program}.py" in (one.info["cmdline"] or [])]
        assert training, f"{program} ended before it was held"
        for process in training:
            process.suspend()


def start_undisturbed(project: Project) -> subprocess.Popen:
    """Train once more in a copy without the trainings' results, on this machine and undisturbed."""
    copy = project.folder.with_name("undisturbed")
    shutil.copytree(project.folder, copy, ignore=shutil.ignore_patterns("locks", "*.part"), symlinks=True)
    for trained in ("results/cluster/06_reward_models", "results/cluster/07_policies", "work/cluster/checkpoints", "work/cache"):
        shutil.rmtree(copy / trained)
    target = f"results/cluster/{POLICY}/checkpoints.json"
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--profile", "profiles/local", *STUDY, "--", target],
        cwd=copy, env=project.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def run(project, cluster, gate) -> Run:
    """Run the study; kill the driver, restart it as a job, requeue that, cancel one training, restart the controller during another."""
    run, started = Run(project, cluster), time.monotonic()
    command, first_log = [sys.executable, "scripts/run_on_slurm.py", *STUDY, *OPTIONS], project.folder / "first_driver.log"
    with open(first_log, "w") as log:
        first = subprocess.Popen(command, **project.options(), stdout=log, stderr=subprocess.STDOUT)
    try:
        cluster.wait(lambda: gate.count > BEFORE_THE_GATE or first.poll() is not None, "the first requests", 300)
        assert first.poll() is None, first_log.read_text()
        run.refused = subprocess.run(command, **project.options(), capture_output=True, text=True, timeout=60)
    finally:
        first.kill()
        first.wait()
    run.at_the_kill = cluster.jobs("RUNNING")

    threading.Timer(5, gate.opened.set).start()
    driver_job = subprocess.run(
        ["sbatch", "--parsable", "--time=30", "profiles/slurm/driver.sbatch", *STUDY, *OPTIONS],
        **project.options(), capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    orphan = run.at_the_kill[-1]["id"]
    cluster.wait(lambda: not any(job["id"] == orphan for job in cluster.jobs("RUNNING")), "the orphan's end", 120)
    orphan_ended = time.monotonic()
    cluster.wait(lambda: any(int(job["id"]) > int(driver_job) for job in cluster.jobs()), "the second driver's first job", 120)
    run.recovery_s = time.monotonic() - orphan_ended

    run.hold_at_step("train_reward_model", "train_reward_model/micro-reward.log", 30)
    cluster.run("scancel", run.jobs("train_reward_model")[-1]["id"])

    # As Slurm does before the driver's own time limit. It would let two minutes pass before the next start; at once it refuses.
    cluster.wait(lambda: any(job["state"] == "RUNNING" for job in run.jobs("iteration")), "the sampling", 200)
    cluster.run("scancel", "--signal=USR1", "--batch", driver_job)
    cluster.wait(lambda: any(job["id"] == driver_job for job in cluster.jobs("PENDING")), "the driver's return to the queue", 90)
    cluster.run("scontrol", "update", f"JobId={driver_job}", "StartTime=now+10")

    run.hold_at_step("train_policy", "train_policy/micro-dpo-iter.1.log", 1)  # until the warning before its time limit
    cluster.stop("slurmctld")
    time.sleep(10)
    cluster.start_controller()

    trained = project.folder / f"results/cluster/{POLICY}/checkpoints.json"
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}

    def state() -> str:
        return next(job["state"] for job in cluster.jobs() if job["id"] == driver_job)

    cluster.wait(lambda: trained.is_file() or state() in over, "the trained policy", 1200)
    undisturbed = start_undisturbed(project) if trained.is_file() else None
    cluster.wait(lambda: state() in over, "the end of the run", 900)
    run.driver_state, run.seconds = state(), time.monotonic() - started
    run.driver_log = (project.folder / f"slurm-driver-{driver_job}.log").read_text()
    if undisturbed:
        run.whole = project.folder.with_name("undisturbed")
        output, _ = undisturbed.communicate(timeout=600)
        assert undisturbed.returncode == 0, output[-4000:]
    return run
