"""Provenance records: what determines an output (its identity), how it was made, and checksums that a later audit recomputes.

Beside every output X stands X.prov.json (config/schemas/provenance.schema.json). Its `identity` holds the program, its code, its
settings and its inputs: each input's sha256 and the hash of the identity in *its* record, so that the records form a hash chain
back to the sources. Times, hosts and costs stand under `run`: an identical rerun changes only them.
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import orjson

from psychocounsel.errors import UserError
from psychocounsel.fingerprint import code_modules
from psychocounsel.records import canonical_json, content_hash, file_sha256, validator

FORMAT = 2
CODE_VERSION = 2  # counts in code fingerprints instead of this module's text; raise it with FORMAT: all records are then written anew

SUFFIX = ".prov.json"
RESULTS = "results"  # what lies here was made by a rule: without a record it is not what it seems
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "accelerate", "aiohttp", "datasets", "deepspeed", "huggingface_hub", "linkify-it-py", "numpy", "openai", "peft",
    "phonenumbers", "pydantic", "rensa", "safetensors", "scikit-learn", "snakemake", "tokenizers", "torch", "transformers", "trl", "vllm",
)  # fmt: skip


def record_path(output: Path) -> Path:
    """Return where the record of an output stands."""
    return output.with_name(output.name + SUFFIX)


def read_record(path: Path) -> dict:
    """Return a record whose bytes, schema and checksums agree; raise UserError that says what does not."""
    content = path.read_bytes()
    try:
        record = validator("provenance")(orjson.loads(content))
    except ValueError as error:  # no JSON, or not a record: fastjsonschema's exception is one too
        raise UserError(f"{path}: not a provenance record of format {FORMAT} ({error})") from None
    if record["record_sha256"] != checksum(record) or rendered(record) != content:
        raise UserError(f"{path}: altered since it was written: its own checksum does not fit")
    if record["identity_sha256"] != content_hash(record["identity"]):
        raise UserError(f"{path}: its identity does not have the hash that it names")
    return record


def sealed(record: dict) -> dict:
    """Return a record with its own checksum, checked against the schema."""
    return validator("provenance")(record | {"record_sha256": checksum(record)})


def checksum(record: dict) -> str:
    """Return the SHA-256 of a record without its own checksum."""
    return content_hash({key: value for key, value in record.items() if key != "record_sha256"})


def rendered(record: dict) -> bytes:
    """Return a record's bytes; there is one way to write it, so that every byte of the file counts."""
    return orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def used(path: Path) -> dict:
    """Return what a record says of an input: path, sha256, and the identity of its own record (None: nothing of ours made it).

    Raises UserError where the file is not the one that its record was written for, or where a result has none.
    """
    sha256, record = file_sha256(path), record_path(path)
    again = f"To make it again: snakemake --forcerun {shown(path)} (with your profile and config file)."
    if not record.is_file():
        if shown(path).split("/")[0] == RESULTS:
            raise UserError(f"{path}: a result without its provenance record {record.name}. {again}")
        return {"path": shown(path), "sha256": sha256, "identity_sha256": None}
    made = read_record(record)
    if made["output"]["sha256"] != sha256:
        raise UserError(f"{path}: altered by hand, or damaged, since it was made: its sha256 is not that of its record. {again}")
    return {"path": shown(path), "sha256": sha256, "identity_sha256": made["identity_sha256"]}


def identity(program: str, settings: dict, defaults: dict, inputs: list[dict]) -> dict:
    """Return what determines the bytes of a program's outputs: its settings as they were given, and what it took for the others."""
    modules = code_modules(program)
    return {
        "program": program,
        "code": content_hash(modules, digits=16),
        "modules": modules,
        "settings": settings,
        "defaults": defaults,
        "inputs": sorted(inputs, key=lambda item: item["path"]),
    }


def left_out(resolved: dict, given: dict) -> dict:
    """Return the parts of resolved settings that were not given, at any depth."""
    found = {}
    for name, value in resolved.items():
        if name not in given:
            found[name] = value
        elif isinstance(value, dict) and isinstance(given[name], dict) and (inner := left_out(value, given[name])):
            found[name] = inner
    return found


def surroundings(started: datetime) -> dict:
    """Return when, where and with what a program ran; no part of the identity."""
    ended = datetime.now(UTC)
    commit, dirty = git_state()
    lock = ROOT / "requirements" / "pipeline.lock"
    return {
        "started": started.isoformat(timespec="seconds"),
        "ended": ended.isoformat(timespec="seconds"),
        "seconds": round((ended - started).total_seconds(), 1),
        "host": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus()},
        "slurm": {key: os.environ.get(f"SLURM_{key.upper()}") for key in ("job_id", "job_partition", "restart_count", "cluster_name")},
        "python": platform.python_version(),
        "packages": {package: version for package in PACKAGES if (version := installed(package))},
        "lock_sha256": file_sha256(lock) if lock.is_file() else None,
        "git": {"commit": commit, "dirty": dirty},
    }


def gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, where torch is loaded; else nothing is known or used of them."""
    import sys

    torch = sys.modules.get("torch")
    return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch and torch.cuda.is_available() else []


def prompts(settings: dict) -> dict[str, str]:
    """Return the SHA-256 of every prompt template among the settings."""
    texts = {name: value for name, value in settings.items() if name.endswith("prompt") and isinstance(value, str)}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def chat_template_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the chat template in a model's folder, or None where it has none."""
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.is_file():
        text = alone.read_text(encoding="utf-8")
    else:
        text = orjson.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    return hashlib.sha256(canonical_json(text).encode()).hexdigest() if text else None


def shown(path: Path) -> str:
    """A path as records show it: relative to the project where it lies below it, so that a run can be moved; else its name."""
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(Path.cwd()).as_posix() if absolute.is_relative_to(Path.cwd()) else absolute.name


def installed(package: str) -> str | None:
    """Return a package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> tuple[str | None, bool | None]:
    """The commit that is checked out and whether the tree differs from it; (None, None) outside git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
