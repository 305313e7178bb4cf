"""How many requests a job will send, and how long they are, while its inputs are still to be made.

A file that lies there and stays is counted. One that is still to be made has as many rows as the settings of the job that
makes it say; the number of speeches, where no limit says it, is the paper's, and so are the lengths of speeches.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from psychocounsel.config import read_yaml
from psychocounsel.endpoints import read_endpoint
from psychocounsel.journal import peek
from psychocounsel.pricing import expected_cost, expected_tokens, read_price, usages
from psychocounsel.prompts import render
from psychocounsel.records import iter_json_lines

CODE_VERSION = 1  # no result depends on an estimate

EXACT, ABOUT, AT_MOST = range(3)  # how a number is meant; a sum is as vague as its vaguest part
PAPER = Path("config/paper.yaml")
RESPONSE_CHARACTERS = 1400  # mean of the published responses


class Count(NamedTuple):
    """A number, and how it is meant."""

    value: int
    meant: int


def times(count: Count, factor: float, meant: int = EXACT) -> Count:
    """Return a multiple of a number."""
    return Count(round(count.value * factor), max(count.meant, meant))


def expected_requests(job, makers: dict) -> dict:
    """Return what a job that asks a model will ask, in the form of `--plan`; `makers` holds the jobs still to run by their outputs."""
    model, kind = job.settings["model"], read_endpoint(job.option("--endpoints"), job.settings["model"]["endpoint"]).kind
    requests = requests_of(job, makers)
    left = Count(0, EXACT) if kind == "local" else requests
    seen = usages(peek(Path(job.option("--journal"))).values(), model["id"], kind)
    longest = (model.get("sampling") or {}).get("max_tokens", 0)
    tokens = expected_tokens([prompt_characters(job)] * left.value, seen, None, longest)
    if seen:  # of this job's own earlier requests
        tokens["prompt_tokens"] = round(left.value * sum(usage["prompt_tokens"] or 0 for usage in seen) / len(seen))
    facts = {"model": model["name"], "endpoint": kind, "requests": requests.value, "left": left.value}
    price = expected_cost(read_price(job.options("--prices"), model["name"]), tokens, kind)
    return {
        **facts,
        **tokens,
        "cost": price,
        "bound": left.value > 0 and not seen,
        "left_meant": max(left.meant, AT_MOST if seen else EXACT),
    }


def requests_of(job, makers: dict) -> Count:
    """Return the number of requests of a job."""
    if job.program == "label_topics":
        return times(speeches(job.option("--speeches"), None, makers), 1, AT_MOST)  # those that the source labels are not asked about
    if job.program == "rate_responses":
        rated, sample = speeches(job.option("--speeches"), None, makers), job.settings.get("sample")
        return times(Count(min(rated.value, sample or rated.value), rated.meant), calls(job))
    if job.program == "judge_answers":
        return times(speeches(job.option("--speeches"), "test", makers), 2 * calls(job))
    if job.program == "rank_pairs":
        return times(pairs(job.option("--pairs"), makers), 2)
    asked = (
        assignments(path, makers)
        if (path := job.option("--assignment"))
        else speeches(job.option("--speeches"), job.option("--split"), makers)
    )
    return times(asked, job.settings.get("samples", 1) * (2 if job.option("--length-of") else 1))


def calls(job) -> int:
    """Return how often a judge is asked about the same: once, or about one principle at a time."""
    return len(job.settings["principles"]) if job.settings["protocol"] == "one_by_one" else 1


def speeches(path: str, split: str | None, makers: dict) -> Count:
    """Return the number of speeches in a file, of one split or all."""
    job = makers.get(path)
    if job is None:
        rows = (row for _, row in iter_json_lines(Path(path)))
        return Count(sum(split in (None, row.get("split")) for row in rows), EXACT)
    if job.program in ("select_speeches", "read_pairs"):
        return selected(job, path)
    if job.program == "sample_prompts" and job.settings["speeches"] is not None:
        return Count(job.settings["speeches"], ABOUT)
    if job.program == "sample_prompts":
        return speeches(job.option("--speeches"), job.settings["split"], makers)
    total = speeches(job.option("--speeches"), None, makers)
    test = min(job.settings["test_speeches"], total.value)
    train = (total.value - test) * (1 - job.settings["dev_fraction"])
    return Count(round({None: total.value, "test": test, "train": train}[split]), max(total.meant, ABOUT) if split else total.meant)


def selected(job, path: str) -> Count:
    """Return the number of speeches that will be selected: as many as now where there are some, the limit, or the paper's number."""
    limit = job.settings["limit"]
    if Path(path).is_file():
        now = sum(1 for _ in iter_json_lines(Path(path)))
        return Count(min(now, limit or now), ABOUT)
    return Count(limit, AT_MOST) if limit else Count(paper()["speeches"]["total"], ABOUT)


def assignments(path: str, makers: dict) -> Count:
    """Return the number of speeches that are assigned to a model: each model of the pool gets an equal share."""
    job = makers.get(path)
    if job is None:
        return Count(sum(1 for _ in iter_json_lines(Path(path))), EXACT)
    share = job.settings["models_per_speech"] / len(job.settings["pool"])
    return times(speeches(job.option("--speeches"), None, makers), share, ABOUT)


def pairs(path: str, makers: dict) -> Count:
    """Return the number of test pairs: at most one a test speech."""
    job = makers.get(path)
    if job is None:
        return Count(sum(1 for _ in iter_json_lines(Path(path))), EXACT)
    return times(speeches(job.option("--speeches"), "test", makers), 1, AT_MOST)


def prompt_characters(job) -> int:
    """Return the length of a job's prompts with a speech of the paper's mean length and responses like the published ones."""
    principles, shown = job.settings.get("principles"), paper()["responses_per_speech"] if job.program == "rate_responses" else 2
    text = render(
        job.settings["prompt"],
        client_speech="x" * paper()["speeches"]["mean_chars"],
        responses=["x" * RESPONSE_CHARACTERS] * shown,
        principle=principles[0] if principles else None,
        principles=principles,
        coarse=job.settings.get("taxonomy"),
    )
    return len(text) + len(job.settings["model"].get("instruction") or "")


@cache
def paper() -> dict:
    """Return what the paper says of its data set."""
    return read_yaml(PAPER)["dataset"]
