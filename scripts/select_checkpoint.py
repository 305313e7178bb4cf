"""Choose the checkpoint of a policy that ranks most dev pairs right, of all rounds of its training (paper, section 4.2).

Among equals the earliest is chosen. Its files get a second place as hard links.

    python scripts/select_checkpoint.py --checkpoints iteration-1/checkpoints.json iteration-2/checkpoints.json \\
        --round-scores iteration-1/dev_scores.json iteration-2/dev_scores.json --out model/manifest.json --scores dev_scores.json
"""

from pathlib import Path

from psychocounsel.checkpoints import add_round_arguments, best, read_rounds
from psychocounsel.model_folders import link_model
from psychocounsel.stage import Settings, command_line, stage


class SelectSettings(Settings):
    """There is nothing to set."""


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, SelectSettings)
    add_round_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, help="manifest of the chosen model")
    parser.add_argument("--scores", required=True, type=Path, help="JSON: accuracy and mean margin of each checkpoint")
    with stage(parser) as run:
        checkpoints = read_rounds(run)
        chosen = best(checkpoints)
        run.note(chosen=chosen.manifest.as_posix())
        link_model(run.model(chosen.manifest), run.output_model(run.args.out))
        run.write_json(run.args.scores, [{"checkpoint": one.manifest.as_posix(), **one.score} for one in checkpoints])


if __name__ == "__main__":
    main()
