"""A plan in people's words: the table of `make plan`, the chain of causes of `audit.py why`, and JSON for scripts."""

from collections.abc import Iterator
from pathlib import Path

from tabulate import SEPARATING_LINE, tabulate

from psychocounsel.budget import read_ledger, total
from psychocounsel.endpoints import is_remote
from psychocounsel.estimates import ABOUT, AT_MOST, EXACT, Count, paper
from psychocounsel.plan import Job, distinct, nearest, plan

CODE_VERSION = 1  # no result depends on a plan

NEEDS = ("requests", "tokens in", "tokens out", "money", "GPU hours")
MARKS = {EXACT: "", ABOUT: "~", AT_MOST: "≤"}


def needs(job: Job) -> dict[str, Count]:
    """Return what a job needs, by NEEDS."""
    needed = {name: Count(0, EXACT) for name in NEEDS} | {"GPU hours": Count(job.gpu_hours, job.gpu_meant)}
    if job.asks and job.asks["left"]:
        number = job.asks["left_meant"]
        length = max(number, AT_MOST if job.asks["bound"] else ABOUT)
        needed["requests"] = Count(job.asks["left"], number)
        needed["tokens in"] = Count(job.asks["prompt_tokens"], max(number, ABOUT))
        needed["tokens out"] = Count(job.asks["completion_tokens"], length)
        needed["money"] = Count(job.asks["cost"] or 0, length)
    return needed


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
    if any(count.meant for _, count in counts):
        yield "~ is about, ≤ at most; a sum is as vague as its vaguest part."
    if asking:
        yield "Requests are those that the journals do not answer yet; answers that must be asked again are not counted."
    if flying := sum(job.asks.get("under_way", 0) for job in jobs if job.asks):
        yield f"{flying:,} requests more are on their way in batches, and paid: they are collected, not counted here."
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
    if budget := next((job.option("--budget") for job in asking if job.option("--budget")), None):
        spent = total(read_ledger(Path(next(job.option("--ledger") for job in asking if job.option("--budget")))))
        money = sums(jobs)["money"]
        over = spent + money.value > float(budget)
        end = (
            "may pass it: the run stops before"
            if over and money.meant == AT_MOST
            else "passes it: the run stops before"
            if over
            else "stays below"
        )
        yield f"Budget: {dollars(float(budget))}, of which ${spent:,.2f} are spent; this plan {end}."
    if unpriced := sorted({job.asks["model"] for job in asking if is_remote(job.asks["endpoint"]) and job.asks["cost"] is None}):
        yield f"No price in the registry, so not in the sum: {', '.join(unpriced)}."
    if any(job.gpu_meant == AT_MOST for job in jobs):
        yield "≤ GPU hours: the jobs' time limits times their GPUs; ~ GPU hours: from the time that the rule took before."
    elif any(job.gpu_hours for job in jobs):
        yield "~ GPU hours: from the time that the rule took before."
    if adopting := dict.fromkeys(job.rule for job in jobs if (kept := job.option("--reuse")) and Path(kept).is_dir()):
        yield f"On inputs that come out the same, these adopt their finished outputs from work/cache in seconds: {', '.join(adopting)}."
    for job in jobs:
        if job.complaint:
            yield f"{job.rule}: requests unknown: {job.complaint}"


def unread(jobs: list[Job]) -> bool:
    """Whether the number of speeches is neither counted nor limited."""
    return any(job.program in ("select_speeches", "read_pairs") and not job.settings["limit"] and not job.record for job in jobs)


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
        yield from chain(distinct(above for job in group for above in nearest(job)), told, depth + 1)
