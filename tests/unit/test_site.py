"""The site file: checked with file, line and key; it decides how jobs are asked for, and the profile may still overrule it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from snakemake.resources import Resources
from snakemake_executor_plugin_slurm.submit_string import get_submit_command

from psychocounsel import site as sites
from psychocounsel.config import Study
from psychocounsel.errors import UserError

TEXT = sites.SITE_FILE.read_text()
SITE = yaml.safe_load(TEXT)


def site_with(**changes: object) -> dict:
    """Return the repository's site with some values changed, a block's by a dict."""
    return {key: value | changes.get(key, {}) if isinstance(value, dict) else changes.get(key, value) for key, value in SITE.items()}


def test_the_shipped_file_is_valid():
    assert sites.load_site(sites.SITE_FILE) == SITE


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  partition: cpu ", "  partition: 3 ", r"site\.yaml:8: cpu\.partition: 3 is not of type 'string'"),
        ("  qos: null", "  qoss: null", r"site\.yaml:9: unknown key cpu\.qoss\. Did you mean 'qos'\?"),
        ("request: gpu ", "request: gpus ", r"site\.yaml:\d+: gpu\.request is 'gpus'; allowed: 'gpu', 'gres'\. Did you mean 'gpu'\?"),
        ("warning_s: 300", "warning_s: soon", r"site\.yaml:\d+: warning_s: 'soon' is not of type 'integer'"),
        ("warning_s: 300", "warning_s: 86400", r"site\.yaml:12: cpu\.max_runtime: 1440 minutes leave no time"),
        ("account: default", "accounts: default", r"lacks the key 'account'"),
        ("scratch: null", "account: other", r"the key 'account' stands twice"),
    ],
)
def test_a_mistake_is_named(tmp_path, old, new, message):
    assert old in TEXT
    file = tmp_path / "site.yaml"
    file.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        sites.load_site(file)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PSYCHOCOUNSEL_SITE", str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        sites.load_site(sites.site_file())


@pytest.mark.parametrize(
    ("changes", "gpus", "expected"),
    [
        ({}, 0, {"slurm_partition": "cpu", "gpu": None, "gpu_model": None, "gres": None}),
        ({}, 2, {"slurm_partition": "gpu", "gpu": 2, "gpu_model": None, "gres": None}),
        ({"gpu": {"model": "h100"}}, 2, {"gpu": 2, "gpu_model": "h100", "gres": None}),
        ({"gpu": {"model": "h100"}}, 0, {"gpu": None, "gpu_model": None, "gres": None}),
        ({"gpu": {"model": "h100", "request": "gres"}}, 4, {"gpu": None, "gpu_model": None, "gres": "gpu:h100:4"}),
        ({"gpu": {"request": "gres"}}, 1, {"gpu": None, "gpu_model": None, "gres": "gpu:1"}),
        ({"gpu": {"qos": "long", "constraint": "a&b"}}, 1, {"qos": "long", "constraint": "a&b"}),
        ({}, 1, {"nodes": None, "cpus_per_task": None, "mpi": None}),
        ({}, 4, {"gpu": 4, "nodes": 1, "cpus_per_task": 8, "mpi": None, "tasks_per_node": None}),
        ({"warning_s": 90}, 0, {"slurm_extra": "--signal=TERM@90", "slurm_account": "default"}),
    ],
)
def test_needs_become_requests(changes, gpus, expected):
    assert expected.items() <= sites.slurm_resources(site_with(**changes), gpus, internet=False, threads=2).items()


def test_jobs_that_need_the_internet_go_where_it_is():
    asked = [sites.slurm_resources(site_with(internet_partition=name), 0, internet=True)["slurm_partition"] for name in (None, "login")]
    assert asked == ["cpu", "login"]


def applied(site: dict, needs: dict, chosen: dict | None = None, groups: dict | None = None) -> dict:
    """Apply a site to a rule with these needs; return its resources as Snakemake would evaluate them, and its retries."""
    rule = SimpleNamespace(name="train", resources=Resources.from_mapping({"mem_mb": 4000, "runtime": 60} | needs), restart_times=None)
    rule.resources.update(Resources.from_mapping(chosen or {}))
    workflow = SimpleNamespace(
        rules=[rule],
        resource_settings=SimpleNamespace(overwrite_resources={"train": chosen or {}}),
        group_settings=SimpleNamespace(overwrite_groups=groups or {}),
        is_main_process=True,
    )
    sites.apply(workflow, site)
    context = {"input": [], "attempt": 1, "threads": 1, "rulename": "train", "async_run": None}
    wildcards = SimpleNamespace(model="big")
    return {name: r.evaluate(wildcards, **context).value for name, r in rule.resources.items()} | {"retries": rule.restart_times}


def test_a_need_may_depend_on_wildcards():
    asked = applied(site_with(), {"gpu": lambda wildcards: 4 if wildcards.model == "big" else 0})
    assert (asked["slurm_partition"], asked["gpu"]) == ("gpu", 4)


def test_requests_are_cut_to_the_partition_and_a_cut_stage_gets_more_tries():
    site = site_with(gpu={"max_mem_mb": 100000, "max_runtime": 240})
    asked = applied(site, {"gpu": 1, "mem_mb": 128000, "runtime": 720})
    assert (asked["mem_mb"], asked["runtime"], asked["retries"]) == (100000, 240, 2 + 2)
    asked = applied(site, {"gpu": 1, "mem_mb": 64000, "runtime": 120})
    assert (asked["mem_mb"], asked["runtime"], asked["retries"]) == (64000, 120, None)


def test_rules_that_share_a_job_share_its_time():
    asked = applied(site_with(cpu={"max_runtime": 60}), {"runtime": 60}, groups={"train": "g", "rank": "g", "other": "h"})
    assert asked["runtime"] == 30


def submitted(resources: dict) -> str:
    """Return the command by which the Slurm plugin would submit a job with these resources."""
    asked = {name: value for name, value in resources.items() if value is not None}
    job = SimpleNamespace(resources=SimpleNamespace(**asked, get=asked.get), threads=2)
    named = dict.fromkeys(("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir"), "x")
    return get_submit_command(job, named)


@pytest.mark.parametrize("request_gpus", ["gpu", "gres"])
@pytest.mark.parametrize("gpus", [4, 16])
def test_gpus_of_several_nodes_are_asked_for_by_the_node(request_gpus, gpus):
    site = site_with(gpu={"model": "h100", "request": request_gpus})
    asked = applied(site, {}, {"gpu": gpus, "nodes": 4})
    command = submitted(asked)
    each = gpus // 4
    assert {"--nodes=4", f"--ntasks-per-node={max(2, each)}", "--cpus-per-task=2"} <= set(command.split())
    assert "--gpus" not in command
    assert asked["gres"] == f"gpu:h100:{each}"
    assert sites.requested_gpus(asked) == gpus


def test_gpus_of_one_training_lie_on_one_node():
    asked = applied(site_with(), {}, {"gpu": 4})
    assert "--nodes=1" in submitted(asked).split()
    assert sites.requested_gpus(asked) == 4


def test_the_launcher_follows_from_gpus_and_nodes():
    assert sites.launcher(0, 1, 2) == sites.launcher(1, 1, 2) == "python"
    one, two = sites.launcher(4, 1, 2).split(), sites.launcher(8, 2, 3)
    assert one[:5] == ["python", "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    assert one[-2:] == ["--standalone", "--"], "a port that is free, whoever else trains on the node"
    assert two.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=12 --kill-on-bad-exit=1 bash -c 'exec python")
    assert "--nproc-per-node 4 " in two


@pytest.mark.parametrize("jobs", [(7, 8), (20006, 7), (41234567, 41234568)])
def test_jobs_of_one_node_meet_at_ports_of_their_own(jobs):
    expression = re.search(r"--master-port (\S+ \+ \S+ % \S+)", sites.launcher(4, 2, 2))[1]
    ports = [
        subprocess.run(["bash", "-c", f"SLURM_JOB_ID={job}; echo {expression}"], capture_output=True, text=True).stdout for job in jobs
    ]
    assert ports[0] != ports[1]
    assert all(1024 < int(port) < 32768 for port in ports), "below the ports that systems give to others"


@pytest.mark.parametrize(
    ("resources", "on_slurm", "message"),
    [
        ({"gpu": 3}, True, r"train_policy of p on gpu: 3, nodes: 1 .*config/train/dpo\.yaml: recipe: batch_size 64 is no multiple"),
        ({"gpu": 8, "nodes": 3}, True, "gpu counts the GPUs of all nodes and must be a multiple of nodes"),
        ({"gpu": 8, "nodes": 2}, False, r"several nodes need Slurm \(--profile slurm\)"),
        ({"gpu": 16, "nodes": 2}, True, None),
        ({"gpu": lambda wildcards: 5 if wildcards.policy == "p" else 1}, True, "gpu: 5"),
        ({}, False, None),
    ],
)
def test_a_training_that_could_not_start_is_told_before_any_job(resources, on_slurm, message):
    rule = SimpleNamespace(name="train_policy", resources=Resources.from_mapping({"mem_mb": 1} | resources))
    study = SimpleNamespace(
        reward_models={}, policies={"p": {"recipe": "config/train/dpo.yaml"}, "base": {"method": "none"}}, recipe=Study.recipe
    )
    if message is None:
        sites.check_trainings(SimpleNamespace(rules=[rule]), study, on_slurm)
        return
    with pytest.raises(UserError, match=message):
        sites.check_trainings(SimpleNamespace(rules=[rule]), study, on_slurm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": None}, "train_policy of p: mine.yaml: beta: Field required"),
        ({"epochs": 1}, "train_policy of p: mine.yaml: Value error, exactly one of epochs and max_steps"),
        (
            {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target": "all-linear"}},
            "train_policy of p: mine.yaml: Value error, deepspeed must",
        ),
    ],
)
def test_a_recipe_that_its_schema_cannot_judge_is_told_before_any_job(change, message):
    recipe = {key: value for key, value in (Study.recipe("config/train/dpo.yaml") | change).items() if (key, value) != ("beta", None)}
    rule = SimpleNamespace(name="train_policy", resources=Resources.from_mapping({"gpu": 1}))
    study = SimpleNamespace(reward_models={}, policies={"p": {"recipe": "mine.yaml"}}, recipe=lambda path: recipe)
    with pytest.raises(UserError, match=message):
        sites.check_trainings(SimpleNamespace(rules=[rule]), study, False)


def test_set_resources_of_the_profile_win():
    asked = applied(site_with(), {}, {"gpu": 1, "slurm_partition": "special", "qos": "urgent", "constraint": "big"})
    assert (asked["slurm_partition"], asked["qos"], asked["constraint"], asked["gpu"]) == ("special", "urgent", "big", 1)


def test_the_profile_overrules_only_by_needs_and_the_groups_name_rules_that_exist():
    profile = yaml.safe_load(Path("profiles/slurm/config.yaml").read_text())
    text = "".join(file.read_text() for file in Path("rules").glob("*.smk"))
    named = [*profile["set-resources"], *(group.partition("=")[0] for group in profile["groups"])]
    assert [rule for rule in named if f"rule {rule}:" not in text and f" as {rule} with:" not in text] == []
    assert {name for needs in profile["set-resources"].values() for name in needs} <= {"gpu", "nodes", "mem_mb", "runtime"}


def shell(site: dict, command: str) -> subprocess.Popen:
    """Start a command as a rule's shell does."""
    text = sites.before_each_job(site) + command
    return subprocess.Popen(["bash", "-c", text], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_shell_of_a_job_waits_for_a_program_that_saves_on_sigterm():
    program = "import signal,sys,time\ndef save(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(75)\n"
    started = shell(SITE, f'python -c "{program}signal.signal(signal.SIGTERM, save); print(1, flush=True); time.sleep(300)"')
    assert started.stdout.readline() == "1\n"
    os.killpg(started.pid, signal.SIGTERM)  # as Slurm does: every process of the job
    output, _ = started.communicate(timeout=120)
    assert (output, started.returncode) == ("saved\n", 75)


def test_a_program_that_does_not_save_ends_at_sigterm():
    started = shell(SITE, "sh -c 'echo started; exec sleep 300'")
    assert started.stdout.readline() == "started\n"
    os.killpg(started.pid, signal.SIGTERM)
    assert started.wait(timeout=120) == 128 + signal.SIGTERM


def test_lines_of_the_site_run_first_and_a_failing_one_is_named(tmp_path):
    site = site_with(before_each_job=['echo "${UNSET} first"', "export X={1}"], scratch=f"{tmp_path}/of-${{USER_ID:-me}}")
    assert shell(site, 'echo "$X $TMPDIR"; ls -d "$TMPDIR"').communicate()[0].split("\n")[:3] == [
        " first", f"{{1}} {tmp_path}/of-me", f"{tmp_path}/of-me",
    ]  # fmt: skip
    failed = shell(site_with(before_each_job=["true", "module-of-nowhere load"]), "echo ran")
    output, errors = failed.communicate()
    assert (output, failed.returncode) == ("", 1)
    assert "before_each_job, line 2 of the site file, failed" in errors


def test_one_driver_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with sites.hold_driver_lock(), pytest.raises(UserError, match=rf"another driver .* is alive \(process {os.getpid()} on "):
        sites.hold_driver_lock()
    sites.hold_driver_lock().close()


@pytest.mark.slow
def test_the_papers_run_takes_hundreds_of_slurm_jobs():
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", "--configfile", "config/config.yaml", "-n", "--nolock"]
    dry = subprocess.run([*command, "--forceall"], capture_output=True, text=True, check=True)
    shown = dry.stdout + dry.stderr
    single, fetched = re.findall(r"^Job \d+: ", shown, re.MULTILINE), re.findall(r"^Job \d+: Fetch the raw file", shown, re.MULTILINE)
    groups = re.findall(r"Group job \w+ \(", shown)  # one for each job that several steps share; the driver fetches
    jobs = len(single) - len(fetched) + len(groups)
    print(f"{jobs} Slurm jobs")
    assert 200 < jobs < 1000
    assert len(groups) > 50


def test_a_slurm_that_does_not_answer_is_told_from_a_site_file_at_fault(tmp_path):
    """Its programs are there, its controller is not: no key of the site file is to blame."""
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "scripts/run_on_slurm.py", "--check"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Slurm does not answer here: Unable to contact slurm controller.")
    assert "site.yaml" not in done.stderr
