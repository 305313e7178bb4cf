"""Count what becomes of each source of client speeches: cells, distinct texts, what is dropped and why, what is kept.

For the sources whose file is at hand: below the source cache (PSYCHOCOUNSEL_SOURCES, or `source_cache` of the config), or at their path.
Each is read and selected by itself, with the settings of the config; the last row takes all of them together, so that what they have
in common counts once.

    python scripts/count_speeches.py                                    # all sources of config/sources.yaml; `make sources` is the same
    python scripts/count_speeches.py my-clinic --configfile mine.yaml   # a source of your own

The columns: cells of the file that should hold a text; distinct texts as they stand in the file, and those of them with the right
length; the same after normalising and masking; what is dropped of the cells, by reason; the speeches that are kept; addresses and
numbers that are masked in these.
"""

import argparse
import os
import sys
from pathlib import Path

from tabulate import tabulate

from psychocounsel.config import Study, load_study, read_config
from psychocounsel.errors import UserError, nearest_or_all
from psychocounsel.stage import dropped_by_reason
from read_source import ReadSettings, read
from select_speeches import SelectSettings, as_speech, select

CONFIG = Path("config/config.yaml")
REASONS = ["empty", "not a text", "too short", "too long", "exact duplicate", "near duplicate", "personal data"]


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("sources", nargs="*", help="names in sources.yaml (default: every source of speeches whose file is at hand)")
    parser.add_argument("--configfile", nargs="+", type=Path, default=[], metavar="FILE", help=f"the study's config files, over {CONFIG}")
    args = parser.parse_args()
    try:
        files = [CONFIG, *args.configfile]
        study = load_study(read_config(files), files)
        print(table(study, args.sources))
        if lacking := [] if args.sources else [name for name in speech_sources(study) if not file_of(study, name)]:
            print(f"not at hand: {', '.join(lacking)}; PSYCHOCOUNSEL_SOURCES names the folder of raw files", file=sys.stderr)
    except UserError as error:
        sys.exit(f"error: {error}")


def table(study: Study, names: list[str]) -> str:
    """Return the table of counts in Markdown."""
    speeches = speech_sources(study)
    for name in names:
        if name not in speeches:
            raise UserError(f"no source of speeches {name!r}.{nearest_or_all(name, speeches)}")
    at_hand = {name: file for name in names or speeches if (file := file_of(study, name))}
    if lacking := [name for name in names if name not in at_hand]:
        raise UserError(f"{', '.join(lacking)}: not at hand; PSYCHOCOUNSEL_SOURCES names the folder of raw files")
    chosen = SelectSettings(**study.config["speeches"] | {"limit": None}, seed=study.config["seed"])
    cells = {}
    for name, file in at_hand.items():
        entry = study.sources[name]
        cells[name] = read(file, ReadSettings(source=name, adapter=entry["adapter"], columns=entry.get("columns")))
    if len(cells) > 1:
        cells["all together"] = tuple(sum(parts, []) for parts in zip(*cells.values(), strict=True))
    counts = {name: count(rows, without_text, chosen) for name, (rows, without_text) in cells.items()}
    columns = [column for column in next(iter(counts.values()), {}) if column not in REASONS or any(c[column] for c in counts.values())]
    rows = [[name, *(f"{counted[column]:,}" for column in columns)] for name, counted in counts.items()]
    aligned = ["left"] + ["right"] * len(columns)
    return tabulate(rows, headers=["source", *columns], tablefmt="github", colalign=aligned, disable_numparse=True)


def speech_sources(study: Study) -> list[str]:
    """Return the names of all sources of client speeches."""
    return [name for name, entry in study.sources.items() if entry["kind"] == "speeches"]


def file_of(study: Study, name: str) -> Path | None:
    """Return the raw file of a source, where it is at hand."""
    cache, entry = os.environ.get("PSYCHOCOUNSEL_SOURCES") or study.config["source_cache"], study.sources[name]
    places = [Path(cache, entry["file"])] if cache and "file" in entry else []
    places += [Path(entry["path"])] if "path" in entry else []
    return next((place for place in places if place.is_file()), None)


def count(rows: list[dict], without_text: list[dict], settings: SelectSettings) -> dict[str, int]:
    """Return the counts of a source's cells, by column."""
    kept, dropped = select(rows, settings)
    reasons = dropped_by_reason([*without_text, *dropped])
    as_it_stands = {row["text"] for row in rows}
    normalised = {as_speech(row, settings.personal_data)["text"] for row in rows}

    def fitting(texts: set[str]) -> int:
        return sum(settings.min_chars <= len(text) <= settings.max_chars for text in texts)

    return {
        "cells": len(rows) + len(without_text),
        "distinct in file": len(as_it_stands),
        "of right length": fitting(as_it_stands),
        "distinct normalised": len(normalised),
        "of right length then": fitting(normalised),
        **{reason: reasons[reason] for reason in REASONS},
        "kept": len(kept),
        "masked": sum(sum(speech.get("masked", {}).values()) for speech in kept),
    }


if __name__ == "__main__":
    main()
