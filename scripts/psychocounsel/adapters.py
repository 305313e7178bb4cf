"""Raw files of client speeches, recorded answers and preference data: one reader of tables, one adapter a source of speeches.

An adapter says in which columns a source keeps a speech, its topic and its own id; sources.yaml may name other columns.
A table's format is told by its first bytes, not by its name: CSV (parted by commas, semicolons or tabs), JSON (a list of
objects), JSON Lines (each may be gzipped) or Parquet.
"""

import csv
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from psychocounsel.errors import UserError, nearest

csv.field_size_limit(sys.maxsize)  # counsel-chat has an answer of 223,973 characters; the default limit is 131,072


class Columns(BaseModel):
    """Which columns of a table hold what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | list[str]  # several columns: each holds a speech of its own
    topic: str | None = None
    key: str | None = None  # the source's own id of a row


def label(cell: object) -> str | None:
    """Return a topic or key as text; None where the cell is empty."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return str(cell).encode(errors="replace").decode().strip() or None  # JSON can hold half of a surrogate pair, UTF-8 cannot


def first_label(cell: object) -> str | None:
    """Return the first of several topics that are parted by commas."""
    return label((label(cell) or "").split(",")[0])


@dataclass(frozen=True)
class Adapter:
    """How a source keeps its speeches; columns None where they have not been seen, or are the user's to name."""

    columns: Columns | None = None
    pick: Callable[[object], object] = lambda cell: cell  # from a cell to the text
    topic: Callable[[object], str | None] = label  # from a cell to the topic


def first_turn(turns: object) -> object:
    """Return the first of a list of turns."""
    return turns[0] if isinstance(turns, list) and turns else None


def first_choice(choices: object) -> object:
    """Return the first turn of the first of a list of choices."""
    choice = first_turn(choices)
    return first_turn(choice.get("turns")) if isinstance(choice, dict) else None


SPEECHES = {
    "counsel_chat": Adapter(Columns(text="questionText", topic="topic", key="questionID")),  # several answers, so rows, a question
    "counselchat_data": Adapter(Columns(text="questionText", topic="topics", key="questionID"), topic=first_label),
    "mentalagora": Adapter(),
    "therapistqa": Adapter(Columns(text="Patient Question", key="Id_Number")),
    "psych8k": Adapter(Columns(text="input")),  # its `instruction` is the same request in every row
    "amod_counsel": Adapter(Columns(text="Context")),
    "mentalchat16k": Adapter(Columns(text="input")),
    "phi2mental": Adapter(),
    "counselling_bench": Adapter(Columns(text="turns", key="question_id"), first_turn),
    "generic": Adapter(),
}


@dataclass(frozen=True)
class Speech:
    """A cell of a source that should hold a client's words."""

    row: int  # 1 is the first data row
    key: str | None
    topic: str | None
    text: object  # as the file has it


def read_speeches(path: Path, adapter: str, columns: Columns | None = None) -> Iterator[Speech]:
    """Yield what a source's file holds in its columns of speeches, in the file's order."""
    if adapter not in SPEECHES:
        raise UserError(f"adapter: no adapter of speeches {adapter!r}.{nearest(adapter, list(SPEECHES))} Known: {', '.join(SPEECHES)}.")
    read, rows = SPEECHES[adapter], read_table(path)
    columns = columns or read.columns
    if columns is None:
        raise UserError(
            f"{path}: the adapter {adapter} needs the names of the columns: give `columns: {{text: …}}` of the source in sources.yaml"
            f" (topic and key, where there are such). The file has: {', '.join(column_names(rows))}."
        )
    texts = [columns.text] if isinstance(columns.text, str) else columns.text
    require_columns(path, rows, [name for name in (*texts, columns.topic, columns.key) if name])
    for number, row in enumerate(rows, start=1):
        for text in texts:
            yield Speech(number, label(row.get(columns.key)), read.topic(row.get(columns.topic)), read.pick(row.get(text)))


def answers_counselling_bench(path: Path, columns: Columns | None = None) -> dict[str, str]:
    """Return the answers of one model of counselling-bench: the question's id -> the first turn of the first choice."""
    columns = columns or Columns(text="choices", key="question_id")
    rows = read_table(path)
    require_columns(path, rows, [columns.key, columns.text])
    answers: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        key, text = label(row.get(columns.key)), first_choice(row.get(columns.text))
        if key is None or text_fault(text):
            raise UserError(f"{path}: row {number} holds no {columns.key} or no text in {columns.text}[0].turns[0]")
        if key in answers:
            raise UserError(f"{path}: row {number}: a second answer to question {key}; keep one")
        answers[key] = text
    return answers


ANSWERS = {"answers_counselling_bench": answers_counselling_bench}


def read_answers(adapter: str, path: Path, columns: dict) -> dict[str, str]:
    """Return one model's recorded answers by the key that the speeches' source gives its rows."""
    if adapter not in ANSWERS:
        raise UserError(f"adapter: no adapter of answers {adapter!r}.{nearest(adapter, list(ANSWERS))} Known: {', '.join(ANSWERS)}.")
    return ANSWERS[adapter](path, Columns.model_validate(columns) if columns else None)


def text_fault(cell: object) -> tuple[str, str | None] | None:
    """Return why a cell holds no text, as (reason, detail), or None where it does."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip()):
        return "empty", None
    if not isinstance(cell, str):
        return "not a text", type(cell).__name__
    if any("\ud800" <= letter <= "\udfff" for letter in cell):
        return "not a text", "half of a surrogate pair"  # JSON can hold one, UTF-8 cannot
    return None


def read_table(path: Path) -> list[dict]:
    """Return the data rows of a CSV, JSON, JSON Lines or Parquet file; raise UserError that says where it is broken."""
    raw = path.read_bytes()
    if raw.startswith(b"\x1f\x8b"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: a broken gzip file ({error}); fetch it again") from None
    if raw.startswith(b"PAR1"):
        return parquet_rows(path)
    if raw.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: a zip archive, as Excel's files are; unpack it, or save the table as CSV (UTF-8)")
    text = decode(path, raw)
    opening = text.lstrip()[:1]
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise UserError(f"{path}: a web page, not a table: a page to sign in, or of an error, was saved in place of the file")
    rows = json_rows(path, text) if opening == "[" else json_lines(path, text) if opening == "{" else csv_rows(path, text)
    if not rows:
        raise UserError(f"{path}: no data rows")
    return rows


def decode(path: Path, raw: bytes) -> str:
    """Decode UTF-8, with or without a byte-order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {error.start} of the file is 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None


def csv_rows(path: Path, text: str) -> list[dict]:
    """Read CSV with a header, whose fields are parted as those of the header are."""
    header = re.sub('"[^"]*"', "", re.match(r"[^\r\n]*", text).group())
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=max(",;\t", key=header.count))
    rows = []
    try:
        if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]:
            raise UserError(f"{path}: several columns are named {twice[0]!r}; rename all but one")
        for row in reader:
            if None in row or None in row.values():
                fields = len(reader.fieldnames)
                raise UserError(
                    f"{path}:{reader.line_num}: this row has not as many fields as the header ({fields}); look for a stray quote"
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num + 1}: broken CSV in the row that begins here ({error})") from None
    return rows


def json_rows(path: Path, text: str) -> list[dict]:
    """Read a JSON list of objects."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}, column {error.colno})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number} of the list is no object but {type(row).__name__}")
    return rows


def json_lines(path: Path, text: str) -> list[dict]:
    """Read JSON Lines by the standard library's reader, which takes the NaN that pandas writes."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not a line of JSON ({error.msg}, column {error.colno})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a row must be a JSON object, not {type(row).__name__}")
            rows.append(row)
    return rows


def parquet_rows(path: Path) -> list[dict]:
    """Read Parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: broken Parquet ({error}); fetch it again") from None


def column_names(rows: list[dict]) -> list[str]:
    """Return the names of all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def require_columns(path: Path, rows: list[dict], names: list[str]) -> None:
    """Raise UserError where a table lacks a column: what is missing, what is there, what is near."""
    found = column_names(rows)
    missing = [f"no column {name!r}.{nearest(name, found)}" for name in names if name not in found]
    if missing:
        raise UserError(
            f"{path}: {' '.join(missing)} The file has: {', '.join(map(repr, found))}. Name the columns in the source's `columns`."
        )
