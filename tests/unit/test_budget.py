"""The budget: whatever answers cost, and wherever a job is killed, what the endpoint bills stays below it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
import yaml
from fakes.batch_server import FakeBatches, Fate
from fakes.openai_server import FakeServer, Reply, completion, echo, error
from hypothesis import given, settings
from hypothesis import strategies as st

from psychocounsel import line
from psychocounsel.budget import OutOfBudget, Purse, read_ledger, total
from psychocounsel.chat import ChatRequest, complete
from psychocounsel.errors import UserError
from psychocounsel.journal import Journal
from psychocounsel.models import ModelSpec

PRICE = {"input": 1000.0, "cached_input": None, "output": 2000.0, "batch": 0.5}  # dollars a million tokens: a tenth of a cent a word
LONGEST = 8
MODEL = {
    **dict.fromkeys(("title", "group", "institution", "language", "licence"), "x"),
    **{"id": "org/model", "endpoint": "fake", "revision": None, "kind": "chat", "instruction": None, "system_role": True},
    **{"structured_output": "none", "sampling": {"temperature": 0.5, "top_p": None, "max_tokens": LONGEST}, "price": PRICE},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(line, "FIRST_PAUSE_S", 0.01)


def requests(count: int) -> list[ChatRequest]:
    return [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(count)]


def ask(folder: Path, url: str, count: int, budget: float | None, kind: str = "openai", journal: str = "journal/a.jsonl", **options):
    limits = {"concurrency": options.pop("concurrency", 4), "timeout_s": options.pop("timeout_s", 60), "max_retries": 2}
    entry = {"kind": kind, "base_url": url, **limits, "batch": {"poll_s": 0.01}}
    (folder / "endpoints.yaml").write_text(yaml.safe_dump({"fake": entry}))
    (folder / "models.yaml").write_text(yaml.safe_dump({"therapist": MODEL}))
    spec = ModelSpec(name="therapist", id="org/model", endpoint="fake", sampling={"temperature": 0.5, "max_tokens": LONGEST})
    files = {"endpoints": folder / "endpoints.yaml", "journal": folder / journal, "prices": [folder / "models.yaml"]}
    return complete(spec, requests(count), **files, ledger=folder / "spending.json", budget=budget, **options)


def price_of(usage: dict) -> float:
    return (usage["prompt_tokens"] * PRICE["input"] + usage["completion_tokens"] * PRICE["output"]) / 1e6


class Billing:
    """A script that answers by another, and bills what it answers."""

    def __init__(self, script=echo, share: float = 1.0) -> None:
        self.script, self.share, self.dollars, self.answered = script, share, 0.0, 0

    def __call__(self, body: dict, nth: int) -> Reply:
        """Answer."""
        reply = self.script(body, nth)
        if reply.status == 200:
            self.dollars += self.share * price_of(completion(body, reply)["usage"])
            self.answered += 1
        return reply


ONE = price_of({"prompt_tokens": 2, "completion_tokens": 4})  # an echoed question


def spent(folder: Path) -> float:
    return total(read_ledger(folder / "spending.json"))


# The ledger ---------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    budget=st.floats(0.3, 2),
    steps=st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(5, 400), st.sampled_from([0, 0.5, 1]), st.sampled_from(["answer", "keep", "keep", "kill"])
        ),
        min_size=10,
        max_size=30,
    ),
)
def test_no_course_of_events_passes_the_budget(tmp_path_factory, budget, steps):
    """Two journals, requests of any size that cost any share of their most, answered at once, later, or never told of after a kill."""
    folder = tmp_path_factory.mktemp("run")

    def opened(number: int) -> Purse:
        return Purse(folder / "spending.json", folder / f"{number}.jsonl", PRICE, budget, LONGEST, batch=False)

    purses, flying, billed = [opened(0), opened(1)], [[], []], 0.0
    for number, size, share, what in steps:
        purse = purses[number]
        most = purse.at_most(size)
        if purse.allows(most):
            purse.in_flight += most
            billed += share * most
            flying[number].append((most, share * most))
        if what == "answer" and flying[number]:
            purse.settle(*flying[number].pop(0))
        if what == "kill":
            purses[number], flying[number] = opened(number), []
        assert billed <= spent(folder) + 1e-6
        assert spent(folder) <= budget + 1e-6


def test_a_clean_end_leaves_in_the_ledger_what_was_spent(tmp_path):
    bill = Billing()
    with FakeServer(bill) as server:
        ask(tmp_path, server.url, 20, budget=None)
        assert spent(tmp_path) == pytest.approx(bill.dollars) == pytest.approx(20 * ONE)
        ask(tmp_path, server.url, 30, budget=100, journal="journal/b.jsonl")
    assert spent(tmp_path) == pytest.approx(bill.dollars)
    assert set(read_ledger(tmp_path / "spending.json")) == {"journal/a.jsonl", "journal/b.jsonl"}


def test_a_journal_from_before_the_ledger_counts(tmp_path):
    with FakeServer() as server:
        ask(tmp_path, server.url, 20, budget=None)
        (tmp_path / "spending.json").unlink()
        with pytest.raises(UserError, match=r"budget of \$0\.21 is used up: \$0\.2000 are spent"):
            ask(tmp_path, server.url, 30, budget=20 * ONE + 0.01)


def test_a_damaged_ledger_is_named(tmp_path):
    (tmp_path / "spending.json").write_text('{"a')
    with FakeServer() as server, pytest.raises(UserError, match=r"spending\.json: damaged"):
        ask(tmp_path, server.url, 1, budget=1)


# Asking -------------------------------------------------------------------------------------------------------------------------------


def test_a_run_stops_before_its_budget_is_passed_and_goes_on_with_a_greater_one(tmp_path):
    bill = Billing()
    with FakeServer(bill) as server:
        with pytest.raises(UserError) as caught:
            ask(tmp_path, server.url, 50, budget=0.3)
        assert 0.3 - 0.2 < bill.dollars <= 0.3, "nearly all of it, but for what one request may cost at its most"
        left = 50 - bill.answered
        assert f"budget of $0.30 is used up: ${bill.dollars:.4f} are spent" in str(caught.value)
        assert f"{left} of 50 requests are left to ask" in str(caught.value)
        assert "raise `budget` in the config" in str(caught.value)
        answers, _, _ = ask(tmp_path, server.url, 50, budget=5)
        assert len(answers) == 50
        assert set(server.seen.values()) == {1}, "what was in flight at the end came in and was kept"


@pytest.mark.parametrize("kind", ["openai", "batch"])
@settings(max_examples=8)
@given(budget=st.floats(0.001, 0.6), count=st.integers(1, 30), words=st.integers(0, LONGEST), bad=st.integers(1, 5))
def test_no_budget_is_passed_whatever_answers_cost(tmp_path_factory, kind, budget, count, words, bad):
    """Answers of any length, some of them unusable."""

    def script(body: dict, nth: int) -> Reply:
        return Reply(" ".join(["bad" if int(body["messages"][-1]["content"].split()[1]) % bad == 0 and nth == 0 else "fine"] * words))

    def check(request, text):
        if "bad" in text:
            raise ValueError("bad")

    folder, bill = tmp_path_factory.mktemp("run"), Billing(script, PRICE["batch"] if kind == "batch" else 1)
    with FakeBatches(bill) if kind == "batch" else FakeServer(bill) as server:
        with suppress(UserError):
            ask(folder, server.url, count, budget, kind, check=check)
        assert bill.dollars <= budget + 1e-9
        assert spent(folder) == pytest.approx(bill.dollars, abs=1e-9)


def test_jobs_share_a_budget(tmp_path):
    bill = Billing()
    with FakeServer(bill) as server:
        ask(tmp_path, server.url, 20, budget=0.5, journal="journal/a.jsonl")
        with pytest.raises(UserError, match="used up"):
            ask(tmp_path, server.url, 50, budget=0.5, journal="journal/b.jsonl")
    assert 20 * ONE < bill.dollars <= 0.5


def test_an_error_costs_nothing_and_an_answer_that_never_came_its_most(tmp_path):
    with FakeServer(lambda body, nth: error(500) if nth == 0 else echo(body, nth)) as server:
        ask(tmp_path, server.url, 5, budget=10)
    assert spent(tmp_path) == pytest.approx(5 * ONE)
    late = tmp_path / "late"
    late.mkdir()
    with FakeServer(lambda body, nth: Reply("late", delay=0 if nth else 0.6)) as server:
        ask(late, server.url, 1, budget=10, timeout_s=0.3)
    assert spent(late) > 0.1, "the server may have billed the first answer, for all that we know"


def test_a_server_that_is_not_there_costs_nothing(tmp_path):
    with FakeServer() as server:
        url = server.url  # where nobody answers any more
    with pytest.raises(UserError, match="no usable answer"):
        ask(tmp_path, url, 2, budget=10)
    assert spent(tmp_path) == 0


def test_no_budget_without_a_price(tmp_path):
    with FakeServer() as server:
        (tmp_path / "bare.yaml").write_text(yaml.safe_dump({"therapist": {k: v for k, v in MODEL.items() if k != "price"}}))
        spec = ModelSpec(name="therapist", id="org/model", endpoint="fake", sampling={"max_tokens": LONGEST})
        (tmp_path / "e.yaml").write_text(yaml.safe_dump({"fake": {"kind": "openai", "base_url": server.url}}))
        files = {"endpoints": tmp_path / "e.yaml", "journal": tmp_path / "j.jsonl", "prices": [tmp_path / "bare.yaml"]}
        with pytest.raises(UserError, match=r"therapist has no price, without which the budget of \$1\.00 cannot be kept"):
            complete(spec, requests(1), **files, ledger=tmp_path / "spending.json", budget=1)
        assert server.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openai", "batch"])
def test_a_killed_run_counts_what_it_may_have_spent(tmp_path, kind):
    """kill -9 three times: all that the server bills, answers that were lost among it, stays below the budget."""
    budget = 3.0
    program = f"""
import sys; sys.path[:0] = ["scripts", "tests"]
from unit.test_budget import *
ask(Path({str(tmp_path)!r}), sys.argv[1], 60, {budget}, {kind!r})
"""
    running: list[subprocess.Popen] = []
    kills, one_at_a_time = [8, 18, 28], threading.Lock()

    def script(body: dict, nth: int) -> Reply:
        with one_at_a_time:
            if kills and bill.answered >= kills[0] and running[-1].poll() is None:
                kills.pop(0)
                running[-1].kill()
                running[-1].wait()
        return echo(body, nth)

    bill = Billing(script, PRICE["batch"] if kind == "batch" else 1)
    server = FakeBatches(bill, fate=lambda number: Fate(polls=2)) if kind == "batch" else FakeServer(bill)
    with server:
        ends = []
        for _ in range(4):
            run = subprocess.Popen([sys.executable, "-c", program, server.url], env=os.environ, stderr=subprocess.PIPE, text=True)
            running.append(run)
            _, says = run.communicate()
            ends.append(run.returncode)
            assert bill.dollars <= spent(tmp_path) + 1e-9 <= budget + 1e-9
    assert ends.count(-signal.SIGKILL) >= (2 if kind == "openai" else 1)
    assert ends[-1] == 0 or "is used up" in says


def test_a_batch_is_cut_to_what_is_left(tmp_path):
    bill = Billing(share=0.5)
    with FakeBatches(bill) as server:
        with pytest.raises(UserError, match=r"used up.*of 60 requests are left"):
            ask(tmp_path, server.url, 60, budget=0.25, kind="batch")
        assert 0.25 - 0.17 < bill.dollars <= 0.25
        assert len(server.batches) > 1, "what a batch leaves over goes into a further one"
        ask(tmp_path, server.url, 60, budget=50, kind="batch")
    assert set(server.answered.values()) == {1}
    assert spent(tmp_path) == pytest.approx(bill.dollars) == pytest.approx(60 * ONE * 0.5)


def test_a_batch_on_its_way_counts_at_its_most_and_then_at_what_it_cost(tmp_path):
    with FakeBatches(Billing(share=0.5), fate=lambda number: Fate(polls=2)) as server:
        options = {"budget": 9, "kind": "batch"}

        def attempt():
            entry = {"kind": "batch", "base_url": server.url, "batch": {"poll_s": 0.01, "wait": False}}
            (tmp_path / "e.yaml").write_text(yaml.safe_dump({"fake": entry}))
            spec = ModelSpec(name="therapist", id="org/model", endpoint="fake", sampling={"temperature": 0.5, "max_tokens": LONGEST})
            (tmp_path / "m.yaml").write_text(yaml.safe_dump({"therapist": MODEL}))
            files = {"endpoints": tmp_path / "e.yaml", "journal": tmp_path / "journal/a.jsonl", "prices": [tmp_path / "m.yaml"]}
            return complete(spec, requests(5), **files, ledger=tmp_path / "spending.json", budget=9)

        with pytest.raises(UserError, match="on the way"):
            attempt()
        flying = spent(tmp_path)
        assert flying > 5 * ONE
        with pytest.raises(UserError, match="used up"):
            ask(tmp_path, server.url, 3, budget=flying, kind="batch", journal="journal/b.jsonl")
        ask(tmp_path, server.url, 5, **options)
        assert spent(tmp_path) == pytest.approx(5 * ONE * 0.5)


def test_a_program_stops_at_its_budget(tmp_path):
    """The whole program: its message, its exit status, and no output."""
    rows = [
        {"speech_id": f"{n:016x}", "text": f"I feel bad about {n}", "source": "s", "source_row": n, "source_key": str(n), "topic": "others"}
        | {"coarse_topic": "special_topics", "topic_from": "source", "cluster_id": f"{n:016x}", "split": "test"}
        for n in range(9)
    ]
    (tmp_path / "speeches.jsonl").write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"therapist": MODEL}))
    spec = {"name": "therapist", "id": "org/model", "endpoint": "fake", "sampling": {"temperature": 0.5, "max_tokens": LONGEST}}
    flags = {"--speeches": "speeches.jsonl", "--endpoints": "endpoints.yaml", "--prices": "models.yaml", "--journal": "j.jsonl"}
    flags |= {"--ledger": "spending.json", "--out": "out.jsonl", "--failed": "failed.jsonl"}
    command = [sys.executable, "scripts/generate_responses.py", "--budget", "0.2", "--settings"]
    command.append(json.dumps({"model": spec, "prompt": "{{ client_speech }}", "seed": 1}))
    with FakeServer() as server:
        (tmp_path / "endpoints.yaml").write_text(yaml.safe_dump({"fake": {"kind": "openai", "base_url": server.url}}))
        done = subprocess.run([*command, *(w for k, v in flags.items() for w in (k, str(tmp_path / v)))], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: therapist: the budget of $0.20 is used up" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    with Journal(tmp_path / "j.jsonl", []):
        pass
    assert len((tmp_path / "j.jsonl").read_bytes().splitlines()) == len(server.requests) > 0


def test_what_waits_for_the_budget_goes_on_when_answers_leave_some_over(tmp_path):
    async def course() -> list[str]:
        purse, log = Purse(tmp_path / "s.json", tmp_path / "a.jsonl", PRICE, 1.0, LONGEST, batch=False), []

        async def request(name: str, cost: float) -> None:
            await purse.take(0.6)
            log.append(name)
            await asyncio.sleep(0.01)
            purse.settle(0.6, cost)

        await asyncio.gather(request("first", 0.1), request("second", 0.1))
        with pytest.raises(OutOfBudget):
            await purse.take(0.9)
        return log

    assert asyncio.run(course()) == ["first", "second"]
