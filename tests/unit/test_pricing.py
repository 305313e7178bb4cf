"""What requests cost and what is left to ask: arithmetic recomputed here, and programs that plan without asking."""

import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import yaml
from fakes.openai_server import FakeServer, echo
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel.chat import ChatRequest, complete
from psychocounsel.errors import UserError
from psychocounsel.journal import Journal, peek
from psychocounsel.models import ModelSpec
from psychocounsel.pricing import cost, expected_tokens, read_price, usages

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
KEY = "FAKE_KEY_OF_THIS_TEST"
SPEC = {"name": "therapist", "id": "org/model", "endpoint": "fake", "sampling": {"max_tokens": 8}}
MODEL = SPEC | {
    **dict.fromkeys(("title", "group", "institution", "language", "licence"), "x"),
    **{"revision": None, "kind": "chat", "instruction": None, "system_role": True, "structured_output": "none"},
    **{"sampling": {"temperature": 0.5, "top_p": None, "max_tokens": 8}, "price": {"input": 2.5, "cached_input": None, "output": 10.0}},
}
MODEL.pop("name")
TOKENS = st.integers(0, 10**9)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A fake server, and files of its address and of its model's price in the test's folder."""
    monkeypatch.setenv(KEY, "sk-x")
    with FakeServer(echo) as fake:
        entry = {"kind": "openai", "base_url": fake.url, "api_key_env": KEY, "concurrency": 2, "timeout_s": 60, "max_retries": 0}
        (tmp_path / "endpoints.yaml").write_text(yaml.safe_dump({"fake": entry}))
        (tmp_path / "models.yaml").write_text(yaml.safe_dump({"therapist": MODEL}))
        yield fake


def requests(count: int) -> list[ChatRequest]:
    return [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i:04}"}]) for i in range(count)]


def ask(folder: Path, count: int, **options):
    files = {"endpoints": folder / "endpoints.yaml", "journal": folder / "journal.jsonl", "prices": [folder / "models.yaml"]}
    return complete(ModelSpec(**SPEC), requests(count), **files, **options)


@given(TOKENS, st.floats(0, 1), TOKENS, st.floats(0, 100), st.none() | st.floats(0, 100), st.floats(0, 100))
def test_a_cost_is_the_sum_of_its_three_parts(prompt, share, completion, input_price, cached_price, output_price):
    cached = int(prompt * share)
    by_hand = ((prompt - cached) * input_price + cached * (input_price if cached_price is None else cached_price)) / 1e6
    by_hand += completion * output_price / 1e6
    price = {"input": input_price, "cached_input": cached_price, "output": output_price}
    tokens = {"prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": completion}
    assert cost(price, tokens) == pytest.approx(by_hand, rel=1e-9, abs=1e-6)
    assert cost(None, tokens) is None


def test_tokens_are_expected_as_they_were_seen_or_at_their_most():
    unseen = expected_tokens([40, 80], [], None, longest_answer=7)
    assert unseen == {"prompt_tokens": 30, "completion_tokens": 14, "cached_tokens": 0}
    usage = [
        {"prompt_tokens": 10, "completion_tokens": 2, "cached_tokens": 4},
        {"prompt_tokens": 30, "completion_tokens": 4, "cached_tokens": None},
    ]
    assert expected_tokens([40, 80], usage, 0.5, longest_answer=7) == {"prompt_tokens": 60, "completion_tokens": 6, "cached_tokens": 6}


def test_another_models_answers_tell_nothing_of_a_paid_one():
    answers = [{"usage": {"n": n}, "served_model": name} for n, name in enumerate(["a-2024", "a-mini-2024", None])] + [
        {"usage": None, "served_model": "a"}
    ]
    assert usages(answers, "a", "openai") == [{"n": 0}, {"n": 2}]
    assert usages(answers, "a", "serve") == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_prices_are_inherited(tmp_path):
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"therapist": MODEL, "cheap": {"extends": "therapist", "title": "y"}}))
    assert read_price([tmp_path / "models.yaml"], "cheap") == MODEL["price"]
    assert read_price([tmp_path / "models.yaml"], "a policy of the run") is None
    assert read_price([], "cheap") is None


def test_what_was_spent_is_told(tmp_path, server):
    _, _, totals = ask(tmp_path, 3)
    assert totals["cost"] == pytest.approx((totals["prompt_tokens"] * 2.5 + totals["completion_tokens"] * 10) / 1e6)


def test_a_plan_asks_nothing_and_counts_what_the_journal_lacks(tmp_path, server, capsys, monkeypatch):
    _, _, totals = ask(tmp_path, 3)
    monkeypatch.delenv(KEY)
    with pytest.raises(SystemExit) as end:
        ask(tmp_path, 10, plan=True)
    plan = json.loads(capsys.readouterr().out)
    assert not end.value.code
    assert len(server.requests) == 3
    expected = {"model": "therapist", "endpoint": "openai", "requests": 10, "left": 7, "under_way": 0, "bound": False, "cached_tokens": 0}
    expected |= {kind: round(totals[kind] * 7 / 3) for kind in ("prompt_tokens", "completion_tokens")}  # questions of one length
    assert plan == expected | {"cost": pytest.approx((expected["prompt_tokens"] * 2.5 + expected["completion_tokens"] * 10) / 1e6)}


def test_without_an_answer_to_go_by_a_plan_is_an_upper_bound(tmp_path, server, capsys):
    with pytest.raises(SystemExit):
        ask(tmp_path, 4, plan=True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["bound"]
    assert (plan["left"], plan["completion_tokens"], plan["prompt_tokens"]) == (4, 4 * 8, round(4 * len("question 0000") / 4))
    assert not (tmp_path / "journal.jsonl").exists()


def test_peeking_takes_no_lock_and_leaves_out_an_unfinished_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    answer = {"text": "secret", "finish_reason": "stop", "usage": None, "served_model": None}
    with Journal(path, []) as journal:
        journal.add({"key": "aa", "answer": answer, "reason": None, "raw": [], "spent": {}})
        journal.add({"key": "bb", "answer": None, "reason": "empty", "raw": [], "spent": {}})
        journal.file.write(b'{"key": "torn", "ans')
        journal.file.flush()
        assert peek(path) == {"aa": {"finish_reason": "stop", "usage": None, "served_model": None}}
    assert path.read_bytes().endswith(b'"torn", "ans')
    assert peek(tmp_path / "none.jsonl") == {}
    for line in (b'{"key": "k"}\n', b"no JSON\n"):
        path.write_bytes(line)
        with pytest.raises(UserError, match="journal.jsonl:1"):
            peek(path)


@pytest.fixture
def speeches(tmp_path) -> Path:
    """A file of two speeches."""
    rows = [
        {"speech_id": f"{n:016x}", "text": f"I feel bad about {n}", "source": "s", "source_row": n, "source_key": str(n), "topic": "others"}
        | {"coarse_topic": "special_topics", "topic_from": "source", "cluster_id": f"{n:016x}", "split": "test"}
        for n in (1, 2)
    ]
    (tmp_path / "speeches.jsonl").write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    return tmp_path / "speeches.jsonl"


def generate(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    settings = json.dumps({"model": SPEC, "prompt": "{{ client_speech }}", "seed": 1})
    files = {"--speeches": "speeches.jsonl", "--endpoints": "endpoints.yaml", "--prices": "models.yaml", "--journal": "journal.jsonl"}
    files |= {"--out": "out.jsonl", "--failed": "failed.jsonl"}
    named = [word for flag, name in files.items() for word in (flag, str(folder / name))]
    command = [sys.executable, str(SCRIPTS / "generate_responses.py"), "--settings", settings, *named, *words]
    without_key = {name: value for name, value in os.environ.items() if name != KEY}
    return subprocess.run(command, capture_output=True, text=True, env=without_key | environment)


def test_a_program_plans_without_key_lock_or_output(tmp_path, server, speeches):
    before = {path.name for path in tmp_path.iterdir()} | {"journal.jsonl"}
    with Journal(tmp_path / "journal.jsonl", []):  # another job is writing
        done = generate(tmp_path, "--plan")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["left"] == 2
    assert server.requests == []
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "journal.jsonl").read_bytes() == b""

    assert generate(tmp_path, **{KEY: "sk-x"}).returncode == 0
    journal, record = (tmp_path / "journal.jsonl").read_bytes(), json.loads((tmp_path / "out.jsonl.prov.json").read_text())
    done = generate(tmp_path, "--plan")
    plan, api = json.loads(done.stdout), record["run"]["facts"]["api"]
    assert (plan["requests"], plan["left"], plan["cost"]) == (2, 0, 0)
    assert api["cost"] == pytest.approx((api["prompt_tokens"] * 2.5 + api["completion_tokens"] * 10) / 1e6)
    assert (tmp_path / "journal.jsonl").read_bytes() == journal
    assert len(server.requests) == 2
