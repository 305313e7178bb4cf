"""An OpenAI-compatible server for tests: answers by echo, fails by script, and counts every request that reaches it.

In a test:    with FakeServer(script) as server: ... server.url, server.requests
From outside: python tests/fakes/openai_server.py --port 8000 [--delay 0.2] [--die-after 10]
              (then GET /count tells how often each user message was asked)
"""

import argparse
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What the server sends back: a status, headers, and an answer's text or a whole body."""

    text: str | None = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: dict | str | None = None
    delay: float = 0.0
    finish_reason: str = "stop"
    model: str | None = None
    refusal: str | None = None
    cut: int | None = None  # bytes of the body after which the connection is closed
    trickle: float = 0.0  # seconds before each further byte of the body


def echo(body: dict, nth: int) -> Reply:
    """Answer with what was asked; `nth` says how often this user message came before."""
    return Reply(f"You said: {body['messages'][-1]['content']}")


def error(status: int, code: str = "", message: str = "scripted", **headers: str) -> Reply:
    """Return an error reply in OpenAI's shape."""
    return Reply(status=status, headers=headers, body={"error": {"message": message, "type": "scripted", "code": code}})


class FakeServer:
    """A server in a thread; `script(body, nth)` decides every reply."""

    def __init__(self, script: Callable[[dict, int], Reply] = echo, port: int = 0) -> None:
        self.script = script
        self.requests: list[dict] = []  # bodies as they came
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.seen: Counter[str] = Counter()  # user message -> times
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send(200, {}, dict(fake.seen))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append(body)
                    fake.times.append(time.monotonic())
                    fake.keys.append(self.headers.get("Authorization"))
                    asked = body["messages"][-1]["content"]
                    nth, fake.seen[asked] = fake.seen[asked], fake.seen[asked] + 1
                    fake.in_flight += 1
                    fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
                reply = fake.script(body, nth)
                time.sleep(reply.delay)
                with fake.lock:
                    fake.in_flight -= 1
                self.send(reply.status, reply.headers, reply.body if reply.body is not None else completion(body, reply), reply)

            def send(self, status: int, headers: dict, body: dict | str, how: Reply | None = None) -> None:
                how = how or Reply()
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()
                    for piece in [data[: how.cut]] if not how.trickle else [bytes([byte]) for byte in data]:
                        time.sleep(how.trickle)
                        self.wfile.write(piece)
                    self.close_connection |= how.cut is not None
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client was killed, as some tests do

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(body: dict, reply: Reply) -> dict:
    """Return a chat completion in OpenAI's shape."""
    prompt, answer = sum(len(m["content"].split()) for m in body["messages"]), len((reply.text or "").split())
    message = {"role": "assistant", "content": reply.text, "refusal": reply.refusal}
    return {
        "id": "fake",
        "object": "chat.completion",
        "created": 0,
        "model": reply.model or body["model"],
        "choices": [{"index": 0, "finish_reason": reply.finish_reason, "message": message}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--die-after", type=int, help="end without a word at the request after so many")
    args = parser.parse_args()

    def script(body: dict, nth: int) -> Reply:
        if args.die_after is not None and len(fake.requests) > args.die_after:
            os._exit(1)
        return Reply(echo(body, nth).text, delay=args.delay)

    with FakeServer(script, args.port) as fake:
        threading.Event().wait()
