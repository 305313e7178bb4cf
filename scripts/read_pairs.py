"""Start a run at preference pairs: take published pairs apart into speeches, responses and scores, as if this run had made them.

So whoever has no budget for an API trains and evaluates at once. Each response stands in the outputs once, however many pairs it is
in. Models get the names of our pool where it has them. Sides that the files give stay: where a speech (with drop_near_test: it
or a near duplicate of it) stands on several, the pairs on test are kept, else those on dev. Rows that are left out go to the side
file --dropped. Example:

    python scripts/read_pairs.py --raw train.parquet test.parquet --speeches unique.jsonl --responses responses.jsonl \\
        --scores scores.jsonl --pairs pairs.jsonl --dropped dropped.jsonl --settings '{"seed": 1, "sources": [
        {"source": "mine", "adapter": "pairs_psychocounsel", "split": "train"},
        {"source": "mine-test", "adapter": "pairs_psychocounsel", "split": "test"}],
        "near_duplicates": {"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 8, "permutations": 128}}'

Adapters: see psychocounsel/preferences.py. A prompt of several turns is no client speech; a system message is left behind, since the
run's own responding prompt takes its place.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from psychocounsel.errors import UserError
from psychocounsel.near_duplicates import NearDuplicateSettings, find_near_duplicates
from psychocounsel.pairs import pair_record
from psychocounsel.personal_data import mask
from psychocounsel.preferences import ADAPTERS, NoPair, Preference, renamed_rows, user
from psychocounsel.records import content_hash
from psychocounsel.sampling import hash_order
from psychocounsel.stage import Settings, command_line, dropped_by_reason, log, stage
from psychocounsel.texts import speech_id
from select_speeches import name_clusters

UNKNOWN = "unknown"  # a response whose model the file does not name
SIDES = ("test", "dev", "train")  # the first that a speech or its cluster stands on is its side


class PairSource(BaseModel):
    """A file of pairs, and how it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    adapter: str
    columns: dict[str, str] | None = None
    split: Literal["train", "dev", "test"] | None = None


class GivenSettings(Settings):
    """The files, the names of models, and which speeches are kept."""

    sources: list[PairSource] = Field(
        description="[{source, adapter, columns, split}], one a file of --raw; split null: as the file says, else drawn by the run"
    )
    models: dict[str, str] = Field({}, description="what a file may call a model, in lower case -> our name")
    near_duplicates: NearDuplicateSettings = Field(description="cluster_above, shingle_chars, permutations: which speeches are one cluster")
    drop_near_test: bool = Field(True, description="drop the pairs of a speech that is a near duplicate of one on the test (or dev) side")
    personal_data: Literal["mask", "keep", "drop"] = Field(
        "mask", description="e-mail addresses, telephone numbers, addresses of web pages in speeches: mask or keep them, or drop the pairs"
    )
    limit: int | None = Field(None, description="keep the pairs of at most so many speeches, in seeded order; null: all", ge=1)
    seed: int = Field(description="seed of the sketches and of the order for `limit`", ge=0)


@dataclass
class GivenPair:
    """A row that makes a pair. `chosen` and `rejected`: id, text, model, scores."""

    source: str
    row: int
    speech_id: str
    speech: str
    masked: dict[str, int] | None  # what is masked in the speech, of which kind; None where nothing was looked for
    side: str | None
    preference: Preference
    chosen: dict
    rejected: dict

    def dropped(self, reason: str, detail: str | None = None) -> dict:
        """Return the side file's record of the row."""
        return {"source": self.source, "source_row": self.row, "reason": reason, "detail": detail}


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, GivenSettings)
    parser.add_argument("--raw", required=True, nargs="+", type=Path, help="raw files of pairs, in the order of the setting sources")
    parser.add_argument("--speeches", required=True, type=Path, help="unique_speech records, with their sides where the files give them")
    parser.add_argument("--responses", required=True, type=Path, help="response records")
    parser.add_argument("--scores", required=True, type=Path, help="score records; none where the files have no ratings")
    parser.add_argument("--pairs", required=True, type=Path, help="pair records, before topics and sides are settled")
    parser.add_argument("--dropped", required=True, type=Path, help="rows that were left out, with the reason")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        if len(args.raw) != len(settings.sources):
            raise UserError(f"--raw names {len(args.raw)} files, the setting sources {len(settings.sources)}")
        rows, pairs, dropped, unknown = 0, [], [], Counter()
        for path, source in zip(args.raw, settings.sources, strict=True):
            rows += read_source(run.uses(path), source, settings, pairs, dropped, unknown)
        pairs = drop_repeated(pairs, dropped)
        pairs = drop_on_several_sides(pairs, dropped)
        pairs = drop_contradicting(pairs, dropped)
        pairs = drop_over_limit(pairs, settings, dropped)
        pairs, cluster = drop_across_sides(pairs, settings, dropped)
        reasons = dropped_by_reason(dropped)
        run.account("pairs", rows, len(pairs), reasons)
        if not pairs:
            raise UserError(f"no row of {', '.join(map(str, args.raw))} makes a pair: {dict(reasons)}")
        check_sides(pairs)
        if unknown:
            log.warning("models that the pool does not have keep their names: %s", dict(unknown.most_common()))
        worse = sum(pair.preference.gap is not None and pair.preference.gap < 0 for pair in pairs)
        run.note(given_pairs={"unknown_models": dict(sorted(unknown.items())), "chosen_scored_lower": worse})

        speeches = {pair.speech_id: speech_record(pair, cluster) for pair in reversed(pairs)}  # the first row of each
        name_clusters(list(speeches.values()))
        run.note(masked=dict(sum((Counter(speech.get("masked")) for speech in speeches.values()), Counter())))
        answers = {answer["id"]: (pair.speech_id, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)}
        run.write(args.speeches, speeches.values(), "unique_speech", sort_by="speech_id")
        run.write(args.responses, (response_record(*found) for found in answers.values()), "response", sort_by="response_id")
        scored = (score_record(*found) for found in answers.values() if found[1]["scores"])
        run.write(args.scores, scored, "score", sort_by="response_id")
        run.write(args.pairs, map(given_record, pairs), "pair", sort_by="pair_id")
        run.write(args.dropped, dropped, "dropped_row", sort_by=lambda row: (row["source"], row["source_row"]))


def read_source(
    path: Path, source: PairSource, settings: GivenSettings, pairs: list[GivenPair], dropped: list[dict], unknown: Counter
) -> int:
    """Read the pairs of a file into `pairs` and its other rows into `dropped`; count names of models that are not ours."""
    rows = renamed_rows(path, source.adapter, source.columns)
    ours = set(settings.models.values())
    for number, row in enumerate(rows, start=1):
        try:
            pairs.append(given_pair(ADAPTERS[source.adapter].read(row), source, number, settings))
        except NoPair as reason:
            dropped.append({"source": source.source, "source_row": number, "reason": reason.args[0], "detail": (*reason.args, None)[1]})
            continue
        unknown.update(answer["model"] for answer in (pairs[-1].chosen, pairs[-1].rejected) if answer["model"] not in ours)
    return len(rows)


def given_pair(preference: Preference, source: PairSource, number: int, settings: GivenSettings) -> GivenPair:
    """Return what a row holds, with our names and ids; raise NoPair where it makes none."""
    preference.check()
    speech, masked = preference.client_speech(), None
    if settings.personal_data != "keep":
        speech, masked = mask(speech)
    if settings.personal_data == "drop" and masked:
        raise NoPair("personal data", ", ".join(f"{kind}: {n}" for kind, n in masked.items()))
    name = speech_id(speech)

    def answer(text: str, model: str | None, scores: dict | None, known: str | None) -> dict:
        model = settings.models.get((model or "").casefold(), model or UNKNOWN)
        return {"id": known or content_hash(name, model, text, digits=16), "text": text, "model": model, "scores": scores}

    p = preference
    return GivenPair(
        source.source,
        number,
        name,
        speech,
        masked,
        source.split or p.split,
        p,
        answer(p.chosen, p.chosen_model, p.chosen_scores, p.chosen_id),
        answer(p.rejected, p.rejected_model, p.rejected_scores, p.rejected_id),
    )


def drop_repeated(pairs: list[GivenPair], dropped: list[dict]) -> list[GivenPair]:
    """Keep each pair of responses once on a side; what stands on several sides is the next step's."""
    kept: dict[tuple, GivenPair] = {}
    for pair in pairs:
        if kept.setdefault((pair.chosen["id"], pair.rejected["id"], pair.side), pair) is not pair:
            dropped.append(pair.dropped("duplicate"))
    return list(kept.values())


def drop_on_several_sides(pairs: list[GivenPair], dropped: list[dict]) -> list[GivenPair]:
    """Keep the pairs of a speech on one side: test before dev before train; a pair without a side counts as train among such with one."""
    if any(pair.side for pair in pairs):
        for pair in pairs:
            pair.side = pair.side or "train"
    side = first_sides((pair.speech_id, pair.side) for pair in pairs)
    dropped += [pair.dropped(f"speech on the {side[pair.speech_id]} side too") for pair in pairs if pair.side != side[pair.speech_id]]
    return [pair for pair in pairs if pair.side == side[pair.speech_id]]


def first_sides(found) -> dict[str, str | None]:
    """Return the first in SIDES of the sides that each name stands on, given (name, side)."""
    sides: dict[str, str | None] = {}
    for name, side in found:
        sides[name] = min(side, sides.get(name, side), key=lambda s: SIDES.index(s) if s else len(SIDES))
    return sides


def drop_contradicting(pairs: list[GivenPair], dropped: list[dict]) -> list[GivenPair]:
    """Keep the pairs whose responses are what they were where they came first: a response has one text and one score."""
    first: dict[str, tuple[GivenPair, dict]] = {}
    kept = []
    for pair in pairs:
        answers = (pair.chosen, pair.rejected)
        before = [first[a["id"]] for a in answers if a["id"] in first]
        if other := next((earlier for earlier, answer in before if answer not in answers), None):
            dropped.append(pair.dropped("response scored otherwise before", f"{other.source}, row {other.row}"))
            continue
        for answer in answers:
            first.setdefault(answer["id"], (pair, answer))
        kept.append(pair)
    return kept


def drop_over_limit(pairs: list[GivenPair], settings: GivenSettings, dropped: list[dict]) -> list[GivenPair]:
    """Keep the pairs of `limit` speeches in seeded order."""
    kept = set(hash_order({pair.speech_id for pair in pairs}, settings.seed, "limit")[: settings.limit])
    dropped += [pair.dropped("over the limit") for pair in pairs if pair.speech_id not in kept]
    return [pair for pair in pairs if pair.speech_id in kept]


def drop_across_sides(pairs: list[GivenPair], settings: GivenSettings, dropped: list[dict]) -> tuple[list[GivenPair], dict[str, str]]:
    """Find clusters of near duplicates; keep of a cluster the pairs on its first side, if told to. Return pairs, speech -> cluster."""
    speeches = {pair.speech_id: pair for pair in pairs}
    names = sorted(speeches)
    found = find_near_duplicates(
        [speeches[name].speech for name in names],
        **settings.near_duplicates.model_dump() | {"drop_above": 1.0},  # what was published is kept beside its like
        seed=settings.seed,
    )
    cluster = {names[index]: names[first] for index, first in found.cluster.items()}
    if not settings.drop_near_test:
        return pairs, cluster
    side = first_sides((cluster[pair.speech_id], pair.side) for pair in pairs)
    kept = []
    for pair in pairs:
        if pair.side == side[cluster[pair.speech_id]]:
            kept.append(pair)
        else:
            dropped.append(pair.dropped(f"near duplicate of a {side[cluster[pair.speech_id]]} speech", pair.speech_id))
    return kept, cluster


def check_sides(pairs: list[GivenPair]) -> None:
    """Raise UserError where sides are given but not both that a run needs."""
    counts = Counter(pair.side for pair in pairs)
    if missing := [side for side in ("train", "test") if counts and None not in counts and not counts[side]]:
        raise UserError(
            f"no pair is on the {missing[0]} side ({dict(counts)}): name a source that has one in `sources`, or leave `split` out of"
            " the sources' entries in sources.yaml and of the files, and the run draws all sides"
        )


def speech_record(pair: GivenPair, cluster: dict[str, str]) -> dict:
    """Return the unique_speech record of a pair's speech."""
    masked = {} if pair.masked is None else {"masked": pair.masked}
    return masked | {
        "speech_id": pair.speech_id,
        "text": pair.speech,
        "source": pair.source,
        "source_row": pair.row,
        "source_key": pair.preference.key,
        "topic_label": pair.preference.topic,
        "cluster_id": cluster[pair.speech_id],
        "side": pair.side,
    }


def response_record(speech: str, answer: dict) -> dict:
    """Return the response record of an answer: how it was made is not known."""
    made = dict.fromkeys(("finish_reason", "usage", "request_key", "served_model", "target_words"))
    return {"response_id": answer["id"], "speech_id": speech, "model": answer["model"], "sample": 0, "text": answer["text"], **made}


def score_record(speech: str, answer: dict) -> dict:
    """Return the score record of an answer."""
    scores, total = answer["scores"], sum(answer["scores"].values())
    facts = {"response_id": answer["id"], "speech_id": speech, "model": answer["model"]}
    return facts | {"scores": scores, "total": total, "overall": total / len(scores)}


def given_record(pair: GivenPair) -> dict:
    """Return the pair record; the prompt is the bare speech until divide_pairs.py puts the responding prompt around it."""
    side, subset = pair.side or "train", pair.preference.subset
    return pair_record(pair.speech_id, side, user(pair.speech), pair.chosen, pair.rejected, pair.preference.gap, subset)


if __name__ == "__main__":
    main()
