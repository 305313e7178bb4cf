"""Never paid twice: programs that are killed outright, again and again, and then finish.

Real programs as processes against a server that counts. At each kill it is noted which requests the server has been asked
and which answers the journal holds: what is in the journal is never asked again, what was under way at most once more for
each kill that hit it. The outputs are those of a run that nobody disturbed, byte for byte.
`make stress` kills 50 times (PSYCHOCOUNSEL_KILLS) where the tests kill 10 times.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import psutil
import pytest
import yaml
from fakes.openai_server import FakeServer, Reply
from unit.test_chat import wait_for

from psychocounsel.records import content_hash, dump_records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("PSYCHOCOUNSEL_KILLS", "10"))
SPEECHES, CONCURRENCY, DELAY_S = 12 * KILLS, 4, 0.02
MODEL = {"name": "therapist", "id": "org/model", "endpoint": "fake", "sampling": {"max_tokens": 8}}
PRINCIPLES = [{"id": name, "name": name, "definition": f"Definition of {name}.", "aspects": ["One."]} for name in ("empathy", "safety")]


def digest(body: dict) -> str:
    """Return what stands for a question in its answer."""
    return hashlib.sha256(body["messages"][-1]["content"].encode()).hexdigest()


def script(body: dict, nth: int) -> Reply:
    """Answer as a therapist or as a judge, with the question's digest."""
    if "response_1_rating" not in body["messages"][-1]["content"]:
        return Reply(digest(body), delay=DELAY_S)
    rated = {"response_1_rating": 4, "rationale_1": digest(body), "response_2_rating": 2, "rationale_2": ""}
    return Reply(json.dumps(rated), delay=DELAY_S)


class Job:
    """A program on the test's files, with its outputs in a folder of its own."""

    def __init__(self, program: str, inputs: Path, folder: Path, server: FakeServer) -> None:
        folder.mkdir()
        self.folder, self.journal = folder, folder / "journal.jsonl"
        entry = {"kind": "openai", "base_url": server.url, "concurrency": CONCURRENCY, "timeout_s": 600, "max_retries": 0}
        (folder / "endpoints.yaml").write_text(yaml.safe_dump({"fake": entry}))
        settings = {"model": MODEL, "seed": 1}
        words = ["--speeches", inputs / "speeches.jsonl"]
        if program == "rate_responses":
            prompt = (ROOT / "config" / "prompts" / "rate.jinja").read_text(encoding="utf-8")
            settings |= {"prompt": prompt, "principles": PRINCIPLES, "protocol": "one_by_one"}
            words += ["--responses", inputs / "a.jsonl", inputs / "b.jsonl"]
        else:
            settings |= {"prompt": "Answer. {{ client_speech }}"}
        words += ["--endpoints", folder / "endpoints.yaml", "--journal", self.journal, "--out", folder / "out.jsonl"]
        words += ["--failed", folder / "failed.jsonl", "--settings", json.dumps(settings)]
        self.command = [sys.executable, str(ROOT / "scripts" / f"{program}.py"), *map(str, words)]

    def start(self) -> subprocess.Popen:
        """Start the program."""
        return subprocess.Popen(self.command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(self) -> dict[str, bytes]:
        """Run to the end; return the outputs."""
        with self.start() as process:
            error = process.stderr.read().decode()
        assert process.returncode == 0, error
        return {name: (self.folder / name).read_bytes() for name in ("out.jsonl", "failed.jsonl")}

    def answered(self) -> list[str]:
        """Return the digests of the questions that the journal answers, one a line."""
        content = self.journal.read_bytes() if self.journal.exists() else b""
        lines = map(orjson.loads, content[: content.rfind(b"\n") + 1].splitlines())
        return [re.search("[0-9a-f]{64}", line["answer"]["text"]).group() for line in lines]


def settle(server: FakeServer) -> None:
    """Wait until the server has read all that a killed client sent, and closed its side of every connection."""
    port = int(server.url.split(":")[2].split("/")[0])
    open_ones = (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
    wait_for(lambda: not any(c.laddr.port == port and c.status in open_ones for c in psutil.net_connections("tcp")))


def write_inputs(folder: Path) -> None:
    """Write speeches, and two responses to each."""
    speeches, responses = [], {"a": [], "b": []}
    for number in range(SPEECHES):
        text = f"I feel bad about number {number} of my life."
        speech_id = content_hash(text, digits=16)
        facts = {"source": "demo", "source_row": number, "source_key": None, "topic": "others", "coarse_topic": "special_topics"}
        speeches.append({"speech_id": speech_id, "text": text, **facts, "topic_from": "source", "cluster_id": speech_id, "split": "train"})
        for model, rows in responses.items():
            row = {
                "response_id": content_hash(number, model, digits=16),
                "speech_id": speech_id,
                "request_key": content_hash(number, model),
            }
            row |= {"model": model, "text": f"{model} answers {number}", "sample": 0, "finish_reason": "stop"}
            rows.append(row | {"usage": None, "served_model": None, "target_words": None})
    dump_records(folder / "speeches.jsonl", speeches, "speech")
    for model, rows in responses.items():
        dump_records(folder / f"{model}.jsonl", rows, "response")


@pytest.mark.parametrize("program", ["generate_responses", "rate_responses"])
def test_a_run_that_is_killed_again_and_again_pays_nothing_twice(tmp_path, program, capsys):
    write_inputs(tmp_path)
    with FakeServer(script) as server:
        undisturbed = Job(program, tmp_path, tmp_path / "undisturbed", server).finish()
        questions = Counter(map(digest, server.requests))
    dice, lost = random.Random(program), Counter()
    with FakeServer(script) as server:
        job = Job(program, tmp_path, tmp_path / "killed", server)
        for kill in range(KILLS):
            before, kept = len(server.requests), set(job.answered())
            share = (len(questions) - len(kept)) / (KILLS - kill)  # so that the last kill, too, finds something to do
            wanted = before + dice.randint(0, round(1.5 * share))
            with job.start() as process:
                wait_for(lambda wanted=wanted, process=process: len(server.requests) >= wanted or process.poll() is not None, 120)
                time.sleep(dice.uniform(0, 2 * DELAY_S))
                process.kill()
                process.stderr.close()
            settle(server)
            asked = Counter(map(digest, server.requests[before:]))
            assert not asked.keys() & kept, "asked again although the journal answered it"
            assert max(asked.values(), default=1) == 1
            in_flight = asked.keys() - set(job.answered())
            assert len(in_flight) <= CONCURRENCY
            lost.update(in_flight)
        outputs = job.finish()
    assert outputs == undisturbed
    assert Counter(map(digest, server.requests)) == questions + lost, "each once, and once more for each kill that hit it under way"
    assert sorted(job.answered()) == sorted(questions)
    with capsys.disabled():
        print(f"\n{program}: {KILLS} kills, {len(questions)} requests, {lost.total()} asked again that were under way at a kill")
