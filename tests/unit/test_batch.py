"""The Batch API as an engine: what is sent and paid, what is remembered before a run can be cut off, what is collected."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
import yaml
from fakes import batch_server
from fakes.batch_server import FakeBatches, Fate, Lost
from fakes.openai_server import FakeServer, Reply, completion, echo, error
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.test_chat_faults import odd

from psychocounsel import batch, line
from psychocounsel.chat import ChatRequest, complete
from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec
from psychocounsel.pricing import cost

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(line, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("FAKE_KEY", KEY)


def requests(count: int, **changes) -> list[ChatRequest]:
    return [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i}"}], **changes) for i in range(count)]


def ask(folder: Path, url: str, asked: list[ChatRequest], limits: dict | None = None, kind: str = "batch", retries: int = 2, **options):
    entry = {"kind": kind, "base_url": url, "api_key_env": "FAKE_KEY", "concurrency": 8, "timeout_s": 60, "max_retries": retries}
    (folder / "endpoints.yaml").write_text(yaml.safe_dump({"fake": entry | {"batch": {"poll_s": 0.01, **(limits or {})}}}))
    spec = ModelSpec(name="therapist", id="org/model", endpoint="fake", sampling={"temperature": 0.5, "max_tokens": 8})
    return complete(spec, asked, endpoints=folder / "endpoints.yaml", journal=folder / "journal.jsonl", **options)


def texts(answers) -> dict[str, str]:
    return {answer.id: answer.text for answer in answers}


def echoed(count: int) -> dict[str, str]:
    return {f"r{i}": f"You said: question {i}" for i in range(count)}


def sizes(server: FakeBatches) -> list[int]:
    """Return the number of requests of each batch that was created."""
    return [len(server.files[made["input_file_id"]].splitlines()) for made in server.batches.values()]


def paid_once(server: FakeBatches, count: int) -> bool:
    return server.answered == {f"question {i}": 1 for i in range(count)}


def said(request: ChatRequest, text: str) -> None:
    if "You said" not in text:
        raise ValueError("too short")


# What is sent and what comes back -----------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests_whatever_the_order_of_the_results(tmp_path):
    with FakeBatches() as server:
        answers, failures, totals = ask(tmp_path, server.url, requests(20))
    assert [answer.id for answer in answers] == [f"r{i}" for i in range(20)]
    assert texts(answers) == echoed(20)
    assert (list(failures), sizes(server)) == ([], [20])
    tokens = {"prompt_tokens": 40, "completion_tokens": 80, "cached_tokens": 0}
    assert totals == {"requests": 20, "from_journal": 0, **tokens, "batch": tokens, "failed": 0, "cost": None}
    made = next(iter(server.batches.values()))
    assert made["metadata"]["journal"] == "journal.jsonl"
    rows = [json.loads(row) for row in server.files[made["input_file_id"]].splitlines()]
    assert [row["custom_id"] for row in rows] == [answer.request_key for answer in answers]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["endpoints.yaml", "journal.jsonl", "journal.jsonl.batches"]


def test_a_batch_sends_what_a_direct_request_sends(tmp_path):
    asked = requests(3, seed=7, response_schema={"type": "object"})
    spec = {"name": "t", "id": "org/model", "endpoint": "fake", "structured_output": "json_schema", "sampling": {"max_tokens": 8}}
    spec = ModelSpec(**spec, chat_template_kwargs={"enable_thinking": False})
    bodies = {}
    with FakeBatches() as batches, FakeServer() as direct:
        for kind, server in (("batch", batches), ("openai", direct)):
            (tmp_path / kind).mkdir()
            entry = {"kind": kind, "base_url": server.url, "timeout_s": 60, "batch": {"poll_s": 0.01}}
            (tmp_path / kind / "e.yaml").write_text(yaml.safe_dump({"fake": entry}))
            answers, _, _ = complete(spec, asked, endpoints=tmp_path / kind / "e.yaml", journal=tmp_path / kind / "j.jsonl")
            bodies[kind] = [answer.request_key for answer in answers]
        assert sorted(map(orjson.dumps, batches.bodies)) == sorted(
            orjson.dumps({name: body[name] for name in batches.bodies[0]}) for body in direct.requests
        )
        assert batches.bodies[0].keys() == direct.requests[0].keys()
    assert bodies["batch"] == bodies["openai"], "batch or direct, the request is the same"


@settings(max_examples=10)
@given(count=st.integers(1, 12), most=st.integers(1, 6), size=st.integers(1, 3000))
def test_files_keep_to_both_limits_and_hold_every_request_once(tmp_path_factory, count, most, size):
    folder = tmp_path_factory.mktemp("run")
    with FakeBatches() as server:
        answers, _, _ = ask(folder, server.url, requests(count), limits={"max_requests": most, "max_bytes": size})
    assert texts(answers) == echoed(count)
    assert paid_once(server, count)
    for made in server.batches.values():
        content = server.files[made["input_file_id"]]
        lines = len(content.splitlines())
        assert lines <= most
        assert len(content) <= size or lines == 1


def test_the_defaults_are_the_limits_that_the_api_has():
    limits = batch.Endpoint(kind="batch", base_url="http://x/v1").batch
    assert (limits.max_requests, limits.max_bytes) == (batch_server.MOST_REQUESTS, batch_server.MOST_BYTES)


def test_a_queue_of_few_tokens_takes_batches_one_after_the_other(tmp_path):
    with FakeBatches(enqueued_tokens=13) as server:  # a question counts 3 here, 2 there
        answers, _, _ = ask(tmp_path, server.url, requests(10), limits={"enqueued_tokens": 13})
    assert texts(answers) == echoed(10)
    assert sizes(server) == [4, 4, 2]
    assert not any(made["errors"] for made in server.batches.values())


def test_a_full_queue_is_waited_for_while_a_batch_of_ours_is_in_it(tmp_path):
    with FakeBatches(enqueued_tokens=12) as server:  # of two batches of 10 tokens, the second is refused at first
        answers, _, _ = ask(tmp_path, server.url, requests(10), limits={"max_requests": 5})
    assert texts(answers) == echoed(10)
    assert sizes(server) == [5, 5, 5]
    assert paid_once(server, 10)


def test_a_batch_that_no_queue_takes_names_the_key_to_change(tmp_path):
    with FakeBatches(enqueued_tokens=12) as server:
        with pytest.raises(UserError, match=r"Enqueued token limit reached.*batch\.enqueued_tokens.*endpoints\.yaml"):
            ask(tmp_path, server.url, requests(10))
        assert texts(ask(tmp_path, server.url, requests(10), limits={"enqueued_tokens": 12})[0]) == echoed(10)
    assert paid_once(server, 10)


def test_an_answered_request_is_asked_neither_by_batch_nor_one_by_one(tmp_path):
    with FakeBatches() as batches, FakeServer() as direct:
        ask(tmp_path, direct.url, requests(5), kind="openai")
        answers, _, totals = ask(tmp_path, batches.url, requests(10))
        assert texts(answers) == echoed(10)
        assert sizes(batches) == [5]
        assert totals["from_journal"] == 5
        ask(tmp_path, direct.url, requests(10), kind="openai")
        assert len(direct.requests) == 5


def test_tokens_of_batches_have_their_own_price_in_a_mixed_journal(tmp_path):
    price = {"input": 3.0, "cached_input": None, "output": 12.0, "batch": 0.5}
    with FakeBatches() as batches, FakeServer() as direct:
        ask(tmp_path, direct.url, requests(5), kind="openai")
        _, _, totals = ask(tmp_path, batches.url, requests(15))
    assert totals["batch"] == {"prompt_tokens": 20, "completion_tokens": 40, "cached_tokens": 0}
    assert totals["prompt_tokens"] == 30
    assert cost(price, totals) == pytest.approx((10 * 3 + 20 * 12) / 1e6 + 0.5 * (20 * 3 + 40 * 12) / 1e6, abs=1e-6)
    assert cost(price | {"batch": 1}, totals) == cost({k: v for k, v in price.items() if k != "batch"}, totals)


# What a batch may bring ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_finished_work_is_kept_and_only_the_rest_sent_again(tmp_path, status):
    with FakeBatches(fate=lambda number: Fate(status, done=[4, 3][number]) if number < 2 else Fate()) as server:
        answers, failures, _ = ask(tmp_path, server.url, requests(10), attempts=1)
    assert texts(answers) == echoed(10)
    assert sizes(server) == [10, 6, 3]
    assert paid_once(server, 10)


def test_a_batch_that_expires_untouched_ends_the_run_and_the_next_run_sends_it_again(tmp_path):
    with FakeBatches(fate=lambda number: Fate() if number else Fate("expired", done=0)) as server:
        with pytest.raises(UserError, match=r"expired before any of its requests was carried out.*run again"):
            ask(tmp_path, server.url, requests(3))
        assert texts(ask(tmp_path, server.url, requests(3))[0]) == echoed(3)
    assert paid_once(server, 3)


def test_an_unusable_answer_goes_into_a_further_batch_with_another_seed(tmp_path):
    def answer(body, nth):
        return Reply(f"mumble {nth}") if body["messages"][-1]["content"] == "question 1" and nth < 2 else echo(body, nth)

    with FakeBatches(answer) as server:
        answers, failures, totals = ask(tmp_path, server.url, requests(4, seed=5), check=said)
    assert texts(answers) == echoed(4)
    assert sizes(server) == [4, 1, 1]
    assert [body["seed"] for body in server.bodies if body["messages"][-1]["content"] == "question 1"] == [5, 6, 7]
    lines = [orjson.loads(row) for row in (tmp_path / "journal.jsonl").read_bytes().splitlines()]
    assert [row["raw"] for row in lines if row["key"] == list(answers)[1].request_key] == [["mumble 0", "mumble 1"]]
    assert totals["completion_tokens"] == 4 * 4 + 2 + 2, "unusable attempts cost as well"


def test_an_answer_that_stays_unusable_is_a_failure_with_every_text_and_asked_anew_by_the_next_run(tmp_path):
    with FakeBatches(lambda body, nth: Reply(f"mumble {nth}") if nth < 3 else echo(body, nth)) as server:
        _, (failure,), totals = ask(tmp_path, server.url, requests(1), check=said, max_failed_share=1)
        assert (failure.reason, failure.raw) == ("too short", ["mumble 0", "mumble 1", "mumble 2"])
        assert totals["batch"]["completion_tokens"] == 6
        answers, failures, totals = ask(tmp_path, server.url, requests(1), check=said)
        assert (texts(answers), list(failures)) == (echoed(1), [])
        assert totals["batch"]["completion_tokens"] == 6 + 4
    assert server.answered["question 0"] == 4


@pytest.mark.parametrize(
    ("reply", "times", "reason"),
    [
        (error(400, "context_length_exceeded", "too long"), 1, "HTTP 400 context_length_exceeded: too long"),
        (error(400, "content_filter", "no"), 1, "stopped by a content filter"),
        (error(500, message="oops"), 3, "HTTP 500: oops"),
        (error(429, message="busy"), 3, "HTTP 429: busy"),
        (Reply(body={"object": "chat.completion"}), 3, "a reply that is no completion"),
        (Reply(body="<html>"), 3, "a reply that is no completion"),
        (Reply("I can't", finish_reason="content_filter"), 1, "stopped by a content filter"),
        (Reply("", finish_reason="length"), 3, "cut off at max_tokens: too short"),
    ],
)
def test_a_request_that_fails_for_good_is_a_failure_with_its_reason(tmp_path, reply, times, reason):
    with FakeBatches(lambda body, nth: reply if body["messages"][-1]["content"] == "question 1" else echo(body, nth)) as server:
        answers, (failure,), _ = ask(tmp_path, server.url, requests(3), check=said, max_failed_share=0.5)
    assert set(texts(answers)) == {"r0", "r2"}
    assert (failure.id, server.answered["question 1"]) == ("r1", times)
    assert failure.reason.startswith(reason)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (error(401, message=f"Incorrect API key provided: {KEY}"), "FAKE_KEY"),
        (error(404, "model_not_found"), "no model 'org/model'"),
        (error(429, "insufficient_quota"), "exhausted"),
    ],
)
def test_a_fatal_fault_in_the_results_ends_the_run_after_every_answer_is_kept(tmp_path, fault, says):
    with FakeBatches(
        lambda body, nth: fault if body["messages"][-1]["content"] == "question 1" and nth == 0 else echo(body, nth)
    ) as server:
        with pytest.raises(UserError, match=says) as caught:
            ask(tmp_path, server.url, requests(5))
        assert KEY not in str(caught.value)
        assert texts(ask(tmp_path, server.url, requests(5))[0]) == echoed(5)
    assert sizes(server) == [5, 1]


def doubled(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[0].replace(b"You said", b"I never said")]


def strange(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[0].replace(b'"custom_id": "', b'"custom_id": "0'), b"", b"[1]", b'"text"']


SPOILT = {
    "a missing line": (lambda lines: lines[1:], 1),
    "a torn line": (lambda lines: [lines[0][:40], *lines[1:]], 1),
    "a line of rubbish": (lambda lines: [b"\xff\xfe{", *lines[1:]], 1),
    "all lines but one": (lambda lines: lines[:1], 4),
    "no line": (lambda lines: [], 5),
    "a line twice, with another answer": (doubled, 0),
    "lines that nobody asked for": (strange, 0),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_file_of_results_costs_only_what_it_lost(tmp_path, spoilt, caplog):
    spoil, lost = SPOILT[spoilt]
    with (
        FakeBatches(fate=lambda number: Fate(spoil=None if number else spoil)) as server,
        caplog.at_level(logging.WARNING, "psychocounsel"),
    ):
        answers, failures, _ = ask(tmp_path, server.url, requests(5))
    assert texts(answers) == echoed(5)
    assert sizes(server) == [5, lost][: 1 + bool(lost)]
    assert bool(lost) <= ("results are readable" in caplog.text)


ROWS = [
    {"custom_id": "k", "response": {"status_code": 200, "body": completion({"model": "m", "messages": []}, Reply("hi"))}, "error": None},
    {"custom_id": "k", "response": {"status_code": 400, "body": {"error": {"code": "c", "message": "m"}}}, "error": None},
    {"custom_id": "k", "response": None, "error": {"code": "batch_expired", "message": "m"}},
]


@given(st.sampled_from(ROWS).flatmap(odd))
@settings(max_examples=300)
def test_any_line_of_results_is_an_answer_or_tells_what_to_do(tmp_path_factory, row):
    """Whichever of its parts are missing or something else."""
    endpoint = batch.Endpoint(kind="batch", base_url="http://x/v1", api_key_env="FAKE_KEY")
    engine = SimpleNamespace(where="x", endpoint=endpoint, common={"model": "m"})
    with batch.Results(tmp_path_factory.getbasetemp() / "results") as results:
        results.append([json.dumps(row).encode()])
        found = results.row("k")
        assert (found is not None) == (row.get("custom_id") == "k")
        with suppress(line.PassingFault, line.RefusedRequest, batch.NotCarriedOut, UserError):
            assert isinstance(batch.Engine.answer(engine, found)["text"], str)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("invalid_json_line", r"refuses a batch as a whole \(invalid_json_line: bad \(line 2\)\): batch-1"),
        ("insufficient_quota", "exhausted"),
        ("billing_hard_limit_reached", "exhausted"),
    ],
)
def test_a_batch_that_is_refused_as_a_whole_says_why_and_nothing_is_lost(tmp_path, code, says):
    wrong = [{"code": code, "message": "bad", "line": 2}]
    with FakeBatches(fate=lambda number: Fate() if number else Fate(errors=wrong)) as server:
        with pytest.raises(UserError, match=says):
            ask(tmp_path, server.url, requests(3))
        assert texts(ask(tmp_path, server.url, requests(3))[0]) == echoed(3)
    assert paid_once(server, 3)


# Faults of the calls ------------------------------------------------------------------------------------------------------------------

CALLS = [
    ("POST", "/files"),
    ("POST", "/batches"),
    ("GET", "/batches/{batch}"),
    ("GET", "/files/{file}/content"),
]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
@pytest.mark.parametrize("lost", [False, True], ids=["refused", "carried out, answer lost"])
@pytest.mark.parametrize("status", [500, 429, None], ids=["500", "429", "connection cut"])
def test_a_passing_fault_of_any_call_is_sent_again_and_nothing_is_paid_twice(tmp_path, call, lost, status):
    def fault(method, path, nth):
        if (method, path) != call or nth > 1:
            return None
        reply = status and error(status)
        return Lost(reply) if lost or not status else reply

    with FakeBatches(fault=fault) as server:
        answers, _, _ = ask(tmp_path, server.url, requests(7), limits={"max_requests": 3})
    assert texts(answers) == echoed(7)
    assert paid_once(server, 7)


def test_an_endpoint_without_a_batch_api_is_named(tmp_path):
    with FakeBatches(fault=lambda method, path, nth: error(404)) as server, pytest.raises(UserError, match="has no Batch API.*kind openai"):
        ask(tmp_path, server.url, requests(1))


def test_a_second_batch_of_our_name_is_cancelled(tmp_path):
    """An answer that comes after the retry was sent: two batches, of which the first counts."""
    with FakeBatches() as server:

        def fault(method, path, nth):
            if (method, path) == ("POST", "/batches") and nth == 0:
                return Lost(error(500))
            if (method, path) == ("GET", "/batches") and nth == 0:
                copy = {**server.batches["batch-1"], "id": "batch-2", "status": "validating"}
                server.batches["batch-2"], server.fates["batch-2"] = copy, Fate()
            return None

        server.fault = fault
        assert texts(ask(tmp_path, server.url, requests(3))[0]) == echoed(3)
    assert server.cancelled == ["batch-2"]


@pytest.mark.parametrize("call", [CALLS[0], CALLS[1], CALLS[3]], ids=" ".join)
@pytest.mark.parametrize(
    ("reply", "says"), [(error(401), "FAKE_KEY"), (error(500), "cannot .*HTTP 500"), (error(400), "cannot .*HTTP 400")]
)
def test_a_fault_that_stays_ends_the_run_and_the_next_one_goes_on(tmp_path, call, reply, says):
    broken = True
    with FakeBatches(fault=lambda method, path, nth: reply if broken and (method, path) == call else None) as server:
        with pytest.raises(UserError, match=says) as caught:
            ask(tmp_path, server.url, requests(3))
        assert "is kept" in str(caught.value)
        broken = False
        assert texts(ask(tmp_path, server.url, requests(3))[0]) == echoed(3)
    assert paid_once(server, 3)


def test_an_outage_while_waiting_is_waited_out(tmp_path, caplog):
    with (
        FakeBatches(fault=lambda method, path, nth: error(503) if path == "/batches/{batch}" and nth < 12 else None) as server,
        caplog.at_level(logging.WARNING, "psychocounsel"),
    ):
        answers, _, _ = ask(tmp_path, server.url, requests(3), retries=1)
    assert texts(answers) == echoed(3)
    assert "cannot be looked at now: HTTP 503" in caplog.text


def test_a_batch_that_is_not_there_any_more_says_what_to_do(tmp_path):
    with FakeBatches(fate=lambda number: Fate(polls=10**9)) as server:
        with pytest.raises(UserError, match="on the way"):
            ask(tmp_path, server.url, requests(3), limits={"wait": False})
        server.batches.clear()
        with pytest.raises(UserError, match=r"not there.*another account.*move .*journal\.jsonl\.batches away"):
            ask(tmp_path, server.url, requests(3), limits={"wait": False})


def test_no_words_of_clients_and_no_key_reach_log_or_memory(tmp_path, caplog):
    with FakeBatches() as server, caplog.at_level(logging.INFO, "psychocounsel"):
        ask(tmp_path, server.url, requests(3))
    seen = caplog.text + (tmp_path / "journal.jsonl.batches").read_text()
    assert "is on its way with 3 requests" in seen
    assert "question" not in seen
    assert KEY not in seen
