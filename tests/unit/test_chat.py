"""The chat client against a server that fails by script: what is asked, how often, and what is kept."""

import logging
import subprocess
import sys
import time
import tracemalloc
import weakref
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
import yaml
from fakes.openai_server import FakeServer, Reply, echo, error

from psychocounsel import chat, line
from psychocounsel.chat import ChatRequest, Lazy, complete
from psychocounsel.endpoints import Endpoint
from psychocounsel.errors import UserError
from psychocounsel.journal import peek, rendered
from psychocounsel.models import ModelSpec

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(line, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("FAKE_KEY", KEY)


def model(**changes) -> ModelSpec:
    return ModelSpec(**{"name": "therapist", "id": "org/model", "endpoint": "fake", "sampling": {"max_tokens": 8}, **changes})


def requests(count: int, **changes) -> list[ChatRequest]:
    return [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i}"}], **changes) for i in range(count)]


def ask(folder: Path, server: FakeServer, asked: list[ChatRequest], spec: ModelSpec | None = None, limits: dict | None = None, **options):
    entry = {
        "kind": "openai",
        "base_url": server.url,
        "api_key_env": "FAKE_KEY",
        "concurrency": 8,
        "timeout_s": 60,
        "max_retries": 2,
        **(limits or {}),
    }
    endpoints = folder / "endpoints.yaml"
    endpoints.write_text(yaml.safe_dump({"fake": entry}))
    answers, failures, totals = complete(spec or model(), asked, endpoints=endpoints, journal=folder / "journal.jsonl", **options)
    return list(answers), list(failures), totals


def long_enough(request: ChatRequest, text: str) -> None:
    if "You said" not in text:
        raise ValueError("too short")


def key_of(spec: ModelSpec, request: ChatRequest, kind: str = "openai", weights: Path | None = None, schema: dict | None = None) -> str:
    identity = chat.model_identity(spec, Endpoint(kind=kind, base_url="http://x/v1", server="vllm", start_timeout_s=1), weights)
    return chat.request_key(identity, spec, request, chat.response_format(spec, schema))


# What is asked ------------------------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests(tmp_path):
    with FakeServer(lambda body, nth: Reply(echo(body, nth).text, delay=0.05 * (body["messages"][-1]["content"][-1] in "024"))) as server:
        answers, failures, totals = ask(tmp_path, server, requests(10))
    assert [a.id for a in answers] == [f"r{i}" for i in range(10)]
    assert [a.text for a in answers] == [f"You said: question {i}" for i in range(10)]
    assert failures == []
    assert totals == {
        "requests": 10,
        "from_journal": 0,
        "prompt_tokens": 20,
        "completion_tokens": 40,
        "cached_tokens": 0,
        "failed": 0,
        "cost": None,
    }
    assert answers[0].usage == {"prompt_tokens": 2, "completion_tokens": 4, "cached_tokens": None}
    assert answers[0].served_model == "org/model"


def test_the_body_holds_what_is_set_and_nothing_else(tmp_path):
    with FakeServer() as server:
        ask(tmp_path, server, requests(1))
        (body,) = server.requests
        assert set(body) == {"model", "messages", "max_tokens"}
        spec = model(sampling={"temperature": 0.7, "top_p": 0.95, "max_tokens": 8}, chat_template_kwargs={"enable_thinking": False})
        ask(tmp_path, server, requests(1, seed=7), spec)
        assert server.requests[1] == {
            "model": "org/model",
            "messages": [{"role": "user", "content": "question 0"}],
            "temperature": 0.7,
            "top_p": 0.95,
            "max_tokens": 8,
            "seed": 7,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        assert server.keys == [f"Bearer {KEY}"] * 2


@pytest.mark.parametrize(("ability", "sent"), [("none", None), ("json_object", "json_object"), ("json_schema", "json_schema")])
def test_structured_output_is_sent_where_the_model_has_it(tmp_path, ability, sent):
    schema = {"type": "object", "properties": {"better": {"type": "integer"}}}
    with FakeServer() as server:
        ask(tmp_path, server, requests(1), model(structured_output=ability), response_schema=schema)
        ask(tmp_path, server, requests(1, response_schema=schema), model(structured_output=ability))
        assert len(server.requests) == 1, "a schema of the request and one of all requests are the same question"
        found = server.requests[0].get("response_format")
    assert (found and found["type"]) == sent
    if ability == "json_schema":
        assert found["json_schema"]["schema"] == schema


def test_only_openai_gets_the_new_name_of_max_tokens():
    def sent(address):
        return chat.common_body(model(), Endpoint(kind="openai", base_url=address), None)

    assert sent("https://api.openai.com/v1")["max_completion_tokens"] == 8
    assert sent("http://other/v1")["max_tokens"] == 8


def test_requests_are_built_on_the_way(tmp_path):
    """No more requests exist at a time than are under way or wait for the first of their group."""
    alive, most = set(), []

    def build(number: int) -> ChatRequest:
        built = ChatRequest(f"r{number}", [{"role": "user", "content": f"question {number}"}], group=str(number // 7))
        alive.add(id(built))
        weakref.finalize(built, alive.discard, id(built))
        most.append(len(alive))
        return built

    with FakeServer() as server:
        answers, _, _ = ask(tmp_path, server, Lazy(range(210), build), limits={"concurrency": 3})
    assert [a.text for a in answers] == [f"You said: question {n}" for n in range(210)]
    assert max(most) < 60


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """Answered requests cost their ids and about 200 bytes, though each question has 2,000 characters and each answer 4,000."""
    count, long = 3000, "x" * 4000
    asked = Lazy(range(count), lambda n: ChatRequest(f"{n:016x}/free/0", [{"role": "user", "content": f"{n} {long[:2000]}"}]))
    answer = {"text": long, "finish_reason": "stop", "usage": None, "served_model": None}
    keys = [key_of(model(), request) for request in asked]
    lines = ({"key": key, "answer": answer, "reason": None, "raw": [], "spent": {}} for key in keys)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(map(rendered, lines)))
    (tmp_path / "endpoints.yaml").write_text("fake: {kind: openai, base_url: http://127.0.0.1:1/v1}")
    del keys
    tracemalloc.start()
    answers, _, _ = complete(model(), asked, endpoints=tmp_path / "endpoints.yaml", journal=tmp_path / "journal.jsonl")
    held, most = tracemalloc.get_traced_memory()
    assert sum(len(answer.text) for answer in answers) == count * 4000
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    an_id = sys.getsizeof("0" * 16 + "/free/0")
    assert held / count < 300 + an_id
    assert max(most, read) < held + 1_000_000, "and hardly more on the way, or when they are read"


# Faults -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_passing_fault_is_sent_again(tmp_path, status):
    with FakeServer(lambda body, nth: error(status) if nth < 2 else echo(body, nth)) as server:
        answers, failures, _ = ask(tmp_path, server, requests(3))
    assert len(answers) == 3
    assert not failures
    assert set(server.seen.values()) == {3}


def test_a_slow_answer_is_given_up_and_asked_again(tmp_path):
    with FakeServer(lambda body, nth: Reply("late", delay=0 if nth else 1)) as server:
        (answer,), _, _ = ask(tmp_path, server, requests(1), limits={"timeout_s": 0.2})
    assert answer.text == "late"


def test_a_fault_that_stays_becomes_a_failure(tmp_path):
    broken = "question 1"
    with FakeServer(lambda body, nth: error(500) if body["messages"][-1]["content"] == broken else echo(body, nth)) as server:
        answers, (failure,), totals = ask(tmp_path, server, requests(3), attempts=2, max_failed_share=0.5)
    assert [a.id for a in answers] == ["r0", "r2"]
    assert (failure.id, failure.raw) == ("r1", [])
    assert failure.reason.startswith("HTTP 500")
    assert server.seen[broken] == 6, "two attempts of a first try and two retries"
    assert totals["failed"] == 1


def test_what_ends_a_run_names_the_codes_of_the_endpoint_and_no_words_of_clients(tmp_path):
    refusals = [error(400, "context_length_exceeded", "secret"), error(400, "said: secret words", "secret"), error(422, message="secret")]
    says = r"HTTP 400 context_length_exceeded \(1\), HTTP 400 \(1\), HTTP 422 \(1\)\."
    with (
        FakeServer(lambda body, nth: refusals[int(body["messages"][-1]["content"][-1])]) as server,
        pytest.raises(UserError, match=says) as caught,
    ):
        ask(tmp_path, server, requests(3))
    assert "secret" not in str(caught.value)
    assert "secret" in (tmp_path / "journal.jsonl").read_text()


def test_a_refused_request_is_asked_once(tmp_path):
    with FakeServer(lambda body, nth: error(400, "context_length_exceeded")) as server:
        _, (failure,), _ = ask(tmp_path, server, requests(1), max_failed_share=1)
    assert len(server.requests) == 1
    assert failure.reason.startswith("HTTP 400")


def test_a_malformed_answer_is_asked_again_with_another_seed(tmp_path):
    with FakeServer(lambda body, nth: echo(body, nth) if nth == 2 else Reply(f"mumble {nth}")) as server:
        (answer,), _, totals = ask(tmp_path, server, requests(1, seed=5), check=long_enough)
        assert [body["seed"] for body in server.requests] == [5, 6, 7]
    line = orjson.loads((tmp_path / "journal.jsonl").read_bytes())
    assert line["raw"] == ["mumble 0", "mumble 1"]
    assert line["key"] == answer.request_key
    assert totals["completion_tokens"] == 4 + 2 + 2, "unusable attempts cost as well"


def test_an_answer_that_stays_malformed_becomes_a_failure_with_every_text(tmp_path):
    with FakeServer(lambda body, nth: Reply(f"mumble {nth}")) as server:
        _, (failure,), _ = ask(tmp_path, server, requests(1), check=long_enough, max_failed_share=1)
    assert (failure.reason, failure.raw) == ("too short", ["mumble 0", "mumble 1", "mumble 2"])


def test_a_recorded_failure_is_asked_again_by_a_later_run(tmp_path):
    with FakeServer(lambda body, nth: Reply("mumble") if nth < 3 else echo(body, nth)) as server:
        ask(tmp_path, server, requests(1), check=long_enough, max_failed_share=1)
        answers, failures, totals = ask(tmp_path, server, requests(1), check=long_enough)
    assert (len(answers), failures) == (1, [])
    assert totals["completion_tokens"] == 3 * 1 + 4


@pytest.mark.parametrize(("bad", "share", "fails"), [(1, 0.1, False), (2, 0.1, True), (1, 0.0, True), (0, 0.0, False)])
def test_more_failures_than_the_share_fail_the_program(tmp_path, bad, share, fails):
    def script(body, nth):
        return Reply("mumble secret words") if int(body["messages"][-1]["content"].split()[-1]) < bad else echo(body, nth)

    with FakeServer(script) as server:
        if not fails:
            assert len(ask(tmp_path, server, requests(10), check=long_enough, max_failed_share=share)[1]) == bad
            return
        with pytest.raises(UserError, match=f"{bad} of 10 requests.*too short \\({bad}\\)") as caught:
            ask(tmp_path, server, requests(10), check=long_enough, max_failed_share=share)
    assert "secret" not in str(caught.value)
    assert len(peek(tmp_path / "journal.jsonl")) == 10 - bad, "what was answered is kept"


def test_a_run_that_can_only_fail_is_not_paid_to_its_end(tmp_path, monkeypatch):
    """A judge that never keeps to the format: the run ends at so many failures, and the next one goes on where it ended."""
    monkeypatch.setattr(chat, "ENOUGH_FAILURES", 10)
    with FakeServer(lambda body, nth: Reply("mumble")) as server:
        with pytest.raises(UserError, match=r"1\d of 300 requests.*too short \(1\d\).*28\d requests were not asked any more"):
            ask(tmp_path, server, requests(300), check=long_enough)
        assert 10 * 3 <= len(server.requests) <= (10 + 8) * 3
        server.script = echo
        assert len(ask(tmp_path, server, requests(300), check=long_enough)[0]) == 300, "failures of an earlier run end no other"


def test_as_many_failures_as_are_allowed_end_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "ENOUGH_FAILURES", 10)
    with FakeServer(lambda body, nth: error(400) if int(body["messages"][-1]["content"].split()[-1]) < 30 else echo(body, nth)) as server:
        answers, failures, _ = ask(tmp_path, server, requests(60), max_failed_share=0.5)
    assert (len(answers), len(failures)) == (30, 30)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (error(401, message=f"Incorrect API key provided: {KEY}"), "FAKE_KEY"),
        (error(403), "FAKE_KEY"),
        (error(404), "no model 'org/model'"),
        (error(402), "exhausted"),
        (error(429, "insufficient_quota"), "exhausted"),
    ],
)
def test_a_fatal_fault_stops_at_once_and_keeps_what_was_answered(tmp_path, fault, says):
    def script(body, nth):
        return fault if len(server.requests) > 5 else echo(body, nth)

    with FakeServer(script) as server, pytest.raises(UserError, match=says) as caught:
        ask(tmp_path, server, requests(50), limits={"concurrency": 2})
    assert len(server.requests) <= 8
    assert KEY not in str(caught.value)
    assert len(peek(tmp_path / "journal.jsonl")) >= 4


def test_a_missing_key_names_the_variable_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("FAKE_KEY")
    with FakeServer() as server:
        with pytest.raises(UserError, match="FAKE_KEY"):
            ask(tmp_path, server, requests(1))
        assert server.requests == []


def test_another_model_than_asked_for_is_recorded_and_warned_of_once(tmp_path, caplog):
    with FakeServer(lambda body, nth: Reply("ok", model="other-model")) as server, caplog.at_level(logging.WARNING, "psychocounsel"):
        answers, _, _ = ask(tmp_path, server, requests(5))
    assert {a.served_model for a in answers} == {"other-model"}
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


@pytest.mark.parametrize(
    ("served", "other"),
    [
        ("org/model", False),
        ("org/model-2024-08-06", False),
        ("org/model-0613", False),
        ("org/model-08-2024", False),
        ("org/model-mini", True),
        ("org/model-mini-2024-07-18", True),
        ("org/model.1", True),
        ("org/model2", True),
        ("org/mode", True),
    ],
)
def test_a_dated_snapshot_of_the_model_is_no_other_model(tmp_path, caplog, served, other):
    with FakeServer(lambda body, nth: Reply("ok", model=served)) as server, caplog.at_level(logging.WARNING, "psychocounsel"):
        ask(tmp_path, server, requests(1))
    assert ("the endpoint says that it was answered by" in caplog.text) == other


def test_no_words_of_clients_and_no_key_reach_the_log(tmp_path, caplog):
    with (
        FakeServer(lambda body, nth: error(500) if nth == 0 else echo(body, nth)) as server,
        caplog.at_level(logging.INFO, "psychocounsel"),
    ):
        ask(tmp_path, server, requests(3))
    assert "therapist: 3 of 3 asked" in caplog.text
    assert "question" not in caplog.text
    assert KEY not in caplog.text


# The journal --------------------------------------------------------------------------------------------------------------------------


def test_what_the_journal_holds_is_not_asked_again(tmp_path, monkeypatch):
    with FakeServer() as server:
        first, _, _ = ask(tmp_path, server, requests(4))
        second, _, totals = ask(tmp_path, server, requests(6))
        assert set(server.seen.values()) == {1}
        assert second[:4] == first
        assert totals["from_journal"] == 4
        monkeypatch.delenv("FAKE_KEY")
        third, _, _ = ask(tmp_path, server, requests(6))
        assert third == second, "a run that asks nothing needs no key"


def test_equal_requests_are_asked_once_and_repeats_again(tmp_path):
    same = [{"role": "user", "content": "the same"}]
    asked = [ChatRequest("a", same), ChatRequest("b", same), ChatRequest("c", same, repeat=1)]
    with FakeServer() as server:
        answers, _, _ = ask(tmp_path, server, asked)
        assert server.seen["the same"] == 2
    assert [a.id for a in answers] == ["a", "b", "c"]
    assert answers[0].request_key == answers[1].request_key != answers[2].request_key


def wait_for(condition, seconds: float = 60) -> None:
    """Wait until a condition holds; an OSError (no file, no connection yet) means not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.01)
    raise TimeoutError


# The offline judge ------------------------------------------------------------------------------------------------------------------------


def test_the_rubric_answers_offline(tmp_path):
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text("rubric: {kind: local}")
    task = {"kind": "judge", "speech": "I feel sad.", "responses": ["That sounds hard. What happened?", "Stop it."]}
    asked = [ChatRequest("a", [{"role": "user", "content": "x"}], task=task)]
    (answer,), failures, totals = complete(model(name="rubric", endpoint="rubric"), asked, endpoints=endpoints, journal=tmp_path / "j")
    assert (answer.usage, answer.finish_reason, answer.served_model) == (None, "stop", "rubric")
    assert orjson.loads(answer.text)
    assert not failures
    assert totals["prompt_tokens"] == 0
    assert not (tmp_path / "j").exists()
    with pytest.raises(UserError, match="rubric"):
        complete(model(endpoint="rubric"), asked, endpoints=endpoints, journal=tmp_path / "j")


# The benchmark ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_runs():
    sizes = ["--requests", "30", "--in-flight", "10", "--delay", "0.01", "--sustain", "0.2", "--many", "50"]
    done = subprocess.run([sys.executable, "benchmarks/chat_throughput.py", *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("raw aiohttp", "AsyncOpenAI, at once", "AsyncOpenAI, in turn", "our client"))
    assert "limited to 10000 requests a minute" in done.stdout
    assert done.stdout.rstrip().endswith("MB")
