"""The line to an endpoint: carries calls within its limits, sends again what may pass, and tells its faults apart.

passing  rate limits, time-outs, broken connections, a server's 5xx: sent again after growing pauses, or as long as Retry-After says
refused  the endpoint will not answer this one request: its content or its length; asking again is of no use
fatal    a refused key, an unknown model, an empty account: nothing more is sent; what is under way still comes in and is kept
"""

import asyncio
import logging
import math
import random
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import orjson

from psychocounsel.budget import Purse
from psychocounsel.endpoints import Endpoint
from psychocounsel.errors import UserError
from psychocounsel.journal import add_tokens
from psychocounsel.pricing import CHARACTERS_PER_TOKEN

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text; raise it when what is kept of an answer changes

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a request is sent again: doubled each time, unless Retry-After says how long
NO_CONNECTION = "no connection"
REFUSALS = {"refusal": "refused by the model", "content_filter": "stopped by a content filter"}  # finish_reason -> reason of a failure
KEPT = "What was answered is kept: run again, and only the rest is asked."

log = logging.getLogger("psychocounsel")


@dataclass(frozen=True)
class Call:
    """A request that has to be sent."""

    key: str  # its request_key
    messages: list[dict]
    options: dict  # what its body holds beside the messages and what all calls send; None is not sent
    group: str | None  # calls of one group begin alike and follow each other
    check: Callable[[str], object]  # raises ValueError(reason) where an answer's text is unusable


class PassingFault(Exception):
    """A fault of the endpoint that another attempt may not meet."""


class RefusedRequest(Exception):
    """The endpoint will not answer this one request; asking again is of no use."""


async def send_all(
    endpoint: Endpoint,
    base_url: str,
    api_key: str,
    common: dict,
    calls: Iterable[Call],
    ask: Callable[["Line", Call], Awaitable[dict]],
    keep: Callable[[dict], None],
    purse: Purse | None,
) -> None:
    """Let `concurrency` workers ask the calls and keep the outcomes; raise the first fatal fault when all that is under way has come in.

    `common` holds what the bodies of all calls share. The calls are taken one by one, each when it may be sent.
    """
    from httpx2 import Limits
    from openai import AsyncOpenAI, DefaultAioHttpClient

    # The package's own retries are off: ours count against the limits, and stop at once where a 429 means an empty account.
    # Its aiohttp transport costs a fraction of the default one's time.
    transport = DefaultAioHttpClient(limits=Limits(max_connections=endpoint.concurrency))
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=endpoint.timeout_s, max_retries=0, http_client=transport) as client:
        line, queue, turn = Line(client, endpoint, common, purse), Queue(calls), asyncio.Lock()

        async def work() -> None:
            while True:
                async with turn:  # one worker waits for the limits, so that the others still have the choice of what goes next
                    call = None if line.fault else await queue.take()
                    if call is None:
                        return
                    await line.admit(call)
                try:
                    keep(await ask(line, call))
                except Exception as fault:
                    line.stop(fault)
                queue.answered(call)

        async with asyncio.TaskGroup() as workers:
            for _ in range(endpoint.concurrency):
                workers.create_task(work())
    if line.fault:
        raise line.fault


class Queue:
    """Calls in their order, but for groups: the first of a group goes ahead, the others follow together as soon as it is answered.

    So a prefix cache, which the first one fills, serves the others. Meanwhile other groups' first calls go out: only at the end
    does a worker idle.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self.calls = iter(calls)
        self.ready: deque[Call] = deque()  # their group's first call was answered
        self.held: dict[str, list[Call]] = {}  # group whose first call is under way -> calls that wait for it
        self.warm: set[str] = set()  # groups whose first call was answered
        self.change = asyncio.Event()

    async def take(self) -> Call | None:
        """Return the call that goes next, or None when there is none left."""
        while not self.ready:
            for call in self.calls:
                if call.group in self.held:
                    self.held[call.group].append(call)
                    continue
                if call.group is not None and call.group not in self.warm:
                    self.held[call.group] = []
                return call
            if not self.held:
                return None
            self.change.clear()
            await self.change.wait()
        return self.ready.popleft()

    def answered(self, call: Call) -> None:
        """Let a group's other calls follow its first one, whatever became of it."""
        if call.group in self.held:
            self.ready.extend(self.held.pop(call.group))
            self.warm.add(call.group)
            self.change.set()


class Line:
    """An open line: keeps the endpoint's limits, sends again what may pass, and is stopped by the first fatal fault."""

    def __init__(self, client, endpoint: Endpoint, common: dict, purse: Purse | None) -> None:
        self.client, self.endpoint, self.common, self.purse = client, endpoint, common, purse
        self.longest_answer = common.get("max_tokens") or common.get("max_completion_tokens") or 0
        self.requests, self.tokens = limiter(endpoint.requests_per_minute), limiter(endpoint.tokens_per_minute)
        self.fault: Exception | None = None
        self.stopped = asyncio.Event()

    def stop(self, fault: Exception) -> None:
        """Send nothing any more: `fault` is fatal; the first one counts."""
        self.fault = self.fault or fault
        self.stopped.set()

    async def admit(self, call: Call) -> None:
        """Wait until the limits let a call through: each time before it is sent."""
        if self.requests:
            await acquire(self.requests, 1)
        if self.tokens:
            await acquire(self.tokens, math.ceil(characters(call.messages) / CHARACTERS_PER_TOKEN) + self.longest_answer)

    async def send(self, call: Call, options: dict, admitted: bool) -> dict:
        """Return the answer to one call, sent with these options: text, finish_reason, usage, served_model.

        Raise PassingFault where it did not pass in all retries, RefusedRequest, or what is fatal.
        """
        from openai import APIError

        body = {"messages": call.messages, **self.common}
        for retry in range(self.endpoint.max_retries + 1):
            if retry or not admitted:
                await self.admit(call)
            try:
                return await self.paid(body | options)
            except (APIError, ValueError, TimeoutError) as error:  # ValueError: no JSON, or no completion
                reason = self.reason(error)
                if retry < self.endpoint.max_retries:
                    await self.wait(pause(error, retry), reason)
                elif self.endpoint.kind == "serve" and reason == NO_CONNECTION:
                    raise ConnectionError from None  # a server of our own, on this host: it will not come back
        raise PassingFault(reason)

    async def paid(self, body: dict) -> dict:
        """Return the answer to a request that is sent once, within the budget."""
        if self.purse is None:
            return await self.sent(body)
        spent = taken = self.purse.at_most(len(orjson.dumps(body)))  # where no reply tells, it may have been answered, and billed
        await self.purse.take(taken)
        try:
            answer = await self.sent(body)
            spent = self.purse.price_of(add_tokens({}, answer["usage"])) if answer["usage"] else taken
        except Exception as error:
            spent = 0 if error is self.fault or unbilled(error) else taken
            raise
        finally:
            self.purse.settle(taken, spent)
        return answer

    async def sent(self, body: dict) -> dict:
        """Return the answer to a request that is sent once."""
        from httpx2 import Response

        if self.fault:
            raise self.fault
        async with asyncio.timeout(self.endpoint.timeout_s):  # the client's own begins anew with each piece of an answer
            # `chat.completions.create` would spend more time on checking types, of both sides, than all the rest takes.
            reply = await self.client.post("/chat/completions", cast_to=Response, content=orjson.dumps(body))
        return read_completion(orjson.loads(reply.content))

    async def wait(self, seconds: float, reason: str) -> None:
        """Sleep, but not past the line's end; say so where the endpoint asks for more than the longest pause of our own."""
        if seconds > 1.25 * LONGEST_PAUSE_S:
            log.info("%s: %s; as the endpoint asks, a request waits for %.0f s", self.common["model"], reason.split(":")[0], seconds)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), seconds)

    def reason(self, error: Exception) -> str:
        """Return the reason of a passing fault; raise UserError for a fatal one, RefusedRequest for a request at fault itself."""
        from httpx2 import ConnectTimeout
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        if isinstance(error, TimeoutError):
            return "no answer in time"
        if isinstance(error, APITimeoutError) and not isinstance(error.__cause__, ConnectTimeout):  # which this transport calls any refusal
            return "no answer in time"
        if isinstance(error, APIConnectionError):
            return NO_CONNECTION
        if not isinstance(error, APIStatusError):
            return "a reply that is no completion"
        about = (self.client.base_url, self.endpoint.api_key_env, self.common["model"])
        return status_reason(error.status_code, error.code, error.message, *about)


def status_reason(status: int, code: str | None, message: str | None, where: object, key: str | None, model: str) -> str:
    """Return the reason of a passing fault that has a status; raise UserError or RefusedRequest for another, as `Line.reason` does."""
    if status in (401, 403) or code == "invalid_api_key":  # the endpoint's own message may quote the key
        said = f"refuses the key in {key}" if key else "wants a key: name its environment variable in `api_key_env` of endpoints.yaml,"
        raise UserError(f"{where} {said} for {model} (HTTP {status}). {KEPT}")
    if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"):
        raise UserError(f"{where}: the account is exhausted (HTTP {status}); top it up. {KEPT}")
    if status == 404 or code == "model_not_found":
        raise UserError(f"{where} knows no model {model!r}: see `id` in models.yaml, `base_url` in endpoints.yaml. {KEPT}")
    # What stands before the colon is counted and shown; a message may quote the request, a code of one word does not.
    reason = f"HTTP {status}{f' {code}' if re.fullmatch(r'[a-z_]{1,60}', str(code)) else ''}: {message}"
    if status in (408, 409, 429) or status >= 500:
        return reason
    if code in ("content_filter", "content_policy_violation"):
        raise RefusedRequest(f"{REFUSALS['content_filter']}: {reason}")
    raise RefusedRequest(reason)


def unbilled(error: BaseException) -> bool:
    """Whether a call surely cost nothing: the endpoint says that it did not answer, or was not reached."""
    from httpx2 import ConnectError, ConnectTimeout
    from openai import APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code != 504  # a gateway's, which does not know what became of the request behind it
    return isinstance(error.__cause__, ConnectError | ConnectTimeout)


def read_completion(body: dict) -> dict:
    """Return what is kept of a completion; where the model refuses in the field made for it, finish_reason is "refusal".

    Raise ValueError for what is no completion.
    """
    try:
        choice = body["choices"][0]
        text, refusal, finish_reason = choice["message"].get("content"), choice["message"].get("refusal"), choice.get("finish_reason")
        usage, served_model = read_usage(body.get("usage")), body.get("model")
    except (LookupError, TypeError, AttributeError):
        raise ValueError("no completion") from None
    if not all(isinstance(found, str | None) for found in (text, refusal, finish_reason, served_model)):
        raise ValueError("no completion")
    finish_reason = "refusal" if refusal and not text else finish_reason
    return {"text": text or refusal or "", "finish_reason": finish_reason, "usage": usage, "served_model": served_model}


def read_usage(usage: dict | None) -> dict | None:
    """Return the tokens that a completion says it took, or None; raise ValueError for what are no counts."""
    if not usage:
        return None
    try:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        counts = {"prompt_tokens": int(usage["prompt_tokens"]), "completion_tokens": int(usage["completion_tokens"])}
        counts["cached_tokens"] = None if cached is None else int(cached)
    except (LookupError, TypeError, AttributeError):
        raise ValueError("no counts of tokens") from None
    if not all(0 <= count < 2**48 for count in counts.values() if count is not None):
        raise ValueError("no counts of tokens")
    return counts


def judge(call: Call, answer: dict) -> None:
    """Raise RefusedRequest for an answer that is a refusal, ValueError(reason) for one that is unusable."""
    if answer["finish_reason"] in REFUSALS:
        raise RefusedRequest(REFUSALS[answer["finish_reason"]])
    try:
        call.check(answer["text"])
    except ValueError as fault:
        raise ValueError(f"cut off at max_tokens: {fault}" if answer["finish_reason"] == "length" else str(fault)) from None


def characters(messages: list[dict]) -> int:
    """Return the length of messages."""
    return sum(len(message["content"]) for message in messages)


def limiter(per_minute: int | None):
    """Return a limiter that lets no more than a second's worth through at once, or None."""
    from aiolimiter import AsyncLimiter

    if per_minute is None:
        return None
    burst = max(1, per_minute / 60)
    return AsyncLimiter(burst, 60 * burst / per_minute)


async def acquire(limiter, amount: float) -> None:
    """Wait for an amount; one that is more than a burst in pieces."""
    while amount > 0:
        piece = min(amount, limiter.max_rate)
        await limiter.acquire(piece)
        amount -= piece


def pause(error: Exception, retry: int) -> float:
    """Return the seconds to wait before a request is sent again: doubling, at least what Retry-After says, with jitter."""
    growing = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**retry)
    asked = retry_after(getattr(error, "response", None))
    return growing * random.uniform(0.75, 1.0) if asked is None else asked + growing * random.uniform(0.0, 0.25)


def retry_after(response) -> float | None:
    """Return the seconds that a reply's Retry-After header asks for, given as a number or as a date; None without a readable one."""
    value = response.headers.get("retry-after") if response is not None else None
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
