"""The files of a run: what stands in each, what it was made from, and single records in it, with file and line.

Records are found by an index of where lines begin, so that of a long file only what is asked for is kept in memory.
"""

import csv
import gzip
import io
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import orjson

from psychocounsel.adapters import decode
from psychocounsel.errors import UserError
from psychocounsel.provenance import read_record, record_path
from psychocounsel.records import iter_json_lines
from psychocounsel.workflow import Workflow

KINDS = [  # files of a run -> what stands in them; the first that fits
    ("01_sources/*.dropped.jsonl", "dropped_row"),
    ("01_sources/*.jsonl", "source_row"),
    ("02_speeches/dropped.jsonl", "dropped_row"),
    ("02_speeches/unique.jsonl", "unique_speech"),
    ("*speeches.jsonl", "speech"),
    ("03_responses/assignments/*", "assignment"),
    ("03_responses/*.failed.jsonl", "failure"),
    ("03_responses/*.jsonl", "response"),
    ("04_ratings/answers.jsonl", "rating_answer"),
    ("04_ratings/again/*.answers.jsonl", "rating_answer"),
    ("04_ratings/ratings.jsonl", "rating"),
    ("04_ratings/again/*.jsonl", "rating"),
    ("04_ratings/judge.json", "judge"),
    ("04_ratings/scores.dropped.jsonl", "unscored"),
    ("04_ratings/scores.jsonl", "score"),
    ("05_pairs/contamination.json", "contamination"),
    ("05_pairs/*.jsonl", "pair"),
    ("06_reward_models/*predictions.jsonl", "prediction"),
    ("06_reward_models/*rankings.jsonl", "ranking_answer"),
    ("06_reward_models/*/metrics.json", "metrics"),
    ("06_reward_models/*/benchmark.json", "metrics"),
    ("08_answers/*.assessment.json", "assessment"),
    ("08_answers/*.jsonl", "response"),
    ("09_judgements/*.answers.jsonl", "judgement_answer"),
    ("09_judgements/*.jsonl", "judgement"),
    ("09_judgements/*.win_rates.json", "win_rates"),
    ("09_judgements/differences.json", "differences"),
    ("09_judgements/*agreement.json", "agreement"),
]


class RunFiles:
    """What a run's files hold and what they were made from; reads files as they are asked for."""

    def __init__(self, flow: Workflow) -> None:
        self.flow = flow
        self.files: dict[str, list[tuple[int, dict]]] = {}
        self.indexes: dict[tuple[str, str], dict[str, list[tuple[int, int]]]] = {}  # (file, field) -> value -> line, byte of its start
        self.above: dict[tuple[str, str], list[str]] = {}  # (file, kind) -> its inputs of this kind

    def kind(self, path: str) -> str | None:
        """Return what stands in a file of the run."""
        if path.startswith(self.flow.work("sources/")):
            return "raw"
        inside = path.removeprefix(self.flow.results(""))
        return next((kind for pattern, kind in KINDS if inside != path and fnmatch(inside, pattern)), None)

    def record(self, path: str) -> dict:
        """Return a file's provenance record."""
        try:
            return read_record(record_path(Path(path)))
        except FileNotFoundError:
            raise UserError(f"{path}: its provenance record is not there; `audit.py verify` tells what else is wrong") from None

    def inputs(self, path: str, kind: str) -> list[str]:
        """Return the inputs of one kind of a file or, where it has none, of its inputs, and so on upwards."""
        if (path, kind) in self.above:
            return self.above[path, kind]
        level, seen, found = [path], set(), []
        while level and not found:
            above = dict.fromkeys(item["path"] for file in level for item in self.record(file)["identity"]["inputs"])
            found = [file for file in above if self.kind(file) == kind]
            seen.update(level)
            level = [file for file in above if file not in seen and self.kind(file) not in (None, "raw")]
        self.above[path, kind] = found
        return found

    def rows(self, path: str) -> list[tuple[int, dict]]:
        """Return (line, record) of a file of records that is read whole, and kept."""
        if path not in self.files:
            self.files[path] = list(lines(path))
        return self.files[path]

    def find(self, paths: list[str], key: str, value: str) -> list[tuple[str, int, dict]]:
        """Return (file, line, record) wherever a field has a value; the files' other records are not kept in memory."""
        found = []
        for path in paths:
            if (path, key) not in self.indexes:
                self.indexes[path, key] = self.index(path, key)
            for line, start in self.indexes[path, key].get(str(value), []):
                with open(path, "rb") as file:
                    file.seek(start)
                    found.append((path, line, orjson.loads(file.readline())))
        return found

    def index(self, path: str, key: str) -> dict[str, list[tuple[int, int]]]:
        """Return value of a field -> the lines that have it, each with the byte at which it begins."""
        found = defaultdict(list)
        starts = line_starts(path)
        for line, row in lines(path):
            found[str(row[key])].append((line, starts[line - 1]))
        return found

    @cached_property
    def journals(self) -> dict[str, list[tuple[str, int, int]]]:
        """Where answered requests stand in the journals, by their keys: file, line, and byte at which the line begins."""
        found = defaultdict(list)
        for path in sorted(Path(self.flow.work("journal")).rglob("*.jsonl")):
            with open(path, "rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    if line.startswith(b'{"key":"') and b'"answer":null' not in line[:100]:
                        found[line[8:72].decode("ascii", "replace")].append((path.as_posix(), number, start))
                    start += len(line)
        return found


def lines(path: str) -> Iterator[tuple[int, dict]]:
    """Yield (line, record) of a file of records."""
    try:
        yield from iter_json_lines(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though a record names it; `audit.py verify` tells what else is wrong") from None


def line_starts(path: str) -> list[int]:
    """Return the byte at which each line of a file begins, and its size; nothing of a file that is not there."""
    if not Path(path).is_file():
        return []
    with open(path, "rb") as file:
        return list(accumulate(map(len, file), initial=0))


def raw_lines(path: Path) -> Iterator[int]:
    """Yield the line on which each data row of a raw CSV or JSON Lines file begins; nothing for other formats."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    if raw.startswith(b"PAR1"):
        return
    text = decode(path, raw)
    if text.lstrip().startswith("{"):
        yield from (number for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    elif not text.lstrip().startswith("["):
        reader, start = csv.reader(io.StringIO(text, newline=""), strict=True), 1
        header = True
        for row in reader:
            if row and not header:
                yield start
            header = header and not row
            start = reader.line_num + 1
