"""Read published preference data as pairs: general data for reward models, benchmarks.

Data that a run starts at, in place of speeches, is read by read_pairs.py. Rows that make no pair go to the side file --dropped.
Example:

    python scripts/read_preferences.py --raw sources/helpsteer2.jsonl.gz --train train.jsonl --dev dev.jsonl --test test.jsonl \\
        --dropped dropped.jsonl --settings source=helpsteer2 adapter=helpsteer2 dev_fraction=0.1 seed=1

Adapters: see psychocounsel/preferences.py. The side of a pair is the setting `split` where it is given, else the file's own, else
train; of a train side that no file has divided, dev_fraction is set aside as dev, by prompt.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.pairs import pair_record
from psychocounsel.preferences import ADAPTERS, NoPair, Preference, renamed_rows, user
from psychocounsel.prompts import render
from psychocounsel.records import content_hash
from psychocounsel.sampling import hash_share
from psychocounsel.stage import Settings, command_line, dropped_by_reason, stage
from psychocounsel.texts import speech_id


class PreferenceSettings(Settings):
    """A source of preference data, and how its file is read."""

    source: str = Field(description="name of the source in sources.yaml")
    adapter: str = Field(description="how the file is read")
    columns: dict[str, str] | None = Field(
        None, description="the file's names of the adapter's columns where they differ: {chosen: better, …}"
    )
    split: Literal["train", "dev", "test"] | None = Field(None, description="side on which the whole file stands; null: as the file says")
    prompt: str | None = Field(
        None, description="template of the responding prompt, for pairs_psychocounsel: a speech becomes the prompt of our pairs"
    )
    dev_fraction: float = Field(0.0, description="share of the train side that is set aside as dev", ge=0, lt=1)
    seed: int = Field(description="seed of the dev side")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, PreferenceSettings)
    parser.add_argument("--raw", required=True, type=Path, help="the raw file")
    for name in ("train", "dev", "test"):
        parser.add_argument(f"--{name}", required=True, type=Path, help=f"pair records of the {name} side")
    parser.add_argument("--dropped", required=True, type=Path, help="rows that make no pair, with the reason")
    with stage(parser) as run:
        settings: PreferenceSettings = run.settings
        rows = renamed_rows(run.uses(run.args.raw), settings.adapter, settings.columns)
        pairs, dropped = {}, []
        for number, row in enumerate(rows, start=1):
            try:
                pair = as_pair(ADAPTERS[settings.adapter].read(row), settings)
                if pair["pair_id"] in pairs:
                    raise NoPair("duplicate", pair["pair_id"])
                pairs[pair["pair_id"]] = pair
            except NoPair as reason:
                dropped.append(
                    {"source": settings.source, "source_row": number, "reason": reason.args[0], "detail": (*reason.args, None)[1]}
                )
        run.account("pairs", len(rows), len(pairs), dropped_by_reason(dropped))
        if not pairs:
            raise UserError(f"{run.args.raw}: no row makes a pair: {dict(Counter(row['reason'] for row in dropped))}")
        for name in ("train", "dev", "test"):
            run.write(getattr(run.args, name), (p for p in pairs.values() if p["split"] == name), "pair", sort_by="pair_id")
        run.write(run.args.dropped, dropped, "dropped_row")


def as_pair(preference: Preference, settings: PreferenceSettings) -> dict:
    """Return the pair record of a row; raise NoPair where its answers do not differ or one is no text."""
    preference.check()
    speech, prompt = preference.speech, preference.prompt
    if settings.prompt and speech:
        prompt = user(render(settings.prompt, client_speech=speech))
    prompt_id = speech_id(speech) if speech else content_hash(prompt, digits=16)
    chosen, rejected = (
        {"id": content_hash(prompt_id, preference.subset, model, text, digits=16), "text": text, "model": model, "scores": scores}
        for text, model, scores in (
            (preference.chosen, preference.chosen_model, preference.chosen_scores),
            (preference.rejected, preference.rejected_model, preference.rejected_scores),
        )
    )
    return pair_record(prompt_id, side(preference, prompt_id, settings), prompt, chosen, rejected, preference.gap, preference.subset)


def side(preference: Preference, prompt_id: str, settings: PreferenceSettings) -> str:
    """Return the side of a pair; all pairs of one prompt stand on one side where the file does not divide them."""
    if settings.split is None and preference.split:
        return preference.split
    if settings.split in ("dev", "test"):
        return settings.split
    return "dev" if hash_share(prompt_id, settings.seed, "dev") < settings.dev_fraction else "train"


if __name__ == "__main__":
    main()
