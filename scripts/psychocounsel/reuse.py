"""Finished outputs kept by what determined their bytes, so that a costly program that would make them again adopts them.

Snakemake reruns everything below a stage that reran, even where that stage wrote the same bytes. An entry is a folder named by
the hash of code, settings and input bytes: the outputs 0, 1, … as hard links (a model is a folder), and entry.json, which holds
their sha256. A link shares its bytes with the result: an edit in place reaches both, so an entry is checked before it is used.
"""

import os
import shutil
import uuid
from pathlib import Path

import orjson

from psychocounsel.errors import UserError
from psychocounsel.model_folders import link_file, link_model
from psychocounsel.records import REMOVED, check_manifest, file_sha256, is_removed

CODE_VERSION = 1  # copies bytes and changes none

ENTRY = "entry.json"
MODEL = "manifest.json"


def keep(folder: Path, outputs: list[Path], rows: dict, facts: dict) -> None:
    """Keep outputs with what their records say of rows and facts; a model is named by its manifest."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    temporary.mkdir(parents=True)
    for number, output in enumerate(outputs):
        if output.name == MODEL:
            link_model(output.parent, temporary / str(number))
            link_file(output, temporary / str(number) / MODEL)
        else:
            link_file(output, temporary / str(number))
    entry = {"outputs": list(map(file_sha256, outputs)), "rows": rows, "facts": facts}
    (temporary / ENTRY).write_bytes(orjson.dumps(entry))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(temporary, folder)
    except OSError:  # an equal run that ended at the same time was first
        shutil.rmtree(temporary)


def find(folder: Path, outputs: list[Path]) -> dict | None:
    """Return a whole entry, or None where there is none, or a file in it is not what it was.

    A model whose files were removed by design is found only for a place at which they were removed too: there nothing needs them.
    """
    try:
        entry = orjson.loads((folder / ENTRY).read_bytes())
        if len(entry["outputs"]) != len(outputs):
            return None
        for number, sha256 in enumerate(entry["outputs"]):
            kept = folder / str(number)
            if file_sha256(kept / MODEL if kept.is_dir() else kept) != sha256:
                return None
            if kept.is_dir() and not (is_removed(kept / MODEL) and is_removed(outputs[number])):
                check_manifest(kept / MODEL)
    except (FileNotFoundError, UserError, ValueError):
        return None
    return entry


def adopt(folder: Path, number: int, output: Path, place: Path) -> None:
    """Link one kept output to a place from which it is moved to `output`: of a model the files without the manifest, or of one that was
    removed here too the manifest and its mark.

    Raises UserError where another run removes it meanwhile (the mark comes first): no part of a model is taken for the whole.
    """
    kept = folder / str(number)
    manifest = kept / MODEL
    if is_removed(manifest) and is_removed(output):
        link_file(manifest, place / MODEL)
        link_file(kept / REMOVED, place / REMOVED)
        return
    try:
        (link_model if kept.is_dir() else link_file)(kept, place)
        gone = is_removed(manifest)
    except FileNotFoundError:
        gone = True
    if gone:
        raise UserError(f"{kept}: another run removed it while it was being adopted; start the program again")
