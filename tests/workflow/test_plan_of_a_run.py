"""`make plan` on the finished micro run and on the paper's config: what would run, why, and the counts, recomputed by hand."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from psychocounsel.records import read_records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def plan(project, *words: str) -> dict:
    """Return the plan of the micro run."""
    command = [sys.executable, "scripts/plan_run.py", "--json", *words, *project.command()[3:]]
    done = subprocess.run(command, **project.options(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def why(planned: dict) -> dict[str, set[str]]:
    """Return the reasons of each rule's jobs."""
    found: dict[str, set[str]] = {}
    for job in planned["jobs"]:
        found.setdefault(job["rule"], set()).update(job["why"])
    return found


@contextmanager
def edited(file: Path, old: str, new: str) -> Iterator[None]:
    """Replace a text in a file for a while."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    try:
        yield
    finally:
        file.write_text(text)


def test_a_finished_run_has_nothing_to_do(project, finished):
    assert plan(project)["jobs"] == []
    command = [sys.executable, "scripts/plan_run.py", *project.command()[3:]]
    done = subprocess.run(command, **project.options(), capture_output=True, text=True)
    assert done.stdout.startswith("Nothing to do")


def test_a_principles_definition_is_named_and_the_rest_follows(project, finished):
    with edited(project.folder / "config/principles.yaml", "The response should be clear,", "The response must be clear,"):
        reasons = why(plan(project))
    assert reasons["rate_responses"] == {"principle 'clarity' changed: definition"}
    assert reasons["parse_ratings"] == {"follows from rate_responses"}
    assert reasons["judge_answers"] == {"principle 'clarity' changed: definition", "follows from answer_speeches"}
    assert "generate_responses" not in reasons


def test_a_models_new_sampling_costs_its_assigned_speeches(project, finished):
    models, asked = project.folder / "tests/workflow/micro_models.yaml", len(project.server.requests)
    journal = project.folder / "work/micro/journal/responses/scripted-advice.jsonl"
    before = journal.read_bytes()
    with (
        edited(models, "price: {input: 0, cached_input: 0, output: 0}", "price: {input: 1000, cached_input: null, output: 3000}"),
        edited(
            models, "scripted-advice: {extends: scripted-warm,", "scripted-advice: {extends: scripted-warm, sampling: {temperature: 0.5},"
        ),
    ):
        planned = plan(project, str(project.path("03_responses/scripted-advice.jsonl").relative_to(project.folder)))
    assert [(job["rule"], job["why"]) for job in planned["jobs"]] == [
        ("generate_responses", ["temperature of scripted-advice: 1.0 -> 0.5"])
    ]
    needs = planned["jobs"][0]["needs"]
    assigned = len(read_records(project.path("03_responses/assignments/scripted-advice.jsonl"), "assignment"))
    assert needs["requests"] == {"value": assigned, "meant": "exact"}
    usage = [json.loads(line)["answer"]["usage"] for line in before.splitlines()]
    assert needs["tokens_out"]["value"] == pytest.approx(sum(u["completion_tokens"] for u in usage), abs=1)
    money = (needs["tokens_in"]["value"] * 1000 + needs["tokens_out"]["value"] * 3000) / 1e6
    assert needs["money"] == {"value": pytest.approx(money, abs=1e-5), "meant": "about"}
    assert (len(project.server.requests), journal.read_bytes()) == (asked, before)


def test_a_lost_result_is_named(project, finished):
    lost = project.path("summary.txt")
    kept = lost.rename(lost.with_suffix(".kept"))
    try:
        reasons = why(plan(project))
    finally:
        kept.rename(lost)
    assert reasons == {"summarise_run": {"results/micro/summary.txt is missing"}}


def test_the_audit_tells_why_down_to_the_cause(project, finished):
    command = [sys.executable, "scripts/audit.py", "why", "results/micro/10_tables/pool.csv", "--configfile"]
    command += ["tests/workflow/micro.yaml", "work/micro_sources.yaml"]
    with edited(project.folder / "config/principles.yaml", "The response should be clear,", "The response must be clear,"):
        told = subprocess.run(command, **project.options(), capture_output=True, text=True).stdout.splitlines()
    assert told[0].startswith("results/micro/10_tables/pool.csv: ")
    assert "make_tables: follows from" in told[1]
    assert any("rate_responses: principle 'clarity' changed: definition" in line for line in told)
    after = subprocess.run(command, **project.options(), capture_output=True, text=True).stdout
    assert after == "results/micro/10_tables/pool.csv is up to date: nothing would run.\n"


def test_the_papers_run_has_the_papers_counts():
    """Nothing of the paper's run is made here: its counts follow from its config and the paper's number of speeches."""
    command = [sys.executable, "scripts/plan_run.py", "--json", "--profile", "slurm", "--configfile", "config/config.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned, requests = json.loads(done.stdout), Counter()
    for job in planned["jobs"]:
        requests[job["rule"]] += job["needs"]["requests"]["value"]
        assert job["why"] == ["not made yet"]
    speeches, test = 26483, 3291
    train = round((speeches - test) * 0.9)
    assert requests["rate_responses"] == 7 * speeches == 185381
    assert requests["generate_responses"] == pytest.approx(4 * speeches, rel=1e-3)
    assert requests["judge_answers"] == 7 * 2 * 2 * test  # policies, settings, orders
    assert requests["judge_checkpoint"] == (6 * 8 + 2 * 16 + 2) * 2 * 500  # DPO, both arms of Figure 4, rounds of iterative DPO, bases
    assert requests["answer_speeches"] == 7 * 2 * test
    assert requests["answer_opponent"] == test
    assert requests["sample_responses"] == 8 * (2 * 16 * 6400 + 2 * train)
    assert planned["sums"]["requests"] == {"value": sum(requests.values()), "meant": "at most"}
    judge = next(job["needs"] for job in planned["jobs"] if job["rule"] == "rate_responses")
    assert judge["tokens_out"] == {"value": 185381 * 2048, "meant": "at most"}
    assert judge["money"]["value"] == pytest.approx((judge["tokens_in"]["value"] * 2.5 + 185381 * 2048 * 10) / 1e6)
    assert planned["sums"]["GPU_hours"]["value"] > 0
