"""The journal of a job's answers: a JSON Lines file beside its outputs, appended as each answer comes.

Snakemake deletes the outputs of a failed job; the journal lies elsewhere, so that a crash, a kill or an edit of another
stage never costs an answer twice. A line holds what became of one request, under its request_key:

    {"key": …, "answer": {"text": …, "finish_reason": …, "usage": …, "served_model": …} or null,
     "reason": why there is no answer, or null, "raw": [texts of the unusable attempts], "spent": tokens of all attempts}
"""

import fcntl
import os
import time
from pathlib import Path
from typing import BinaryIO

import orjson

from psychocounsel.errors import UserError
from psychocounsel.records import iter_json_lines

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text

SYNC_EVERY_S = 2.0  # every line reaches the operating system at once, the disk after at most so long: a power cut may cost these


class Journal:
    """An open, locked journal: `answers` holds the answered requests by key, `add` appends one more outcome."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, dict] = {}  # request_key -> outcome
        self.spent: dict[str, dict[str, int]] = {}  # request_key -> tokens of all attempts, those of earlier failures too
        self.synced = time.monotonic()

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO = open(self.path, "ab")  # noqa: SIM115 (open as long as the journal)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"{self.path}: another job writes this journal; wait for it or stop it first") from None
        drop_torn_line(self.path)
        for number, outcome in iter_json_lines(self.path):
            self._take(journalled(self.path, number, outcome))
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self.file.fileno())
        self.file.close()  # releases the lock

    def add(self, outcome: dict) -> None:
        """Append what became of a request."""
        self.file.write(orjson.dumps(outcome, option=orjson.OPT_APPEND_NEWLINE))
        self.file.flush()
        if time.monotonic() - self.synced > SYNC_EVERY_S:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()
        self._take(outcome)

    def _take(self, outcome: dict) -> None:
        """Count an outcome; a failure is not kept among the answers, so that a later run asks again."""
        if outcome["answer"] is not None:
            self.answers[outcome["key"]] = outcome
        self.spent[outcome["key"]] = add_tokens(self.spent.get(outcome["key"], {}), outcome["spent"])


def peek(path: Path) -> dict[str, dict]:
    """Return the answers of a journal by key, without their texts and without locking it: another job may be writing its last line."""
    found: dict[str, dict] = {}
    if path.is_file():
        with open(path, "rb") as file:
            for number, line in enumerate((line for line in file if line.endswith(b"\n")), start=1):
                try:
                    outcome = orjson.loads(line)
                except orjson.JSONDecodeError:
                    outcome = {}
                if journalled(path, number, outcome)["answer"] is not None:
                    found[outcome["key"]] = {key: value for key, value in outcome["answer"].items() if key != "text"}
    return found


def journalled(path: Path, number: int, outcome: dict) -> dict:
    """Return a line of a journal; raise UserError for one that is none."""
    if not {"key", "answer", "reason", "raw", "spent"} <= set(outcome):
        raise UserError(f"{path}:{number}: not a line of a journal; move the file away to ask everything again")
    return outcome


def add_tokens(total: dict, usage: dict | None) -> dict[str, int]:
    """Return the sum of two counts of tokens by kind; a kind that an endpoint does not count is 0."""
    kinds = ("prompt_tokens", "completion_tokens", "cached_tokens")
    return {kind: (total.get(kind) or 0) + ((usage or {}).get(kind) or 0) for kind in kinds}


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line end: a line that a kill left unfinished."""
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:  # backwards in blocks: a journal may have gigabytes
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
