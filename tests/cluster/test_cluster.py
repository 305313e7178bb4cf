"""One run on a real Slurm: where jobs go, and what is left of it after kills, time limits and a lost controller."""

import re
import shutil
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest
from tests.cluster.conftest import OPTIONS, POLICY, STUDY, write_site

import run_on_slurm
from psychocounsel.provenance import read_record, record_path
from psychocounsel.records import check_manifest, read_records

pytestmark = pytest.mark.slow

GPU_RULES = {"rule_train_reward_model", "rule_train_policy", "rule_score_pairs", "rule_score_checkpoints"}


def test_the_run_ends_well(run):
    assert run.driver_state == "COMPLETED", run.driver_log[-6000:]
    assert (run.project.folder / "results/cluster/report.html").is_file()
    print(f"\n{len(run.cluster.jobs())} Slurm jobs, {run.seconds:.0f} s; a killed driver cost {run.recovery_s:.0f} s")


def test_gpu_rules_run_on_the_gpu_node_with_a_gpu_and_others_do_not(run):
    places = run.places()
    assert set(places) >= GPU_RULES
    for name, found in places.items():
        for node, gpus in found:
            assert (node, gpus in ("0", "1")) == (("gn1", True) if name in GPU_RULES else ("cn1", False)), (name, found)


def test_steps_that_follow_one_another_share_a_job(run):
    groups = {name for name in run.places() if name.startswith("group_")}
    assert {re.sub(r"_.*", "", name.removeprefix("group_")) for name in groups} == {
        "speeches", "assignments", "pairs", "judge", "iteration", "verdicts", "report",
    }  # fmt: skip


def test_a_second_driver_is_refused(run):
    assert run.refused.returncode == 1
    assert "another driver of this folder is alive" in run.refused.stderr
    assert "Traceback" not in run.refused.stderr


def test_a_killed_driver_costs_no_request_and_no_job(run):
    """The orphan is waited for, and its work is taken over: nothing is asked or done a second time."""
    assert run.at_the_kill, "the kill came while no job ran"
    assert "waiting for jobs of a killed driver" in run.driver_log
    assert set(run.project.asked().values()) == {1}
    speeches = read_records(run.project.folder / "results/cluster/02_speeches/speeches.jsonl", "speech")
    test_speeches = sum(speech["split"] == "test" for speech in speeches)
    asked = Counter(body["model"] for body in run.project.server.requests)
    assert asked == {"scripted-advice": test_speeches, "scripted-warm": len(speeches), "scripted-cold": len(speeches)}
    ended = Counter(job["comment"] for job in run.cluster.jobs("COMPLETED") if job["name"] != "psychocounsel-driver")
    twice = {name: count for name, count in ended.items() if count > 1}
    assert twice == {"rule_verdicts_compute_win_rates_parse_judgements": 2}, "one for each setting; Slurm shows no wildcards of a group"


def test_a_driver_job_comes_back_after_its_time_limit(run):
    assert run.driver_log.count("Slurm takes such jobs") == 2
    assert [job["state"] for job in run.jobs("iteration")] == ["COMPLETED"]


def test_a_cancelled_training_goes_on_in_a_next_job(run):
    assert [job["state"] for job in run.jobs("train_reward_model")] == ["CANCELLED", "COMPLETED"]
    assert "going on from" in run.log("train_reward_model/micro-reward.log")


def test_a_training_stopped_by_its_time_limit_goes_on_in_a_next_job(run):
    states = [job["state"] for job in run.jobs("train_policy")]
    assert len(states) >= 2
    assert states[-1] == "COMPLETED"
    assert set(states[:-1]) == {"FAILED"}, "stopped by the warning, with code 75, not killed at the limit"
    told = run.driver_log + run.log("train_policy/micro-dpo-iter.1.log")  # the driver shows the logs of failed jobs
    assert re.search(r"SIGTERM: saved at step \d+ of 400", told)
    assert re.search(r"going on from \S+/policies/micro-dpo-iter\.1/checkpoint-\d+", told)


@pytest.mark.parametrize("result", ["06_reward_models/micro-reward/model/manifest.json", f"{POLICY}/checkpoints.json"])
def test_disturbed_trainings_end_with_the_same_bytes_as_undisturbed_ones(run, result):
    disturbed, whole = (folder / "results/cluster" / result for folder in (run.project.folder, run.whole))
    assert disturbed.read_bytes() == whole.read_bytes()
    if disturbed.name == "manifest.json":
        check_manifest(disturbed)
    assert training_log(disturbed).read_bytes() == training_log(whole).read_bytes()


def training_log(result: Path) -> Path:
    """Return the log of the training that made a model or a list of checkpoints."""
    return (result.parent.parent if result.name == "manifest.json" else result.parent) / "training.json"


def test_records_name_their_slurm_job_and_the_run_verifies(run):
    record = read_record(record_path(run.project.folder / "results/cluster/06_reward_models/micro-reward/model/manifest.json"))
    assert record["run"]["slurm"]["job_id"] == run.jobs("train_reward_model")[-1]["id"]
    assert record["run"]["slurm"]["job_partition"] == "gpu"
    command = [sys.executable, "scripts/audit.py", "verify", *STUDY]
    verified = subprocess.run(command, cwd=run.project.folder, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout


def test_jobs_run_in_the_sites_scratch_folder(run):
    assert list((run.project.folder / "work").glob("scratch-*"))


def test_no_temporary_file_and_no_orphan_is_left(run):
    assert not list((run.project.folder / "results").rglob("*.part*"))
    assert not run.cluster.jobs("RUNNING", "PENDING")


def test_another_site_file_reruns_nothing(run):
    write_site(run.project.folder / "work/other_site.yaml", cpu={"partition": "elsewhere"}, gpu={"request": "gres"})
    environment = run.project.environment | {"PSYCHOCOUNSEL_SITE": "work/other_site.yaml"}
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", "-n", *STUDY, *OPTIONS]
    dry = subprocess.run(command, cwd=run.project.folder, env=environment, capture_output=True, text=True)
    assert "Nothing to be done" in dry.stdout + dry.stderr, dry.stdout + dry.stderr


def test_gpus_may_be_asked_for_by_gres(run):
    write_site(run.project.folder / "work/gres_site.yaml", gpu={"request": "gres"})
    environment = run.project.environment | {"PSYCHOCOUNSEL_SITE": "work/gres_site.yaml"}
    target = "results/cluster/06_reward_models/micro-reward/predictions.jsonl"
    command = [sys.executable, "scripts/run_on_slurm.py", *STUDY, *OPTIONS, "--force", "--", target]
    done = subprocess.run(command, cwd=run.project.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    job = run.jobs("score_pairs")[-1]
    log = next((run.project.folder / ".snakemake/slurm_logs/rule_score_pairs").rglob(f"{job['id']}.log"))
    assert "on gn1 gpus=0" in log.read_text()
    asked = run.cluster.run("squeue", "--noheader", "--states=all", "--jobs", job["id"], "--Format=tres-per-node:100")
    assert asked.strip() == "gres:gpu:h100:1"


@pytest.mark.parametrize(("cancel", "ends"), [(False, "COMPLETED"), (True, "CANCELLED")])
def test_only_orphans_of_this_folder_are_ended(cluster, tmp_path, monkeypatch, cancel, ends):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here / "profiles/slurm", elsewhere):
        folder.mkdir(parents=True)
    shutil.copy("profiles/slurm/config.yaml", here / "profiles/slurm")
    ours = f"psychocounsel_{uuid.uuid4()}"

    def submit(name: str, folder: Path, *options: str) -> str:
        words = ["sbatch", "--parsable", "--job-name", name, "--chdir", str(folder), "--output=/dev/null", *options, "--wrap", "sleep 8"]
        return cluster.run(*words).strip()

    running, held = submit(ours, here), submit(ours, here, "--hold")
    others = [submit(ours, elsewhere), submit("psychocounsel-driver", here), submit("psychocounsel_mine", here)]
    cluster.wait(lambda: len(cluster.jobs("RUNNING")) == 4, "running jobs")
    monkeypatch.chdir(here)
    run_on_slurm.wait_for_orphans(cancel)
    states = {job["id"]: job["state"] for job in cluster.jobs()}
    assert (states[running], states[held]) == (ends, "CANCELLED")
    assert "CANCELLED" not in {states[job] for job in others}


def test_a_driver_job_hands_sigint_on(cluster, tmp_path):
    (tmp_path / "scripts").mkdir()
    program = "import time\ntry:\n    print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('cancelling my jobs')\n"
    (tmp_path / "scripts/run_on_slurm.py").write_text(program)
    job = cluster.run("sbatch", "--parsable", f"--chdir={tmp_path}", "profiles/slurm/driver.sbatch").strip()
    log = tmp_path / f"slurm-driver-{job}.log"
    cluster.wait(lambda: log.is_file() and "up" in log.read_text(), "the driver")
    cluster.run("scancel", "--signal=INT", "--batch", job)
    cluster.wait(lambda: any(one["id"] == job for one in cluster.jobs("COMPLETED")), "the driver's end")
    assert "cancelling my jobs" in log.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": {"model": "a100"}}, r"site\.yaml:\d+: gpu\.model: --gpus=a100:1 is refused: .*not available"),
        ({"gpu": {"model": "a100", "request": "gres"}}, r"site\.yaml:\d+: gpu\.model: --gres=gpu:a100:1 is refused: .*not available"),
        ({"cpu": {"partition": "long"}}, r"site\.yaml:\d+: cpu\.partition: --partition long is refused: .*invalid partition"),
        ({"cpu": {"constraint": "avx1024"}}, r"site\.yaml:\d+: cpu\.constraint: --constraint avx1024 is refused: .*feature"),
        ({"gpu": {"max_mem_mb": 900000}}, r"site\.yaml:\d+: gpu\.max_mem_mb: --mem 900000 is refused: .*not available"),
        ({"gpu": {"max_runtime": 600}}, r"site\.yaml:\d+: gpu\.max_runtime: the partition allows 60 minutes"),
    ],
)
def test_an_impossible_request_is_explained_before_any_job(cluster, tmp_path, change, message):
    site = write_site(tmp_path / "site.yaml", **change)
    root = Path(__file__).resolve().parents[2]
    environment = cluster.environment | {"PSYCHOCOUNSEL_SITE": str(site)}
    done = subprocess.run(
        [sys.executable, "scripts/run_on_slurm.py"], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
