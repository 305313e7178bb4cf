"""OpenAI's Batch API for tests: files, batches and results as the real one has them, and faults by script.

    with FakeBatches(fate=lambda number: Fate(done=3, status="expired")) as server: ... server.url, server.answered

A batch is carried out when it is created; `Fate` decides how much of it, and how many polls see it on its way. `fault`
sees every call before it is carried out: it may answer in its place, or let it be carried out and lose the answer.
"""

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from fakes.openai_server import Reply, completion, echo

MOST_REQUESTS, MOST_BYTES = 50_000, 200 * 10**6  # of one file, as the real one has them


@dataclass
class Fate:
    """What becomes of a batch."""

    status: str = "completed"  # or expired, cancelled, failed
    polls: int = 1  # how often it is seen on its way
    done: int | None = None  # lines that are carried out; None: all
    errors: list[dict] = field(default_factory=list)  # of a failed one: code, message, line
    spoil: Callable[[list[bytes]], list[bytes]] | None = None  # what happens to the lines of its output file


@dataclass
class Lost:
    """A fault: the call is carried out, and the client gets this instead of the answer (None: the connection is cut)."""

    reply: Reply | None = None


class FakeBatches:
    """A server in a thread. `answer(body, nth)` answers a line, `fault(method, path, nth)` a call of that kind, or returns None."""

    def __init__(
        self,
        answer: Callable[[dict, int], Reply] = echo,
        fate: Callable[[int], Fate] = lambda number: Fate(),
        fault: Callable[[str, str, int], Reply | Lost | None] = lambda method, path, nth: None,
        enqueued_tokens: int | None = None,
    ) -> None:
        self.answer, self.fate, self.fault, self.enqueued_tokens = answer, fate, fault, enqueued_tokens
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.fates: dict[str, Fate] = {}
        self.answered: Counter[str] = Counter()  # user message -> how often it was answered, and would be paid
        self.bodies: list[dict] = []  # of the answered lines
        self.calls: Counter[tuple[str, str]] = Counter()
        self.cancelled: list[str] = []
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body go out together

            def do_GET(self) -> None:
                self.handle_call("GET", b"")

            def do_POST(self) -> None:
                self.handle_call("POST", self.rfile.read(int(self.headers["Content-Length"] or 0)))

            def handle_call(self, method: str, data: bytes) -> None:
                address = urlsplit(self.path)
                path = address.path.removeprefix("/v1")
                kind = re.sub(r"/(file|batch)-\w+", r"/{\1}", path)
                with fake.lock:
                    nth, fake.calls[method, kind] = fake.calls[method, kind], fake.calls[method, kind] + 1
                fault = fake.fault(method, kind, nth)
                if isinstance(fault, Reply):
                    return self.send(fault.status, fault.body, fault.headers)
                with fake.lock:
                    status, body = fake.carry_out(method, path, data, self.headers, parse_qs(address.query))
                if isinstance(fault, Lost):
                    if fault.reply is None:
                        self.close_connection = True
                        return self.connection.close()
                    status, body = fault.reply.status, fault.reply.body
                return self.send(status, body, {})

            def send(self, status: int, body: dict | str | bytes | None, headers: dict) -> None:
                data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
                kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client was killed, as some tests do

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "FakeBatches":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def carry_out(self, method: str, path: str, data: bytes, headers, query: dict) -> tuple[int, dict | bytes]:
        """Return the answer to a call: a status and a body."""
        if (method, path) == ("POST", "/files"):
            return self.upload(data, headers)
        if (method, path) == ("POST", "/batches"):
            return self.create(json.loads(data))
        if (method, path) == ("GET", "/batches"):
            return self.listed(query)
        if found := re.fullmatch(r"/files/(file-\w+)/content", path):
            return (200, self.files[found[1]]) if found[1] in self.files else not_found(found[1])
        if found := re.fullmatch(r"/batches/(batch-\w+)(/cancel)?", path):
            if found[1] not in self.batches:
                return not_found(found[1])
            if found[2]:
                self.cancelled.append(found[1])
                self.batches[found[1]]["status"] = "cancelling"
            return 200, self.polled(found[1])
        return not_found(path)

    def upload(self, data: bytes, headers) -> tuple[int, dict]:
        """Keep an uploaded file."""
        boundary = re.search(r"boundary=(\S+)", headers["Content-Type"])[1].encode()
        fields = {}
        for part in data.split(b"--" + boundary)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            fields[re.search(rb'name="(\w+)"', head)[1].decode()] = (head, content[:-2])
        assert fields["purpose"][1] == b"batch"
        head, content = fields["file"]
        if not re.search(rb'filename="[^"]+\.jsonl"', head):
            return 400, refusal("Invalid file format for Batch API. Must be .jsonl")
        if len(content) > MOST_BYTES:
            return 400, refusal("The file is too large for the Batch API.")
        file = self.keep(content)
        return 200, {"id": file, "object": "file", "bytes": len(content), "created_at": now(), "filename": "x", "purpose": "batch"}

    def keep(self, content: bytes) -> str:
        """Keep a file; return its id."""
        name = f"file-{len(self.files) + 1}"
        self.files[name] = content
        return name

    def create(self, asked: dict) -> tuple[int, dict]:
        """Create a batch and carry it out."""
        assert asked["completion_window"] == "24h"
        assert asked["endpoint"] == "/v1/chat/completions"
        if asked["input_file_id"] not in self.files:
            return 400, refusal("No such File object")
        lines = self.files[asked["input_file_id"]].splitlines()
        name, fate = f"batch-{len(self.batches) + 1}", self.fate(len(self.batches))
        batch = {"id": name, "object": "batch", "created_at": now(), "status": "validating", "errors": None} | asked
        batch |= {"output_file_id": None, "error_file_id": "", "request_counts": {"total": 0, "completed": 0, "failed": 0}}
        if wrong := fate.errors or self.faults_of(lines):
            fate.status = "failed"
            batch["errors"] = {"object": "list", "data": wrong}
        else:
            self.run(batch, lines, fate)
        self.batches[name], self.fates[name] = batch, fate
        return 200, {**batch, "status": "validating", "output_file_id": None, "error_file_id": None, "errors": None}

    def faults_of(self, lines: list[bytes]) -> list[dict]:
        """Return why a file of requests is refused."""
        rows = [json.loads(line) for line in lines]
        if not rows:
            return [{"code": "empty_file", "message": "The batch file is empty.", "line": None}]
        if len(rows) > MOST_REQUESTS:
            return [{"code": "too_many_tasks", "message": "The batch contains too many tasks.", "line": None}]
        if len({row["custom_id"] for row in rows}) < len(rows):
            return [{"code": "duplicate_custom_id", "message": "A custom_id stands twice.", "line": 2}]
        if len({row["body"]["model"] for row in rows}) > 1:
            return [{"code": "model_mismatch", "message": "All requests must name one model.", "line": 2}]
        waiting = sum(batch["tokens"] for batch in self.batches.values() if batch["status"] not in ("completed", "expired", "failed"))
        if self.enqueued_tokens and waiting + tokens_of(rows) > self.enqueued_tokens:
            message = f"Enqueued token limit reached for {rows[0]['body']['model']}. Limit: {self.enqueued_tokens:,} enqueued tokens."
            return [{"code": "token_limit_exceeded", "message": message, "line": None}]
        for row in rows:
            assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
            assert len(row["custom_id"]) <= 64
        return []

    def run(self, batch: dict, lines: list[bytes], fate: Fate) -> None:
        """Answer the lines of a batch and write its files, in an order of their own."""
        rows = [json.loads(line) for line in lines]
        batch["tokens"] = tokens_of(rows)
        done = len(rows) if fate.done is None else fate.done
        good, bad = [], []
        for number, row in enumerate(rows):
            if number >= done:
                code = "batch_cancelled" if fate.status == "cancelled" else "batch_expired"
                bad.append({"custom_id": row["custom_id"], "response": None, "error": {"code": code, "message": "not carried out"}})
                continue
            asked = row["body"]["messages"][-1]["content"]
            reply = self.answer(row["body"], self.answered[asked])
            self.answered[asked] += 1
            self.bodies.append(row["body"])
            body = reply.body if reply.body is not None else completion(row["body"], reply)
            response = {"status_code": reply.status, "request_id": "r", "body": body}
            (good if reply.status == 200 else bad).append({"custom_id": row["custom_id"], "response": response, "error": None})
        failed = sum(row["response"] is not None for row in bad)
        batch["request_counts"] = {"total": len(rows), "completed": len(good), "failed": failed}
        for name, results in (("output_file_id", good), ("error_file_id", bad)):
            random.Random(0).shuffle(results)
            content = [json.dumps({"id": "x", **result}).encode() for result in results]
            if name == "output_file_id" and fate.spoil:
                content = fate.spoil(content)
            if content:
                batch[name] = self.keep(b"\n".join(content) + b"\n")

    def polled(self, name: str) -> dict:
        """Return a batch as a poll sees it."""
        batch, fate = self.batches[name], self.fates[name]
        if fate.polls > 0:
            fate.polls -= 1
            batch["status"] = "in_progress"
            return {**batch, "output_file_id": None, "error_file_id": None, "errors": None}
        batch["status"] = fate.status
        return batch

    def listed(self, query: dict) -> tuple[int, dict]:
        """Return a page of the batches, the newest first."""
        names = list(reversed(self.batches))
        if "after" in query:
            names = names[names.index(query["after"][0]) + 1 :]
        page = names[: int(query.get("limit", ["20"])[0])]
        body = {"object": "list", "data": [self.batches[name] for name in page], "has_more": len(names) > len(page)}
        return 200, body | ({"first_id": page[0], "last_id": page[-1]} if page else {})


def tokens_of(rows: list[dict]) -> int:
    """Return the input tokens of requests: the words of their messages."""
    return sum(len(message["content"].split()) for row in rows for message in row["body"]["messages"])


def refusal(message: str) -> dict:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "type": "invalid_request_error", "code": None, "param": None}}


def not_found(what: str) -> tuple[int, dict]:
    """Return the answer about something that is not there."""
    return 404, refusal(f"No such object: {what}")


def now() -> int:
    """Return the Unix time."""
    return int(time.time())
