"""Select client speeches from all sources (paper, section 3.1): normalise, mask personal data, filter by length, remove duplicates.

Personal data are masked first, so that all that follows, the ids too, rests on the text that is released. Sources are taken in the
order given, rows in their file's order; of duplicates the first is kept. Every row that is left out goes to the side file --dropped
with its reason and, of a duplicate, the id of the kept speech that it repeats.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.near_duplicates import NearDuplicateSettings, find_near_duplicates
from psychocounsel.personal_data import mask
from psychocounsel.sampling import hash_order
from psychocounsel.stage import Settings, command_line, dropped_by_reason, stage
from psychocounsel.texts import normalise, speech_id


class SelectSettings(Settings):
    """Which speeches are kept."""

    min_chars: int = Field(description="least length of a normalised speech", ge=1)
    max_chars: int = Field(description="greatest length of a normalised speech", ge=1)
    personal_data: Literal["mask", "keep", "drop"] = Field(
        "mask", description="e-mail addresses, telephone numbers, addresses of web pages: mask or keep them, or drop a speech that has any"
    )
    near_duplicates: NearDuplicateSettings = Field(description="drop_above, cluster_above, shingle_chars, permutations")
    limit: int | None = Field(None, description="keep at most so many speeches, in seeded order; null: all", ge=1)
    seed: int = Field(description="seed of the sketches and of the order for `limit`", ge=0)


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, SelectSettings)
    parser.add_argument("--sources", required=True, nargs="+", type=Path, help="source_row records, one file a source")
    parser.add_argument("--out", required=True, type=Path, help="unique_speech records")
    parser.add_argument("--dropped", required=True, type=Path, help="rows that were left out, with the reason")
    with stage(parser) as run:
        settings: SelectSettings = run.settings
        rows = [row for path in run.args.sources for row in run.read(path, "source_row")]
        speeches, dropped = select(rows, settings)
        run.account("speeches", len(rows), len(speeches), dropped_by_reason(dropped))
        run.note(masked=dict(sum((Counter(speech.get("masked", {})) for speech in speeches), Counter())))
        if not speeches:
            raise UserError(f"no speech is left of {len(rows)} rows: {dict(dropped_by_reason(dropped))}; see `speeches` in the config")
        run.write(run.args.out, speeches, "unique_speech", sort_by="speech_id")
        run.write(run.args.dropped, dropped, "dropped_row", sort_by=lambda row: (row["source"], row["source_row"]))


def select(rows: list[dict], settings: SelectSettings) -> tuple[list[dict], list[dict]]:
    """Return the speeches that are kept of the sources' rows, and those left out with their reason."""
    dropped: list[dict] = []
    speeches = drop_personal_data([as_speech(row, settings.personal_data) for row in rows], settings, dropped)
    speeches = drop_by_length(speeches, settings, dropped)
    speeches = drop_exact_duplicates(speeches, dropped)
    speeches = drop_near_duplicates(speeches, settings, dropped)
    speeches = drop_over_limit(speeches, settings, dropped)
    name_clusters(speeches)
    return speeches, dropped


def as_speech(row: dict, personal_data: str) -> dict:
    """Return a source's row with its normalised, masked text and the id made from it; it is a cluster of its own at first."""
    text = normalise(row["text"])
    masked = {}
    if personal_data != "keep":
        text, found = mask(text)
        masked = {"masked": found}
    return {"speech_id": speech_id(text), **row, "text": text, "cluster_id": speech_id(text), **masked}


def drop_personal_data(speeches: list[dict], settings: SelectSettings, dropped: list[dict]) -> list[dict]:
    """Keep speeches without personal data, where the settings say so; else all."""
    kept = []
    for speech in speeches:
        if settings.personal_data == "drop" and speech["masked"]:
            dropped.append(dropped_row(speech, "personal data", ", ".join(f"{kind}: {n}" for kind, n in speech["masked"].items())))
        else:
            kept.append(speech)
    return kept


def drop_by_length(speeches: list[dict], settings: SelectSettings, dropped: list[dict]) -> list[dict]:
    """Keep speeches of min_chars to max_chars characters."""
    kept = []
    for speech in speeches:
        chars = len(speech["text"])
        if settings.min_chars <= chars <= settings.max_chars:
            kept.append(speech)
        else:
            dropped.append(dropped_row(speech, "too short" if chars < settings.min_chars else "too long", f"{chars} characters"))
    return kept


def drop_exact_duplicates(speeches: list[dict], dropped: list[dict]) -> list[dict]:
    """Keep the first speech of each normalised text."""
    kept: dict[str, dict] = {}
    for speech in speeches:
        if kept.setdefault(speech["speech_id"], speech) is not speech:
            dropped.append(dropped_row(speech, "exact duplicate", speech["speech_id"]))
    return list(kept.values())


def drop_near_duplicates(speeches: list[dict], settings: SelectSettings, dropped: list[dict]) -> list[dict]:
    """Keep the first speech of near duplicates; give the kept that resemble each other one cluster_id."""
    found = find_near_duplicates([speech["text"] for speech in speeches], **settings.near_duplicates.model_dump(), seed=settings.seed)
    for index, (twin, similarity) in found.twin.items():
        dropped.append(dropped_row(speeches[index], "near duplicate", f"{speeches[twin]['speech_id']} (similarity {similarity:.3f})"))
    return [{**speeches[index], "cluster_id": speeches[first]["speech_id"]} for index, first in found.cluster.items()]


def drop_over_limit(speeches: list[dict], settings: SelectSettings, dropped: list[dict]) -> list[dict]:
    """Keep `limit` speeches in seeded order."""
    kept = set(hash_order((speech["speech_id"] for speech in speeches), settings.seed, "limit")[: settings.limit])
    dropped += [dropped_row(speech, "over the limit", None) for speech in speeches if speech["speech_id"] not in kept]
    return [speech for speech in speeches if speech["speech_id"] in kept]


def name_clusters(speeches: list[dict]) -> None:
    """Name each cluster by the smallest id of its speeches, whatever was read first."""
    smallest: dict[str, str] = {}
    for speech in speeches:
        cluster = speech["cluster_id"]
        smallest[cluster] = min(smallest.get(cluster, speech["speech_id"]), speech["speech_id"])
    for speech in speeches:
        speech["cluster_id"] = smallest[speech["cluster_id"]]


def dropped_row(speech: dict, reason: str, detail: str | None) -> dict:
    """Return the side file's record of a row that is left out."""
    return {"source": speech["source"], "source_row": speech["source_row"], "reason": reason, "detail": detail}


if __name__ == "__main__":
    main()
