"""The frame of every program: arguments, settings, logging, whole outputs or none, row accounts, provenance records.

    parser = command_line(__doc__, PairSettings)
    parser.add_argument("--scores", required=True, help="…")
    with stage(parser) as run:
        scores = run.read(run.args.scores, "score")
        …
        run.account("pairs", rows_in=…, rows_out=…, dropped={"gap below min_gap": …})
        run.write(run.args.train, pairs, "pair")

Outputs are written beside their place under a temporary name and moved there together when the program has ended well;
beside each stands its provenance record, `<output>.prov.json`.
"""

import argparse
import errno
import logging
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from psychocounsel import provenance, reuse
from psychocounsel.errors import UserError, nearest
from psychocounsel.records import check_manifest, content_hash, dump_records, file_sha256, is_removed, iter_records, write_manifest

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # the user's to mend; no bug, and no traceback

log = logging.getLogger("psychocounsel")


class Settings(BaseModel):
    """The settings of a program: a typed slice of the config; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def command_line(doc: str | None, settings: type[Settings]) -> argparse.ArgumentParser:
    """Return a parser that knows --settings and shows the program's docstring and its settings in --help."""
    fields = "\n".join(
        f"  {name}: {field.description or ''}{'' if field.is_required() else f' (default {field.default!r})'}"
        for name, field in settings.model_fields.items()
    )
    parser = argparse.ArgumentParser(
        description=doc, epilog=f"settings:\n{fields}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(settings_type=settings)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["{}"],
        metavar="JSON|key=value",
        help="the settings below, as one JSON object or as key=value, the value in JSON",
    )
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING"], help="DEBUG may show texts of clients")
    return parser


def read_settings(words: list[str]) -> tuple[dict, dict | None]:
    """Return what a JSON object and key=value words say, and the job (rule and wildcards) that a rule's JSON names."""
    values: dict = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            if word.lstrip().startswith("{"):
                values.update(orjson.loads(word))
            elif equals:
                values[key] = _json_or_text(value)
            else:
                raise UserError(f"--settings {word!r}: expected a JSON object or key=value")
        except orjson.JSONDecodeError as error:
            raise UserError(f"--settings: not JSON ({error})") from None
    return {name: value for name, value in values.items() if name != "job"}, values.get("job")


def add_reuse_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument of programs that cost much (Stage.adopts)."""
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="DIR",
        help="adopt the outputs of an equal run from this folder, or keep them there (default: neither)",
    )


def parse_settings(kind: type[Settings], values: dict, where: str = "--settings") -> Settings:
    """Build settings from their values; raise UserError that names where they stand, the key and the nearest name."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors(include_url=False):
            name = ".".join(str(part) for part in fault["loc"])
            place = f"{where}: {name}" if name else where  # what concerns several keys has no name
            hint = nearest(name, list(kind.model_fields)) if fault["type"] == "extra_forbidden" else ""
            lines.append(f"{place}: {fault['msg']}.{hint}")
        raise UserError("\n".join(lines)) from None


def _json_or_text(value: str) -> object:
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value


class Stage:
    """One run of a program: what it read, what it is about to write, and its accounts."""

    def __init__(self, args: argparse.Namespace, program: str) -> None:
        self.args, self.program = args, program
        self.values, self.job = read_settings(args.settings)
        self.settings = parse_settings(args.settings_type, self.values)
        self.defaults = provenance.left_out(self.settings.model_dump(mode="json"), self.values)
        self.started = datetime.now(UTC)
        self.clock = time.perf_counter()
        self.inputs: dict[str, dict] = {}  # path -> what the records say of it
        self.outputs: dict[Path, Path] = {}  # final path -> temporary path
        self.folders: dict[Path, Path] = {}  # the same for model folders
        self.rows: dict[str, dict] = {}
        self.facts: dict[str, object] = {}
        self.templates: dict[str, str] = {}  # manifest -> sha256 of the model's chat template
        self.kept: tuple[Path, list[Path]] | None = None  # where which outputs are kept for an equal run to adopt

    def uses(self, path: Path | str) -> Path:
        """Note an input file that is not a file of records, checked against its provenance record; return its path."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if str(path) not in self.inputs:
            self.inputs[str(path)] = provenance.used(path)
        return path

    def read(self, path: Path | str, kind: str) -> list[dict]:
        """Read and note an input file of records."""
        return list(self.each(path, kind))

    def each(self, path: Path | str, kind: str) -> Iterator[dict]:
        """Note an input file of records and yield them one by one: nothing is kept of a file that is gone through once."""
        return iter_records(self.uses(path), kind)

    def model(self, manifest: Path | str) -> Path:
        """Check and note a model by its manifest; return the model's folder."""
        folder = check_manifest(self.uses(manifest))
        if template := provenance.chat_template_sha256(folder):
            self.templates[provenance.shown(Path(manifest))] = template
        return folder

    def knows(self, manifest: Path | str) -> None:
        """Note a model that may not be needed: one whose files were removed by design stands by its manifest alone."""
        if is_removed(Path(manifest)):
            self.uses(manifest)
        else:
            self.model(manifest)

    def adopts(self, inputs: list[Path | None], outputs: list[Path]) -> bool:
        """Adopt the outputs of an earlier run of the same code and settings on the same input bytes; say whether there was one.

        For programs that cost much. `inputs` holds all of them in an order that tells their roles (None for one that is not given),
        `outputs` all outputs, a model by its manifest. Where there was no such run, this one's outputs are kept for later ones.
        """
        for path in inputs:
            if path and path.name == "manifest.json":
                self.knows(path)
            elif path:
                self.uses(path)
        roles = [self.inputs[str(path)]["sha256"] if path else None for path in inputs]
        if not self.args.reuse:
            return False
        key = content_hash(provenance.identity(self.program, self.values, self.defaults, []), roles)
        self.kept = (Path(self.args.reuse) / key, outputs)
        entry = reuse.find(self.kept[0], outputs)
        if entry is None:
            return False
        if os.environ.get("RANK", "0") != "0":
            sys.exit(0)  # of the processes of a distributed training the first alone writes
        for number, path in enumerate(outputs):
            place = self.output_model(path) if path.name == reuse.MODEL else self.output(path)
            reuse.adopt(self.kept[0], number, path, place)
        self.rows, self.facts = entry["rows"], entry["facts"] | {"adopted": True}
        log.info("an equal run has been here before: its outputs are adopted from %s", self.kept[0])
        return True

    def output(self, path: Path | str) -> Path:
        """Return the temporary path under which to write an output that is moved to `path` at the end."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.outputs[path] = _temporary(path)
        return self.outputs[path]

    def write(self, path: Path | str, rows: Iterable[dict], kind: str, sort_by: str | Callable | None = None) -> int:
        """Write an output of records, sorted by a key; return their number."""
        key = (lambda row: row[sort_by]) if isinstance(sort_by, str) else sort_by
        return dump_records(self.output(path), sorted(rows, key=key) if key else rows, kind)

    def write_json(self, path: Path | str, value: object) -> None:
        """Write an output of one JSON value, indented, keys in the order given."""
        self.output(path).write_bytes(
            orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        )

    def write_text(self, path: Path | str, text: str) -> None:
        """Write an output of text."""
        self.output(path).write_text(text, encoding="utf-8")

    def output_model(self, manifest: Path | str) -> Path:
        """Return a temporary folder to save a model in; it is moved whole to the folder of `manifest` at the end."""
        folder = Path(manifest).parent
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(folder)
        temporary.mkdir()
        self.folders[folder] = temporary
        return temporary

    def account(self, unit: str, rows_in: int, rows_out: int, dropped: dict[str, int] | None = None) -> None:
        """Count rows in, out and dropped by reason; raise where they do not add up: nothing is lost silently."""
        dropped = {reason: count for reason, count in sorted((dropped or {}).items()) if count}
        self.rows[unit] = {"in": rows_in, "out": rows_out, "dropped": dropped}
        if rows_in != rows_out + sum(dropped.values()):
            raise AssertionError(f"{self.program}: {unit} do not add up: {self.rows[unit]}")
        reasons = "".join(f"; {count} dropped: {reason}" for reason, count in dropped.items())
        log.info("%s: %d in, %d out%s", unit, rows_in, rows_out, reasons)

    def note(self, **facts: object) -> None:
        """Add facts of this run (tokens, cost, device, …) to the provenance records."""
        self.facts.update(facts)

    def finish(self) -> None:
        """Write provenance records and move every output into place."""
        finals: list[tuple[Path, Path]] = []
        for folder, temporary in self.folders.items():
            manifest = temporary / "manifest.json"
            finals.append((folder / "manifest.json", manifest if is_removed(manifest) else write_manifest(temporary)))
        finals += list(self.outputs.items())
        identity = provenance.identity(self.program, self.values, self.defaults, list(self.inputs.values()))
        run = provenance.surroundings(self.started) | self._sources_of_answers() | {"facts": self.facts}
        records = {final: self._record(final, temporary, identity, run) for final, temporary in finals}
        for folder, temporary in self.folders.items():
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        for final, temporary in self.outputs.items():
            os.replace(temporary, final)
        for final, record in records.items():
            part = _temporary(provenance.record_path(final))
            part.write_bytes(provenance.rendered(record))
            os.replace(part, provenance.record_path(final))
        if self.kept and "adopted" not in self.facts:
            reuse.keep(*self.kept, self.rows, self.facts)
        log.info("%s: done in %.1f s", self.program, time.perf_counter() - self.clock)

    def _record(self, final: Path, temporary: Path, identity: dict, run: dict) -> dict:
        """Return the provenance record of one output."""
        output = {"path": provenance.shown(final), "sha256": file_sha256(temporary), "bytes": temporary.stat().st_size}
        return provenance.sealed(
            {
                "format": provenance.FORMAT,
                "output": output,
                "job": self.job,
                "rows": self.rows,
                "identity": identity,
                "identity_sha256": content_hash(identity),
                "run": run,
            }
        )

    def _sources_of_answers(self) -> dict:
        """Return which models and prompts took part, for the records."""
        model = self.values.get("model")
        open_name = {"unpinned": True} if model and model.get("unpinned") else {}
        return {
            "model": {key: model.get(key) for key in ("name", "id", "revision")} | open_name if model else None,
            "chat_templates": self.templates,
            "prompts": provenance.prompts(self.values),
        }

    def abandon(self) -> None:
        """Remove what was written under temporary names."""
        for temporary in self.outputs.values():
            temporary.unlink(missing_ok=True)
        for temporary in self.folders.values():
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def stage(parser: argparse.ArgumentParser) -> Iterator[Stage]:
    """Run a program: parse its arguments, hand out a Stage, finish it or clean up; user errors end as one message."""
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(args.log_level)
    # transformers imports DeepSpeed, which tells of a CPU on standard output, in the middle of Snakemake's own lines.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator" not in record.getMessage())
    run: Stage | None = None
    try:
        run = Stage(args, Path(sys.argv[0]).stem)
        yield run
        run.finish()
    except BaseException as error:
        if run:
            run.abandon()
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        if run and isinstance(error, OSError) and error.errno in DISK_FAULTS:
            place = error.filename or ", ".join(sorted({str(path.parent) for path in (*run.outputs, *run.folders)}))
            print(f"error: {place}: {error.strerror}; mend that and run it again: what is finished stays", file=sys.stderr)
            sys.exit(1)
        raise


def dropped_by_reason(dropped: Iterable[dict]) -> dict[str, int]:
    """Count side-file rows by their reason."""
    return Counter(row["reason"] for row in dropped)


def _temporary(path: Path) -> Path:
    """Return a name beside a path that no other job uses, on this machine or another: two writers never meet in one file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
