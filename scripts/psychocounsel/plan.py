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
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from tabulate import SEPARATING_LINE, tabulate

from psychocounsel.changes import changed_code, changed_settings
from psychocounsel.errors import UserError
from psychocounsel.estimates import ABOUT, AT_MOST, EXACT, Count, expected_requests, paper
from psychocounsel.fingerprint import code_modules
from psychocounsel.provenance import read_record, record_path

CODE_VERSION = 1  # no result depends on a plan

MARKS = {EXACT: "", ABOUT: "~", AT_MOST: "≤"}
NOT_MADE = "not made yet"
NEEDS = ("requests", "tokens in", "tokens out", "money", "GPU hours")


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
    minutes, gpus = event.resources.get("runtime"), event.resources.get("gpu")
    return Job(
        rule=event.rule_name,
        wildcards=dict(event.wildcards),
        inputs=list(event.input),
        outputs=list(event.output),
        reason=event.reason,
        command=words[start:end],
        gpus=gpus if isinstance(gpus, int) else 0,
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
        job.asks = job.least = counted(job)
        return
    job.asks = job.least = expected_requests(job, makers)
    if there and job.record:
        answered = not changed_settings(job.record["identity"]["settings"], job.settings) and Path(job.option("--journal")).is_file()
        job.least = job.asks | {"left": 0, "cost": 0} if answered else counted(job)


def counted(job: Job) -> dict | None:
    """Return what a job's program would ask with its inputs as they lie there."""
    done = subprocess.run([sys.executable, *job.command, "--plan"], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout) | {"left_meant": EXACT}
    job.complaint = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), "its program failed")
    return None


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


# In words -----------------------------------------------------------------------------------------------------------------------------


def needs(job: Job) -> dict[str, Count]:
    """Return what a job needs, by NEEDS."""
    asks = job.asks or {"left": 0, "left_meant": EXACT, "prompt_tokens": 0, "completion_tokens": 0, "cost": None, "bound": False}
    number = asks["left_meant"]
    length = max(number, AT_MOST if asks["bound"] else ABOUT)
    return {
        "requests": Count(asks["left"], number),
        "tokens in": Count(asks["prompt_tokens"], max(number, ABOUT)),
        "tokens out": Count(asks["completion_tokens"], length),
        "money": Count(asks["cost"] or 0, length),
        "GPU hours": Count(job.gpu_hours, job.gpu_meant),
    }


def sums(jobs: list[Job]) -> dict[str, Count]:
    """Return what jobs need together; a sum is as vague as its vaguest part."""
    parts = [needs(job) for job in jobs]
    return {
        name: Count(sum(part[name].value for part in parts), max((part[name].meant for part in parts if part[name].value), default=EXACT))
        for name in NEEDS
    }


def printed(name: str, count: Count) -> str:
    """Return a number as people read it."""
    if not count.value:
        return "-"
    if name == "money":
        number = dollars(count.value)
    elif name == "GPU hours":
        number = f"{count.value:,.2f}"
    elif name != "requests" and count.value >= 1e5:
        number = f"{count.value / 1e6:,.1f} M"
    else:
        number = f"{count.value:,.0f}"
    return f"{MARKS[count.meant]}{number}"


def dollars(amount: float) -> str:
    """Return an amount of money; of less than a cent, the first digits that tell."""
    return f"${amount:,.2f}" if amount >= 0.01 else f"${amount:.1g}"


def alike(jobs: list[Job]) -> list[list[Job]]:
    """Return the jobs of one rule that would run for the same reasons together, in the order of the jobs."""
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.rule, *(cause.words for cause in job.causes)), []).append(job)
    return list(groups.values())


def reasons(jobs: list[Job]) -> str:
    """Return the reasons that jobs have in common."""
    more = f" (and {len(jobs) - 1} like it)" if len(jobs) > 1 else ""
    return "; ".join(cause.words.format(cause.file) + (more if cause.file else "") for cause in jobs[0].causes)


def table(jobs: list[Job]) -> str:
    """Return the plan for people: a line for the jobs of a rule and a reason, sums, and what the numbers rest on."""
    if not jobs:
        return "Nothing to do: what is asked for is there and agrees with the config and the code."
    rows = [[group[0].rule, len(group), *numbers(group), reasons(group)] for group in alike(jobs)]
    rows += [SEPARATING_LINE, ["total", len(jobs), *numbers(jobs), ""]]
    text = tabulate(
        rows,
        ["rule", "jobs", *NEEDS, "why"],
        "simple",
        colalign=["left", *["right"] * (len(NEEDS) + 1), "left"],
        maxcolwidths=[*[None] * (len(NEEDS) + 2), 76],
    )
    return "\n\n".join([text, "\n".join(footnotes(jobs))]).rstrip()


def numbers(jobs: list[Job]) -> list[str]:
    """Return the table's numbers for some jobs."""
    return [printed(name, count) for name, count in sums(jobs).items()]


def footnotes(jobs: list[Job]) -> Iterator[str]:
    """Yield what the numbers of a plan rest on."""
    counts = [(name, count) for job in jobs for name, count in needs(job).items() if count.value]
    asking = [job for job in jobs if job.asks and job.asks["left"]]
    if asking:
        yield "Requests are those that the journals do not answer yet; answers that must be asked again are not counted."
    if any(name == "requests" and count.meant for name, count in counts):
        sizes = f"; of the speeches, where no limit says, the paper's {paper()['speeches']['total']:,}" if unread(jobs) else ""
        yield f"~ or ≤ requests: their inputs are still to be made, so their number is the config's{sizes}."
    if any(job.asks["bound"] for job in asking):
        yield "≤ tokens out, money: with no journalled answer to go by, each counts as the longest (max_tokens), and no input as cached."
    least = [job.least for job in jobs if job.least]
    if (left := sum(asks["left"] for asks in least)) < sum(job.asks["left"] for job in asking):
        spent = sum(asks["cost"] or 0 for asks in least)
        price = f" (about {dollars(spent)})" if spent else ""
        yield f"Where rerun stages bring the same again, {left:,} requests{price} are left in all: the journals answer the others."
    if any(job.asks["cost"] for job in asking):
        yield "Money is by the list prices of the models' registry."
    if unpriced := sorted({job.asks["model"] for job in asking if job.asks["endpoint"] == "openai" and job.asks["cost"] is None}):
        yield f"No price in the registry, so not in the sum: {', '.join(unpriced)}."
    if any(job.gpu_meant == AT_MOST for job in jobs):
        yield "≤ GPU hours: the jobs' time limits times their GPUs; ~ GPU hours: from the time that the rule took before."
    elif any(job.gpu_hours for job in jobs):
        yield "~ GPU hours: from the time that the rule took before."
    if adopting := dict.fromkeys(job.rule for job in jobs if (kept := job.option("--reuse")) and Path(kept).is_dir()):
        yield f"On inputs that come out the same, these adopt their finished outputs from work/cache in seconds: {', '.join(adopting)}."
    for job in jobs:
        if job.complaint:
            yield f"{job.rule}: requests unknown: {job.complaint.removeprefix('error: ')}"


def unread(jobs: list[Job]) -> bool:
    """Whether the number of speeches is neither counted nor limited."""
    return any(job.program == "select_speeches" and not job.settings["limit"] and not job.record for job in jobs)


def as_json(jobs: list[Job]) -> dict:
    """Return the plan for scripts."""

    def counts(of: dict[str, Count]) -> dict:
        words = {EXACT: "exact", ABOUT: "about", AT_MOST: "at most"}
        return {name.replace(" ", "_"): {"value": count.value, "meant": words[count.meant]} for name, count in of.items()}

    listed = [
        {
            "rule": job.rule,
            "wildcards": job.wildcards,
            "outputs": job.outputs,
            "why": [cause.words.format(cause.file) for cause in job.causes],
            "needs": counts(needs(job)),
            "complaint": job.complaint,
        }
        for job in jobs
    ]
    return {"jobs": listed, "sums": counts(sums(jobs)), "notes": list(footnotes(jobs))}


def explain(target: str, words: list[str]) -> str:
    """Return why a file or rule would be made again, down to the causes, and what that costs; `words` go to Snakemake."""
    jobs = plan([target, *words])
    if not jobs:
        return f"{target} is up to date: nothing would run."
    below = {id(above) for job in jobs for above in job.above}
    ends = [job for job in jobs if target in job.outputs] or [job for job in jobs if id(job) not in below]
    spent = ", ".join(f"{printed(name, count)} {name}".removesuffix(" money") for name, count in sums(jobs).items() if count.value)
    head = f"{target}: {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'} would run ({spent or 'nothing asked, no GPU'})."
    return "\n".join([head, *chain(ends, set(), 1), "", *footnotes(jobs)]).rstrip()


def chain(jobs: list[Job], told: set[int], depth: int) -> Iterator[str]:
    """Yield the causes of jobs, and under each line those of the jobs that it follows from; a job is told of once."""
    fresh = [job for job in jobs if id(job) not in told]
    told.update(map(id, fresh))
    for group in alike(fresh):
        count = f" ({len(group)} jobs)" if len(group) > 1 else ""
        yield f"{'  ' * depth}{group[0].rule}{count}: {reasons(group)}"
        yield from chain(distinct(above for job in group for above in job.above), told, depth + 1)
