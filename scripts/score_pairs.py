"""Score preference pairs with a reward model: ours (--weights) or a published one from the Hub (paper, Table 1).

Most reward models are sequence classifiers with one output; the setting model.reward_from names the other ways, eos_token (OpenRLHF)
and first_token_logit (Nemotron).

    python scripts/score_pairs.py --pairs pairs/test.jsonl --weights models/reward/manifest.json --out predictions.jsonl \\
        --settings '{"model": {...}, "max_length": 2048, "batch_size": 32, "seed": 1}'
"""

from pathlib import Path

from pydantic import Field

from psychocounsel.models import ModelSpec
from psychocounsel.records import content_hash
from psychocounsel.stage import Settings, add_reuse_argument, command_line, stage


class ScoreSettings(Settings):
    """How pairs are scored."""

    model: ModelSpec = Field(
        description="the reward model, an entry of models.yaml; with --weights the chat model that it was trained from"
    )
    max_length: int = Field(description="most tokens of a conversation; longer ones lose their start", ge=1)
    batch_size: int = Field(description="conversations read at once", ge=1)
    seed: int = Field(description="seed of the side on which the chosen answer stands")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ScoreSettings)
    parser.add_argument("--pairs", required=True, type=Path, help="pair records")
    parser.add_argument("--weights", type=Path, help="manifest of a trained reward model (default: the model's own weights, from the Hub)")
    parser.add_argument("--out", required=True, type=Path, help="prediction records")
    add_reuse_argument(parser)
    with stage(parser) as run:
        if run.adopts([run.args.pairs, run.args.weights], [run.args.out]):
            return
        from psychocounsel.rewards import load_reward_model, load_tokenizer, pair_rewards, reward_rows

        spec = run.settings.model
        pairs = run.read(run.args.pairs, "pair")
        weights = run.model(run.args.weights) if run.args.weights else None
        tokenizer = load_tokenizer(spec, weights)
        model = load_reward_model(spec, weights, tokenizer.pad_token_id)
        rows, cut = reward_rows(tokenizer, spec, pairs, run.settings.max_length)
        scored = zip(pairs, pair_rewards(model, spec, rows, tokenizer.pad_token_id, run.settings.batch_size), strict=True)
        predictions = [prediction(pair, chosen, rejected, run.settings.seed) for pair, (chosen, rejected) in scored]
        run.account("pairs", len(pairs), len(predictions))
        run.note(cut_conversations=cut)
        run.write(run.args.out, predictions, "prediction", sort_by="pair_id")


def prediction(pair: dict, reward_chosen: float, reward_rejected: float, seed: int) -> dict:
    """Return the record of a scored pair; a seeded coin says on which side the chosen answer counts as standing (for AUC, ECE, Brier)."""
    return {
        "pair_id": pair["pair_id"],
        "speech_id": pair["speech_id"],
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "chosen_first": int(content_hash(seed, pair["pair_id"]), 16) % 2 == 0,
    }


if __name__ == "__main__":
    main()
