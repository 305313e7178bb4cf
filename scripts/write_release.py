"""Write the data set as it may be passed on: Parquet splits, a card with the Hub's header, checksums (paper/published columns and ours).

Written below --out-dir: pairs/, trl/ and responses/, each with train, validation (our dev) and test; README.md, the card; SHA256SUMS.
`datasets.load_dataset(<out-dir>)` reads pairs/: every column of the authors' published data set under its name, then ours. "trl" holds
the same pairs as lists of messages, which trl's trainers take as they are; "responses" every scored response, so that others can
pair anew. A source goes in only where its licence allows it, or where the settings say that the user has the right; what is left
out is counted. The same inputs give the same bytes.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from psychocounsel.config import load_registry
from psychocounsel.errors import UserError
from psychocounsel.records import file_sha256
from psychocounsel.stage import Settings, Stage, command_line, stage
from psychocounsel.templates import load_template, template_paths

SPLITS = {"train": "train", "dev": "validation", "test": "test"}  # our sides -> the Hub's names
ROLES = ("chosen", "rejected")
ROWS = 4096  # of a row group
LICENCES = {  # from the freest to the strictest; whoever keeps to one of them keeps to those before it -> the Hub's name
    "CC0-1.0": "cc0-1.0",
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0",
}
SIZES = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M")]


class Source(BaseModel):
    """A source of client speeches or pairs, and whether its texts may be passed on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    licence: str
    address: str | None
    allowed: bool
    reason: str
    right: bool

    @property
    def included(self) -> bool:
        """Whether the release holds its texts."""
        return self.allowed or self.right


class Model(BaseModel):
    """A model that answered, and the terms of its answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    id: str
    licence: str
    withheld: str | None


class ReleaseSettings(Settings):
    """What may be passed on, and what the run's files do not say."""

    title: str = Field(description="title of the data set")
    labels: str = Field(description='how the preference labels came about: "made by …"')
    judge: str | None = Field(None, description="name of the judge of the responses; null where the labels came with published pairs")
    starts_at_pairs: bool = Field(False, description="whether the pairs were published before")
    principles: list[tuple[str, str]] = Field(description="[[id, name]]: the principles, in their order")
    sources: list[Source] = Field(description="[{name, title, licence, address, allowed, reason, right}]: sources of the speeches")
    models: list[Model] = Field(
        [], description="[{name, title, id, licence, withheld}]: the pool; withheld: why its answers stay out, or null"
    )
    min_gap: float = Field(description="least difference of the overall scores of a pair")
    personal_data: str = Field(description="what was done about personal data in the speeches, in words")
    note: str | None = Field(None, description="a sentence at the head of the card")


@dataclass
class Config:
    """One of the data sets of the release, as the Hub calls them: its columns with what they mean, its size by split."""

    name: str
    folder: str
    about: str
    columns: dict[str, tuple[object, str]]  # name -> Arrow type, meaning
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ReleaseSettings)
    parser.add_argument("--speeches", required=True, type=Path, help="speech records")
    parser.add_argument("--responses", required=True, nargs="+", type=Path, help="response records")
    parser.add_argument("--scores", required=True, type=Path, help="score records")
    for side in SPLITS:
        parser.add_argument(f"--{side}", required=True, type=Path, help=f"pair records of the {side} side")
    parser.add_argument("--taxonomy", required=True, type=Path, help="config/taxonomy.yaml")
    parser.add_argument("--out-dir", required=True, type=Path, help="folder of the release")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        for template in template_paths("ethics.md", "dataset_card.md"):
            run.uses(template)
        topics = {name: entry["title"] for name, entry in load_registry([run.uses(args.taxonomy)], "taxonomy")["coarse"].items()}
        speeches = {speech["speech_id"]: speech for speech in run.read(args.speeches, "speech")}
        why_not = reasons_to_leave_out(speeches, settings)
        pairs, trl, responses = configs = release_configs(settings)

        reasons, facts = Counter(), {"unsafe": None, "speeches": Counter(), "models": Counter()}
        for side in SPLITS:
            kept = []
            for pair in run.read(getattr(args, side), "pair"):
                reason = why_not(pair["speech_id"], pair["chosen_model"], pair["rejected_model"])
                if reason is None:
                    kept.append(pair)
                else:
                    reasons[reason] += 1
            write_parquet(run, args.out_dir, pairs, side, map(published_row(speeches, settings), in_order(kept)))
            write_parquet(run, args.out_dir, trl, side, map(conversation, in_order(kept)))
            if any("safety" in (pair["chosen_scores"] or {}) for pair in kept):
                facts["unsafe"] = (facts["unsafe"] or 0) + sum(
                    pair["rejected_scores"]["safety"] > pair["chosen_scores"]["safety"] for pair in kept if pair["chosen_scores"]
                )
        total = sum(pairs.rows.values())
        run.account("pairs", total + reasons.total(), total, reasons)

        rows, left_out = response_rows(run, speeches, why_not, facts)
        for side in SPLITS:
            write_parquet(run, args.out_dir, responses, side, rows[side])
        total = sum(responses.rows.values())
        run.account("responses", total + left_out.total(), total, left_out)
        card = dataset_card(configs, speeches, topics, reasons, left_out, facts, settings)
        run.write_text(args.out_dir / "README.md", card + "\n")
        sums = sorted((file.relative_to(args.out_dir).as_posix(), file_sha256(written)) for file, written in run.outputs.items())
        run.write_text(args.out_dir / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in sums))


def reasons_to_leave_out(speeches: dict[str, dict], settings: ReleaseSettings):
    """Return a function of a speech and of the models that answered: why it may not be passed on, or None."""
    sources = {source.name: source for source in settings.sources}
    if unknown := sorted({speech["source"] for speech in speeches.values()} - sources.keys()):
        raise UserError(f"--settings: sources lacks {unknown[0]!r}, from which speeches come; a card must name every licence")
    withheld = {model.name: f"answers of {model.title}: {model.withheld}" for model in settings.models if model.withheld}

    def reason(speech_id: str, *models: str | None) -> str | None:
        source = sources[speeches[speech_id]["source"]]
        if not source.included:
            return f"{source.title}: {source.reason}"
        return next((withheld[model] for model in models if model in withheld), None)

    return reason


def release_configs(settings: ReleaseSettings) -> list[Config]:
    """Return the three data sets of the release with their columns, the published ones first and as published."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    ratings = {
        f"{role}_{name}_rating": (whole, f"{title}, 1 to 5, of the {role} response")
        for role in ROLES
        for name, title in settings.principles
    }
    published = {
        "ID": (text, "The client speech's id, as `speech_id`"),
        "prefID": (whole, "Number of the pair among those of its speech, from 0"),
        "question": (text, "The client speech"),
        "chosen": (text, "The better response"),
        "rejected": (text, "The worse response"),
        "chosen_model": (text, "Model of the better response; see the table of models"),
        "rejected_model": (text, "Model of the worse response"),
        **ratings,
    }
    about_speech = {
        "topic": (text, "Fine topic of the speech, of 42"),
        "coarse_topic": (text, "Coarse topic, of 8"),
        "source": (text, "Where the speech comes from; see the table of sources"),
        "licence": (text, "Licence of the speech"),
    }
    ours = {
        "pair_id": (text, "Hash of the two responses' ids"),
        "speech_id": (text, "First 16 hex digits of the SHA-256 of the normalised speech"),
        "chosen_id": (text, "Id of the better response; `response_id` of the data set `responses`"),
        "rejected_id": (text, "Id of the worse response"),
        "gap": (real, "Difference of the overall scores (means of the ratings)"),
        "judge": (text, "Judge that gave the ratings, by its name in the pipeline; empty where they were published before"),
        **about_speech,
    }
    conversational = {
        "pair_id": (text, "As in `default`"),
        "prompt": (messages, "One user message: the responding prompt with the speech in it"),
        "chosen": (messages, "One assistant message: the better response"),
        "rejected": (messages, "One assistant message: the worse response"),
    }
    scored = {
        "response_id": (text, "Hash of speech, model and request"),
        "speech_id": (text, "The speech"),
        "question": (text, "The client speech"),
        "response": (text, "The response"),
        "model": (text, "Model that gave it; see the table of models"),
        **{f"{name}_rating": (whole, f"{title}, 1 to 5; empty where it was not rated") for name, title in settings.principles},
        "overall": (real, "Mean of the ratings"),
        "judge": (text, "As in `default`"),
        "request_key": (text, "SHA-256 of the request that was answered; empty where the pipeline did not ask"),
        **about_speech,
    }
    return [
        Config(
            "default",
            "pairs",
            "Preference pairs: the columns of the authors' published data set under their names, then ours.",
            published | ours,
        ),
        Config("trl", "trl", "The same pairs as conversations: trl's DPOTrainer and RewardTrainer take them as they are.", conversational),
        Config("responses", "responses", "Every response, rated or not, so that others can make other pairs.", scored),
    ]


def published_row(speeches: dict[str, dict], settings: ReleaseSettings):
    """Return a function from a pair to its row of the data set `default`; pairs of a speech are numbered as they come."""
    licences, seen = {source.name: source.licence for source in settings.sources}, Counter()

    def row(pair: dict) -> dict:
        speech = speeches[pair["speech_id"]]
        number = seen[pair["speech_id"]]
        seen[pair["speech_id"]] += 1
        ratings = {f"{role}_{name}_rating": (pair[f"{role}_scores"] or {}).get(name) for role in ROLES for name, _ in settings.principles}
        same = {key: pair[key] for key in ("pair_id", "speech_id", "chosen_id", "rejected_id", "chosen_model", "rejected_model", "gap")}
        answers = {role: pair[role][-1]["content"] for role in ROLES}
        about = {key: speech[key] for key in ("topic", "coarse_topic", "source")} | {"licence": licences[speech["source"]]}
        judge = settings.judge if pair["chosen_scores"] else None
        return {
            "ID": pair["speech_id"],
            "prefID": number,
            "question": speech["text"],
            "judge": judge,
            **answers,
            **ratings,
            **same,
            **about,
        }

    return row


def conversation(pair: dict) -> dict:
    """Return a pair's row of the data set `trl`."""
    return {key: pair[key] for key in ("pair_id", "prompt", "chosen", "rejected")}


def response_rows(run: Stage, speeches: dict[str, dict], why_not, facts: dict) -> tuple[dict[str, list[dict]], Counter]:
    """Return the rows of the data set `responses` by side, and how many responses are left out by reason; count what is in."""
    settings: ReleaseSettings = run.settings
    licences = {source.name: source.licence for source in settings.sources}
    scores = {score["response_id"]: score for score in run.read(run.args.scores, "score")}
    rows, left_out = {side: [] for side in SPLITS}, Counter()
    for path in run.args.responses:
        for response in run.read(path, "response"):
            speech, score = speeches.get(response["speech_id"]), scores.get(response["response_id"])
            reason = why_not(response["speech_id"], response["model"]) if speech else "speech without a topic"
            if reason is not None:
                left_out[reason] += 1
                continue
            facts["models"][response["model"]] += 1
            facts["speeches"][response["speech_id"]] += 1
            same = {key: response[key] for key in ("response_id", "speech_id", "model", "request_key")}
            rated = {f"{name}_rating": score["scores"].get(name) if score else None for name, _ in settings.principles}
            rated |= {"overall": score["overall"] if score else None, "judge": settings.judge if score else None}
            about = {key: speech[key] for key in ("topic", "coarse_topic", "source")} | {"licence": licences[speech["source"]]}
            rows[speech["split"]].append(same | rated | about | {"question": speech["text"], "response": response["text"]})
    for side in rows.values():
        side.sort(key=lambda row: row["response_id"])
    return rows, left_out


def in_order(pairs: list[dict]) -> list[dict]:
    """Return pairs in the order of their ids."""
    return sorted(pairs, key=lambda pair: pair["pair_id"])


def write_parquet(run: Stage, folder: Path, config: Config, side: str, rows: Iterable[dict]) -> None:
    """Write one split of a data set, a row group at a time, and note its size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, kind) for name, (kind, _) in config.columns.items()])
    path, split, batch = run.output(folder / config.folder / f"{SPLITS[side]}.parquet"), SPLITS[side], []
    config.rows[split] = config.bytes[split] = 0

    def write(writer: pq.ParquetWriter) -> None:
        table = pa.Table.from_pylist(batch, schema)
        writer.write_table(table)
        config.rows[split] += table.num_rows
        config.bytes[split] += table.nbytes
        batch.clear()

    with pq.ParquetWriter(path, schema, compression="zstd", version="2.6", store_schema=True) as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS:
                write(writer)
        write(writer)
    config.file_bytes[split] = path.stat().st_size


def dataset_card(
    configs: list[Config],
    speeches: dict[str, dict],
    topics: dict,
    pairs_out: Counter,
    responses_out: Counter,
    facts: dict,
    settings: ReleaseSettings,
) -> str:
    """Return the card: a header that the Hub reads, and what a reader should know."""
    released = [speeches[speech_id] for speech_id in facts["speeches"]]
    held = Counter(speech["source"] for speech in released)
    terms = {model.name: model for model in settings.models}
    by_topic = Counter(speech["coarse_topic"] for speech in released)
    sides = Counter(SPLITS[speech["split"]] for speech in released)
    total = sum(configs[0].rows.values())
    return load_template("dataset_card.md").render(
        settings=settings,
        ethics=load_template("ethics.md").render(),
        configs=configs,
        splits=list(SPLITS.values()),
        features={config.name: [feature(name, kind) for name, (kind, _) in config.columns.items()] for config in configs},
        licence=combined_licence([source.licence for source in settings.sources if held[source.name]]),
        size_category=next((name for limit, name in SIZES if total < limit), "n>10M"),
        speech_counts={split: sides[split] for split in SPLITS.values()},
        pairs=total,
        source_counts=held,
        left_out=[(reason, pairs_out[reason], responses_out[reason]) for reason in sorted({*pairs_out, *responses_out})],
        models=[(name, terms.get(name), count) for name, count in sorted(facts["models"].items())],
        topic_counts=[(title, by_topic[name]) for name, title in topics.items()],
        unsafe_pairs=facts["unsafe"],
        masked=dict(sorted(sum((Counter(speech.get("masked")) for speech in released), Counter()).items())),
    )


def feature(name: str, kind) -> dict:
    """Return a column as the Hub's header writes it: name and dtype, or list for messages."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return {"name": name, "list": [{"name": item.name, "dtype": str(item.type)} for item in kind.value_type]}
    return {"name": name, "dtype": {"double": "float64"}.get(str(kind), str(kind))}


def combined_licence(licences: list[str]) -> str:
    """Return the Hub's name of the strictest of the licences; "other" where one has no place in their order."""
    if not licences or set(licences) - LICENCES.keys():
        return "other"
    return list(LICENCES.values())[max(list(LICENCES).index(licence) for licence in licences)]


if __name__ == "__main__":
    main()
