"""How fast the chat client is, beside its floor and its rival, on the same stub server in the same run.

    raw aiohttp             a session that posts a body and reads the reply's JSON: the floor; no retries, limits or journal
    AsyncOpenAI, at once    asyncio.gather over all requests, with the openai package's default transport
    AsyncOpenAI, in turn    the same with a semaphore, so that the transport's pool holds no long queue
    our client              psychocounsel.chat.complete with journal, request and token limits, check and retries on

Each client is a process of its own, from its first request to its last answer; the stub server (tests/fakes/stub_server.py)
is another and answers each prompt of about 7,000 characters after --delay seconds. Then our client alone, at the rate of the
highest tier of OpenAI (10,000 requests a minute), and with --many requests as fast as it can, its memory printed on the way.
Run it from the project's root on a machine that does nothing else:

    python benchmarks/chat_throughput.py --requests 5000 --in-flight 500 --many 20000
"""

import argparse
import asyncio
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, "scripts")
sys.path.insert(0, "tests")

import yaml
from fakes.stub_server import StubServer

PROMPT_CHARACTERS = 7000
MODEL = "stub-judge"
CLIENTS = {"raw": "raw aiohttp", "once": "AsyncOpenAI, at once", "turn": "AsyncOpenAI, in turn", "ours": "our client"}
TIER_5 = 10_000  # requests a minute


def main() -> None:
    """Run the benchmark, or one of its clients in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="requests of each client (default 5000)")
    parser.add_argument("--in-flight", type=int, default=500, help="requests in flight (default 500)")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds before each answer (default 1)")
    parser.add_argument("--sustain", type=float, default=60, help=f"seconds at {TIER_5} requests a minute (default 60)")
    parser.add_argument("--many", type=int, default=200_000, help="requests of the memory test (default 200,000)")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--per-minute", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report-every", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        print(json.dumps(measured(args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Measure every client and print the tables."""
    found = {}
    for client in CLIENTS:
        with StubServer(args.delay) as stub:
            found[client] = run(client, stub.url, args.requests, args.in_flight)
            assert stub.count()["requests"] == args.requests
    print(f"{args.in_flight} in flight, answers after {args.delay:g} s")
    print(f"{'client':<24}{'requests':>9}{'requests/s':>12}{'CPU ms/request':>16}{'peak MB':>9}{'ours is':>10}")
    for client, facts in found.items():
        rate, cpu, ratio = (
            args.requests / facts["seconds"],
            1000 * facts["cpu_s"] / args.requests,
            facts["seconds"] / found["ours"]["seconds"],
        )
        print(f"{CLIENTS[client]:<24}{args.requests:>9}{rate:>12.1f}{cpu:>16.2f}{facts['peak_mb']:>9.0f}{ratio:>8.2f} x")
    if args.sustain:
        with StubServer(args.delay) as stub:
            facts = run("ours", stub.url, round(args.sustain * TIER_5 / 60), args.in_flight, "--per-minute", str(TIER_5))
        rate, cores = facts["requests"] / facts["seconds"], facts["cpu_s"] / facts["seconds"]
        print(f"limited to {TIER_5} requests a minute: {rate:.1f} requests/s for {facts['seconds']:.0f} s, {cores:.2f} of a core")
    if args.many:
        print(f"{args.many} requests, as fast as they go: answered, MB of memory")
        with StubServer(0.0) as stub:
            run("ours", stub.url, args.many, args.in_flight, "--report-every", str(max(1, args.many // 10)))


def run(client: str, url: str, requests: int, in_flight: int, *more: str) -> dict:
    """Run one client in a process of its own; return what it measured. What it reports on the way is shown."""
    command = [
        sys.executable,
        __file__,
        "--client",
        client,
        "--url",
        url,
        "--requests",
        str(requests),
        "--in-flight",
        str(in_flight),
        *more,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [line for line in process.stdout if line.startswith("{") or print(line, end="", flush=True)]
    if process.returncode:
        raise SystemExit(f"{CLIENTS[client]} failed")
    return json.loads(lines[-1])


def measured(args: argparse.Namespace) -> dict:
    """Run one client in this process; return seconds, CPU seconds and peak memory (MB) of asking, imports left out."""
    prepare = {"raw": ask_raw, "once": ask_package, "turn": ask_package, "ours": ask_ours}[args.client]
    with tempfile.TemporaryDirectory() as folder:
        ask = prepare(args, Path(folder))
        cpu, clock = time.process_time(), time.perf_counter()
        ask()
        seconds, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"requests": args.requests, "seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak_mb}


def prompt(number: int) -> str:
    """Return a prompt of the length of a rating request."""
    return f"{number} " + "I do not know what to do any more. " * (PROMPT_CHARACTERS // 35)


def ask_raw(args: argparse.Namespace, folder: Path):
    """The floor."""
    import aiohttp

    async def ask() -> None:
        waiting = iter(range(args.requests))

        async def work() -> None:
            for number in waiting:
                body = {"model": MODEL, "messages": [{"role": "user", "content": prompt(number)}]}
                async with session.post(args.url + "/chat/completions", json=body) as reply:
                    assert (await reply.json())["choices"]

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=args.in_flight)) as session:
            await asyncio.gather(*(work() for _ in range(args.in_flight)))

    return lambda: asyncio.run(ask())


def ask_package(args: argparse.Namespace, folder: Path):
    """The rival: one task a request, at once or as many at a time as may be in flight."""
    from openai import AsyncOpenAI

    async def ask() -> None:
        async with AsyncOpenAI(base_url=args.url, api_key="none", timeout=600) as client:
            free = asyncio.Semaphore(args.in_flight if args.client == "turn" else args.requests)

            async def one(number: int) -> None:
                async with free:
                    messages = [{"role": "user", "content": prompt(number)}]
                    assert (await client.chat.completions.create(model=MODEL, messages=messages)).choices

            await asyncio.gather(*(one(number) for number in range(args.requests)))

    return lambda: asyncio.run(ask())


def ask_ours(args: argparse.Namespace, folder: Path):
    """Our client; without a limit of its own the limits are there, but far away."""
    import openai  # noqa: F401 (complete imports it when it first asks)

    from psychocounsel.chat import ChatRequest, Lazy, complete
    from psychocounsel.models import ModelSpec

    logging.disable(logging.WARNING)
    limits = {"requests_per_minute": args.per_minute or 10**7, "tokens_per_minute": 10**11}
    entry = {"kind": "openai", "base_url": args.url, "concurrency": args.in_flight, "timeout_s": 120, "max_retries": 8, **limits}
    (folder / "endpoints.yaml").write_text(yaml.safe_dump({"stub": entry}))
    spec = ModelSpec(name=MODEL, id=MODEL, endpoint="stub", sampling={"temperature": 0.0, "max_tokens": 1024})
    requests = Lazy(range(args.requests), lambda n: ChatRequest(f"r{n}", [{"role": "user", "content": prompt(n)}], group=str(n // 7)))

    def check(request: ChatRequest, text: str) -> None:
        nonlocal answered
        answered += 1
        if args.report_every and answered % args.report_every == 0:
            print(f"{answered:>9} {resident_mb():7.0f} MB", flush=True)

    def ask() -> None:
        answers, failures, _ = complete(spec, requests, endpoints=folder / "endpoints.yaml", journal=folder / "journal.jsonl", check=check)
        assert (len(answers), len(failures)) == (args.requests, 0)

    answered = 0
    return ask


def resident_mb() -> float:
    """Return the memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
