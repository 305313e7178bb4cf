"""Score a round's checkpoints of a policy on the dev pairs (paper, section 4.2: a dev set selects the best checkpoints).

A policy ranks by its implicit reward, log p(answer) under the policy minus log p(answer) under the base, the same for all
checkpoints (DPO's beta scales it and changes no order). select_checkpoint.py chooses among the rounds' scores.

    python scripts/score_checkpoints.py --checkpoints dpo/iteration-1/checkpoints.json --weights base/manifest.json \\
        --dev pairs/dev.jsonl --out dpo/iteration-1/dev_scores.json --settings '{"model": {...}, "max_length": 2048, "batch_size": 32}'
"""

from pathlib import Path

from pydantic import Field

from psychocounsel.checkpoints import read_checkpoints
from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec
from psychocounsel.stage import Settings, add_reuse_argument, command_line, log, stage


class ScoreSettings(Settings):
    """How checkpoints are scored."""

    model: ModelSpec = Field(description="chat model that the checkpoints were trained from, an entry of models.yaml")
    max_length: int = Field(description="most tokens of a prompt with its answer; longer answers lose their end", ge=1)
    batch_size: int = Field(description="answers read at once", ge=1)


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ScoreSettings)
    parser.add_argument("--checkpoints", required=True, type=Path, help="list of the round's checkpoints")
    parser.add_argument("--weights", type=Path, help="manifest of the base's local weights (default: the model's own, from the Hub)")
    parser.add_argument("--dev", required=True, type=Path, help="pair records of the dev side")
    parser.add_argument("--out", required=True, type=Path, help="JSON: accuracy and mean margin of each checkpoint")
    add_reuse_argument(parser)
    with stage(parser) as run:
        if run.adopts([run.args.dev, run.args.weights, run.args.checkpoints], [run.args.out]):
            return
        from psychocounsel.rewards import load_language_model, load_tokenizer, pair_log_ratios, policy_rows

        spec = run.settings.model
        dev = run.read(run.args.dev, "pair")
        weights = run.model(run.args.weights) if run.args.weights else None
        checkpoints = read_checkpoints(run, run.args.checkpoints)
        tokenizer = load_tokenizer(spec, weights)
        rows, cut = policy_rows(tokenizer, spec, dev, run.settings.max_length)
        if not rows:
            raise UserError(f"{run.args.dev}: no dev pair whose prompt is shorter than max_length: there is nothing to choose by")
        run.account("dev pairs", len(dev), len(rows), {"prompt fills max_length": len(dev) - len(rows)})
        run.note(cut_pairs=cut)

        base = pair_log_ratios(load_language_model(spec, weights), rows, tokenizer.pad_token_id, run.settings.batch_size)
        scores = []
        for checkpoint in checkpoints:
            folder = run.model(checkpoint.manifest)
            ratios = pair_log_ratios(load_language_model(spec, folder), rows, tokenizer.pad_token_id, run.settings.batch_size)
            scores.append({"manifest_sha256": checkpoint.sha256, **dev_score(ratios, base)})
            log.info("%s: accuracy %.3f, mean margin %.3f nats", checkpoint.manifest, scores[-1]["accuracy"], scores[-1]["mean_margin"])
        run.write_json(run.args.out, scores)


def dev_score(ratios: list[float], base: list[float]) -> dict:
    """Return the share of pairs with a positive implicit-reward margin, and the mean margin in nats.

    Both lists hold log p(chosen) - log p(rejected) by pair, under the checkpoint and under the base.
    """
    margins = [ratio - reference for ratio, reference in zip(ratios, base, strict=True)]
    return {"accuracy": sum(margin > 0 for margin in margins) / len(margins), "mean_margin": sum(margins) / len(margins)}


if __name__ == "__main__":
    main()
