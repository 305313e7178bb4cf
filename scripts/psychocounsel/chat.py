"""The one client through which every stage asks chat models: limits, retries, a journal, and failures that are counted.

`complete` answers a list of requests from an OpenAI-compatible address, from a server that it starts (serving.py), or
from the offline rubric. Whatever the journal holds is not asked again. For a plan it asks nothing, prints what it would
ask as a line of JSON, and ends the program. Faults are of three kinds:

  passing    rate limits, time-outs, a server's 5xx: sent again after growing pauses, or as long as Retry-After says
  malformed  the caller's `check` refuses the text: asked again, `attempts` times in all, under the same request_key
  fatal      a refused key, an unknown model, an empty account: the program stops at once; what was answered is kept

A request that fails for good becomes a ChatFailure with every text that came; too many of them fail the program.
"""

import asyncio
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from psychocounsel.endpoints import Endpoint, read_endpoint
from psychocounsel.errors import UserError
from psychocounsel.journal import Journal, add_tokens, peek
from psychocounsel.models import ModelSpec
from psychocounsel.pricing import CHARACTERS_PER_TOKEN, cost, expected_tokens, read_price, usages
from psychocounsel.records import canonical_json, content_hash, file_sha256
from psychocounsel.serving import name_at_server, served, transformers_options

log = logging.getLogger("psychocounsel")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a request is sent again: doubled each time, unless Retry-After says how long
NO_CONNECTION = "no connection"


@dataclass(frozen=True)
class ChatRequest:
    """One question to a model; `id` names it for the caller and is no part of its identity."""

    id: str
    messages: list[dict]
    task: dict = field(default_factory=dict)  # what the messages were made from, for the offline rubric alone
    repeat: int = 0  # a deliberate second asking of the same
    seed: int | None = None
    response_schema: dict | None = None  # JSON Schema of the answer, where it differs between requests


@dataclass(frozen=True)
class ChatAnswer:
    """A usable answer."""

    id: str
    request_key: str
    text: str
    finish_reason: str | None
    usage: dict | None  # prompt_tokens, completion_tokens, cached_tokens; None from the offline rubric
    served_model: str | None


@dataclass(frozen=True)
class ChatFailure:
    """A request without a usable answer, and the texts of its attempts."""

    id: str
    request_key: str
    reason: str
    raw: list[str]


class PassingFault(Exception):
    """A fault of the endpoint that another attempt may not meet."""


class RefusedRequest(Exception):
    """The endpoint refuses this one request (HTTP 400, 413, 422): asking again is of no use."""


def accept_any(request: ChatRequest, text: str) -> None:
    """Find every text usable."""


def complete(
    spec: ModelSpec,
    requests: list[ChatRequest],
    *,
    endpoints: Path | str,
    journal: Path | str,
    weights: Path | str | None = None,
    response_schema: dict | None = None,
    check: Callable[[ChatRequest, str], object] = accept_any,
    attempts: int = 3,
    max_failed_share: float = 0.01,
    prices: list[Path | str] = (),
    plan: bool = False,
) -> tuple[list[ChatAnswer], list[ChatFailure], dict]:
    """Answer the requests; return answers and failures, each in the order of the requests, and totals for the provenance record.

    `weights` is the manifest of local weights, `check` raises ValueError(reason) where a text is unusable, `response_schema` holds for
    requests without one of their own. Equal requests are asked once. The totals' tokens and their cost by the list price in `prices`
    (the models' registry) are those of all attempts, journalled or not. With `plan` nothing is asked, and the program ends here.
    """
    endpoint, price = read_endpoint(Path(endpoints), spec.endpoint), read_price(prices, spec.name)
    identity = model_identity(spec, endpoint, Path(weights) if weights else None)
    formats = {request.id: response_format(spec, request.response_schema or response_schema) for request in requests}
    keys = {request.id: request_key(identity, spec, request, formats[request.id]) for request in requests}
    if len(keys) < len(requests):
        raise ValueError("the ids of requests must be unique")
    unique = {keys[request.id]: request for request in requests}
    if plan:
        print(canonical_json(planned(spec, endpoint, unique, peek(Path(journal)), price)))
        sys.exit()
    totals = {"requests": len(requests), "from_journal": 0, **add_tokens({}, None)}

    if endpoint.kind == "local":
        outcomes = {key: answer_offline(spec, key, request, check) for key, request in unique.items()}
    else:
        with Journal(Path(journal)) as kept:
            todo = [(key, request) for key, request in unique.items() if key not in kept.answers]
            totals["from_journal"] = len(unique) - len(todo)
            log.info("%s: %d requests, %d answered in the journal", spec.name, len(unique), totals["from_journal"])
            calls = [Call(key, request, {"response_format": formats[request.id], "seed": request.seed}) for key, request in todo]
            outcomes = kept.answers | ask_all(spec, endpoint, Path(weights).parent if weights else None, calls, kept, check, attempts)
            for key in unique:
                totals |= add_tokens(totals, kept.spent[key])

    shown = {"served_model": spec.name} if endpoint.kind == "serve" else {}  # our own server names it by a path of this machine
    answers = [ChatAnswer(r.id, keys[r.id], **outcomes[keys[r.id]]["answer"] | shown) for r in requests if outcomes[keys[r.id]]["answer"]]
    failed = [(r.id, outcomes[keys[r.id]]) for r in requests if not outcomes[keys[r.id]]["answer"]]
    failures = [ChatFailure(request_id, outcome["key"], outcome["reason"], outcome["raw"]) for request_id, outcome in failed]
    refuse_too_many(spec, failures, len(requests), max_failed_share, journal)
    if endpoint.kind == "openai":
        warn_of_other_model(spec, answers)
    return answers, failures, totals | {"failed": len(failures), "cost": cost(price, totals)}


def planned(spec: ModelSpec, endpoint: Endpoint, requests: dict[str, ChatRequest], answered: dict[str, dict], price: dict | None) -> dict:
    """Return what is left to ask of requests by key, and its tokens and cost: about, or, without an answer to go by, at most so much."""
    left = {} if endpoint.kind == "local" else {key: request for key, request in requests.items() if key not in answered}
    known = {key: usage for key in requests if key in answered and (usage := answered[key]["usage"])}
    read, length = sum(usage["prompt_tokens"] for usage in known.values()), sum(characters(requests[key]) for key in known)
    longest = spec.sampling.max_tokens if spec.sampling else 0
    seen = usages(answered.values(), spec.id, endpoint.kind)
    tokens = expected_tokens([characters(request) for request in left.values()], seen, read / length if length else None, longest)
    facts = {"model": spec.name, "endpoint": endpoint.kind, "requests": len(requests), "left": len(left)}
    return {**facts, **tokens, "cost": cost(price, tokens), "bound": bool(left) and not seen}


# What determines an answer ------------------------------------------------------------------------------------------------------------


def model_identity(spec: ModelSpec, endpoint: Endpoint, weights: Path | None) -> dict:
    """Return what of the model determines its answers; local weights stand for themselves, whatever the model is called."""
    who = {"weights": file_sha256(weights)} if weights else {"id": spec.id, "revision": spec.revision}
    loaded = spec.serve.model_dump(exclude={"tensor_parallel"}) if endpoint.kind == "serve" and spec.serve else None
    return {"kind": endpoint.kind, **who, "serve": loaded}


def request_key(identity: dict, spec: ModelSpec, request: ChatRequest, answer_format: dict | None) -> str:
    """Return the SHA-256 of everything that determines an answer; no address, limit or name of ours is part of it."""
    return content_hash(
        {
            "model": identity,
            "messages": request.messages,
            "sampling": spec.sampling.model_dump() if spec.sampling else None,
            "response_format": answer_format,
            "chat_template_kwargs": spec.chat_template_kwargs,
            "seed": request.seed,
            "repeat": request.repeat,
        }
    )


def response_format(spec: ModelSpec, schema: dict | None) -> dict | None:
    """Return the `response_format` that is sent: as much of the wanted schema as the model's endpoint can hold it to."""
    if schema is None or spec.structured_output == "none":
        return None
    if spec.structured_output == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def common_body(spec: ModelSpec, endpoint: Endpoint, folder: Path | None) -> dict:
    """Return what all requests to a model send alike: its name there and its sampling; null settings are not sent."""
    sampling = spec.sampling.model_dump(exclude_none=True) if spec.sampling else {}
    if "api.openai.com" in (endpoint.base_url or "") and "max_tokens" in sampling:
        sampling["max_completion_tokens"] = sampling.pop("max_tokens")  # its reasoning models refuse the old name, others the new one
    extra = {"chat_template_kwargs": spec.chat_template_kwargs} if spec.chat_template_kwargs else {}
    if endpoint.server == "transformers":
        extra |= transformers_options(spec, folder)
    name = name_at_server(spec, endpoint, folder) if endpoint.kind == "serve" else spec.id
    return {"model": name, **sampling, "extra_body": extra}


# Asking -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A request that has to be sent."""

    key: str
    request: ChatRequest
    options: dict  # arguments of `chat.completions.create` of this request alone; None is not sent

    def tokens(self, longest_answer: int) -> int:
        """Estimate what a token limit counts: a token for four characters of the messages, and the longest answer."""
        return math.ceil(characters(self.request) / CHARACTERS_PER_TOKEN) + longest_answer


def characters(request: ChatRequest) -> int:
    """Return the length of a request's messages."""
    return sum(len(message["content"]) for message in request.messages)


def ask_all(
    spec: ModelSpec, endpoint: Endpoint, folder: Path | None, calls: list[Call], kept: Journal, check: Callable, attempts: int
) -> dict[str, dict]:
    """Ask every call, journal each outcome as it comes and return the outcomes by key; without calls no server is started."""
    if not calls:
        return {}
    api_key, common = endpoint.api_key(), common_body(spec, endpoint, folder)
    if endpoint.kind == "serve":
        server = served(spec, endpoint, folder, kept.path.with_name(kept.path.name + ".server.log"))
    else:
        server = nullcontext(endpoint.base_url)
    with server as base_url:
        return asyncio.run(ask_concurrently(endpoint, base_url, api_key, common, calls, kept, check, attempts))


async def ask_concurrently(
    endpoint: Endpoint, base_url: str, api_key: str, common: dict, calls: list[Call], kept: Journal, check: Callable, attempts: int
) -> dict[str, dict]:
    """Let `concurrency` workers take the calls in order; the first fatal fault ends them all."""
    from openai import AsyncOpenAI, DefaultAioHttpClient

    outcomes: dict[str, dict] = {}
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:
            outcomes[call.key] = await ask_until_usable(line, call, check, attempts)
            kept.add(outcomes[call.key])
            if len(outcomes) % max(1, len(calls) // 10) == 0:
                log.info("%d of %d asked", len(outcomes), len(calls))

    # The package's own retries are off: ours count against the limits, and stop at once where a 429 means an empty account.
    # Its aiohttp transport carries ten times the requests of the default one.
    async with AsyncOpenAI(
        base_url=base_url, api_key=api_key, timeout=endpoint.timeout_s, max_retries=0, http_client=DefaultAioHttpClient()
    ) as client:
        line = Line(client, endpoint, common, calls)
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(endpoint.concurrency, len(calls))):
                    workers.create_task(work())
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None
    return outcomes


async def ask_until_usable(line: "Line", call: Call, check: Callable, attempts: int) -> dict:
    """Ask one call up to `attempts` times; return what became of it, as a line of the journal."""
    reason, raw, spent = "", [], add_tokens({}, None)
    for attempt in range(attempts):
        try:
            answer = await line.send(call, attempt)
        except PassingFault as fault:
            reason = str(fault)
            continue
        except RefusedRequest as fault:
            reason = str(fault)
            break
        spent = add_tokens(spent, answer["usage"])
        try:
            check(call.request, answer["text"])
        except ValueError as fault:
            reason = str(fault)
            raw.append(answer["text"])
            continue
        return {"key": call.key, "answer": answer, "reason": None, "raw": raw, "spent": spent}
    return {"key": call.key, "answer": None, "reason": reason, "raw": raw, "spent": spent}


class Line:
    """A line to an endpoint: keeps its limits, sends again what may pass, and tells its faults apart."""

    def __init__(self, client, endpoint: Endpoint, common: dict, calls: list[Call]) -> None:
        self.client, self.endpoint, self.common = client, endpoint, common
        self.longest_answer = common.get("max_tokens") or common.get("max_completion_tokens") or 0
        self.requests = limiter(endpoint.requests_per_minute, largest=1)
        self.tokens = limiter(endpoint.tokens_per_minute, largest=max(call.tokens(self.longest_answer) for call in calls))

    async def send(self, call: Call, attempt: int) -> dict:
        """Return the answer to one call: text, finish_reason, usage, served_model."""
        from openai import APIError

        options = {name: value for name, value in call.options.items() if value is not None}
        if "seed" in options:
            options["seed"] += attempt  # the same seed would bring the same unusable text
        if self.endpoint.server == "transformers":
            options.pop("seed", None)  # it would set back the generator of all answers in the batch, and make none repeatable
        for retry in range(self.endpoint.max_retries + 1):
            if self.requests:
                await self.requests.acquire()
            if self.tokens:
                await self.tokens.acquire(min(call.tokens(self.longest_answer), self.tokens.max_rate))
            try:
                completion = await self.client.chat.completions.create(messages=call.request.messages, **self.common, **options)
                answer = read_completion(completion)
            except (APIError, ValueError, AttributeError) as error:  # the latter two: a reply that is no JSON, or no completion
                reason = self.reason(error)
                if retry < self.endpoint.max_retries:
                    await asyncio.sleep(pause(error, retry))
                elif self.endpoint.kind == "serve" and reason == NO_CONNECTION:
                    raise ConnectionError from None  # a server of our own, on this host: it will not come back
            else:
                return answer
        raise PassingFault(reason)

    def reason(self, error: Exception) -> str:
        """Return the reason of a passing fault; raise UserError for a fatal one, RefusedRequest for a request at fault itself."""
        from httpx2 import ConnectTimeout
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        if isinstance(error, APITimeoutError) and not isinstance(error.__cause__, ConnectTimeout):  # which this transport calls any refusal
            return "no answer in time"
        if isinstance(error, APIConnectionError):
            return NO_CONNECTION
        if not isinstance(error, APIStatusError):
            return "a reply that is no completion"
        status, where, again = error.status_code, self.client.base_url, "What was answered is kept: run again, and only the rest is asked."
        if status in (401, 403):  # the endpoint's own message may quote the key
            raise UserError(f"{where} refuses the key in {self.endpoint.api_key_env} for {self.common['model']} (HTTP {status}). {again}")
        if status == 402 or error.code == "insufficient_quota":
            raise UserError(f"{where}: the account is exhausted (HTTP {status}); top it up. {again}")
        if status == 404:
            raise UserError(
                f"{where} knows no model {self.common['model']!r}: see `id` in models.yaml, `base_url` in endpoints.yaml. {again}"
            )
        if status in (408, 409, 429) or status >= 500:
            return f"HTTP {status}: {error.message}"
        raise RefusedRequest(f"HTTP {status}: {error.message}")


def read_completion(completion) -> dict:
    """Return what is kept of a completion; a refusal is a text too, which the caller's check then judges."""
    if not getattr(completion, "choices", None):
        raise ValueError("no choices")
    choice, usage = completion.choices[0], completion.usage
    counts = usage and {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None,
    }
    text = choice.message.content or choice.message.refusal or ""
    return {"text": text, "finish_reason": choice.finish_reason, "usage": counts, "served_model": completion.model}


def limiter(per_minute: int | None, largest: int):
    """Return a limiter that lets no more than a second's worth through at once (but always the largest single amount), or None."""
    from aiolimiter import AsyncLimiter

    if per_minute is None:
        return None
    burst = min(per_minute, max(largest, per_minute / 60))
    return AsyncLimiter(burst, 60 * burst / per_minute)


def pause(error: Exception, retry: int) -> float:
    """Return the seconds to wait before a request is sent again: what Retry-After says, else doubling, with jitter."""
    response = getattr(error, "response", None)
    try:
        return float(response.headers["retry-after"])
    except (AttributeError, KeyError, ValueError):
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**retry) * random.uniform(0.75, 1.0)


def answer_offline(spec: ModelSpec, key: str, request: ChatRequest, check: Callable) -> dict:
    """Return the offline judge's answer to a request's task."""
    from psychocounsel import rubric

    if spec.name != "rubric":
        raise UserError(f"{spec.name}: of local endpoints only the model `rubric` can be asked; recorded answers are read from a file")
    text = rubric.answer(request.task)
    check(request, text)
    return {"key": key, "answer": {"text": text, "finish_reason": "stop", "usage": None, "served_model": spec.name}}


# Complaints ---------------------------------------------------------------------------------------------------------------------------


def refuse_too_many(spec: ModelSpec, failures: list[ChatFailure], requests: int, max_share: float, journal: Path | str) -> None:
    """Raise UserError where more than `max_share` of the requests failed; what the reasons quote stays in the journal."""
    if len(failures) > max_share * requests:
        reasons = Counter(failure.reason.split(":")[0] for failure in failures)
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
        raise UserError(
            f"{spec.name}: {len(failures)} of {requests} requests have no usable answer, more than max_failed_share = {max_share:g} allows:"
            f" {listed}. Their texts are in {journal}. Run again: the answers are kept, the failures are asked again."
        )


def warn_of_other_model(spec: ModelSpec, answers: list[ChatAnswer]) -> None:
    """Log one warning where an endpoint names another model than was asked for."""
    others = {answer.served_model for answer in answers if answer.served_model and not answer.served_model.startswith(spec.id)}
    if others:
        log.warning("%s: asked for %s, the endpoint says that it was answered by %s", spec.name, spec.id, ", ".join(sorted(others)))
