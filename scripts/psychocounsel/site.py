"""What a site decides about Slurm jobs, apart from what rules need: read from profiles/slurm/site.yaml, applied to every rule.

Rules state needs (gpu, mem_mb, runtime, threads); a site says how its cluster wants to be asked for them. Nothing of this
is part of a result's identity: a change of the file reruns nothing. rules/site.smk calls `apply`; programs never come here.
"""

import fcntl
import os
import socket
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from typing import BinaryIO, NamedTuple

from psychocounsel.config import check_duplicate_keys, complain, locate, read_yaml, schema_errors
from psychocounsel.errors import UserError

SITE_FILE = Path("profiles/slurm/site.yaml")
DRIVER_LOCK = Path("work/driver.lock")
SPARE_RETRIES = 2  # as `retries` of the profile: for what a cut time limit does not explain
SIGNAL_LEAD_S = 60  # Slurm may warn a job so much earlier than asked
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
    """Return the GPUs of a job, whichever way its site asks for them (site.yaml: gpu.request)."""
    gpus = resources.get("gpu") or str(resources.get("gres") or "").rpartition(":")[2]
    return int(gpus) if str(gpus).isdigit() else 0


def slurm_resources(site: dict, gpus: int, internet: bool) -> dict[str, str | int | None]:
    """Return how a job with so many GPUs is asked for; None leaves a resource out."""
    block = partition_of(site, gpus)
    model, by_gres = site["gpu"]["model"], site["gpu"]["request"] == "gres"
    gres = ":".join(["gpu", *([model] if model else []), str(gpus)])
    return {
        "slurm_account": site["account"],
        "slurm_partition": site["internet_partition"] if internet and site["internet_partition"] else block["partition"],
        "qos": block["qos"],
        "constraint": block["constraint"],
        "gpu": None if by_gres or not gpus else gpus,
        "gpu_model": model if gpus and not by_gres else None,
        "gres": gres if gpus and by_gres else None,
        "slurm_extra": f"--signal=TERM@{site['warning_s']}",
    }


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
        needs = Needs(rule.name, rule.resources.get("gpu"), rule.resources.get("remote"))
        for name in slurm_resources(site, 0, False):
            if name == "gpu" or name not in chosen:
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
    remote: object

    def gpus(self, *args, **context) -> int:
        """Return the GPUs of one job."""
        return int(self.gpu.evaluate(*args, **context).value or 0)

    def internet(self, *args, **context) -> bool:
        """Say whether one job talks to the internet."""
        return self.rule in NEEDS_INTERNET or bool(self.remote.evaluate(*args, **context).value)


def asked(site: dict, needs: Needs, name: str):
    """Return a resource as Snakemake evaluates it for each job: what the site makes of the job's needs."""
    return lambda *args, **context: slurm_resources(site, needs.gpus(*args, **context), needs.internet(*args, **context))[name]


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
