"""Serving a model for the length of a job: start vLLM on GPUs or `transformers serve` on a CPU, and stop it whatever happens.

The server runs in a process group of its own on a free local port, writes its log beside the job's journal, and is killed
as a group when the block ends: by an error, Ctrl-C and SIGTERM too (Slurm's warning before the time limit). Where the job
itself is killed outright, a guard does it. A port that another server took meanwhile is given up for another one, and a
server that is lost during the work is started once more.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson
import psutil

from psychocounsel.endpoints import Endpoint
from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec, Serve

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text

log = logging.getLogger("psychocounsel")

GRACE_S = 15  # between the request to stop and the kill
LOG_TAIL = 2000  # characters of the server's log that an error shows
PORTS = 5  # tried one after the other where others take them

# What the guard, a shell in a session of its own, does: wait until the pipe from the job ends, which it does however the job
# ends, then end the server's process group.
GUARD = 'read -r _; kill -TERM "-$0"; sleep "$1"; kill -KILL "-$0"'


def while_served(
    spec: ModelSpec, endpoint: Endpoint, folder: Path | None, gpus: int, log_path: Path, work: Callable[[str], object]
) -> None:
    """Serve a model and call `work` with its address; where that loses the server (ConnectionError), start it and call once more.

    `work` goes on with what is left. The log holds both servers' words; a second loss raises UserError with its end.
    """
    log_path.unlink(missing_ok=True)
    for last in (False, True):
        with served(spec, endpoint, folder, gpus, log_path) as address:
            try:
                work(address)
                return
            except ConnectionError:
                if last:
                    raise UserError(
                        f"{endpoint.server} was lost twice while it answered; what was answered is kept. Its log, {log_path}, ends:\n"
                        f"{tail(log_path)}"
                    ) from None
        log.warning("%s was lost while it answered for %s and is started once more; its log: %s", endpoint.server, spec.name, log_path)


@contextmanager
def served(spec: ModelSpec, endpoint: Endpoint, folder: Path | None, gpus: int, log_path: Path) -> Iterator[str]:
    """Serve a model from its local folder, or from the Hub where that is None, on so many GPUs; yield the address up to /v1."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    template = None
    if spec.serve and spec.serve.chat_template:
        template = log_path.with_name(log_path.name.removesuffix(".log") + ".chat_template.jinja")
        template.write_text(spec.serve.chat_template, encoding="utf-8")
    # Waiting threads sleep: where other jobs share the cores, spinning ones made a server on two of them six times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ} | ({"HF_HUB_OFFLINE": "1"} if folder else {})
    with terminated_as_exit():
        for _ in range(PORTS):
            port = free_port()
            command = server_command(spec, endpoint, folder, gpus, port, template)
            log.info("starting %s for %s on port %d; its log: %s", command[0], spec.name, port, log_path)
            with running(command, environment, log_path) as process:
                if wait_until_healthy(process, port, endpoint, log_path):
                    yield f"http://127.0.0.1:{port}/v1"
                    return
            log.warning("another server took port %d meanwhile", port)
        raise UserError(f"{endpoint.server}: no port to listen on: others took each of {PORTS} that were free; see {log_path}")


def server_command(spec: ModelSpec, endpoint: Endpoint, folder: Path | None, gpus: int, port: int, template: Path | None) -> list[str]:
    """Return the command line of the server; what endpoints.yaml adds stands last."""
    serve = spec.serve or Serve()
    if endpoint.server == "transformers":
        if template:
            raise UserError(f"{spec.name}: `transformers serve` takes no chat template (serve.chat_template); let vLLM serve the model")
        words = ["transformers", "serve", name_at_server(spec, endpoint, folder)]
    else:
        words = ["vllm", "serve", str(folder or spec.id), "--served-model-name", name_at_server(spec, endpoint, folder)]
        # Without it vLLM fills in sampling parameters from the model's generation_config.json that no record would show.
        words += ["--tensor-parallel-size", str(gpus), "--generation-config", "vllm"]
        words += ["--enable-prompt-tokens-details"]  # says in each answer how many tokens of the request its prefix cache served
        words += ["--max-model-len", str(serve.max_model_len)] if serve.max_model_len else []
        words += ["--chat-template", str(template)] if template else []
        if spec.revision and not folder:
            kinds = ["--revision", "--tokenizer-revision", *(["--code-revision"] if serve.trust_remote_code else [])]
            words += [word for kind in kinds for word in (kind, spec.revision)]
    words += ["--dtype", serve.dtype, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--trust-remote-code"] if serve.trust_remote_code else []
    return words + endpoint.server_args


def name_at_server(spec: ModelSpec, endpoint: Endpoint, folder: Path | None) -> str:
    """Return the name under which requests reach the served model."""
    if endpoint.server == "transformers":  # it knows a model by where it lies
        return str(folder.resolve()) if folder else spec.id + (f"@{spec.revision}" if spec.revision else "")
    return spec.name


def transformers_options(spec: ModelSpec, folder: Path | None) -> dict:
    """Return what a request to `transformers serve` must add so that the model's sampling parameters are kept.

    The server samples only where the model's own generation_config.json says do_sample (else a temperature is silently
    ignored), and takes a top_k from there that no record would show. So each request brings a configuration of its own.
    """
    from huggingface_hub import hf_hub_download

    file = folder / "generation_config.json" if folder else hf_hub_download(spec.id, "generation_config.json", revision=spec.revision)
    own = orjson.loads(Path(file).read_bytes())
    tokens = {key: own[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if own.get(key) is not None}
    sampled = spec.sampling is not None and spec.sampling.temperature != 0
    return {"generation_config": orjson.dumps({"do_sample": sampled, "top_k": 0, **tokens}).decode()}


# The process --------------------------------------------------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], environment: dict[str, str], log_path: Path) -> Iterator[subprocess.Popen]:
    """Run a server in a process group of its own, its words appended to a log; with the block, or the job, the whole group ends."""
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise UserError(f"{command[0]}: not installed in this environment ({sys.prefix}); see envs/serve.yaml")
    with open(log_path, "ab") as log_file:
        log_file.write(f"$ {' '.join(command)}\n".encode())
        log_file.flush()
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    guard = None
    try:
        guard = subprocess.Popen(
            ["sh", "-c", GUARD, str(process.pid), str(GRACE_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what kills the job's process group must not kill it
        )
        yield process
    finally:
        stop(process)
        if guard:
            guard.kill()
            guard.communicate()


def wait_until_healthy(process: subprocess.Popen, port: int, endpoint: Endpoint, log_path: Path) -> bool:
    """Wait until the server answers /health; return False where another one has its port.

    Raise UserError with the end of the log where it ends or takes too long.
    """
    started = time.monotonic()
    while time.monotonic() - started < endpoint.start_timeout_s:
        if process.poll() is not None:
            words = tail(log_path)
            own = words.rpartition(" ".join(process.args[1:]))[2]  # before its command line stand the words of an earlier start
            if "address already in use" in own.lower():
                return False
            raise UserError(
                f"{endpoint.server}: the server ended with code {process.returncode} before it was ready. Its log ends:\n{words}"
            )
        if listening(port):
            if not listens_alone(process, port):
                return False
            if healthy(port):
                log.info("the server is ready after %.0f s", time.monotonic() - started)
                return True
        time.sleep(0.3)
    raise UserError(
        f"{endpoint.server}: the server was not ready after start_timeout_s = {endpoint.start_timeout_s:g} s"
        f" (endpoints.yaml). Its log ends:\n{tail(log_path)}"
    )


def listening(port: int) -> bool:
    """Whether anybody listens on a local port."""
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def listens_alone(process: subprocess.Popen, port: int) -> bool:
    """Whether all that listens on a port is of the process group.

    vLLM shares its port with other servers of the same user that do so too (SO_REUSEPORT), and each gets some of the requests.
    """
    try:
        found = psutil.net_connections("tcp")
    except psutil.AccessDenied:  # macOS shows other processes' connections to root alone
        return True
    return all(in_group(c.pid, process.pid) for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port)


def in_group(pid: int | None, group: int) -> bool:
    """Whether a process is of a process group; another user's (None) or one that has ended is not."""
    try:
        return pid is not None and os.getpgid(pid) == group
    except ProcessLookupError:
        return False


def healthy(port: int) -> bool:
    """Whether the server on a port says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def stop(process: subprocess.Popen) -> None:
    """End the server with everything that it started: ask first, then kill what is left of its process group."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a worker may outlive the leader of the group
    process.wait()


@contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM end this process by an exception, so that `finally` blocks run; 143 is what a shell would report."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """Return a port of the local interface that nobody listens on; another server may still take it first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(path: Path) -> str:
    """Return the end of a log."""
    return path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
