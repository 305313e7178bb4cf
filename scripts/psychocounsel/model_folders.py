"""Folders of finished models: the same files in a second place without a second copy."""

import os
import shutil
from pathlib import Path

CODE_VERSION = 1  # copies bytes and changes none


def link_model(source: Path, target: Path) -> None:
    """Give a model's files a second place by hard links, or by copies where the file system wants that; the manifest stays behind."""
    for file in sorted(p for p in source.rglob("*") if p.is_file() and not p.name.startswith("manifest.json")):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        link_file(file, place)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second place by a hard link, or by a copy where the file system wants that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
