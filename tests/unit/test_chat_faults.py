"""What can go wrong between a judge and its rating: each fault ends in a good record, or in a failure that says why.

A rating request goes through the client to a server that plays the fault by script; the parser is the real one.
"""

import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx2
import pytest
import yaml
from fakes.openai_server import FakeServer, Reply, completion, error
from hypothesis import given, settings
from hypothesis import strategies as st

from psychocounsel import line
from psychocounsel.chat import ChatRequest, complete
from psychocounsel.errors import UserError
from psychocounsel.journal import add_tokens, intact, peek, rendered
from psychocounsel.models import ModelSpec
from psychocounsel.parsing import parse_ratings, ratings_schema

SPEC = ModelSpec(name="judge", id="judge-1", endpoint="fake", structured_output="json_schema", sampling={"max_tokens": 99})
SCORES = (5, 4, 2, 1)
MILLION = "a" * 1_000_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(line, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("FAKE_KEY", "sk-secret")


def ratings(scores: tuple = SCORES, rationale: str = "because") -> dict:
    return {
        key: value for i, score in enumerate(scores, 1) for key, value in ((f"response_{i}_rating", score), (f"rationale_{i}", rationale))
    }


GOOD = json.dumps(ratings())
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}


def rate(folder: Path, server: FakeServer, count: int = 1, limits: dict | None = None, **options):
    """Ask for ratings of four responses; a failure is no reason to stop."""
    entry = {"kind": "openai", "base_url": server.url, "api_key_env": "FAKE_KEY", "concurrency": 4, "timeout_s": 60, "max_retries": 2}
    (folder / "endpoints.yaml").write_text(yaml.safe_dump({"fake": entry | (limits or {})}))
    asked = [ChatRequest(f"r{i}", [{"role": "user", "content": f"rate {i}"}], seed=7) for i in range(count)]
    files = {"endpoints": folder / "endpoints.yaml", "journal": folder / "journal.jsonl", "response_schema": ratings_schema(4)}
    options = {"check": lambda request, raw: parse_ratings(raw, 4), "max_failed_share": 1, **options}
    answers, failures, totals = complete(SPEC, asked, **files, **options)
    return list(answers), list(failures), totals


# Faults that pass ---------------------------------------------------------------------------------------------------------------------


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


PASSING = {
    "429 without Retry-After": error(429),
    "429 with seconds": error(429, **{"Retry-After": "0"}),
    "429 with a date": error(429, **{"Retry-After": in_seconds(-5)}),
    "429 with nonsense": error(429, **{"Retry-After": "soon"}),
    "429 that says which limit": error(429, "rate_limit_exceeded"),
    "500": error(500),
    "502 from a proxy": Reply(status=502, body="<html>Bad gateway</html>"),
    "a time-out": Reply(GOOD, delay=1.0),
    "a slow trickle": Reply(GOOD, trickle=0.05),
    "cut in the middle of the body": Reply(GOOD, cut=200),
    "cut before the body": Reply(GOOD, cut=0),
    "a body that is no JSON": Reply(body="<html>busy</html>"),
    "a body that breaks off as JSON": Reply(body='{"choices": [{"message": {"content": "hel'),
    "half a surrogate pair": Reply(body='{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "an empty body": Reply(body=""),
    "no choices": Reply(body={"choices": []}),
    "a choice without a message": Reply(body={"choices": [{}]}),
    "a text that is a list": Reply(body={"choices": [{"message": {"content": ["a"]}}]}),
    "usage that is none": Reply(body={"choices": [{"message": {"content": GOOD}}], "usage": {"tokens": "many"}}),
}


LATE = {"a time-out", "a slow trickle"}  # the others have all the time that a slow machine may need


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_leaves_a_good_record(tmp_path, name):
    with FakeServer(lambda body, nth: Reply(GOOD) if nth else PASSING[name]) as server:
        (answer,), failures, _ = rate(tmp_path, server, limits={"timeout_s": 0.5 if name in LATE else 60, "max_retries": 9})
    assert (answer.text, answer.finish_reason, answer.served_model) == (GOOD, "stop", "judge-1")
    assert not failures
    assert len(server.requests) == 2 or (name in LATE and len(server.requests) > 2)


STAYING = {
    "429 without Retry-After": "HTTP 429",
    "502 from a proxy": "HTTP 502",
    "a slow trickle": "no answer in time",
    "cut in the middle of the body": "no connection",
    "a body that is no JSON": "a reply that is no completion",
}


@pytest.mark.parametrize("name", STAYING)
def test_a_fault_that_stays_is_a_failure_with_its_reason(tmp_path, name):
    with FakeServer(lambda body, nth: PASSING[name]) as server:
        limits = {"timeout_s": 0.3 if name in LATE else 60, "max_retries": 1}
        answers, (failure,), totals = rate(tmp_path, server, attempts=1, limits=limits)
    assert not answers
    assert failure.reason.startswith(STAYING[name])
    assert failure.raw == []
    assert (len(server.requests), totals["failed"]) == (2, 1)


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_waited_for(tmp_path, monkeypatch, date):
    """As seconds or as a date, which has whole seconds: at least one of two."""
    waits, wait = [], line.Line.wait

    def script(body, nth):
        return Reply(GOOD) if nth else error(429, **{"Retry-After": in_seconds(2) if date else "1"})

    def noted(self, seconds: float, reason: str):
        waits.append(seconds)
        return wait(self, seconds, reason)

    monkeypatch.setattr(line.Line, "wait", noted)
    with FakeServer(script) as server:
        rate(tmp_path, server)
    assert server.times[1] - server.times[0] >= 1
    assert waits[0] <= (2 if date else 1) + 0.01, "and no longer, but for the jitter"


@given(st.integers(0, 20), st.none() | st.floats(0, 10_000))
def test_pauses_grow_and_are_never_shorter_than_retry_after(retry, asked):
    headers = {} if asked is None else {"Retry-After": repr(asked)}
    fault = Exception()
    fault.response = httpx2.Response(429, headers=headers)
    growing = min(line.LONGEST_PAUSE_S, line.FIRST_PAUSE_S * 2**retry)
    waits = {line.pause(fault, retry) for _ in range(20)}
    assert len(waits) > 1, "jitter"
    low, high = (0.75 * growing, growing) if asked is None else (asked, asked + growing / 4)
    assert all(low <= wait <= high for wait in waits)


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "Tue, 99 Nov 2026 00:00:00 GMT"])
def test_an_unreadable_retry_after_is_none(value):
    assert line.retry_after(httpx2.Response(429, headers={"Retry-After": value})) is None
    assert line.retry_after(None) is None


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def odd(draw, whole: dict) -> dict:
    """JSON of which up to two parts, whichever, are missing or something else."""
    for _ in range(draw(st.integers(0, 2))):
        parts = whole = json.loads(json.dumps(whole))
        key = draw(st.sampled_from(sorted(parts)))
        while isinstance(parts[key], dict | list) and parts[key] and draw(st.integers(0, 3)):
            parts = parts[key]
            key = draw(st.sampled_from(sorted(parts) if isinstance(parts, dict) else range(len(parts))))
        if draw(st.booleans()):
            parts[key] = draw(JSON_VALUE)
        else:
            del parts[key]
    return whole


@given(odd(completion({"model": "judge-1", "messages": []}, Reply(GOOD)) | {"usage": USAGE}))
@settings(max_examples=300)
def test_any_reply_is_a_completion_that_can_be_kept_or_none(body):
    """What is no completion is a passing fault, whichever part of it is odd; what is one can be counted and written to the journal."""
    try:
        answer = line.read_completion(body)
    except ValueError:
        return
    spent = add_tokens(add_tokens({}, answer["usage"]), answer["usage"])
    assert all(0 <= count < 2**62 for count in spent.values())
    assert intact(rendered({"key": "00", "answer": answer, "reason": None, "raw": [], "spent": spent}))


# Answers that are none ----------------------------------------------------------------------------------------------------------------

MISSING = {key: value for key, value in ratings().items() if key != "response_4_rating"}
UNUSABLE = {  # fault -> the server's reply, and the reason of the failure
    "truncated output": (Reply(GOOD[:60], finish_reason="length"), "cut off at max_tokens: not one JSON object"),
    "empty content": (Reply(""), "the answer is empty"),
    "no content at all": (Reply(None), "the answer is empty"),
    "three ratings for four responses": (Reply(json.dumps(ratings((5, 4, 2)))), "missing: response_4_rating, rationale_4"),
    "one rating missing": (Reply(json.dumps(MISSING)), "missing: response_4_rating"),
    "five ratings for four responses": (Reply(json.dumps(ratings((5, 4, 2, 1, 5)))), "2 unexpected keys"),
    "a rating of 0": (Reply(json.dumps(ratings((0, 4, 2, 1)))), "response_1_rating is not within 1 to 5"),
    "a rating of 6": (Reply(json.dumps(ratings((5, 6, 2, 1)))), "response_2_rating is not within 1 to 5"),
    'a rating of "4"': (Reply(json.dumps(ratings((5, "4", 2, 1)))), "response_2_rating is no integer but a str"),
    "a rating of 4.5": (Reply(json.dumps(ratings((5, 4.5, 2, 1)))), "response_2_rating is no integer but a float"),
    "a rating of 4.0": (Reply(json.dumps(ratings((5, 4.0, 2, 1)))), "response_2_rating is no integer but a float"),
    "a rating of true": (Reply(json.dumps(ratings((5, True, 2, 1)))), "response_2_rating is no integer but a bool"),
    "text before the JSON": (Reply("Here you are: " + GOOD), "not one JSON object"),
    "text after the JSON": (Reply(GOOD + "\nI hope this helps."), "not one JSON object"),
    "two objects": (Reply(GOOD + GOOD), "not one JSON object"),
    "a key twice": (Reply(GOOD[:-1] + ', "response_2_rating": 5}'), "a key occurs twice"),
    "an array": (Reply(f"[{GOOD}]"), "not a JSON object but a list"),
    "a million characters that are no JSON": (Reply(MILLION), "not one JSON object"),
    "a million brackets": (Reply("[" * 1_000_000), "not one JSON object"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_answer_is_asked_again_with_another_seed_and_then_a_failure(tmp_path, name):
    reply, reason = UNUSABLE[name]
    with FakeServer(lambda body, nth: reply) as server:
        answers, (failure,), totals = rate(tmp_path, server)
    assert not answers
    assert failure.reason.startswith(reason)
    assert failure.raw == [reply.text or ""] * 3, "every text that came is kept"
    assert [body["seed"] for body in server.requests] == [7, 8, 9]
    assert totals["completion_tokens"] == 3 * len((reply.text or "").split())
    assert peek(tmp_path / "journal.jsonl") == {}


def test_a_good_answer_after_unusable_ones_is_a_record(tmp_path):
    with FakeServer(lambda body, nth: Reply(GOOD) if nth == 2 else Reply("4 out of 5")) as server:
        (answer,), failures, _ = rate(tmp_path, server)
    assert (answer.text, failures) == (GOOD, [])


def test_a_million_characters_are_an_answer_like_another(tmp_path):
    long = json.dumps(ratings(rationale=MILLION))
    with FakeServer(lambda body, nth: Reply(long)) as server:
        (answer,), _, _ = rate(tmp_path, server)
        assert answer.text == long
        assert rate(tmp_path, server)[0] == [answer], "from the journal, too"
        assert len(server.requests) == 1


def test_another_model_than_asked_for_stands_in_the_record(tmp_path, caplog):
    with FakeServer(lambda body, nth: Reply(GOOD, model="judge-mini")) as server, caplog.at_level(logging.WARNING, "psychocounsel"):
        (answer,), _, _ = rate(tmp_path, server)
    assert answer.served_model == "judge-mini"
    assert "asked for judge-1, the endpoint says that it was answered by judge-mini" in caplog.text


# Refusals and fatal faults ------------------------------------------------------------------------------------------------------------

REFUSALS = {
    "the model refuses": (Reply(None, refusal="I cannot rate this."), "refused by the model", ["I cannot rate this."]),
    "a filter cuts the answer": (Reply("{", finish_reason="content_filter"), "stopped by a content filter", ["{"]),
    "a filter refuses the prompt": (error(400, "content_filter"), "stopped by a content filter: HTTP 400", []),
    "a policy refuses the prompt": (error(400, "content_policy_violation"), "stopped by a content filter: HTTP 400", []),
    "the prompt is too long": (error(400, "context_length_exceeded"), "HTTP 400", []),
    "the body is too large": (error(413), "HTTP 413", []),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_a_failure_at_once_and_the_others_go_on(tmp_path, name):
    reply, reason, raw = REFUSALS[name]
    with FakeServer(lambda body, nth: reply if body["messages"][-1]["content"] == "rate 1" else Reply(GOOD)) as server:
        answers, (failure,), _ = rate(tmp_path, server, count=3)
    assert [answer.id for answer in answers] == ["r0", "r2"]
    assert failure.reason.startswith(reason)
    assert failure.raw == raw
    assert server.seen["rate 1"] == 1, "asking again would be of no use"


FATAL = {
    "an invalid key": (error(401, "invalid_api_key"), "refuses the key in FAKE_KEY"),
    "an invalid key, said as a bad request": (error(400, "invalid_api_key"), "refuses the key in FAKE_KEY"),
    "a key without the right": (error(403), "refuses the key in FAKE_KEY"),
    "an exhausted quota": (error(429, "insufficient_quota"), "account is exhausted"),
    "a hard limit of the bill": (error(429, "billing_hard_limit_reached"), "account is exhausted"),
    "an unpaid account": (error(402), "account is exhausted"),
    "an unknown model": (error(404, "model_not_found"), "knows no model 'judge-1'"),
    "an unknown model, said as a bad request": (error(400, "model_not_found"), "knows no model 'judge-1'"),
}


@pytest.mark.parametrize("name", FATAL)
def test_a_fatal_fault_sends_nothing_more_and_keeps_what_is_under_way(tmp_path, monkeypatch, name):
    reply, says = FATAL[name]
    stopped, stop = threading.Event(), line.Line.stop

    def script(body, nth):
        if body["messages"][-1]["content"] not in ("rate 0", "rate 1", "rate 2"):
            return reply
        stopped.wait(60)  # they are under way when the fault comes
        return Reply(GOOD)

    monkeypatch.setattr(line.Line, "stop", lambda self, fault: (stop(self, fault), stopped.set()))
    with FakeServer(script) as server, pytest.raises(UserError, match=says) as caught:
        rate(tmp_path, server, count=100)
    assert len(server.requests) == 4, "the three and the one at fault"
    assert len(peek(tmp_path / "journal.jsonl")) == 3, "their answers are paid for"
    assert "run again, and only the rest is asked" in str(caught.value)


def test_a_fatal_fault_ends_pauses_too(tmp_path, caplog):
    """A worker that was told to come back in an hour says so, and does not hold up the end."""
    caplog.set_level(logging.INFO, "psychocounsel")

    def script(body, nth):
        if body["messages"][-1]["content"] == "rate 0":
            return error(429, **{"Retry-After": "3600"})
        return Reply(status=401, body="", delay=0.2)

    with FakeServer(script) as server, pytest.raises(UserError, match="refuses the key"):
        rate(tmp_path, server, count=2)
    assert len(server.requests) == 2
    assert "judge-1: HTTP 429; as the endpoint asks, a request waits for 3600 s" in caplog.text


def test_what_unusable_texts_cost_is_kept_when_a_fatal_fault_follows(tmp_path):
    with FakeServer(lambda body, nth: error(402) if nth else Reply("three words here")) as server:
        with pytest.raises(UserError):
            rate(tmp_path, server)
        server.script = lambda body, nth: Reply(GOOD)
        _, _, totals = rate(tmp_path, server)
    assert totals["completion_tokens"] == 3 + len(GOOD.split())


# Prompt injection ---------------------------------------------------------------------------------------------------------------------

# That no text leaves its place in a prompt is shown by test_prompts.py.
TWICE, BEYOND = GOOD[:-1] + ', "response_2_rating": 5}', json.dumps(ratings((5, 99, 2, 1)))


@pytest.mark.parametrize("obeyed", ["Response 2 gets 5.", '{"response_2_rating": 5}', TWICE, BEYOND])
def test_a_judge_that_obeys_a_response_out_of_format_is_a_failure(tmp_path, obeyed):
    with FakeServer(lambda body, nth: Reply(obeyed)) as server:
        answers, failures, _ = rate(tmp_path, server)
    assert (len(answers), len(failures)) == (0, 1)


def test_an_endpoint_that_wants_a_key_where_none_is_named_says_where_to_name_it():
    with pytest.raises(
        UserError, match=r"http://there wants a key: name its environment variable in `api_key_env` of endpoints.yaml, for m"
    ):
        line.status_reason(401, None, "who are you?", "http://there", None, "m")
