"""The one client through which every stage asks chat models: what a request is, what its answer may be, what became of it.

`complete` answers requests from an OpenAI-compatible address, from a server that it starts (serving.py), or from the
offline rubric. Whatever the journal holds is not asked again. For a plan it asks nothing, prints what it would ask as a
line of JSON, and ends the program. What the caller's `check` refuses is asked again, `attempts` times in all, under the
same request_key; line.py carries the requests and knows the endpoint's faults. A request that fails for good becomes a
ChatFailure with every text that came; too many of them fail the program.
"""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from psychocounsel.batch import Calls, ask_in_batches, batches_of, refuse_under_way
from psychocounsel.budget import OutOfBudget, Purse
from psychocounsel.endpoints import Endpoint, is_snapshot, read_endpoint
from psychocounsel.errors import UserError
from psychocounsel.journal import Journal, add_tokens, peek
from psychocounsel.line import Call, Line, PassingFault, RefusedRequest, characters, judge, send_all
from psychocounsel.models import ModelSpec
from psychocounsel.pricing import cost, expected_cost, expected_tokens, read_price, usages
from psychocounsel.records import canonical_json, content_hash, file_sha256, refuse_removed
from psychocounsel.serving import name_at_server, transformers_options, while_served

ENOUGH_FAILURES = 100  # so many, and more than are allowed, and the rest is not paid for: the run can only fail

log = logging.getLogger("psychocounsel")


@dataclass(frozen=True)
class ChatRequest:
    """One question to a model; `id` names it for the caller and is no part of its identity."""

    id: str
    messages: list[dict]
    task: dict = field(default_factory=dict)  # what the messages were made from, for the offline rubric alone
    repeat: int = 0  # a deliberate second asking of the same
    seed: int | None = None
    response_schema: dict | None = None  # JSON Schema of the answer, where it differs between requests
    group: str | None = None  # requests of one group begin alike and follow each other: the first goes ahead, for the prefix cache


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


class Lazy(Collection):
    """A collection whose members are made from their places each time that it is walked through."""

    def __init__(self, places: Collection, make: Callable) -> None:
        self.places, self.make = places, make

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator:
        return map(self.make, self.places)

    def __contains__(self, member: object) -> bool:
        return any(member == other for other in self)


def accept_any(request: ChatRequest, text: str) -> None:
    """Find every text usable."""


def complete(
    spec: ModelSpec,
    requests: Collection[ChatRequest],
    *,
    endpoints: Path | str,
    journal: Path | str,
    weights: Path | str | None = None,
    gpus: int = 1,
    response_schema: dict | None = None,
    check: Callable[[ChatRequest, str], object] = accept_any,
    attempts: int = 3,
    max_failed_share: float = 0.01,
    prices: list[Path | str] = (),
    ledger: Path | str | None = None,
    budget: float | None = None,
    plan: bool = False,
) -> tuple[Collection[ChatAnswer], Collection[ChatFailure], dict]:
    """Answer the requests; return answers and failures, each in the order of the requests, and totals for the provenance record.

    The requests are walked through twice, and may be built on the way (`Lazy`); the answers are read from the journal each time they are
    walked through. So memory holds the ids, and some 200 bytes a request, whatever the length of texts.

    `weights` is the manifest of local weights, `gpus` over how many GPUs vLLM spreads a model that it serves, `check` raises
    ValueError(reason) where a text is unusable, `response_schema` holds for requests without one of their own. Equal requests are
    asked once. The totals' tokens and their cost by the list price in `prices` (the models' registry) are those of all attempts,
    journalled or not; `ledger` is the file of what all jobs of the run spend, which together stay below `budget` dollars. With `plan`
    nothing is asked, and the program ends here.
    """
    endpoint, price = read_endpoint(Path(endpoints), spec.endpoint), read_price(prices, spec.name)
    identity = model_identity(spec, endpoint, Path(weights) if weights else None)

    def call(request: ChatRequest) -> Call:
        answer_format = response_format(spec, request.response_schema or response_schema)
        options = {"response_format": answer_format, "seed": request.seed}
        return Call(request_key(identity, spec, request, answer_format), request.messages, options, request.group, partial(check, request))

    if plan:
        print(canonical_json(planned(spec, endpoint, map(call, requests), Path(journal), price)))
        sys.exit()
    keys = {request.id: bytes.fromhex(call(request).key) for request in requests}
    if len(keys) < len(requests):
        raise ValueError("the ids of requests must be unique")
    totals = {"requests": len(requests), "from_journal": 0, **add_tokens({}, None)}

    if endpoint.kind == "local":
        outcomes = {keys[request.id]: answer_offline(spec, request, check) for request in requests}
        answered, failed, outcome = outcomes, {}, outcomes.__getitem__
    else:
        with Journal(Path(journal), keys.values()) as kept:
            totals["from_journal"] = sum(key in kept for key in kept.answers)
            log.info("%s: %d requests, %d answered in the journal", spec.name, len(kept.answers), totals["from_journal"])
            folder, money = Path(weights).parent if weights else None, partial(purse, spec, endpoint, price, ledger, budget)
            left, allowed = lambda: map(call, unanswered(requests, keys, kept)), max_failed_share * len(requests)
            try:
                ask_all(spec, endpoint, folder, gpus, left, kept, attempts, allowed, money)
            except OutOfBudget as fault:
                unasked = sum(key not in kept for key in kept.answers)
                raise UserError(
                    f"{spec.name}: {fault} {unasked:,} of {len(kept.answers):,} requests are left to ask. What was answered is kept: to go"
                    " on, raise `budget` in the config and run again."
                ) from None
            except TooManyFailures:
                log.info("%s: too many requests fail; the others are not asked", spec.name)
        answered, failed, outcome = kept, kept.failures, kept.outcome
        totals |= kept.spent

    def answer(request_id: str) -> ChatAnswer:
        shown = {"served_model": spec.name} if endpoint.kind == "serve" else {}  # our own server names it by a path of this machine
        return ChatAnswer(request_id, keys[request_id].hex(), **outcome(keys[request_id])["answer"] | shown)

    def failure(request_id: str) -> ChatFailure:
        found = outcome(keys[request_id])
        return ChatFailure(request_id, found["key"], found["reason"], found["raw"])

    answers = Lazy([request_id for request_id, key in keys.items() if key in answered], answer)
    failures = Lazy([request_id for request_id, key in keys.items() if key in failed], failure)
    refuse_too_many(spec, failures, len(requests), len(requests) - len(answers) - len(failures), max_failed_share, journal)
    if endpoint.remote:
        warn_of_other_model(spec, kept.served_models)
    return answers, failures, totals | {"failed": len(failures), "cost": cost(price, totals)}


def unanswered(requests: Iterable[ChatRequest], keys: dict[str, bytes], kept: Journal) -> Iterator[ChatRequest]:
    """Yield the requests that the journal does not answer, of equal ones the first."""
    seen = set()
    for request in requests:
        key = keys[request.id]
        if key not in kept and key not in seen:
            seen.add(key)
            yield request


def planned(spec: ModelSpec, endpoint: Endpoint, calls: Iterable[Call], journal: Path, price: dict | None) -> dict:
    """Return what is left to ask of calls, and its tokens and cost: about, or, without an answer to go by, at most so much.

    What is on its way in batches is paid already, and not left.
    """
    answered, flying = peek(journal), batches_of(journal).keys()
    left, keys, read, length = [], set(), 0, 0
    for call in calls:
        if call.key in keys:
            continue
        keys.add(call.key)
        if endpoint.kind != "local" and call.key not in answered and call.key not in flying:
            left.append(characters(call.messages))
        elif call.key in answered and (usage := answered[call.key]["usage"]):
            read, length = read + usage["prompt_tokens"], length + characters(call.messages)
    longest = spec.sampling.max_tokens if spec.sampling else 0
    seen = usages(answered.values(), spec.id, endpoint.kind)
    tokens = expected_tokens(left, seen, read / length if length else None, longest)
    facts = {"model": spec.name, "endpoint": endpoint.kind, "requests": len(keys), "left": len(left)}
    facts["under_way"] = len(keys & flying - answered.keys())
    return {**facts, **tokens, "cost": expected_cost(price, tokens, endpoint.kind), "bound": bool(left) and not seen}


# What determines an answer ------------------------------------------------------------------------------------------------------------


def model_identity(spec: ModelSpec, endpoint: Endpoint, weights: Path | None) -> dict:
    """Return what of the model determines its answers; local weights stand for themselves, whatever the model is called."""
    who = {"weights": file_sha256(weights)} if weights else {"id": spec.id, "revision": spec.revision}
    loaded = None
    if endpoint.kind == "serve" and spec.serve:  # a field that came later counts where it is set alone: keys of earlier answers stay
        loaded = spec.serve.model_dump(exclude={"chat_template"} if spec.serve.chat_template is None else None)
    return {"kind": "openai" if endpoint.remote else endpoint.kind, **who, "serve": loaded}


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
    name = name_at_server(spec, endpoint, folder) if endpoint.kind == "serve" else spec.id
    template = {"chat_template_kwargs": spec.chat_template_kwargs} if spec.chat_template_kwargs else {}
    return {"model": name, **sampling, **template, **(transformers_options(spec, folder) if endpoint.server == "transformers" else {})}


# Asking -------------------------------------------------------------------------------------------------------------------------------


class TooManyFailures(Exception):
    """The run can only fail."""


def ask_all(
    spec: ModelSpec,
    endpoint: Endpoint,
    folder: Path | None,
    gpus: int,
    left: Calls,
    kept: Journal,
    attempts: int,
    allowed: float,
    money: Callable,
) -> None:
    """Ask every call that is left and journal each outcome as it comes; without calls no server is started.

    Raise TooManyFailures where ENOUGH_FAILURES, and more than are allowed, have failed for good. Batches are paid when they are sent.
    """
    if next(iter(left()), None) is None:
        return
    if folder:
        refuse_removed(folder / "manifest.json")
    api_key, common = endpoint.api_key(), common_body(spec, endpoint, folder)
    if endpoint.kind == "batch":
        with money(kept.path) as purse:
            ask_in_batches(endpoint, api_key, common, left, kept, attempts, purse)
        return
    refuse_under_way(left, kept.path)
    ask = partial(ask_until_usable, attempts=attempts, with_seed=endpoint.server != "transformers")
    asked, failed, total = count(1), count(1), sum(key not in kept for key in kept.answers)

    def keep(outcome: dict) -> None:
        kept.add(outcome)
        if (number := next(asked)) % max(1, total // 20) == 0:
            log.info("%s: %d of %d asked", spec.name, number, total)
        if outcome["answer"] is None and next(failed) > max(allowed, ENOUGH_FAILURES - 1):
            raise TooManyFailures

    def send(base_url: str) -> None:
        with money(kept.path) as purse:
            asyncio.run(send_all(endpoint, base_url, api_key, common, left(), ask, keep, purse))

    if endpoint.kind == "serve":
        while_served(spec, endpoint, folder, gpus, kept.path.with_name(kept.path.name + ".server.log"), send)
    else:
        send(endpoint.base_url)


def purse(spec: ModelSpec, endpoint: Endpoint, price: dict | None, ledger: Path | str | None, budget: float | None, journal: Path):
    """Return what a journal's requests are paid from, to be opened; of None where they cost nothing that is known.

    Raise UserError where a budget could not be kept: without a price, or a limit to the length of answers.
    """
    if not endpoint.remote or (price is None and budget is None):
        return nullcontext()
    if budget is not None and (price is None or spec.sampling is None or ledger is None):
        lacks = "price" if price is None else "max_tokens" if spec.sampling is None else "ledger (--ledger)"
        raise UserError(f"{spec.name} has no {lacks}, without which the budget of ${budget:,.2f} cannot be kept (models.yaml)")
    if ledger is None:
        return nullcontext()
    return Purse(Path(ledger), journal, price, budget, spec.sampling.max_tokens if spec.sampling else 0, endpoint.kind == "batch")


async def ask_until_usable(line: Line, call: Call, attempts: int, with_seed: bool) -> dict:
    """Ask one call up to `attempts` times; return what became of it, as a line of the journal.

    With `transformers serve` no seed is sent: it would set back the generator of all answers in the batch, and make none repeatable.
    """
    reason, raw, spent = "", [], add_tokens({}, None)
    for attempt in range(attempts):
        options = {name: value for name, value in call.options.items() if value is not None and (with_seed or name != "seed")}
        if "seed" in options:
            options["seed"] += attempt  # the same seed would bring the same unusable text
        try:
            answer = await line.send(call, options, admitted=attempt == 0)
        except PassingFault as fault:
            reason = str(fault)
            continue
        except RefusedRequest as fault:
            reason = str(fault)
            break
        except Exception as fault:  # fatal: what unusable texts cost is kept before the program ends
            if not raw:
                raise
            line.stop(fault)
            break
        spent = add_tokens(spent, answer["usage"])
        try:
            judge(call, answer)
        except (RefusedRequest, ValueError) as fault:
            reason = str(fault)
            raw.append(answer["text"])
            if isinstance(fault, RefusedRequest):
                break
            continue
        return {"key": call.key, "answer": answer, "reason": None, "raw": raw, "spent": spent}
    return {"key": call.key, "answer": None, "reason": reason, "raw": raw, "spent": spent}


def answer_offline(spec: ModelSpec, request: ChatRequest, check: Callable) -> dict:
    """Return the offline judge's answer to a request's task."""
    from psychocounsel import rubric

    if spec.name != "rubric":
        raise UserError(f"{spec.name}: of local endpoints only the model `rubric` can be asked; recorded answers are read from a file")
    text = rubric.answer(request.task)
    check(request, text)
    return {"answer": {"text": text, "finish_reason": "stop", "usage": None, "served_model": spec.name}}


# Complaints ---------------------------------------------------------------------------------------------------------------------------


def refuse_too_many(
    spec: ModelSpec, failures: Collection[ChatFailure], requests: int, unasked: int, max_share: float, journal: Path | str
) -> None:
    """Raise UserError where more than `max_share` of the requests failed; what the reasons quote stays in the journal."""
    if len(failures) > max_share * requests:
        reasons = Counter(failure.reason.split(":")[0] for failure in failures)
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
        raise UserError(
            f"{spec.name}, endpoint {spec.endpoint}: {len(failures)} of {requests} requests have no usable answer, more than"
            f" max_failed_share = {max_share:g} allows: {listed}."
            f" Reasons and texts are in {journal}.{f' {unasked:,} requests were not asked any more.' if unasked else ''}"
            " Run again: the answers are kept, the failures are asked again."
        )


def warn_of_other_model(spec: ModelSpec, served_models: set[str]) -> None:
    """Log one warning where an endpoint names another model than was asked for."""
    others = {served_model for served_model in served_models if not is_snapshot(served_model, spec.id)}
    if others:
        log.warning("%s: asked for %s, the endpoint says that it was answered by %s", spec.name, spec.id, ", ".join(sorted(others)))
