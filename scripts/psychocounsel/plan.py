"""What Snakemake would run, why, in people's words, and what it would cost: behind plan_run.py and `audit.py why`.

Which jobs would run is Snakemake's own decision: its dry run is asked, in this process. Why is read from the provenance
records of the files that lie there. Requests are counted by the programs themselves (--plan) where their inputs are there
and stay as they are, else estimated.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from psychocounsel.changes import changed_code, changed_settings
from psychocounsel.config import check_config_files
from psychocounsel.errors import UserError
from psychocounsel.estimates import ABOUT, AT_MOST, EXACT, expected_requests
from psychocounsel.fingerprint import code_modules
from psychocounsel.provenance import read_record, record_path
from psychocounsel.site import requested_gpus

CODE_VERSION = 1  # no result depends on a plan

NOT_MADE = "not made yet"


@dataclass
class Job:
    """A job of Snakemake's dry run."""

    rule: str
    wildcards: dict
    inputs: list[str]
    outputs: list[str]
    reason: str  # in Snakemake's words
    command: list[str]  # the program and its arguments, without redirections
    gpus: int
    limit_s: int | None  # seconds after which the job would be stopped
    causes: list["Cause"] = field(default_factory=list)
    above: list["Job"] = field(default_factory=list)  # the jobs that make its inputs
    asks: dict | None = None  # what it would ask of a model (chat.planned, estimates.expected_requests)
    least: dict | None = None  # the same where its inputs come out as they lie there now
    complaint: str | None = None  # why its program could not tell
    gpu_hours: float = 0.0
    gpu_meant: int = EXACT

    @property
    def program(self) -> str:
        """The program's name."""
        return Path(self.command[0]).stem

    def options(self, flag: str) -> list[str]:
        """Return the values of an option of the command line."""
        if flag not in self.command:
            return []
        rest = self.command[self.command.index(flag) + 1 :]
        return rest[: next((n for n, word in enumerate(rest) if word.startswith("--")), len(rest))]

    def option(self, flag: str) -> str | None:
        """Return the value of an option of the command line, or None."""
        return next(iter(self.options(flag)), None)

    @cached_property
    def settings(self) -> dict:
        """The settings that the program would get."""
        values = json.loads(self.option("--settings") or "{}")
        return {key: value for key, value in values.items() if key != "job"}

    @cached_property
    def record(self) -> dict | None:
        """The provenance record of its present outputs, if there is a sound one."""
        for output in map(Path, self.outputs):
            try:
                return read_record(record_path(output))
            except (FileNotFoundError, UserError):
                continue
        return None


@dataclass(frozen=True)
class Cause:
    """Why a job would run; of several jobs with the same words, the first file stands for all."""

    words: str  # "{}" stands for the file
    file: str | None = None


# What would run -----------------------------------------------------------------------------------------------------------------------


class Tap(logging.Filter):
    """Takes the jobs out of Snakemake's log and lets only complaints pass."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a job's event; say whether the record is printed."""
        if getattr(record, "event", None) == "job_info":
            self.jobs.append(record)
        return record.levelno >= logging.WARNING


def dry_run(words: list[str]) -> list[Job]:
    """Return the jobs that Snakemake would run with these words on its command line, in the order of their dependencies."""
    from snakemake import cli

    check_config_files(words)
    tap, logger = Tap(), logging.getLogger("snakemake.logging")
    logger.addFilter(tap)  # Snakemake removes handlers that are not its own
    try:
        cli.main(["--dry-run", *words])
    except SystemExit as end:
        if end.code:
            raise UserError("Snakemake cannot plan this run; its message stands above.") from None
    finally:
        logger.removeFilter(tap)
    return [as_job(record) for record in tap.jobs if record.shellcmd]


def as_job(event: logging.LogRecord) -> Job:
    """Return the job of an event of Snakemake's log."""
    words = shlex.split(event.shellcmd)
    start = next(number for number, word in enumerate(words) if word.startswith("scripts/") and word.endswith(".py"))
    end = next((number for number, word in enumerate(words) if word == "2>"), len(words))
    minutes = event.resources.get("runtime")
    return Job(
        rule=event.rule_name,
        wildcards=dict(event.wildcards),
        inputs=list(event.input),
        outputs=list(event.output),
        reason=event.reason,
        command=words[start:end],
        gpus=requested_gpus(event.resources),
        limit_s=60 * minutes if isinstance(minutes, int) else None,
    )


def plan(words: list[str]) -> list[Job]:
    """Return the jobs that would run, each with its causes and what it would cost, in the order of the run's numbered folders."""
    jobs = sorted(dry_run(words), key=folder)
    makers = {output: job for job in jobs for output in job.outputs}
    for job in jobs:
        job.above = distinct(makers[path] for path in job.inputs if path in makers)
    for job in jobs:
        job.causes = list(causes(job))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as programs:
        list(programs.map(lambda job: ask_program(job, makers), jobs))
    for job in jobs:
        job.gpu_hours, job.gpu_meant = gpu_hours(job)
    return jobs


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Return each job once."""
    return list({id(job): job for job in jobs}.values())


def folder(job: Job) -> tuple[str, ...]:
    """Return the folder of a run that a job writes to, e.g. results/demo/04_ratings; what lies outside of results/ comes first."""
    parts = Path(job.outputs[0]).parts
    return parts[:3] if parts[0] == "results" else ()


# Why ----------------------------------------------------------------------------------------------------------------------------------


def causes(job: Job) -> Iterator[Cause]:
    """Yield why a job would run: what concerns itself, then what it only follows from."""
    own = list(own_causes(job))
    yield from own
    if job.above and not (own and own[0].words == NOT_MADE):
        yield Cause(f"follows from {', '.join(dict.fromkeys(above.rule for above in nearest(job)))}")
    elif not own:
        yield Cause(job.reason)


def own_causes(job: Job) -> Iterator[Cause]:
    """Yield the causes that lie in the job itself, in its settings, code and files."""
    reasons = said(job.reason)
    if "Forced execution" in reasons:
        yield Cause("forced on the command line")
    missing = reasons.get("Missing output files", [])
    if missing and not job.record and not any(Path(output).exists() for output in job.outputs):
        yield Cause(NOT_MADE)
        return
    if missing:
        yield Cause("{} is missing", missing[0])
    if incomplete := reasons.get("Incomplete output files"):
        yield Cause("{} was left incomplete", incomplete[0])
    settings, code = [], []
    if job.record:
        settings = changed_settings(job.record["identity"]["settings"], job.settings)
        code = changed_code(job.record["identity"]["modules"], modules(job.program))
    yield from map(Cause, [escaped(words) for words in [*settings, *code]])
    if "Params have changed since last execution" in reasons and not settings + code:
        yield Cause("another parameter of its rule changed" if job.record else "settings or code changed (no sound record tells which)")
    if "Code has changed since last execution" in reasons:
        yield Cause("command line of its rule changed")
    if "Software environment definition has changed since last execution" in reasons:
        yield Cause("its conda environment changed")
    for path in reasons.get("Updated input files", []):
        yield Cause("input {} changed", path)
    if "Set of input files has changed since last execution" in reasons and not settings:
        yield Cause("other input files")


def nearest(job: Job) -> list[Job]:
    """Return the jobs that make a job's inputs, without those that the others among them follow from."""
    farther = {id(one) for above in job.above for one in everything_above(above)}
    return [above for above in job.above if id(above) not in farther]


def everything_above(job: Job) -> list[Job]:
    """Return all jobs that a job follows from."""
    found, waiting = {}, list(job.above)
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            waiting.extend(one.above)
    return list(found.values())


def said(reason: str) -> dict[str, list[str]]:
    """Return the files of each phrase of Snakemake's reason."""
    phrases = (phrase.partition(": ") for phrase in reason.split("; "))
    return {phrase: files.split(", ") for phrase, _, files in phrases}


def escaped(words: str) -> str:
    """Return words that hold no place for a file."""
    return words.replace("{", "{{").replace("}", "}}")


modules = cache(code_modules)


# What it costs ------------------------------------------------------------------------------------------------------------------------


def ask_program(job: Job, makers: dict[str, Job]) -> None:
    """Note what a job would ask of a model: its program counts where its inputs stay as they are, else it is estimated."""
    if "--journal" not in job.command:
        return
    there = all(Path(path).is_file() for path in job.inputs)
    if there and not job.above:
        try:
            job.asks = job.least = counted(job)
        except UserError as error:
            job.complaint = str(error)
        return
    job.asks = job.least = expected_requests(job, makers)
    if there and job.record:
        answered = not changed_settings(job.record["identity"]["settings"], job.settings) and Path(job.option("--journal")).is_file()
        with suppress(UserError):  # what lies there now will be made anew
            job.least = job.asks | {"left": 0, "cost": 0} if answered else counted(job)


def counted(job: Job) -> dict:
    """Return what a job's program would ask with its inputs as they lie there; raise UserError with the program's complaint."""
    done = subprocess.run([sys.executable, *job.command, "--plan"], capture_output=True, text=True)
    if done.returncode:
        complaints = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(complaints[0] if complaints else f"{job.command[0]} --plan failed")
    return json.loads(done.stdout) | {"left_meant": EXACT}


def gpu_hours(job: Job) -> tuple[float, int]:
    """Return a job's GPU hours: by the time that its rule took before, a model's answers by their number, else its time limit."""
    left = job.asks["left"] if job.asks else None
    if not job.gpus or left == 0:
        return 0.0, EXACT
    record = job.record if job.record and measures(job.record) else latest_records(Path(*folder(job)[:2])).get(job.rule)
    if record is None:
        return job.gpus * (job.limit_s or 0) / 3600, AT_MOST
    share = left / newly_asked(record) if left else 1
    return job.gpus * share * record["run"]["seconds"] / 3600, ABOUT


@cache
def latest_records(folder: Path) -> dict[str, dict]:
    """Return by rule the last record that tells how long its work takes."""
    found: dict[str, dict] = {}
    for path in folder.rglob("*.prov.json"):
        record = json.loads(path.read_bytes())
        rule = (record["job"] or {}).get("rule")
        if measures(record) and (rule not in found or record["run"]["started"] > found[rule]["run"]["started"]):
            found[rule] = record
    return found


def measures(record: dict) -> bool:
    """Whether a run did its work: it adopted no outputs and asked something, if it asks at all."""
    return "adopted" not in record["run"]["facts"] and newly_asked(record) != 0


def newly_asked(record: dict) -> int | None:
    """Return the requests that a run sent, or None for a program that asks nothing."""
    api = record["run"]["facts"].get("api")
    return api["requests"] - api["from_journal"] if api else None
