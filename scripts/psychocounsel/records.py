"""Records: JSON Lines, UTF-8, one record a line, validated against config/schemas when read and when written."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import fastjsonschema
import orjson

from psychocounsel.errors import UserError

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text; raise it when a file format changes

REMOVED = "manifest.json.removed"  # beside the manifest of a model whose files were removed by design (remove_checkpoints.py)
MARK = b"removed by design: no stage needed this model any more\n"  # all that stands in it
SCHEMAS = Path(__file__).resolve().parent.parent.parent / "config" / "schemas"


@cache
def validator(kind: str) -> Callable[[dict], dict]:
    """Return the compiled validator of a record type, e.g. "speech" (config/schemas/speech.schema.json)."""
    return fastjsonschema.compile(orjson.loads((SCHEMAS / f"{kind}.schema.json").read_bytes()), use_default=False)


def iter_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a JSON Lines file; raise UserError with file and line where a line is broken."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a record must be a JSON object, not {type(row).__name__}")
            yield number, row


def read_records(path: Path | str, kind: str) -> list[dict]:
    """Read a file of records of one kind; raise UserError with file and line for the first that does not fit."""
    return list(iter_records(path, kind))


def iter_records(path: Path | str, kind: str) -> Iterator[dict]:
    """Yield the records of a file one by one, for a file that is too long to keep; raise UserError as read_records does."""
    check = validator(kind)
    try:
        for number, row in iter_json_lines(Path(path)):
            try:
                yield check(row)
            except fastjsonschema.JsonSchemaValueException as error:
                raise UserError(f"{path}:{number}: not a {kind} record: {complaint(error)}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def read_result(path: Path, kind: str) -> dict:
    """Read a JSON result (metrics, win_rates) and check it against its schema."""
    try:
        return validator(kind)(orjson.loads(path.read_bytes()))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    except fastjsonschema.JsonSchemaValueException as error:
        raise UserError(f"{path}: not a {kind} result: {complaint(error)}") from None


def dump_records(path: Path, rows: Iterable[dict], kind: str) -> int:
    """Write records to `path` (not atomic: the stage moves finished files into place); return their number."""
    check, count = validator(kind), 0
    with open(path, "wb") as file:
        for row in rows:
            try:
                file.write(orjson.dumps(check(row), option=orjson.OPT_APPEND_NEWLINE))
            except fastjsonschema.JsonSchemaValueException as error:
                raise ValueError(f"a {kind} record does not fit its schema: {complaint(error)}") from None
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def complaint(error: fastjsonschema.JsonSchemaValueException) -> str:
    """Say what is wrong without quoting the value: it may be a client's words."""
    return error.message.removeprefix("data").lstrip(". ") if error.rule != "additionalProperties" else error.message


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()


def content_hash(*parts: object, digits: int = 64) -> str:
    """Return the first hex digits of the SHA-256 of the parts' canonical JSON."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:digits]


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the process is killed."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_manifest(folder: Path) -> Path:
    """Write folder/manifest.json: the sha256 of every file of a model, which stands for the folder in rules."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    for file in files:
        file.chmod(0o644)  # safetensors writes 0600, which colleagues on a cluster could not read
    manifest = {"files": {p.relative_to(folder).as_posix(): {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in files}}
    path = folder / "manifest.json"
    path.write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
    return path


def is_removed(manifest: Path) -> bool:
    """Whether a model's files were removed by design and its manifest alone stays."""
    return manifest.with_name(REMOVED).is_file()


def refuse_removed(manifest: Path) -> None:
    """Raise UserError for a model whose files were removed by design."""
    if is_removed(manifest):
        policy = manifest.parents[3]  # <policy>/iteration-1/checkpoints/2/manifest.json
        raise UserError(
            f"{manifest}: the model's files were removed by design, when no stage needed them any more (docs/disk.md). To train it again:"
            f" rm -r {policy}/iteration-*/checkpoints and then snakemake --forcerun {policy}/iteration-1/checkpoints.json (with your"
            " profile and config file). `keep_checkpoints: true` in the policy keeps them."
        )


def check_manifest(manifest: Path | str) -> Path:
    """Return the folder that a manifest stands for; raise UserError where a file is missing, added or altered."""
    manifest = Path(manifest)
    refuse_removed(manifest)
    try:
        recorded = orjson.loads(manifest.read_bytes())["files"]
    except FileNotFoundError:
        raise UserError(f"{manifest}: no such model; a model is named by the manifest.json in its folder") from None
    folder = manifest.parent
    lying = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith("manifest.json")}
    if lying != set(recorded):
        raise UserError(f"{manifest}: the folder's files differ from the manifest: {sorted(lying ^ set(recorded))}")
    for name, facts in recorded.items():
        if (folder / name).stat().st_size != facts["bytes"] or file_sha256(folder / name) != facts["sha256"]:
            raise UserError(f"{folder / name}: altered since its manifest was written; run the rule that made it again")
    return folder
