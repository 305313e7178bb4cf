"""What a site decides about jobs, apart from what rules need: read from profiles/slurm/site.yaml, applied to every rule.

Rules state needs (gpu, nodes, mem_mb, runtime, threads); a site says how its cluster wants to be asked for them, and how a
training starts follows from what it gives. Nothing of this is part of a result's identity: a change reruns nothing.
rules/site.smk calls `check_trainings` and `apply`; programs never come here.
"""

import fcntl
import os
import socket
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NamedTuple

from psychocounsel.config import Study, check_duplicate_keys, complain, locate, read_yaml, schema_errors
from psychocounsel.errors import UserError
from psychocounsel.recipes import PolicyRecipe, Recipe, accumulation
from psychocounsel.stage import parse_settings

SITE_FILE = Path("profiles/slurm/site.yaml")
DRIVER_LOCK = Path("work/driver.lock")
SPARE_RETRIES = 2  # as `retries` of the profile: for what a cut time limit does not explain
SIGNAL_LEAD_S = 60  # Slurm may warn a job so much earlier than asked
SAVING_S = 1800  # after SIGTERM a launcher lets its processes save for so long; Slurm ends them sooner
NEEDS_INTERNET = ("prepare_model",)  # as jobs with a `remote` resource, which ask an API; fetch_source is the driver's


def site_file() -> Path:
    """Return the site file: PSYCHOCOUNSEL_SITE, or that of the profile."""
    return Path(os.environ.get("PSYCHOCOUNSEL_SITE") or SITE_FILE)


def load_site(file: Path) -> dict:
    """Read and check a site file; raise UserError with file, line and key where it is wrong."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; copy {SITE_FILE} of the repository, or mend PSYCHOCOUNSEL_SITE")
    check_duplicate_keys(file)
    site = read_yaml(file)
    complain(list(schema_errors(site, "site", [file])))
    for kind in ("cpu", "gpu"):
        if site[kind]["max_runtime"] * 60 <= site["warning_s"] + SIGNAL_LEAD_S:
            raise UserError(
                f"{locate((kind, 'max_runtime'), [file])}: {kind}.max_runtime: {site[kind]['max_runtime']} minutes leave no time to work "
                f"before the warning (warning_s is {site['warning_s']}, and Slurm may give it {SIGNAL_LEAD_S} s early)"
            )
    return site


def partition_of(site: dict, gpus: int) -> dict:
    """Return the block of the site file that a job with so many GPUs belongs to."""
    return site["gpu" if gpus else "cpu"]


def requested_gpus(resources: dict) -> int:
    """Return the GPUs of a job on all its nodes, whichever way its site asks for them (site.yaml: gpu.request)."""
    if resources.get("gpu"):
        gpus = resources["gpu"]
        return int(gpus) if str(gpus).isdigit() else 0
    of_a_node = str(resources.get("gres") or "").rpartition(":")[2]
    return int(of_a_node) * (resources.get("nodes") or 1) if of_a_node.isdigit() else 0


def slurm_resources(site: dict, gpus: int, internet: bool, nodes: int = 1, threads: int = 1) -> dict[str, str | int | None]:
    """Return how a job with so many GPUs, on all its nodes together, is asked for; None leaves a resource out.

    Over several nodes GPUs are asked for by the node (--gpus would leave open how they are spread), and `mpi` lets the command
    call srun itself: the Slurm plugin would put one in front of it, and an srun within that one dies of Slurm's warning.
    """
    block = partition_of(site, gpus)
    model, by_gres, several = site["gpu"]["model"], site["gpu"]["request"] == "gres" or nodes > 1, nodes > 1
    gres = ":".join(["gpu", *([model] if model else []), str(gpus // nodes)])
    return {
        "slurm_account": site["account"],
        "slurm_partition": site["internet_partition"] if internet and site["internet_partition"] else block["partition"],
        "qos": block["qos"],
        "constraint": block["constraint"],
        "gpu": None if by_gres or not gpus else gpus,
        "gpu_model": model if gpus and not by_gres else None,
        "gres": gres if gpus and by_gres else None,
        "nodes": nodes if gpus > 1 else None,
        "mpi": "srun" if several else None,
        "tasks_per_node": max(2, gpus // nodes) if several else None,  # as many times the threads; the plugin takes no 1
        "cpus_per_task": threads * gpus if gpus > 1 and not several else None,
        "slurm_extra": f"--signal=TERM@{site['warning_s']}",
    }


def launcher(gpus: int, nodes: int, threads: int) -> str:
    """Return the shell text in front of a training program: one process, or one for each GPU of one node or of several.

    torchrun finds a free port by itself on one node. On several, srun starts one on each; they meet at the job's first node, at
    a port that follows from the job's number. All of them hand SIGTERM on and wait until the processes have saved.
    """
    if gpus <= 1:
        return "python"
    torchrun = f"python -m torch.distributed.run --nproc-per-node {gpus // nodes} --shutdown-timeout {SAVING_S}"
    if nodes == 1:
        return f"{torchrun} --standalone --"
    meet = (
        f'--nnodes {nodes} --node-rank "$SLURM_NODEID" --master-port $((10000 + SLURM_JOB_ID % 20000))'
        ' --master-addr "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
    )
    cpus = threads * max(2, gpus // nodes)
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=1"
    return f"""{srun} bash -c 'exec {torchrun} {meet} -- "$@"' torchrun"""


def before_each_job(site: dict) -> str:
    """Return the shell text that stands before each rule's command.

    SIGTERM goes to every process of a job. The shell must outlive it: when it ends, Slurm takes the job for finished and kills
    a training that is still saving. `set -u` comes last, since the scripts of modules and conda do not bear it.
    """
    lines = ["trap : TERM"]
    for number, line in enumerate(site["before_each_job"], start=1):
        lines.append(f"{line} || {{ echo 'error: before_each_job, line {number} of the site file, failed' >&2; exit 1; }}")
    if site["scratch"]:
        lines.append(f'export TMPDIR="{site["scratch"]}"; mkdir -p "$TMPDIR"')
    return "; ".join([*lines, "set -euo pipefail; "])


def apply(workflow, site: dict) -> None:
    """Give every rule of a Snakemake workflow the site's resources; those that the profile's set-resources names stay."""
    for rule in workflow.rules:
        chosen = workflow.resource_settings.overwrite_resources.get(rule.name, {})
        needs = needs_of(rule)
        for name in slurm_resources(site, 0, False):
            if name in ("gpu", "nodes") or name not in chosen:
                rule.resources[name] = asked(site, needs, name)
        runtime = rule.resources.get("runtime")
        rule.resources["mem_mb"] = capped(site, needs, rule.resources.get("mem_mb"), "max_mem_mb", lambda: 1)
        rule.resources["runtime"] = capped(site, needs, runtime, "max_runtime", partial(group_size, workflow, rule.name))
        if workflow.is_main_process and not runtime.is_evaluable():  # in a job it would try again within the job
            more = cuts(runtime.value, min(site["cpu"]["max_runtime"], site["gpu"]["max_runtime"]))
            if more:
                rule.restart_times = SPARE_RETRIES + more


def group_size(workflow, rule: str) -> int:
    """Return how many rules share a rule's job: they run one after another, and their times add up to the job's."""
    groups = workflow.group_settings.overwrite_groups  # known only after the rules have been read
    return list(groups.values()).count(groups[rule]) if rule in groups else 1


class Needs(NamedTuple):
    """A rule's abstract needs that decide where its jobs go: Snakemake resources, perhaps functions of wildcards."""

    rule: str
    gpu: object
    node: object
    remote: object

    def gpus(self, *args, **context) -> int:
        """Return the GPUs of one job."""
        return int(self.gpu.evaluate(*args, **context).value or 0)

    def nodes(self, *args, **context) -> int:
        """Return the nodes of one job."""
        return int(self.node.evaluate(*args, **context).value or 1)

    def internet(self, *args, **context) -> bool:
        """Say whether one job talks to the internet."""
        return self.rule in NEEDS_INTERNET or bool(self.remote.evaluate(*args, **context).value)


def needs_of(rule) -> Needs:
    """Return the needs of a rule, as it and the profile's set-resources state them."""
    return Needs(rule.name, *(rule.resources.get(name) for name in ("gpu", "nodes", "remote")))


def asked(site: dict, needs: Needs, name: str):
    """Return a resource as Snakemake evaluates it for each job: what the site makes of the job's needs."""

    def of_job(*args, **context):
        gpus, nodes = needs.gpus(*args, **context), needs.nodes(*args, **context)
        return slurm_resources(site, gpus, needs.internet(*args, **context), nodes, context["threads"])[name]

    return of_job


def check_trainings(workflow, study: Study, on_slurm: bool) -> None:
    """Raise UserError where a training could not start on the GPUs and nodes that the profile or the command line gives its rule."""
    policies = {name: entry for name, entry in study.policies.items() if "recipe" in entry}
    trainings = {"train_reward_model": (study.reward_models, "reward_model", Recipe), "train_policy": (policies, "policy", PolicyRecipe)}
    for rule in workflow.rules:
        entries, wildcard, kind = trainings.get(rule.name, ({}, "", Recipe))
        for name, entry in entries.items():
            of_job = {"input": [], "attempt": 1, "threads": 1, "rulename": rule.name, "async_run": None}
            job, needs = SimpleNamespace(**{wildcard: name, "iteration": "1"}), needs_of(rule)
            gpus, nodes = needs.gpus(job, **of_job), needs.nodes(job, **of_job)
            place = f"{rule.name} of {name} on gpu: {gpus}, nodes: {nodes} (set-resources of the profile, or --set-resources)"
            if nodes > 1 and not on_slurm:
                raise UserError(f"{place}: several nodes need Slurm (--profile slurm)")
            if nodes > 1 and gpus % nodes:
                raise UserError(f"{place}: gpu counts the GPUs of all nodes and must be a multiple of nodes")
            recipe = parse_settings(kind, study.recipe(entry["recipe"]), f"{rule.name} of {name}: {entry['recipe']}")
            try:
                accumulation(recipe, max(gpus, 1))
            except UserError as error:
                raise UserError(f"{place}: {entry['recipe']}: {error}") from None


def capped(site: dict, needs: Needs, wanted, ceiling: str, sharing: Callable[[], int]):
    """Return a resource that follows the rule's own, up to the ceiling of the job's partition, which rules that share a job share."""
    return lambda *args, **context: min(
        wanted.evaluate(*args, **context).value, partition_of(site, needs.gpus(*args, **context))[ceiling] // sharing()
    )


def cuts(needed: int, ceiling: int) -> int:
    """Return how often a stage is interrupted whose time limit is cut to the ceiling."""
    return ceil(needed / ceiling) - 1


def hold_driver_lock() -> BinaryIO:
    """Take the lock of the run's driver until this process ends; raise UserError where another driver is alive."""
    DRIVER_LOCK.parent.mkdir(exist_ok=True)
    file = open(DRIVER_LOCK, "a+b")  # noqa: SIM115 (held as long as the process)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode() or "unknown"
        raise UserError(
            f"{DRIVER_LOCK}: another driver of this folder is alive ({holder}); stop it first (SIGINT) or let it work"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file
