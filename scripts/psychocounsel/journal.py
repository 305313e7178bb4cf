"""The journal of a job's answers: a JSON Lines file beside its outputs, appended as each answer comes.

Snakemake deletes the outputs of a failed job; the journal lies elsewhere, so that a crash, a kill or an edit of another
stage never costs an answer twice. A line holds what became of one request, under its request_key:

    {"key": …, "answer": {"text": …, "finish_reason": …, "usage": …, "served_model": …} or null,
     "reason": why there is no answer, or null, "raw": [texts of the unusable attempts], "spent": tokens of all attempts,
     "crc": CRC-32 of the line up to here, in hex; lines of older runs have none}

A line reaches the operating system at once and the disk within SYNC_EVERY_S: a kill costs nothing that was added, a power
cut the lines of that time. What either leaves torn at the end is dropped; any other damage is an error with file and line.
In memory stands only where each line begins: answers are read when they are looked at.
"""

import fcntl
import logging
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson

from psychocounsel.errors import UserError

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text

SYNC_EVERY_S = 1.0

log = logging.getLogger("psychocounsel")


class Journal:
    """The open, locked journal of the requests with the given keys (SHA-256 as bytes): `key in journal` tells whether one is answered.

    `add` appends what became of one more; `outcome` and the counts stay of use when the journal is closed.
    """

    def __init__(self, path: Path, keys: Iterable[bytes]) -> None:
        self.path = path
        self.answers: dict[bytes, int | None] = dict.fromkeys(keys)  # key -> where the line of its answer begins
        self.failures: dict[bytes, int] = {}  # the same of the last failure of requests without an answer
        self.spent = add_tokens({}, None)  # tokens of all attempts, those of failures too
        self.served_models: set[str] = set()  # as the endpoint names them
        self.end = 0  # size of the file

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the journal)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for line in whole_lines(self.path):
                self._take(orjson.loads(line), len(line))
            drop_torn_end(self.path, self.end)
        except BaseException as fault:
            self.file.close()
            if isinstance(fault, BlockingIOError):
                raise UserError(f"{self.path}: another job writes this journal; wait for it or stop it first") from None
            raise
        self.reader = open(self.path, "rb")  # noqa: SIM115 (answers are read later, too)
        self.closing, self.unsynced, self.fault = threading.Event(), False, None
        self.syncing = threading.Thread(target=self._sync_in_groups, daemon=True)
        self.syncing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.syncing.join()
        os.fsync(self.file.fileno())
        self.file.close()  # releases the lock

    def __contains__(self, key: bytes) -> bool:
        return self.answers.get(key) is not None

    def outcome(self, key: bytes) -> dict:
        """Return the line of a request's answer, or of its last failure."""
        self.reader.seek(self.answers[key] if key in self else self.failures[key])
        return orjson.loads(self.reader.readline())

    def add(self, outcome: dict) -> None:
        """Append what became of a request."""
        if self.fault:
            raise self.fault
        line = rest = rendered(outcome)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as fault:
            self.file.truncate(self.end)  # or the next line would follow a piece of this one
            raise self.cannot_write(fault) from None
        self.unsynced = True
        self._take(outcome, len(line))

    def sync(self) -> None:
        """Bring everything that was added to the disk."""
        os.fsync(self.file.fileno())

    def _take(self, outcome: dict, length: int) -> None:
        """Count the outcome on the next line; a failure is no answer, so that a later run asks again."""
        start, self.end, key, answer = self.end, self.end + length, bytes.fromhex(outcome["key"]), outcome["answer"]
        if key not in self.answers:  # of other requests: an earlier prompt's
            return
        self.spent = add_tokens(self.spent, outcome["spent"])
        if answer is None:
            self.failures[key] = start
            return
        self.answers[key] = start
        self.failures.pop(key, None)
        if answer["served_model"]:
            self.served_models.add(answer["served_model"])

    def _sync_in_groups(self) -> None:
        """Bring to the disk what was added since the last time, aside from the loop that asks."""
        try:
            sync_folder(self.path.parent)  # or a power cut could lose a new file as a whole
            while not self.closing.wait(SYNC_EVERY_S):
                if self.unsynced:
                    self.unsynced = False
                    os.fsync(self.file.fileno())
        except OSError as fault:
            self.fault = self.cannot_write(fault)

    def cannot_write(self, fault: OSError) -> UserError:
        """Return what to say of a full or broken disk."""
        return UserError(f"{self.path} cannot be written: {fault.strerror}. What it holds is kept: make room and run again.")


def rendered(outcome: dict) -> bytes:
    """Return the line of an outcome."""
    body = orjson.dumps(outcome)[:-1]
    return b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body))


def intact(line: bytes) -> bool:
    """Say whether a line is one of a journal, as it was written."""
    body, mark, crc = line.rpartition(b',"crc":"')
    if mark:  # no text of an answer looks so: its quotes are escaped
        return crc == b'%08x"}\n' % zlib.crc32(body)
    try:
        outcome = orjson.loads(line)
        return len(bytes.fromhex(outcome["key"])) > 0 and outcome.keys() == {"key", "answer", "reason", "raw", "spent"}
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a journal but for a torn end; raise UserError for any other damaged line.

    A kill leaves a last line without its end; a power cut may also leave NUL bytes where the last lines were to stand.
    """
    torn = 0  # number of the first line that a power cut may have left
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            ended = line.endswith(b"\n")
            whole = ended and intact(line)
            if (whole and torn) or (ended and not whole and b"\0" not in line):
                raise UserError(
                    f"{path}:{torn or number}: this line of the journal is damaged. `sed -i {torn or number}d {path}` removes it:"
                    " its request is asked, and paid, again; all other answers stay."
                )
            if whole:
                yield line
            torn = torn or (0 if whole else number)


def drop_torn_end(path: Path, end: int) -> None:
    """Cut off what follows the last whole line, and say so."""
    if (excess := path.stat().st_size - end) > 0:
        log.warning("%s: an unfinished line at the end is dropped (%d bytes): a run was cut off while it wrote", path, excess)
        os.truncate(path, end)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def peek(path: Path) -> dict[str, dict]:
    """Return the answers of a journal by key, without their texts and without locking it: another job may be writing its last line."""
    found: dict[str, dict] = {}
    if path.is_file():
        for line in whole_lines(path):
            outcome = orjson.loads(line)
            if outcome["answer"] is not None:
                found[outcome["key"]] = {key: value for key, value in outcome["answer"].items() if key != "text"}
    return found


def tokens_of(path: Path) -> dict:
    """Return the tokens that all lines of a journal spent."""
    total = add_tokens({}, None)
    for line in whole_lines(path) if path.is_file() else ():
        total = add_tokens(total, orjson.loads(line)["spent"])
    return total


def add_tokens(total: dict, usage: dict | None) -> dict:
    """Return the sum of two counts of tokens by kind; a kind that an endpoint does not count is 0.

    Of them, those under "batch" came by the Batch API, at a price of their own; the key stands only where there are some.
    """
    usage = usage or {}
    kinds = ("prompt_tokens", "completion_tokens", "cached_tokens")
    summed = {kind: (total.get(kind) or 0) + (usage.get(kind) or 0) for kind in kinds}
    if "batch" in total or "batch" in usage:
        summed["batch"] = add_tokens(total.get("batch") or {}, usage.get("batch"))
    return summed
