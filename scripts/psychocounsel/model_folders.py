"""Folders of finished models: the same files in a second place without a second copy."""

import os
import shutil
from pathlib import Path

from psychocounsel.records import MARK, REMOVED

CODE_VERSION = 1  # copies bytes and changes none


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model, without its manifest and what lies beside that."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("manifest.json"))


def link_model(source: Path, target: Path) -> None:
    """Give a model's files a second place by hard links, or by copies where the file system wants that; the manifest stays behind."""
    for file in model_files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        link_file(file, place)


def remove_files(manifest: Path) -> None:
    """Remove a model's files by design: a mark beside its manifest first, so that a kill in between leaves no damage."""
    mark = manifest.with_name(REMOVED)
    mark.write_bytes(MARK)
    for path in sorted(manifest.parent.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir():
            path.rmdir()
        elif not path.name.startswith(manifest.name):
            path.unlink()


def link_file(source: Path, target: Path) -> None:
    """Give a file a second place by a hard link, or by a copy where the file system wants that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
