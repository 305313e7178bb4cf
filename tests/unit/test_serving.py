"""Servers that live as long as a job: their command line, their start, and their end whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import orjson
import psutil
import pytest
import yaml
from fakes.micro_model import build_micro_model
from fakes.openai_server import FakeServer
from unit.test_chat import wait_for

from psychocounsel import serving
from psychocounsel.chat import ChatRequest, complete
from psychocounsel.endpoints import Endpoint
from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec
from psychocounsel.serving import free_port, listening, running, served, server_command, transformers_options

FAKE = Path("tests/fakes/openai_server.py").resolve()


def model(**changes) -> ModelSpec:
    return ModelSpec(**{"name": "therapist", "id": "org/model", "endpoint": "fake", "sampling": {"max_tokens": 8}, **changes})


def endpoint(server: str = "transformers", **changes) -> Endpoint:
    return Endpoint(**{"kind": "serve", "server": server, "start_timeout_s": 60, **changes})


@pytest.fixture
def instead(monkeypatch):
    """Start another program in the place of the server, a function of the port or a text of Python that gets the port as sys.argv[1]."""

    def start(program) -> None:
        def command(spec, endpoint, folder, gpus, port, template) -> list[str]:
            return program(port) if callable(program) else [sys.executable, "-c", program, str(port)]

        monkeypatch.setattr(serving, "server_command", command)

    return start


def fake(port: int, *options: str) -> list[str]:
    """The command line of the fake, whose /health answers like any address of it."""
    return [sys.executable, str(FAKE), "--port", str(port), *options]


def start(log: Path, spec: ModelSpec | None = None, at: Endpoint | None = None):
    return served(spec or model(), at or endpoint(), None, 1, log)


def port_of(address: str) -> int:
    return int(address.split(":")[2].split("/")[0])


# The command line ---------------------------------------------------------------------------------------------------------------------


def test_vllm_gets_all_of_the_model(tmp_path):
    spec = model(revision="abc", serve={"dtype": "bfloat16", "max_model_len": 4096, "trust_remote_code": True, "chat_template": "{{ x }}"})
    command = server_command(spec, endpoint("vllm", server_args=["--max-num-seqs", "64"]), None, 4, 8000, Path("t.jinja"))
    assert " ".join(command) == (
        "vllm serve org/model --served-model-name therapist --tensor-parallel-size 4 --generation-config vllm"
        " --enable-prompt-tokens-details --max-model-len 4096 --chat-template t.jinja"
        " --revision abc --tokenizer-revision abc --code-revision abc"
        " --dtype bfloat16 --host 127.0.0.1 --port 8000 --trust-remote-code --max-num-seqs 64"
    )
    without_code = server_command(model(revision="abc"), endpoint("vllm"), None, 1, 8000, None)
    assert "--code-revision" not in without_code
    assert "--trust-remote-code" not in without_code


def test_local_weights_stand_in_the_place_of_id_and_revision(tmp_path):
    command = server_command(model(revision="abc"), endpoint("vllm"), tmp_path, 1, 8000, None)
    assert command[:3] == ["vllm", "serve", str(tmp_path)]
    assert "abc" not in command
    spec = model(revision="abc", serve={"dtype": "float32"})
    command = server_command(spec, endpoint(server_args=["--device", "cpu"]), tmp_path, 1, 8000, None)
    assert " ".join(command) == f"transformers serve {tmp_path} --dtype float32 --host 127.0.0.1 --port 8000 --device cpu"


def test_transformers_finds_a_model_of_the_hub_by_id_and_revision():
    assert server_command(model(revision="abc"), endpoint(), None, 1, 1, None)[2] == "org/model@abc"
    assert server_command(model(), endpoint(), None, 1, 1, None)[2] == "org/model"


def test_a_chat_template_that_the_server_cannot_take_is_refused(tmp_path):
    with (
        pytest.raises(UserError, match="therapist: `transformers serve` takes no chat template"),
        start(tmp_path / "server.log", model(serve={"chat_template": "{{ messages }}"})),
    ):
        pass


@pytest.mark.parametrize(("temperature", "sampled"), [(0.7, True), (None, True), (0.0, False)])
def test_transformers_is_told_to_sample(tmp_path, temperature, sampled):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5], "pad_token_id": 0, "top_k": 50, "do_sample": false}')
    options = transformers_options(model(sampling={"temperature": temperature, "max_tokens": 8}), tmp_path)
    assert orjson.loads(options["generation_config"]) == {"do_sample": sampled, "top_k": 0, "eos_token_id": [2, 5], "pad_token_id": 0}


# Start and end ------------------------------------------------------------------------------------------------------------------------


def test_a_server_answers_within_the_block_and_is_gone_after_it(instead, tmp_path):
    instead(fake)
    with start(tmp_path / "logs" / "server.log") as address:
        assert urllib.request.urlopen(address + "/models").status == 200
    assert not listening(port_of(address))


def test_the_chat_template_lies_beside_the_log(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(serving, "server_command", lambda s, e, f, g, port, template: seen.append(template) or fake(port))
    with start(tmp_path / "j.jsonl.server.log", model(serve={"chat_template": "{{ messages }}"}), endpoint("vllm")):
        assert seen == [tmp_path / "j.jsonl.server.chat_template.jinja"]
        assert seen[0].read_text() == "{{ messages }}"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_stops_the_server(instead, tmp_path, error):
    instead(fake)
    with pytest.raises(error), start(tmp_path / "server.log") as address:
        raise error
    assert not listening(port_of(address))


def test_a_server_that_crashes_shows_the_end_of_its_log(instead, tmp_path):
    instead("print('CUDA out of memory'); raise SystemExit(3)")
    with pytest.raises(UserError, match="(?s)code 3.*CUDA out of memory"), start(tmp_path / "server.log"):
        pass


def test_a_server_that_is_never_ready_is_given_up(instead, monkeypatch, tmp_path):
    log = tmp_path / "server.log"
    instead("import time; print('loading', flush=True); time.sleep(600)")
    monkeypatch.setattr(serving, "listening", lambda port: wait_for(lambda: "\nloading" in log.read_text()))
    slow = endpoint(start_timeout_s=0.5)
    with pytest.raises(UserError, match="(?s)start_timeout_s = 0.5 s.*loading"), start(log, at=slow):
        pass


def test_a_server_that_is_not_installed_is_named(instead, tmp_path):
    instead(lambda port: ["no-such-server"])
    with pytest.raises(UserError, match="no-such-server: not installed"), start(tmp_path / "server.log"):
        pass


# A server with a worker that does not listen to SIGTERM, and a job that starts it.
STUBBORN = f"""
import subprocess, sys
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
subprocess.run([sys.executable, {str(FAKE)!r}, "--port", sys.argv[1]])
"""
JOB = f"""
import sys; sys.path[:0] = ["scripts", "tests"]
from unit.test_serving import *
serving.GRACE_S = 1
serving.server_command = lambda spec, endpoint, folder, gpus, port, template: [sys.executable, "-c", {STUBBORN!r}, str(port)]
with start(Path(sys.argv[1])) as address:
    print(address, flush=True)
    __import__("time").sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_job_ends_the_server_and_its_workers(tmp_path, end):
    log = tmp_path / "server.log"
    with subprocess.Popen([sys.executable, "-c", JOB, str(log)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as job:
        address = job.stdout.readline().strip()
        worker = int(log.read_text().splitlines()[-1])
        assert is_alive(worker)
        job.send_signal(end)
        assert job.wait(60) == {signal.SIGTERM: 143, signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}[end]
    wait_for(lambda: not listening(port_of(address)) and not is_alive(worker))


def is_alive(process: int) -> bool:
    """Whether a process lives; one that is dead but not yet collected does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Ports --------------------------------------------------------------------------------------------------------------------------------


def test_a_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


@pytest.fixture
def taken_first(monkeypatch):
    """A port that another server, a healthy one too, takes after it was found free; the next one is free."""
    with FakeServer() as other:
        taken = port_of(other.url)
        ports = iter([taken, *(free_port() for _ in range(3))])
        monkeypatch.setattr(serving, "free_port", lambda: next(ports))
        yield taken


def test_a_port_taken_meanwhile_is_given_up_for_another(instead, taken_first, tmp_path):
    clash = "raise SystemExit('OSError: [Errno 98] Address already in use')"
    instead(lambda port: [sys.executable, "-c", clash] if port == taken_first else fake(port))
    with start(tmp_path / "server.log") as address:
        assert port_of(address) != taken_first
    assert "Address already in use" in (tmp_path / "server.log").read_text()


def test_a_crash_after_a_port_clash_is_no_clash(instead, taken_first, tmp_path):
    """One log holds the words of both starts: those of the first say nothing of the second."""
    words = {True: "OSError: [Errno 98] Address already in use", False: "CUDA out of memory"}
    instead(lambda port: [sys.executable, "-c", f"raise SystemExit({words[port == taken_first]!r})"])
    with pytest.raises(UserError, match="(?s)code 1 before it was ready.*CUDA out of memory"), start(tmp_path / "server.log"):
        pass


def test_the_health_of_another_server_is_not_ours(instead, taken_first, tmp_path):
    """Ours never comes as far as to listen; the other one answers /health on its port."""
    instead(lambda port: [sys.executable, "-c", "import time; time.sleep(60)"] if port == taken_first else fake(port))
    with start(tmp_path / "server.log") as address:
        assert port_of(address) != taken_first


def test_a_port_is_not_shared(instead, monkeypatch, tmp_path):
    """Servers that set SO_REUSEPORT, as vLLM does, listen side by side without an error, and each gets some of the requests."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        shared = other.getsockname()[1]
        ports = iter([shared, free_port()])
        monkeypatch.setattr(serving, "free_port", lambda: next(ports))
        log, listens = tmp_path / "server.log", tmp_path / "the other one listens"
        instead(lambda port: [sys.executable, "-c", SHARING, str(port), str(listens)])

        def listen_later() -> None:
            wait_for(lambda: f"up at {shared}" in log.read_text())
            other.listen()
            listens.touch()

        thread = threading.Thread(target=listen_later)
        thread.start()
        with start(log) as address:
            assert port_of(address) != shared
        thread.join()


# Listens on its port whoever else does, and is healthy when a file is there.
SHARING = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists(sys.argv[2]) else 503)
        self.end_headers()
class Sharing(HTTPServer):
    allow_reuse_port = True
server = Sharing(("127.0.0.1", int(sys.argv[1])), Health)
print("up at", sys.argv[1], flush=True)
server.serve_forever()
"""


def test_ports_that_are_all_taken_are_an_error(instead, monkeypatch, tmp_path):
    instead("raise SystemExit('[Errno 98] address already in use')")
    with pytest.raises(UserError, match="no port to listen on: others took each of 5"), start(tmp_path / "server.log"):
        pass


# A server that is lost during the work ------------------------------------------------------------------------------------------------


def ask(tmp_path: Path, requests: int, spec: ModelSpec | None = None, journal: str = "j.jsonl", **entry):
    """Ask so many questions; returns answers in their order."""
    endpoints = tmp_path / "endpoints.yaml"
    entry = {"kind": "serve", "server": "vllm", "start_timeout_s": 60, "concurrency": 2, "max_retries": 1, **entry}
    endpoints.write_text(yaml.safe_dump({"fake": entry}))
    asked = [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(requests)]
    return list(complete(spec or model(), asked, endpoints=endpoints, journal=tmp_path / journal)[0])


def test_a_journal_that_answers_everything_starts_no_server(instead, tmp_path):
    instead(fake)
    first = ask(tmp_path, 3)
    assert {a.served_model for a in first} == {"therapist"}
    assert (tmp_path / "j.jsonl.server.log").exists()
    instead(lambda port: ["no-such-server"])
    assert ask(tmp_path, 3) == first


def test_a_server_that_is_lost_is_started_once_more_and_asked_what_is_left(instead, tmp_path):
    starts = []
    instead(lambda port: starts.append(port) or fake(port, *(["--die-after", "7"] if len(starts) == 1 else [])))
    answers = ask(tmp_path, 30)
    assert [a.text for a in answers] == [f"You said: question {i}" for i in range(30)]
    assert len(starts) == 2
    lines = [orjson.loads(line) for line in (tmp_path / "j.jsonl").read_bytes().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 30, "what was answered is kept and not asked again"
    assert (tmp_path / "j.jsonl.server.log").read_text().count("$ ") == 2, "one log holds both"


def test_a_server_that_is_lost_twice_stops_the_program_with_the_end_of_its_log(instead, tmp_path):
    starts = []
    dies = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, {str(FAKE)!r}, "--port", sys.argv[1], "--die-after", "3"])
print("segmentation fault", flush=True); time.sleep(60)
"""
    instead(lambda port: starts.append(port) or [sys.executable, "-c", dies, str(port)])
    with pytest.raises(UserError, match="(?s)lost twice.*kept.*segmentation fault"):
        ask(tmp_path, 50)
    assert len(starts) == 2
    instead(fake)
    assert len(ask(tmp_path, 50)) == 50
    assert (tmp_path / "j.jsonl.server.log").read_text().count("$ ") == 1, "a new job begins a new log"


@pytest.mark.slow
def test_a_real_server_that_is_killed_is_started_once_more(monkeypatch, tmp_path):
    """Half a minute: `transformers serve` is killed with -9 in the middle of its answers; a second one answers what is left."""
    os.environ["OMP_NUM_THREADS"] = "1"
    manifest = build_micro_model(tmp_path / "model")
    servers = []

    @contextmanager
    def noted(*args):
        with running(*args) as process:
            servers.append(process)
            yield process

    monkeypatch.setattr(serving, "running", noted)
    journal = tmp_path / "j.jsonl"

    def kill() -> None:
        wait_for(lambda: journal.read_bytes().count(b"\n") >= 6, 120)
        servers[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text(yaml.safe_dump({"fake": REAL}))
    spec = model(sampling={"temperature": 0.0, "max_tokens": 24}, serve={"dtype": "float32"})
    asked = [ChatRequest(f"r{i}", [{"role": "user", "content": f"I feel sad about {i}."}]) for i in range(40)]
    answers, failures, totals = complete(spec, asked, endpoints=endpoints, journal=journal, weights=manifest)
    killer.join()
    assert len(servers) == 2
    assert [a.id for a in answers] == [request.id for request in asked]
    assert len(failures) == 0
    assert totals["completion_tokens"] <= 24 * 40
    assert [process.poll() is not None for process in servers] == [True, True]


REAL = {
    "kind": "serve",
    "server": "transformers",
    "start_timeout_s": 120,
    "concurrency": 4,
    "timeout_s": 60,
    "max_retries": 1,
    "server_args": ["--device=cpu", "--continuous-batching", "--cb-num-blocks=64", "--cb-block-size=32", "--cb-max-batch-tokens=256"],
}


@pytest.mark.slow
def test_a_real_server_serves_a_real_model(tmp_path):
    """Half a minute: `transformers serve` with a micro model answers, samples, and repeats itself at temperature 0."""
    os.environ["OMP_NUM_THREADS"] = "1"
    manifest = build_micro_model(tmp_path / "model")
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text(yaml.safe_dump({"fake": REAL}))
    same = [{"role": "user", "content": "I feel sad."}]

    def ask(temperature: float, journal: str):
        spec = model(sampling={"temperature": temperature, "top_p": 0.95, "max_tokens": 12}, serve={"dtype": "float32"})
        asked = [ChatRequest(f"r{i}", same, seed=i) for i in range(4)]
        return list(complete(spec, asked, endpoints=endpoints, journal=tmp_path / journal, weights=manifest)[0])

    sampled = ask(1.0, "a.jsonl")
    assert len({a.text for a in sampled}) == 4
    assert all(a.usage["completion_tokens"] <= 12 and a.served_model == "therapist" for a in sampled)
    assert all(a.finish_reason == ("length" if a.usage["completion_tokens"] == 12 else "stop") for a in sampled)
    greedy = ask(0.0, "b.jsonl")
    assert len({a.text for a in greedy}) == 1
    assert [a.text for a in ask(0.0, "c.jsonl")] == [a.text for a in greedy]
