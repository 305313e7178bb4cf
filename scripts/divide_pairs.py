"""Give the pairs at which a run starts their side and their prompt: train, dev or test as their speech, and the responding prompt.

Counterpart of build_pairs.py for a run that starts at pairs (read_pairs.py): which pairs there are is given, so no gap is asked for.
"""

from collections import Counter
from pathlib import Path

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.preferences import user
from psychocounsel.prompts import render
from psychocounsel.stage import Settings, command_line, stage


class DivideSettings(Settings):
    """What stands before both answers."""

    prompt: str = Field(description="template of the responding prompt, with {{ client_speech }}")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, DivideSettings)
    parser.add_argument("--speeches", required=True, type=Path, help="speech records")
    parser.add_argument("--pairs", required=True, type=Path, help="pair records of read_pairs.py")
    for split in ("train", "dev", "test"):
        parser.add_argument(f"--{split}", required=True, type=Path, help=f"pair records of the {split} side")
    with stage(parser) as run:
        speeches = {speech["speech_id"]: speech for speech in run.read(run.args.speeches, "speech")}
        given = run.read(run.args.pairs, "pair")
        pairs = [as_divided(pair, speeches[pair["speech_id"]], run.settings.prompt) for pair in given if pair["speech_id"] in speeches]
        run.account("pairs", len(given), len(pairs), {"speech left out": len(given) - len(pairs)})
        counts = Counter(pair["split"] for pair in pairs)
        for split, out in (("train", run.args.train), ("dev", run.args.dev), ("test", run.args.test)):
            if not counts[split] and split != "dev":
                raise UserError(f"no pair is on the {split} side: {dict(counts)}; see `split` in the config and the sources' `split`")
            run.write(out, (pair for pair in pairs if pair["split"] == split), "pair", sort_by="pair_id")


def as_divided(pair: dict, speech: dict, template: str) -> dict:
    """Return a pair on its speech's side, with the responding prompt."""
    return pair | {"split": speech["split"], "prompt": user(render(template, client_speech=speech["text"]))}


if __name__ == "__main__":
    main()
