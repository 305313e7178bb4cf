"""OpenAI's Batch API as an engine of the chat client: the same requests at half the price, answered within a day.

What is left to ask goes out in files of at most `max_requests` requests and `max_bytes` bytes. What is on its way stands in a
file beside the journal, `<journal>.batches`; a line reaches the disk before the next step can fail:

    {"event": "intended", "batch": our name, "time": Unix time, "tokens": of the requests, "attempts": {request_key: earlier attempts}}
    {"event": "uploaded", "batch": our name, "file": id at the endpoint}
    {"event": "created", "batch": our name, "id": id at the endpoint}
    {"event": "ended", "batch": our name, "status": …, "tried": {request_key: {"reason", "raw", "spent", "attempts"}}, "unclaimed": […]}
    {"event": "settled"}    all that was asked is answered or failed for good; attempts count anew

Our name stands in the batch's metadata too. After a kill the endpoint's own list tells whether an intended batch was created,
so wherever a run is cut off, nothing is paid twice. Results are matched by request_key (`custom_id`), never by their order.
A request without a usable answer goes into a further batch, `attempts` times in all; one that was not carried out, because
the batch expired or was cancelled, as often as it takes. Results of requests that are asked no more are not fetched: they
wait at the endpoint, for as long as it keeps them, in case the requests are asked again.
"""

import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import orjson

from psychocounsel.budget import Purse
from psychocounsel.endpoints import Endpoint
from psychocounsel.errors import UserError
from psychocounsel.journal import Journal, add_tokens, sync_folder
from psychocounsel.line import (
    KEPT,
    Call,
    PassingFault,
    RefusedRequest,
    characters,
    judge,
    pause,
    read_completion,
    read_usage,
    status_reason,
)
from psychocounsel.pricing import CHARACTERS_PER_TOKEN

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text: it carries what chat.py asks

PATH = "/v1/chat/completions"
TAG = "psychocounsel_batch"  # the metadata of a batch that holds our name for it
ENDED = ("completed", "expired", "cancelled")
NOT_CARRIED_OUT = ("batch_expired", "batch_cancelled")  # codes of lines
DAY_S = 86_400

log = logging.getLogger("psychocounsel")


Calls = Callable[[], Iterable[Call]]  # walked through again and again: only keys are held in memory


def ask_in_batches(endpoint: Endpoint, api_key: str, common: dict, calls: Calls, kept: Journal, attempts: int, purse: Purse | None) -> None:
    """Ask every call that is not in the journal, and journal what became of each; `common` holds what all calls send alike.

    The program waits until all batches have ended. With the endpoint's batch.wait off it ends, by a UserError that says so, as soon as
    batches are on their way, and the next run collects what has ended by then.
    """
    from openai import OpenAI

    with OpenAI(base_url=endpoint.base_url, api_key=api_key, timeout=endpoint.timeout_s, max_retries=0) as client:
        Engine(client, endpoint, common, calls, kept, attempts, purse).run()


def refuse_under_way(calls: Calls, journal: Path) -> None:
    """Raise UserError where calls that are to be asked one by one are on their way in batches: they would be paid twice."""
    batches = batches_of(journal)
    flying = batches.keys()
    if waiting := flying and sum(call.key in flying for call in calls()):
        raise UserError(
            f"{journal}: {waiting:,} of the requests are on their way in batches. Give the endpoint the kind batch again (endpoints.yaml)"
            f" to collect their answers. {batches.lost()}"
        )


# What is on its way -------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A batch that was intended and whose results are still to be collected."""

    name: str
    attempts: dict[str, int]  # request_key -> earlier attempts
    time: float
    tokens: int
    file: str | None = None  # ids at the endpoint
    id: str | None = None


class Batches:
    """What is known of a journal's batches: those on their way, and what earlier attempts brought of requests without an answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: dict[str, Batch] = {}
        self.tried: dict[str, dict] = {}  # request_key -> reason, raw, spent, attempts
        content = path.read_bytes() if path.is_file() else b""
        self.end = content.rfind(b"\n") + 1  # what follows was cut off by a kill: that step was not taken
        last = content.rfind(b"\n", 0, max(0, self.end - 1)) + 1
        if b"\0" in content[last : self.end]:  # cut off by a power cut: pages that had not reached the disk
            self.end = last
        for number, line in enumerate(content[: self.end].splitlines(), start=1):
            try:
                self._take(orjson.loads(line))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: not a line about batches. {self.lost()}") from None

    def note(self, event: str, **facts: object) -> None:
        """Remember an event: when this returns, it is on the disk."""
        line = orjson.dumps({"event": event, **facts}, option=orjson.OPT_APPEND_NEWLINE)
        with open(self.path, "ab") as file:
            file.truncate(self.end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if not self.end:
            sync_folder(self.path.parent)
        self.end += len(line)
        self._take({"event": event, **facts})

    def _take(self, event: dict) -> None:
        if event["event"] == "intended":
            self.open[event["batch"]] = Batch(event["batch"], event["attempts"], event["time"], event["tokens"])
        elif event["event"] == "uploaded":
            self.open[event["batch"]].file = event["file"]
        elif event["event"] == "created":
            self.open[event["batch"]].id = event["id"]
        elif event["event"] == "ended":
            batch = self.open.pop(event["batch"])
            batch.attempts = {key: batch.attempts[key] for key in event["unclaimed"]}
            self.open |= {batch.name: batch} if batch.attempts else {}
            self.tried |= event["tried"]
        else:
            self.tried = {}

    def lost(self) -> str:
        """Say what to do where batches cannot be followed any more."""
        return f"Where their results are lost, move {self.path} away: their requests are then asked, and paid, again."

    def keys(self) -> set[str]:
        """Return the keys of all requests on their way."""
        return {key for batch in self.open.values() for key in batch.attempts}

    def attempts(self, key: str) -> int:
        """Return how often a request was tried in vain."""
        return self.tried[key]["attempts"] if key in self.tried else 0


def batches_of(journal: Path) -> Batches:
    """Return what is known of a journal's batches."""
    return Batches(journal.with_name(f"{journal.name}.batches"))


# Files of requests and of results -----------------------------------------------------------------------------------------------------


class Requests:
    """A file of requests for one batch, written line by line to the disk: none is held in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.attempts, self.tokens, self.bytes, self.dollars = path, {}, 0, 0, 0.0
        self.file = open(path, "wb")  # noqa: SIM115 (open until it is sent)

    def __enter__(self) -> "Requests":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.path.unlink()

    def add(self, key: str, attempts: int, line: bytes, tokens: int, dollars: float) -> None:
        """Append the line of a request, which may cost so much."""
        self.file.write(line)
        self.attempts[key] = attempts
        self.tokens += tokens
        self.bytes += len(line)
        self.dollars += dollars


def request_line(call: Call, attempt: int, common: dict) -> bytes:
    """Return the line that asks a call for the attempt of this number."""
    options = {name: value for name, value in call.options.items() if value is not None}
    if "seed" in options:
        options["seed"] += attempt  # the same seed would bring the same unusable text
    body = {"messages": call.messages, **common, **options}
    return orjson.dumps({"custom_id": call.key, "method": "POST", "url": PATH, "body": body}, option=orjson.OPT_APPEND_NEWLINE)


def an_object(found: object) -> dict:
    """Return what is found in a line where an object belongs; an empty one where there is something else."""
    return found if isinstance(found, dict) else {}


class Results:
    """The lines of a batch's result files, found by request_key; they stay on the disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.places, self.damaged = path, {}, 0  # places: request_key -> where its line begins
        self.spent, self.told = add_tokens({}, None), set()  # tokens of all answers; keys whose cost is told, even that it is none
        self.file = open(path, "w+b")  # noqa: SIM115 (open as long as the results)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.path.unlink()

    def append(self, pieces: Iterable[bytes]) -> None:
        """Append a file, and find its lines; where it breaks off, nothing is left of it."""
        start = self.file.seek(0, os.SEEK_END)
        try:
            for piece in pieces:
                self.file.write(piece)
            self.file.write(b"\n")  # whether the last line had its end or not
        except BaseException:
            self.file.truncate(start)
            raise
        place = self.file.seek(start)
        for line in iter(self.file.readline, b""):
            try:
                if line.strip():
                    self.take(orjson.loads(line), place)
            except (ValueError, KeyError, TypeError):
                self.damaged += 1
            place += len(line)

    def take(self, row: dict, place: int) -> None:
        """Note where the line of a request begins, and what it cost; of two lines the first counts."""
        if row["custom_id"] in self.places:
            return
        self.places[row["custom_id"]] = place
        response = an_object(row.get("response"))
        if response.get("status_code") != 200:
            self.told.add(row["custom_id"])
        elif usage := read_usage(an_object(response.get("body")).get("usage")):
            self.told.add(row["custom_id"])
            self.spent = add_tokens(self.spent, usage)

    def row(self, key: str) -> dict | None:
        """Return the line about a request, or None."""
        if key not in self.places:
            return None
        self.file.seek(self.places[key])
        return orjson.loads(self.file.readline())


# Asking -------------------------------------------------------------------------------------------------------------------------------


class NotCarriedOut(Exception):
    """The batch ended before it came to this request."""


class Engine:
    """Sends the calls of one run in batches, waits, and collects the results."""

    def __init__(self, client, endpoint: Endpoint, common: dict, calls: Calls, kept: Journal, attempts: int, purse: Purse | None) -> None:
        self.client, self.endpoint, self.common, self.calls, self.kept, self.most = client, endpoint, common, calls, kept, attempts
        self.limits, self.where, self.purse = endpoint.batch, client.base_url, purse
        self.batches = batches_of(kept.path)
        self.asked = {call.key for call in calls()}
        exhausted = {key for key in self.asked if self.batches.attempts(key) >= attempts}
        self.left = self.asked - exhausted - self.batches.keys()  # to be sent
        self.queue_full = False  # the endpoint takes no more until a batch has ended
        self.told = ""

    def run(self) -> None:
        """Collect, send and wait until every call is answered or has failed for good."""
        if self.purse:
            self.purse.keep_batches(set(self.batches.open))
        self.find_lost()
        while True:
            ended = self.poll()
            self.send_left()
            if not self.flying():
                break
            if not ended and not self.limits.wait:
                raise UserError(f"{self.on_their_way()}. They are remembered: run the same command again, and it collects what has ended.")
            if not ended:
                time.sleep(self.limits.poll_s)
        for key, tale in self.batches.tried.items():
            if key in self.asked and tale["attempts"] >= self.most:
                self.kept.add({"key": key, "answer": None, "reason": tale["reason"], "raw": tale["raw"], "spent": tale["spent"]})
        self.kept.sync()
        self.batches.note("settled")

    def flying(self) -> list[Batch]:
        """Return the batches on their way that hold something that this run asks, or has just been answered."""
        return [batch for batch in self.batches.open.values() if any(key in self.asked or self.answered(key) for key in batch.attempts)]

    def answered(self, key: str) -> bool:
        """Whether the journal answers a request of this run."""
        return bytes.fromhex(key) in self.kept

    def on_their_way(self) -> str:
        """Say what is waited for."""
        flying = self.flying()
        requests, batches = sum(len(batch.attempts) for batch in flying), "1 batch is" if len(flying) == 1 else f"{len(flying)} batches are"
        return f"{self.where}: {batches} on the way, with {requests:,} requests"

    # Sending

    def send_left(self) -> None:
        """Send what is left, or as much of it as the endpoint's queue takes."""
        if not self.left or self.queue_full:
            return
        calls = (call for call in self.calls() if call.key in self.left)
        call = next(calls, None)
        while call:
            self.room = self.purse.room() if self.purse else math.inf
            with Requests(self.kept.path.with_name(f"{self.kept.path.name}.requests")) as requests:
                while call and self.add(requests, call):
                    call = next(calls, None)
                if not requests.attempts:
                    break
                self.send(requests)

    def add(self, requests: Requests, call: Call) -> bool:
        """Add a call to a file of requests and say so, unless a batch or the queue would then hold too much."""
        attempt, limits = self.batches.attempts(call.key), self.limits
        line, tokens = request_line(call, attempt, self.common), math.ceil(characters(call.messages) / CHARACTERS_PER_TOKEN)
        queued = sum(batch.tokens for batch in self.batches.open.values()) + requests.tokens
        fits = len(requests.attempts) < limits.max_requests and requests.bytes + len(line) <= limits.max_bytes
        fits = fits and (limits.enqueued_tokens is None or queued + tokens <= limits.enqueued_tokens)
        alone = not (requests.attempts or self.flying())
        dollars = self.purse.at_most(len(line)) if self.purse else 0
        if requests.dollars + dollars > self.room:  # what is on its way may leave some over
            if alone:
                raise self.purse.exhausted(dollars)
            return False
        if fits or alone:  # one that is too large by itself is for the endpoint to refuse
            requests.add(call.key, attempt, line, tokens, dollars)
            self.left.remove(call.key)
            return True
        return False

    def send(self, requests: Requests) -> None:
        """Send a file as a batch, and remember each step."""
        requests.file.flush()
        name = uuid.uuid4().hex
        if self.purse:
            self.purse.take_batch(name, requests.dollars)
        self.batches.note("intended", batch=name, time=time.time(), tokens=requests.tokens, attempts=requests.attempts)
        uploaded = self.call("upload a file of requests", lambda: self.upload(requests.path))
        self.batches.note("uploaded", batch=name, file=uploaded.id)
        created = self.create(self.batches.open[name])
        self.batches.note("created", batch=name, id=created.id)
        log.info("batch %s is on its way with %d requests", created.id, len(requests.attempts))

    def upload(self, path: Path):
        """Upload a file of requests."""
        from openai import NotFoundError

        with open(path, "rb") as file:
            try:
                return self.client.files.create(file=("requests.jsonl", file), purpose="batch")
            except NotFoundError:
                raise UserError(f"{self.where} has no Batch API: give the endpoint the kind openai (endpoints.yaml)") from None

    def create(self, batch: Batch):
        """Create a batch; where the answer was lost on the way, see first whether it was created before."""
        tried = False

        def create_or_find():
            nonlocal tried
            if tried and (found := self.find(batch)):
                return found
            tried = True
            tags = {TAG: batch.name, "journal": self.kept.path.name}
            return self.client.batches.create(input_file_id=batch.file, endpoint=PATH, completion_window="24h", metadata=tags)

        return self.call("create a batch", create_or_find)

    def find_lost(self) -> None:
        """Find out what became of intended batches whose id a run that was cut off could not remember."""
        for batch in [batch for batch in self.batches.open.values() if not batch.id]:
            if found := self.call("list the batches", lambda batch=batch: self.find(batch)):
                self.batches.note("created", batch=batch.name, id=found.id)
            else:
                self.left |= self.asked & batch.attempts.keys()
                self.settle(batch, 0)
                self.batches.note("ended", batch=batch.name, status="never created", tried={}, unclaimed=[])

    def find(self, batch: Batch):
        """Return the endpoint's batch of our name, or None; a second one, after an answer that came too late, is cancelled."""
        found = []
        for remote in self.client.batches.list(limit=100):  # the newest first, page after page
            if remote.created_at < batch.time - DAY_S:  # clocks differ, but not by a day
                break
            if (remote.metadata or {}).get(TAG) == batch.name or (batch.file and remote.input_file_id == batch.file):
                found.append(remote)
        for later in found[:-1]:
            self.client.batches.cancel(later.id)
        return found[-1] if found else None

    # Waiting

    def poll(self) -> bool:
        """Look at every batch that is waited for, collect those that have ended, and say whether there was one."""
        states, ended = [], False
        for batch in self.flying():
            try:
                remote = self.call(f"look at batch {batch.id}", lambda batch=batch: self.client.batches.retrieve(batch.id), patient=True)
            except PassingFault as fault:
                log.warning("batch %s cannot be looked at now: %s", batch.id, fault)
                continue
            if remote.status in ENDED:
                self.collect(batch, remote)
                self.queue_full, ended = False, True
            elif remote.status == "failed":
                self.refused(batch, remote, room_made=ended)
                ended = True
            else:
                states.append(remote)
        self.tell(states)
        return ended

    def tell(self, states: list) -> None:
        """Log how far the batches are, whenever a tenth more is done."""
        counts = [remote.request_counts for remote in states if remote.request_counts]
        total, done = sum(count.total for count in counts), sum(count.completed + count.failed for count in counts)
        now = f"{', '.join(sorted({remote.status for remote in states}))}, {10 * (10 * done // total) if total else 0} % done"
        if states and now != self.told:
            log.info("%s: %s", self.on_their_way(), now)
            self.told = now

    def refused(self, batch: Batch, remote, room_made: bool) -> None:
        """Take back a batch that the endpoint did not carry out; raise UserError where sending it again is of no use."""
        self.left |= self.asked & batch.attempts.keys()
        self.settle(batch, 0)
        self.batches.note("ended", batch=batch.name, status="failed", tried={}, unclaimed=[])
        faults = (remote.errors and remote.errors.data) or []
        codes = {fault.code for fault in faults}
        says = "; ".join(f"{f.code}: {f.message}{f' (line {f.line})' if f.line else ''}" for f in faults[:3]) or "it does not say why"
        if "token_limit_exceeded" in codes and (room_made or self.flying()):
            log.info("the account's queue of batches was full: what batch %s asks goes out when another one has ended", remote.id)
            self.queue_full = not room_made
        elif "token_limit_exceeded" in codes:
            raise UserError(
                f"{self.where}: the account's queue of batches is full ({says}). Set batch.enqueued_tokens of the endpoint"
                f" (endpoints.yaml) to what your account may have on the way, or wait until batches of others have ended. {KEPT}"
            )
        elif codes & {"insufficient_quota", "billing_hard_limit_reached"}:
            raise UserError(f"{self.where}: the account is exhausted ({says}); top it up. {KEPT}")
        else:
            raise UserError(f"{self.where} refuses a batch as a whole ({says}): {remote.id}. {KEPT}")

    # Collecting

    def collect(self, batch: Batch, remote) -> None:
        """Journal the answers of a batch that has ended, and note what its other requests brought."""
        tried, unsent, fatal, untold = {}, set(), None, 0.0
        with Results(self.kept.path.with_name(f"{self.kept.path.name}.results")) as results:
            self.fetch(remote, results)
            for call in self.calls():
                if call.key not in batch.attempts:
                    continue
                if self.purse and call.key not in results.told:  # its answer is lost, and may be billed
                    untold += self.purse.at_most(len(request_line(call, batch.attempts[call.key], self.common)))
                try:
                    outcome = self.outcome(call, batch.attempts[call.key] + 1, results.row(call.key))
                except NotCarriedOut:
                    unsent.add(call.key)
                except UserError as fault:
                    unsent.add(call.key)
                    fatal = fatal or fault
                else:
                    if "attempts" in outcome:
                        tried[call.key] = outcome
                    else:
                        self.kept.add(outcome)
        self.kept.sync()
        unclaimed = [key for key in batch.attempts if not (key in tried or key in unsent or self.answered(key))]
        answered = len(batch.attempts) - len(tried) - len(unsent) - len(unclaimed)
        again = unsent | {key for key, tale in tried.items() if tale["attempts"] < self.most}
        log.info("batch %s %s: %d requests answered, %d to be asked again", remote.id, remote.status, answered, len(again))
        self.settle(batch, self.purse.price_of(results.spent) + untold if self.purse else 0)
        self.batches.note("ended", batch=batch.name, status=remote.status, tried=tried, unclaimed=unclaimed)
        self.left |= again
        if fatal:
            raise fatal
        if unsent and not answered and not tried:  # or it would be sent for ever
            raise UserError(f"{self.where}: batch {remote.id} {remote.status} before any of its requests was carried out. {KEPT}")

    def settle(self, batch: Batch, dollars: float) -> None:
        """Tell the budget what a batch cost."""
        if self.purse:
            self.purse.settle_batch(batch.name, dollars)

    def outcome(self, call: Call, attempt: int, row: dict | None) -> dict:
        """Return what became of a request: a line for the journal, or reason, raw, spent and attempts where it brought no usable answer."""
        before = self.batches.tried.get(call.key) or {"raw": [], "spent": add_tokens({}, None)}
        raw, spent = before["raw"], before["spent"]
        try:
            answer = self.answer(row)
        except PassingFault as fault:
            return {"reason": str(fault), "raw": raw, "spent": spent, "attempts": attempt}
        except RefusedRequest as fault:
            return {"reason": str(fault), "raw": raw, "spent": spent, "attempts": self.most}
        if usage := answer["usage"]:
            spent = add_tokens(spent, usage | {"batch": usage})  # they have a price of their own
        try:
            judge(call, answer)
        except (ValueError, RefusedRequest) as fault:
            again = self.most if isinstance(fault, RefusedRequest) else attempt
            return {"reason": str(fault), "raw": [*raw, answer["text"]], "spent": spent, "attempts": again}
        return {"key": call.key, "answer": answer, "reason": None, "raw": raw, "spent": spent}

    def answer(self, row: dict | None) -> dict:
        """Return the answer in a line of results, or raise what stands there instead; UserError is fatal."""
        if row is None:
            raise PassingFault("no line in the results of its batch")
        response, error = an_object(row.get("response")), an_object(row.get("error"))
        if error.get("code") in NOT_CARRIED_OUT:
            raise NotCarriedOut
        if not response:
            raise PassingFault(f"{error.get('code')}: {error.get('message')}")
        body = an_object(response.get("body"))
        if response.get("status_code") != 200:
            error = an_object(body.get("error"))
            status = response.get("status_code")
            says = (status if isinstance(status, int) else 500, error.get("code"), error.get("message"))
            raise PassingFault(status_reason(*says, self.where, self.endpoint.api_key_env, self.common["model"]))
        try:
            return read_completion(body)
        except ValueError:
            raise PassingFault("a reply that is no completion") from None

    def fetch(self, remote, results: Results) -> None:
        """Fetch the results of a batch; once more where lines are damaged or missing: it may have been the way."""
        counts = remote.request_counts
        expected = counts.completed + counts.failed if counts else 0
        for _ in range(2):
            results.damaged = 0
            for file_id in filter(None, (remote.output_file_id, remote.error_file_id)):  # either may be null, or an empty text
                self.call(f"fetch the results of batch {remote.id}", lambda file_id=file_id: self.download(file_id, results))
            if not results.damaged and len(results.places) >= expected:
                return
        log.warning("batch %s: %d of %d results are readable; the others are asked again", remote.id, len(results.places), expected)

    def download(self, file_id: str, results: Results) -> None:
        """Append a file of results to those at hand."""
        with self.client.files.with_streaming_response.content(file_id) as response:
            results.append(response.iter_bytes())

    # The endpoint

    def call(self, what: str, function: Callable, patient: bool = False):
        """Return what a call of the endpoint returns, sent again after growing pauses where that may help; raise UserError where not.

        A patient caller comes again by itself: one try, and PassingFault.
        """
        from httpx2 import HTTPError  # a download that breaks off
        from openai import APIError

        for retry in range(1 if patient else self.endpoint.max_retries + 1):
            try:
                return function()
            except (APIError, HTTPError) as error:
                reason = self.reason(error, what)
                if not patient and retry < self.endpoint.max_retries:
                    time.sleep(pause(error, retry))
        if patient:
            raise PassingFault(reason)
        raise UserError(f"{self.where}: cannot {what}: {reason}. Batches on their way are remembered. {KEPT}")

    def reason(self, error: Exception, what: str) -> str:
        """Return the reason of a passing fault of a call; raise UserError for another."""
        from openai import APIStatusError

        if not isinstance(error, APIStatusError):
            return f"no connection, or a broken one ({type(error).__name__})"
        if error.status_code == 404:
            raise UserError(
                f"{self.where}: cannot {what}: it is not there. Is the key that of another account or project? {self.batches.lost()}"
            )
        try:
            return status_reason(error.status_code, error.code, error.message, self.where, self.endpoint.api_key_env, self.common["model"])
        except RefusedRequest as fault:
            raise UserError(f"{self.where}: cannot {what}: {fault}. Batches on their way are remembered. {KEPT}") from None
