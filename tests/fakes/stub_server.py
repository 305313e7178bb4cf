"""A fast OpenAI-compatible server for benchmarks: a useful answer to every prompt of the project, after a fixed delay.

It costs its machine as little as it can, since the client that is measured runs on the same cores: HTTP/1.1 by hand on asyncio,
answers cut out of one prepared text. openai_server.py is the one that fails by script. Answers depend on the request alone:

  rating      valid scores; a response's quality follows from its words, so that gaps between responses are as wide as the paper's
  comparison  the response of the greater quality; a ranking the same
  topic       one of the topics that the prompt offers
  others      a text of some 1,400 characters, as the published responses; its first words follow from the model

In a benchmark: with StubServer(delay=1.0) as stub: ... stub.url, stub.count()
From outside:   python tests/fakes/stub_server.py --port 8000 [--delay 1.0] [--bytes 7000]
                (GET /count: requests, how many were in flight at most, CPU seconds of the server)
"""

import argparse
import asyncio
import hashlib
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
import zlib
from functools import lru_cache

import orjson

RESPONSE_CHARS, RATIONALE_CHARS = 1400, 400
PHRASES = (
    "I hear how heavy this has been for you",
    "and it makes sense that you feel torn about it.",
    "What would it be like to take one small step",
    "and notice what comes up this week?",
    "You are not alone with such a worry,",
    "many people carry one for years before they speak of it.",
    "We can look at it together, at your pace,",
    "and find out what matters most to you.",
)
OPENINGS = [
    f"{first} {second}"
    for first in ("Well", "Look", "Listen", "Thank you", "I hear you")
    for second in ("my friend,", "there,", "now,", "and yes,")
]
PROSE = " ".join(PHRASES[zlib.crc32(b"%d" % k) % len(PHRASES)] for k in range(2000))  # plain ASCII without quotes: needs no escapes

# Spread of quality between models, between responses of a model, and of one principle's score. By them 1.47 of the six pairs of responses
# to a speech have a gap of 1 or more, and 0.66 of the best against the worst; in the paper (34,329 and 2,324 pairs) 1.48 and 0.71.
MODEL_SPREAD, RESPONSE_SPREAD, PRINCIPLE_SPREAD, MEAN_SCORE = 0.3, 0.45, 0.45, 3.4

RESPONSE = re.compile(r"<response_\d+>\n(.*?)\n</response_\d+>", re.DOTALL)
TOPICS = re.compile(r"^- .*?: (.*)$", re.MULTILINE)
NORMAL = [statistics.NormalDist().inv_cdf((k + 0.5) / 4096) for k in range(4096)]
MODEL_QUALITY = {opening: MODEL_SPREAD * NORMAL[4096 * k // len(OPENINGS) + 102] for k, opening in enumerate(OPENINGS)}


def normal(*parts: str) -> float:
    """Return a standard normal number that follows from texts alone."""
    digest = hashlib.md5("\0".join(parts).encode(), usedforsecurity=False).digest()  # a CRC would make the scores of a response alike
    return NORMAL[int.from_bytes(digest[:2]) >> 4]


@lru_cache(maxsize=16384)
def quality(response: str) -> float:
    """Return how good a response is: its opening words tell the model, the rest is its own."""
    of_model = MODEL_QUALITY.get(response[: response.find(",") + 1], 0.0)
    return MEAN_SCORE + of_model + RESPONSE_SPREAD * normal("response", response)


def prose(seed: int, chars: int) -> str:
    """Return a piece of the prepared text."""
    start = seed % max(1, len(PROSE) - chars)
    return PROSE[start : start + chars]


def answer(model: str, prompt: str, chars: int | None) -> str:
    """Return the text that answers a prompt; `chars` is its length (None: as the paper's)."""
    seed = zlib.crc32(prompt.encode())
    asked = prompt.rpartition("keys:\n" if "keys:\n" in prompt else "key:\n")[2]
    if "- response_1_rating:" in asked:
        responses = RESPONSE.findall(prompt)
        principle = asked.rpartition("Principle: ")[2].partition("\n")[0]
        length = chars // len(responses) if chars else RATIONALE_CHARS
        ratings = (
            f'"response_{k}_rating": {score(response, principle)}, "rationale_{k}": "{prose(seed + 7919 * k, length)}"'
            for k, response in enumerate(responses, start=1)
        )
        return "{" + ", ".join(ratings) + "}"
    if "- better:" in asked:
        first, second = RESPONSE.findall(prompt)
        rationale = f'"rationale": "{prose(seed, chars or RATIONALE_CHARS)}", ' if "- rationale:" in asked else ""
        return f'{{{rationale}"better": {1 if quality(first) >= quality(second) else 2}}}'
    if "- topic:" in asked:
        offered = [topic for line in TOPICS.findall(prompt.partition("\nClient Speech:")[0]) for topic in line.split(", ")]
        return json.dumps({"topic": offered[seed % len(offered)]})
    opening = OPENINGS[zlib.crc32(model.encode()) % len(OPENINGS)]
    return f"{opening} {prose(zlib.crc32(model.encode(), seed), (chars or RESPONSE_CHARS) - len(opening) - 1)}"


def score(response: str, principle: str) -> int:
    """Return a score of 1 to 5."""
    return min(5, max(1, round(quality(response) + PRINCIPLE_SPREAD * normal(principle, response))))


class Server:
    """What the connections share."""

    def __init__(self, delay: float, chars: int | None) -> None:
        self.delay, self.chars = delay, chars
        self.requests = self.in_flight = self.most_in_flight = 0

    def count(self) -> dict:
        """Return what was counted."""
        return {"requests": self.requests, "most_in_flight": self.most_in_flight, "cpu_s": time.process_time()}

    def completion(self, body: bytes) -> bytes:
        """Return the chat completion for a request's body."""
        request = orjson.loads(body)
        text = answer(request["model"], request["messages"][-1]["content"], self.chars)
        read, written = len(body) // 4, len(text) // 4
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        facts = {"id": "stub", "object": "chat.completion", "created": 0, "model": request["model"]}
        return orjson.dumps({**facts, "choices": choices, "usage": usage})


class Connection(asyncio.Protocol):
    """One connection, kept alive; a client that waits for each answer before it asks again is all that there is to serve."""

    def __init__(self, server: Server) -> None:
        self.server, self.buffer, self.need = server, bytearray(), 0
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Keep the way back."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Take every request that has come whole."""
        self.buffer += data
        while len(self.buffer) >= self.need and (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0] or 0)
            self.need = end + 4 + length
            if len(self.buffer) < self.need:
                return
            body = bytes(self.buffer[end + 4 : self.need])
            del self.buffer[: self.need]
            self.need = 0
            self.take(head, body)

    def take(self, head: bytes, body: bytes) -> None:
        """Answer one request, a POST after the delay."""
        server = self.server
        if not head.startswith(b"post"):
            self.send(orjson.dumps(server.count()))
            return
        server.requests += 1
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        self.loop.call_later(server.delay, self.reply, body)

    def reply(self, body: bytes) -> None:
        """Send the answer, if the client is still there."""
        self.server.in_flight -= 1
        if not self.transport.is_closing():
            self.send(self.server.completion(body))

    def send(self, content: bytes) -> None:
        """Send a reply's head and content."""
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))


class StubServer:
    """The server as a process of its own, on a free port."""

    def __init__(self, delay: float = 0.0, chars: int | None = None) -> None:
        self.command = [sys.executable, __file__, "--port", "0", "--delay", str(delay), *(["--bytes", str(chars)] if chars else [])]

    def __enter__(self) -> "StubServer":
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError("the stub server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def count(self) -> dict:
        """Return requests, most_in_flight and cpu_s of the server so far."""
        with urllib.request.urlopen(self.url.replace("/v1", "/count")) as reply:
            return json.load(reply)


async def serve(port: int, server: Server) -> None:
    """Serve for ever; say where."""
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", port, backlog=4096)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="0: a free one; the address is printed")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer (default 0)")
    parser.add_argument("--bytes", type=int, help="length of each answer's text (default: that of the paper's answers)")
    args = parser.parse_args()
    asyncio.run(serve(args.port, Server(args.delay, args.bytes)))
