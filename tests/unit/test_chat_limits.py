"""The limits of an endpoint, and the order of requests that begin alike."""

import asyncio
import statistics
import threading
import time

from fakes.openai_server import FakeServer, Reply, echo, error
from unit.test_chat import ask, quick, requests  # noqa: F401 (quick is a fixture)

from psychocounsel import line
from psychocounsel.chat import ChatRequest
from psychocounsel.endpoints import Endpoint


def test_as_many_requests_in_flight_as_allowed_and_no_more(tmp_path):
    three = threading.Barrier(3)  # none is answered before three are there

    def script(body, nth):
        three.wait(60)
        return Reply("ok")

    with FakeServer(script) as server:
        ask(tmp_path, server, requests(21), limits={"concurrency": 3})
    assert server.most_in_flight == 3


def test_requests_per_minute_pace_the_requests(tmp_path):
    with FakeServer() as server:
        started = time.monotonic()
        ask(tmp_path, server, requests(10), limits={"requests_per_minute": 300})  # 5 at once, then 5 a second
    assert server.times[9] - started > 0.95


def test_tokens_per_minute_pace_the_requests(tmp_path):
    with FakeServer() as server:  # each request: 11 characters, so 3 tokens, and 8 of the answer: 11; 1,320 a minute are 22 a second
        started = time.monotonic()
        ask(tmp_path, server, requests(4), limits={"tokens_per_minute": 1320})
    assert server.times[3] - started > 0.8


def test_what_is_sent_again_waits_for_the_limits_too(tmp_path):
    with FakeServer(lambda body, nth: error(500) if nth < 7 else echo(body, nth)) as server:
        started = time.monotonic()
        ask(tmp_path, server, requests(1), limits={"requests_per_minute": 300})
    assert server.times[7] - started > 0.55


def test_the_first_of_a_group_goes_ahead_and_the_others_follow_together(tmp_path):
    """Seven questions on each of ten speeches: six of them find the cache that the first one filled."""
    asked = [ChatRequest(f"{s}/{p}", [{"role": "user", "content": f"speech{s} {p}"}], group=str(s)) for s in range(10) for p in range(7)]
    with FakeServer(lambda body, nth: Reply("ok", delay=0.03)) as server:
        ask(tmp_path, server, asked, limits={"concurrency": 4})
    arrived = [body["messages"][-1]["content"] for body in server.requests]
    assert len(arrived) == 70
    spans = []
    for speech in range(10):
        places = [place for place, text in enumerate(arrived) if text.startswith(f"speech{speech} ")]
        assert arrived[places[0]] == f"speech{speech} 0"
        first, second = (server.times[place] for place in places[:2])
        assert second - first >= 0.03, "not before the first one is answered"
        spans.append(places[-1] - places[1])
    assert statistics.median(spans) <= 5 + 2 * 4, "close together: between them stands what was under way, or freed with them"


def test_what_a_first_one_frees_goes_next():
    async def order() -> list[str]:
        calls = [line.Call(f"{s}{p}", [], {}, s if s != "-" else None, len) for s, p in ("a1", "a2", "a3", "b1", "b2", "-1", "c1", "c2")]
        queue, taken = line.Queue(calls), []

        async def take(count: int) -> list[line.Call]:
            new = [await queue.take() for _ in range(count)]
            taken.extend(call.key for call in new)
            return new

        a, b = await take(2)
        queue.answered(b)
        await take(1)
        queue.answered(a)
        _, _, _, c = await take(4)
        waiting = asyncio.create_task(take(1))
        await asyncio.sleep(0)
        assert not waiting.done(), "c2 waits for c1"
        queue.answered(c)
        await waiting
        assert await queue.take() is None
        return taken

    assert asyncio.run(order()) == ["a1", "b1", "b2", "a2", "a3", "-1", "c1", "c2"]


def test_a_low_limit_does_not_drive_a_group_apart(monkeypatch):
    """With a limit that lets one through when nothing is under way, an answered first one's others come before new groups."""
    sent, flying = [], set()

    class Limit:
        max_rate = 1

        async def acquire(self, amount: float) -> None:
            while flying:
                await asyncio.sleep(0)

    async def answer(_: line.Line, call: line.Call) -> dict:
        sent.append(call.key)
        flying.add(call.key)
        await asyncio.sleep(0)
        flying.remove(call.key)
        return {}

    monkeypatch.setattr(line, "limiter", lambda per_minute: per_minute and Limit())
    endpoint = Endpoint(kind="openai", base_url="http://x/v1", concurrency=16, requests_per_minute=1)
    calls = [line.Call(f"{s}{p}", [], {}, s, len) for s in "abcd" for p in range(3)]
    asyncio.run(line.send_all(endpoint, endpoint.base_url, "none", {}, calls, answer, lambda outcome: None, None))
    assert " ".join(sent) == "a0 b0 a1 a2 b1 b2 c0 d0 c1 c2 d1 d2", "of new groups one, which was next while the first was under way"


def test_groups_of_one_worker_and_groups_that_fail_go_on(tmp_path):
    asked = [ChatRequest(f"{s}/{p}", [{"role": "user", "content": f"speech{s} {p}"}], group=str(s)) for s in range(3) for p in range(3)]
    with FakeServer(lambda body, nth: error(400) if body["messages"][-1]["content"].endswith(" 0") else Reply("ok")) as server:
        answers, failures, _ = ask(tmp_path, server, asked, limits={"concurrency": 1}, max_failed_share=0.4)
    assert [body["messages"][-1]["content"] for body in server.requests] == [f"speech{s} {p}" for s in range(3) for p in range(3)]
    assert (len(answers), len(failures)) == (6, 3)
