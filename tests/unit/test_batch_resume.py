"""Batches that outlive their run: cut off wherever, collected by the next one, and nothing is paid twice."""

import json
import os
import signal
import subprocess
import sys

import orjson
import pytest
from fakes.batch_server import FakeBatches, Fate, Lost
from fakes.openai_server import FakeServer, Reply, echo
from unit.test_batch import CALLS, KEY, ask, echoed, paid_once, quick, requests, said, sizes, texts  # noqa: F401 (quick is a fixture)

from psychocounsel import batch
from psychocounsel.chat import ChatRequest
from psychocounsel.errors import UserError
from psychocounsel.pricing import expected_cost


def test_without_waiting_the_run_ends_and_the_next_ones_collect(tmp_path):
    with FakeBatches(lambda body, nth: Reply("mumble") if nth == 0 else echo(body, nth), fate=lambda number: Fate(polls=3)) as server:
        for _ in range(4):
            with pytest.raises(UserError, match="1 batch is on the way, with 4 requests.*run the same command again"):
                ask(tmp_path, server.url, requests(4), limits={"wait": False}, check=said)
        answers, _, _ = ask(tmp_path, server.url, requests(4), check=said)
    assert texts(answers) == echoed(4)
    assert sizes(server) == [4, 4]


def test_requests_that_fail_in_every_run_end_as_failures_although_no_run_waits(tmp_path):
    with FakeBatches(lambda body, nth: Reply(f"mumble {nth}"), fate=lambda number: Fate(polls=2)) as server:
        for _ in range(20):
            try:
                _, (failure,), _ = ask(tmp_path, server.url, requests(1), limits={"wait": False}, check=said, max_failed_share=1)
                break
            except UserError:
                continue
    assert failure.raw == ["mumble 0", "mumble 1", "mumble 2"]
    assert server.answered["question 0"] == 3


def test_what_is_on_its_way_is_not_asked_one_by_one(tmp_path):
    with FakeBatches(fate=lambda number: Fate(polls=4)) as server, FakeServer() as direct:
        with pytest.raises(UserError, match="on the way"):
            ask(tmp_path, server.url, requests(3), limits={"wait": False})
        with pytest.raises(UserError, match=r"3 of the requests are on their way.*kind batch again"):
            ask(tmp_path, direct.url, requests(5), kind="openai")
        assert direct.requests == []
        ask(tmp_path, server.url, requests(3))
        ask(tmp_path, direct.url, requests(5), kind="openai")
        assert len(direct.requests) == 2


def test_a_plan_leaves_out_what_is_on_its_way_and_touches_nothing(tmp_path, capsys):
    with FakeBatches(fate=lambda number: Fate(polls=10**6)) as server:
        with pytest.raises(UserError, match="on the way"):
            ask(tmp_path, server.url, requests(3), limits={"wait": False})
        memory = tmp_path / "journal.jsonl.batches"
        memory.write_bytes(memory.read_bytes() + b"torn by another job that is writing")
        before, calls = memory.read_bytes(), server.calls.copy()
        with pytest.raises(SystemExit):
            ask(tmp_path, server.url, requests(5), plan=True)
        assert (memory.read_bytes(), server.calls) == (before, calls)
    plan = json.loads(capsys.readouterr().out)
    assert (plan["requests"], plan["left"], plan["under_way"]) == (5, 2, 3)


def test_batches_to_come_are_planned_at_their_price():
    price = {"input": 3.0, "cached_input": None, "output": 12.0, "batch": 0.5}
    tokens = {"prompt_tokens": 10**6, "completion_tokens": 10**6, "cached_tokens": 0}
    assert [expected_cost(price, tokens, kind) for kind in ("openai", "batch")] == [15, 7.5]


def test_what_is_asked_no_more_is_collected_when_it_is_asked_again(tmp_path):
    """A prompt edited while a batch is on its way, and the edit taken back: neither is paid twice."""
    with FakeBatches(fate=lambda number: Fate(polls=2)) as server:
        with pytest.raises(UserError, match="on the way"):
            ask(tmp_path, server.url, requests(4), limits={"wait": False})
        other = [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i}"}]) for i in (2, 3, 4, 5)]
        assert set(texts(ask(tmp_path, server.url, other)[0])) == {"r2", "r3", "r4", "r5"}
        assert texts(ask(tmp_path, server.url, requests(6))[0]) == echoed(6)
    assert paid_once(server, 6)


def test_a_line_that_was_cut_off_is_dropped_and_a_damaged_one_named(tmp_path):
    memory = tmp_path / "journal.jsonl.batches"
    with FakeBatches() as server:
        ask(tmp_path, server.url, requests(2))
        memory.write_bytes(memory.read_bytes() + b'{"event":"inten')
        ask(tmp_path, server.url, requests(4))
        assert paid_once(server, 4)
        memory.write_bytes(b'{"event":"created","batch":"x","id":"y"}\n')
        with pytest.raises(UserError, match=r"batches:1: not a line about batches.*move"):
            ask(tmp_path, server.url, requests(5))


@pytest.mark.parametrize("hole", [(0, 20), (5, 60), (30, 10**6)], ids=["at its beginning", "in the middle", "to its end"])
def test_a_power_cut_in_the_last_line_costs_that_line_alone(tmp_path, hole):
    """A line of many requests takes many pages, of which the first may not have reached the disk when the last has."""
    with FakeBatches(fate=lambda number: Fate(polls=10**6)) as server, pytest.raises(UserError):
        ask(tmp_path, server.url, requests(2), limits={"wait": False})
    memory = tmp_path / "journal.jsonl.batches"
    whole = memory.read_bytes()
    last = bytearray(orjson.dumps({"event": "intended", "batch": "b", "time": 0, "tokens": 1, "attempts": {"k": 0}}) + b"\n")
    start, end = hole
    last[start:end] = bytes(len(last[start:end]))
    memory.write_bytes(whole + last)
    known = batch.Batches(memory)
    assert [found.id for found in known.open.values()] == ["batch-1"]
    known.note("settled")
    assert memory.read_bytes() == whole + b'{"event":"settled"}\n'
    memory.write_bytes(whole[:5] + b"\0" + whole[6:])
    with pytest.raises(UserError, match=r"batches:1: not a line about batches"):
        batch.Batches(memory)


class Cut(BaseException):
    """The end of a process, as far as one can have it inside of one."""


@pytest.mark.parametrize("after", [False, True], ids=["before it is on the disk", "after"])
@pytest.mark.parametrize("step", range(9))
def test_a_run_cut_off_at_any_step_is_taken_up_without_paying_twice(tmp_path, monkeypatch, step, after):
    """Whatever the last thing was that reached the file of batches, or was just about to."""

    def answer(body, nth):  # question 1 needs two attempts
        return Reply("mumble") if body["messages"][-1]["content"] == "question 1" and nth == 0 else echo(body, nth)

    steps, note = [], batch.Batches.note

    def cut(self, event, **facts):
        if len(steps) == step and not after:
            raise Cut
        note(self, event, **facts)
        steps.append(event)
        if len(steps) == step + 1 and after:
            raise Cut

    with FakeBatches(answer, fate=lambda number: Fate("expired", done=3) if number == 0 else Fate()) as server:
        monkeypatch.setattr(batch.Batches, "note", cut)
        with pytest.raises(Cut):
            ask(tmp_path, server.url, requests(5), check=said)
        monkeypatch.setattr(batch.Batches, "note", note)
        answers, failures, _ = ask(tmp_path, server.url, requests(5), check=said)
    assert texts(answers) == echoed(5)
    assert server.answered == {f"question {i}": 1 + (i == 1) for i in range(5)}
    assert not server.cancelled


def test_a_file_of_batches_from_before_a_kill_survives_every_cut_of_its_last_line(tmp_path):
    with FakeBatches(fate=lambda number: Fate(polls=10**6)) as server, pytest.raises(UserError):
        ask(tmp_path, server.url, requests(2), limits={"wait": False})
    memory = tmp_path / "journal.jsonl.batches"
    whole = memory.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        memory.write_bytes(whole[:-cut])
        known = batch.Batches(memory)
        assert [found.id for found in known.open.values()] == [None], "intended, and its id is to be found at the endpoint"


@pytest.mark.parametrize("before", [True, False], ids=["before the call is carried out", "before its answer comes"])
@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_a_killed_run_is_taken_up_without_paying_twice(tmp_path, call, before):
    """kill -9 by the server, in the middle of a call."""
    program = f"""
import sys; sys.path[:0] = ["scripts", "tests"]
from unit.test_batch import *
answers, _, _ = ask(Path({str(tmp_path)!r}), sys.argv[1], requests(7), limits=dict(max_requests=3))
print(texts(answers))
"""
    victim: list[subprocess.Popen] = []

    def fault(method, path, nth):
        if (method, path) == call and nth == 1 and victim[0].returncode is None:
            if before:
                victim[0].kill()
                victim[0].wait()
                return Reply(status=500, body={})
            return Dead()
        return None

    class Dead(Lost):  # is asked for its reply when the call was carried out
        @property
        def reply(self):
            victim[0].kill()
            return None

        @reply.setter
        def reply(self, value):
            pass

    with FakeBatches(fault=fault) as server:
        run = [sys.executable, "-c", program, server.url]
        victim.append(subprocess.Popen(run, env=os.environ | {"FAKE_KEY": KEY}, stdout=subprocess.PIPE))
        victim[0].wait()
        assert victim[0].returncode == -signal.SIGKILL
        answers, _, _ = ask(tmp_path, server.url, requests(7), limits={"max_requests": 3})
    assert texts(answers) == echoed(7)
    assert paid_once(server, 7)
