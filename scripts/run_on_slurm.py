"""Start a run on Slurm, or take it up after its driver was killed; then Snakemake has the word.

The driver is the process that submits jobs. When it is killed, its jobs live on and its lock stays. This program asks Slurm
whether it would take such jobs as the site file describes, refuses while another driver of this folder is alive, cancels the
waiting jobs of a killed one, waits for its running ones (or cancels them: a training saves first), unlocks, and becomes
`snakemake --profile slurm` with the remaining arguments. Nothing that a job has finished is done again.

    python scripts/run_on_slurm.py --configfile mine.yaml         # in a tmux session on a login node
    sbatch profiles/slurm/driver.sbatch --configfile mine.yaml    # or as a job
"""

import argparse
import getpass
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from psychocounsel import site as sites
from psychocounsel.config import check_config_files, locate
from psychocounsel.errors import UserError

PROFILE = Path("profiles/slurm/config.yaml")
LOCKS = Path(".snakemake/locks")
LOOK_EVERY_S = 5


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--orphans", choices=["wait", "cancel"], default="wait", help="what becomes of a killed driver's running jobs")
    parser.add_argument("--check", action="store_true", help="only ask Slurm whether it would take the site file's jobs")
    args, for_snakemake = parser.parse_known_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs find this environment's python
    snakemake = [sys.executable, "-m", "snakemake", "--profile", "slurm", *for_snakemake]
    try:
        check_config_files(for_snakemake)
        check_site(sites.site_file())
        if args.check:
            return
        with sites.hold_driver_lock():
            wait_for_orphans(cancel=args.orphans == "cancel")
            if LOCKS.is_dir() and any(LOCKS.iterdir()):
                say("unlocking what a killed driver left locked")
                subprocess.run([*snakemake, "--unlock", "--quiet", "all"], check=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    os.execv(sys.executable, snakemake)  # rules/site.smk takes the lock again


def say(text: str) -> None:
    """Tell the user."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def check_site(file: Path) -> None:
    """Raise UserError, with file, line and key, where Slurm would refuse jobs as the site file describes them, or never start them."""
    site = sites.load_site(file)
    if not shutil.which("sbatch"):
        raise UserError("no sbatch here: start the run on a login node of the cluster (or use profiles/local on one machine)")
    answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"Slurm does not answer here: {' '.join(answer.stderr.split())}. Start the run on a login node, or try again later")
    complaints = [text for kind in ("cpu", "gpu") for text in refusals(site, kind, file)]
    if complaints:
        raise UserError("\n  ".join([f"Slurm would not run the jobs that {file} describes:", *complaints]))
    say(f"{file}: Slurm takes such jobs (account {site['account']}, partitions {site['cpu']['partition']} and {site['gpu']['partition']})")


def refusals(site: dict, kind: str, file: Path) -> Iterator[str]:
    """Yield what Slurm has against the jobs of one kind: the options are added one by one, so that the one at fault has a name."""
    request: list[str] = []
    for key, options in requests(site, kind):
        request += options
        tried = subprocess.run(["sbatch", "--test-only", *request, "--wrap", "true"], capture_output=True, text=True)
        if tried.returncode:
            said = " ".join(tried.stderr.split()).removeprefix("sbatch: error: ")
            yield f"{locate(tuple(key.split('.')), [file])}: {key}: {' '.join(options)} is refused: {said}. sinfo shows what there is."
            return
    limit = time_limit(site[kind]["partition"])
    if site[kind]["max_runtime"] > limit:
        place = locate((kind, "max_runtime"), [file])
        yield f"{place}: {kind}.max_runtime: the partition allows {limit} minutes; jobs that ask for more would wait for ever."


def requests(site: dict, kind: str) -> Iterator[tuple[str, list[str]]]:
    """Yield key and options of sbatch for the jobs of one kind."""
    block, asked = site[kind], sites.slurm_resources(site, gpus=int(kind == "gpu"), internet=False)
    yield "account", ["--account", site["account"], "--ntasks", "1"]
    yield f"{kind}.partition", ["--partition", block["partition"]]
    if block["qos"]:
        yield f"{kind}.qos", ["--qos", block["qos"]]
    if block["constraint"]:
        yield f"{kind}.constraint", ["--constraint", block["constraint"]]
    yield f"{kind}.max_mem_mb", ["--mem", str(block["max_mem_mb"])]
    if asked["gres"]:
        yield f"{kind}.model" if block["model"] else f"{kind}.request", [f"--gres={asked['gres']}"]
    elif asked["gpu"]:
        yield f"{kind}.model" if block["model"] else f"{kind}.request", [f"--gpus={block['model'] + ':' if block['model'] else ''}1"]
    if kind == "cpu" and site["internet_partition"]:
        yield "internet_partition", ["--partition", site["internet_partition"]]


def time_limit(partition: str) -> float:
    """Return a partition's time limit in minutes."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "partition", partition], capture_output=True, text=True).stdout
    found = re.search(r"\bMaxTime=(?:(\d+)-)?(\d+):(\d+):(\d+)", shown)
    if not found:
        return float("inf")  # UNLIMITED, or not told
    days, hours, minutes, _ = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes


def orphans() -> dict[str, str]:
    """Return id and state of the jobs that a driver of this folder has submitted and that are not over."""
    prefix = yaml.safe_load(PROFILE.read_text())["slurm-jobname-prefix"]
    shown = subprocess.run(["squeue", "--user", getpass.getuser(), "--noheader", "--format", "%i|%T|%j|%Z"], capture_output=True, text=True)
    if shown.returncode:
        raise UserError(f"squeue does not answer, so a killed driver's jobs cannot be found: {shown.stderr.strip()}. Try again later")
    jobs = (line.split("|", maxsplit=3) for line in shown.stdout.splitlines())
    ours = re.compile(rf"{re.escape(prefix)}_[0-9a-f-]{{36}}")
    return {job: state for job, state, name, folder in jobs if ours.fullmatch(name) and Path(folder).resolve() == Path.cwd()}


def wait_for_orphans(cancel: bool) -> None:
    """Cancel the waiting jobs of a killed driver; wait until its running ones are over, or cancel those too."""
    found = orphans()
    pending = [job for job, state in found.items() if state == "PENDING"]
    if doomed := list(found) if cancel else pending:
        say(f"cancelling jobs of a killed driver: {', '.join(doomed)}")
        subprocess.run(["scancel", *doomed], check=True)
    told: dict[str, str] = {}
    while found := orphans():
        if found != told:
            say(f"waiting for jobs of a killed driver: {', '.join(f'{job} ({state})' for job, state in found.items())}")
            told = found
        time.sleep(LOOK_EVERY_S)


if __name__ == "__main__":
    main()
