"""Servers that live as long as a job: their command line, their start, and their end whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import orjson
import pytest
import yaml
from fakes.micro_model import build_micro_model
from unit.test_chat import wait_for

from psychocounsel import serving
from psychocounsel.chat import ChatRequest, complete
from psychocounsel.endpoints import Endpoint
from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec
from psychocounsel.serving import free_port, served, server_command, transformers_options

FAKE = Path("tests/fakes/openai_server.py").resolve()


def model(**changes) -> ModelSpec:
    return ModelSpec(**{"name": "therapist", "id": "org/model", "endpoint": "fake", "sampling": {"max_tokens": 8}, **changes})


def endpoint(server: str = "transformers", **changes) -> Endpoint:
    return Endpoint(**{"kind": "serve", "server": server, "start_timeout_s": 10, **changes})


@pytest.fixture
def fake_server(monkeypatch):
    """Start the fake in the place of a real server; its /health answers like any address of it."""
    monkeypatch.setattr(serving, "server_command", lambda spec, endpoint, folder, port: [sys.executable, str(FAKE), "--port", str(port)])


def listens(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(address.split(":")[2].split("/")[0]))) == 0


# The command line ---------------------------------------------------------------------------------------------------------------------


def test_vllm_gets_all_of_the_model(tmp_path):
    spec = model(revision="abc", serve={"dtype": "bfloat16", "max_model_len": 4096, "tensor_parallel": 4, "trust_remote_code": True})
    command = server_command(spec, endpoint("vllm", server_args=["--enable-prefix-caching"]), None, 8000)
    assert " ".join(command) == (
        "vllm serve org/model --served-model-name therapist --tensor-parallel-size 4 --generation-config vllm"
        " --max-model-len 4096 --revision abc"
        " --dtype bfloat16 --host 127.0.0.1 --port 8000 --trust-remote-code --enable-prefix-caching"
    )


def test_local_weights_stand_in_the_place_of_id_and_revision(tmp_path):
    command = server_command(model(revision="abc"), endpoint("vllm"), tmp_path, 8000)
    assert command[:3] == ["vllm", "serve", str(tmp_path)]
    assert "abc" not in command
    command = server_command(model(revision="abc", serve={"dtype": "float32"}), endpoint(server_args=["--device", "cpu"]), tmp_path, 8000)
    assert " ".join(command) == f"transformers serve {tmp_path} --dtype float32 --host 127.0.0.1 --port 8000 --device cpu"


def test_transformers_finds_a_model_of_the_hub_by_id_and_revision():
    assert server_command(model(revision="abc"), endpoint(), None, 1)[2] == "org/model@abc"
    assert server_command(model(), endpoint(), None, 1)[2] == "org/model"


@pytest.mark.parametrize(("temperature", "sampled"), [(0.7, True), (None, True), (0.0, False)])
def test_transformers_is_told_to_sample(tmp_path, temperature, sampled):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5], "pad_token_id": 0, "top_k": 50, "do_sample": false}')
    options = transformers_options(model(sampling={"temperature": temperature, "max_tokens": 8}), tmp_path)
    assert orjson.loads(options["generation_config"]) == {"do_sample": sampled, "top_k": 0, "eos_token_id": [2, 5], "pad_token_id": 0}


# Start and end ------------------------------------------------------------------------------------------------------------------------


def test_a_server_answers_within_the_block_and_is_gone_after_it(fake_server, tmp_path):
    with served(model(), endpoint(), None, tmp_path / "logs" / "server.log") as address:
        assert urllib.request.urlopen(address + "/models").status == 200
    assert not listens(address)


def test_an_error_in_the_block_stops_the_server(fake_server, tmp_path):
    with pytest.raises(RuntimeError), served(model(), endpoint(), None, tmp_path / "server.log") as address:
        raise RuntimeError
    assert not listens(address)


def test_a_server_that_crashes_shows_the_end_of_its_log(monkeypatch, tmp_path):
    program = "print('CUDA out of memory'); raise SystemExit(3)"
    monkeypatch.setattr(serving, "server_command", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(UserError, match="(?s)code 3.*CUDA out of memory"), served(model(), endpoint(), None, tmp_path / "server.log"):
        pass


def test_a_server_that_is_never_ready_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(
        serving, "server_command", lambda *_: [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)"]
    )
    slow = endpoint(start_timeout_s=1)
    with pytest.raises(UserError, match="(?s)start_timeout_s = 1 s.*loading"), served(model(), slow, None, tmp_path / "server.log"):
        pass


def test_a_server_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "server_command", lambda *_: ["no-such-server"])
    with pytest.raises(UserError, match="no-such-server: not installed"), served(model(), endpoint(), None, tmp_path / "server.log"):
        pass


def test_sigterm_stops_the_server_and_all_its_children(tmp_path):
    server = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
subprocess.run([sys.executable, {str(FAKE)!r}, "--port", sys.argv[1]])
"""
    program = f"""
import sys; sys.path[:0] = ["scripts", "tests"]
from unit.test_serving import *
serving.server_command = lambda spec, endpoint, folder, port: [sys.executable, "-c", {server!r}, str(port)]
with served(model(), endpoint(), None, Path(sys.argv[1])) as address:
    print(address, flush=True)
    __import__("time").sleep(60)
"""
    log = tmp_path / "server.log"
    with subprocess.Popen([sys.executable, "-c", program, str(log)], stdout=subprocess.PIPE, text=True) as job:
        address = job.stdout.readline().strip()
        job.send_signal(signal.SIGTERM)
        assert job.wait(20) == 143
    assert not listens(address)
    wait_for(lambda: not running(int(log.read_text().split()[0])))


def running(process: int) -> bool:
    """Whether a process lives; one that is dead but not yet collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_journal_that_answers_everything_starts_no_server(fake_server, monkeypatch, tmp_path):
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text(yaml.safe_dump({"fake": {"kind": "serve", "server": "vllm", "start_timeout_s": 10, "concurrency": 2}}))
    asked = [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(3)]
    first = list(complete(model(), asked, endpoints=endpoints, journal=tmp_path / "j.jsonl")[0])
    assert {a.served_model for a in first} == {"therapist"}
    assert (tmp_path / "j.jsonl.server.log").exists()
    monkeypatch.setattr(serving, "server_command", lambda *_: ["no-such-server"])
    assert list(complete(model(), asked, endpoints=endpoints, journal=tmp_path / "j.jsonl")[0]) == first


def test_a_server_that_dies_stops_the_program_with_its_log(monkeypatch, tmp_path):
    dies = f"import os, subprocess, sys; subprocess.Popen([sys.executable, {str(FAKE)!r}, '--port', sys.argv[1], '--die-after', '3'])\n"
    dies += "import time; print('segmentation fault', flush=True); time.sleep(60)"
    monkeypatch.setattr(serving, "server_command", lambda spec, endpoint, folder, port: [sys.executable, "-c", dies, str(port)])
    endpoints = tmp_path / "endpoints.yaml"
    entry = {"kind": "serve", "server": "vllm", "start_timeout_s": 10, "concurrency": 2, "max_retries": 1}
    endpoints.write_text(yaml.safe_dump({"fake": entry}))
    asked = [ChatRequest(f"r{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(50)]
    with pytest.raises(UserError, match="(?s)stopped answering.*segmentation fault"):
        complete(model(), asked, endpoints=endpoints, journal=tmp_path / "j.jsonl")
    assert (tmp_path / "j.jsonl").read_bytes().count(b"\n") in (2, 3), "all that it answered; one may have been on its way"


@pytest.mark.slow
def test_a_real_server_serves_a_real_model(tmp_path):
    """Half a minute: `transformers serve` with a micro model answers, samples, and repeats itself at temperature 0."""
    os.environ["OMP_NUM_THREADS"] = "1"
    manifest = build_micro_model(tmp_path / "model")
    args = ["--device", "cpu", "--continuous-batching", "--cb-num-blocks", "64", "--cb-block-size", "32", "--cb-max-batch-tokens", "256"]
    entry = {"kind": "serve", "server": "transformers", "start_timeout_s": 120, "concurrency": 4, "timeout_s": 60, "server_args": args}
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text(yaml.safe_dump({"fake": entry}))
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


def test_a_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone stops a child with its parent")
def test_a_server_dies_with_a_job_that_is_killed_outright():
    code = (
        "import subprocess, time; from psychocounsel.serving import die_with_parent;"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True, preexec_fn=die_with_parent);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "scripts"})
    child = int(job.stdout.readline())
    job.kill()
    job.wait()
    wait_for(lambda: not running(child))
