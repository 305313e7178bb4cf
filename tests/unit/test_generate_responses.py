"""The sampling program, run as a user runs it, against a fake endpoint."""

import subprocess
from pathlib import Path

import orjson
import pytest
import yaml
from fakes.openai_server import FakeServer, Reply, echo
from programs import run_program, start_program

from psychocounsel.records import content_hash, dump_records, read_records

PROMPT = "Answer. {{ client_speech }}"
LENGTH_PROMPT = "Answer in {{ words }} words. {{ client_speech }}"
MODEL = {"name": "therapist", "id": "org/model", "endpoint": "fake", "instruction": "You are kind.", "sampling": {"max_tokens": 8}}


def speech(number: int, split: str = "test") -> dict:
    text = f"I feel number {number}."
    return {
        "speech_id": content_hash(text, digits=16),
        "text": text,
        "source": "demo",
        "source_row": number,
        "source_key": f"q{number}",
        "topic": "anxiety",
        "coarse_topic": "Emotion",
        "topic_from": "source",
        "cluster_id": content_hash(text, digits=16),
        "split": split,
    }


SPEECHES = [speech(i, split) for i, split in enumerate(["train", "test", "test", "dev", "test"])]
IDS = [s["speech_id"] for s in SPEECHES]


@pytest.fixture
def folder(tmp_path):
    dump_records(tmp_path / "speeches.jsonl", SPEECHES, "speech")
    return tmp_path


def generate(folder: Path, server: FakeServer | None, *more: str, how=run_program, **settings) -> subprocess.CompletedProcess:
    url = server.url if server else "http://127.0.0.1:1/v1"
    entry = {"kind": "openai", "base_url": url, "api_key_env": None, "concurrency": 4, "timeout_s": 60, "max_retries": 0}
    (folder / "endpoints.yaml").write_text(yaml.safe_dump({"fake": entry}))
    settings = orjson.dumps({"model": MODEL, "prompt": PROMPT, "seed": 1, **settings}).decode()
    words = ["--speeches", "speeches.jsonl", "--endpoints", "endpoints.yaml", "--journal", "journal.jsonl"]
    words += ["--out", "out.jsonl", "--failed", "failed.jsonl", *more]
    paths = [folder / word if word.endswith((".jsonl", ".yaml")) else word for word in words]
    return how("generate_responses", *paths, "--settings", settings)


def responses(folder: Path, name: str = "out.jsonl") -> list[dict]:
    return read_records(folder / name, "response")


def test_every_speech_is_answered_with_the_model_s_own_messages(folder):
    with FakeServer() as server:
        done = generate(folder, server)
    assert done.returncode == 0, done.stderr
    rows = responses(folder)
    assert [row["speech_id"] for row in rows] == sorted(IDS)
    assert {row["text"] for row in rows} == {f"You said: Answer. {s['text']}" for s in SPEECHES}
    assert {(row["model"], row["sample"], row["target_words"], row["served_model"]) for row in rows} == {
        ("therapist", 0, None, "org/model")
    }
    assert all(body["messages"][0] == {"role": "system", "content": "You are kind."} for body in server.requests)
    assert all(row["response_id"] == content_hash(row["speech_id"], "therapist", row["request_key"], digits=16) for row in rows)
    assert read_records(folder / "failed.jsonl", "failure") == []
    assert orjson.loads((folder / "out.jsonl.prov.json").read_bytes())["run"]["facts"]["api"]["requests"] == 5
    assert "I feel" not in done.stderr, "no client's words in the log"


def test_split_and_assignment_choose_the_speeches(folder):
    rows = [
        {"speech_id": IDS[0], "model": "therapist"},
        {"speech_id": IDS[1], "model": "therapist"},
        {"speech_id": IDS[2], "model": "other"},
    ]
    dump_records(folder / "assigned.jsonl", rows, "assignment")
    with FakeServer() as server:
        generate(folder, server, "--assignment", "assigned.jsonl")
        assert {row["speech_id"] for row in responses(folder)} == {IDS[0], IDS[1]}
        generate(folder, server, "--assignment", "assigned.jsonl", "--split", "test")
        assert {row["speech_id"] for row in responses(folder)} == {IDS[1]}
        generate(folder, server, "--split", "dev")
        assert {row["speech_id"] for row in responses(folder)} == {IDS[3]}
    assert len(server.requests) == 3, "the journal answers what was asked before"


def test_a_model_that_was_assigned_nothing_gets_an_empty_file(folder):
    dump_records(folder / "assigned.jsonl", [], "assignment")
    assert generate(folder, None, "--assignment", "assigned.jsonl").returncode == 0
    assert responses(folder) == []


def test_an_assigned_speech_that_is_not_there_is_named(folder):
    dump_records(folder / "assigned.jsonl", [{"speech_id": "0" * 16, "model": "therapist"}], "assignment")
    done = generate(folder, None, "--assignment", "assigned.jsonl")
    assert done.returncode == 1
    assert "0000000000000000" in done.stderr


def test_samples_have_seeds_of_their_own_that_do_not_depend_on_the_other_speeches(folder):
    with FakeServer(lambda body, nth: Reply(f"answer {body['seed']}")) as server:
        generate(folder, server, samples=3)
    rows = responses(folder)
    assert [row["sample"] for row in rows] == [0, 1, 2] * 5
    assert len({row["text"] for row in rows}) == len({row["response_id"] for row in rows}) == 15
    seeds = {body["seed"] for body in server.requests}
    assert seeds == {int(content_hash(1, speech_id, sample, digits=7), 16) for speech_id in IDS for sample in range(3)}


def test_the_second_setting_asks_for_the_other_model_s_length(folder):
    with FakeServer() as server:
        generate(folder, server, "--split", "test")
        (folder / "out.jsonl").rename(folder / "opponent.jsonl")
        rows = responses(folder, "opponent.jsonl")[:-1]  # the opponent left one speech unanswered
        dump_records(folder / "opponent.jsonl", rows, "response")
        done = generate(
            folder, server, "--split", "test", "--length-of", "opponent.jsonl", "--out-length", "length.jsonl", length_prompt=LENGTH_PROMPT
        )
    assert done.returncode == 0, done.stderr
    assert len(responses(folder)) == 3
    length = responses(folder, "length.jsonl")
    assert [row["speech_id"] for row in length] == [row["speech_id"] for row in rows]
    for row, other in zip(length, rows, strict=True):
        assert row["target_words"] == len(other["text"].split())
        assert f"Answer in {row['target_words']} words." in row["text"]
    assert len({row["response_id"] for row in [*length, *responses(folder)]}) == 5
    assert "1 dropped: no answer to take the length from" in done.stderr


@pytest.mark.parametrize("arguments", [["--length-of", "o.jsonl"], ["--out-length", "l.jsonl"], ["--recorded", "r.jsonl"]])
def test_arguments_that_belong_together_are_asked_for(folder, arguments):
    done = generate(folder, None, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_an_empty_answer_is_asked_again_and_then_a_failure(folder):
    with FakeServer(lambda body, nth: Reply("  \n") if "number 2" in body["messages"][-1]["content"] else echo(body, nth)) as server:
        done = generate(folder, server, max_failed_share=0.2, attempts=2)
    assert done.returncode == 0, done.stderr
    assert len(responses(folder)) == 4
    (failure,) = read_records(folder / "failed.jsonl", "failure")
    assert (failure["request_id"], failure["reason"], failure["raw"]) == (f"{IDS[2]}/free/0", "an empty answer", ["  \n", "  \n"])


def test_too_many_failures_leave_no_output(folder):
    with FakeServer(lambda body, nth: Reply("")) as server:
        done = generate(folder, server)
    assert done.returncode == 1
    assert "5 of 5 requests" in done.stderr
    assert not (folder / "out.jsonl").exists()
    assert (folder / "journal.jsonl").exists()


def test_an_answer_that_was_cut_off_is_kept_and_counted(folder):
    with FakeServer(lambda body, nth: Reply("I hear", finish_reason="length")) as server:
        done = generate(folder, server)
    assert {row["finish_reason"] for row in responses(folder)} == {"length"}
    assert "5 answers were cut off" in done.stderr
    assert orjson.loads((folder / "out.jsonl.prov.json").read_bytes())["run"]["facts"]["cut_off"] == 5


def test_recorded_answers_join_by_the_source_s_key(folder):
    rows = [{"question_id": f"q{i}", "choices": [{"turns": [f"recorded {i}"]}]} for i in (4, 2, 1, 3)]
    (folder / "recorded.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    recorded = {"adapter": "answers_counselling_bench", "columns": {}}
    done = generate(folder, None, "--recorded", "recorded.jsonl", recorded=recorded, max_failed_share=0.2)
    assert done.returncode == 0, done.stderr
    assert {row["speech_id"]: row["text"] for row in responses(folder)} == {IDS[i]: f"recorded {i}" for i in (1, 2, 3, 4)}
    assert {(row["usage"], row["finish_reason"]) for row in responses(folder)} == {(None, None)}
    (failure,) = read_records(folder / "failed.jsonl", "failure")
    assert (failure["request_id"], failure["reason"]) == (f"{IDS[0]}/free/0", "no recorded answer")
    assert not (folder / "journal.jsonl").exists()

    done = generate(folder, None, "--recorded", "recorded.jsonl", recorded=recorded)
    assert done.returncode == 1
    assert "no answer to 1 of 5 speeches" in done.stderr


def test_two_runs_write_the_same_bytes(folder):
    with FakeServer() as server:
        generate(folder, server)
        first = (folder / "out.jsonl").read_bytes()
        (folder / "journal.jsonl").unlink()
        generate(folder, server, how=start_program)
    assert (folder / "out.jsonl").read_bytes() == first
