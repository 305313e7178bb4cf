"""Choose the checkpoint of a policy that ranks most dev pairs right (paper, section 4.2: a dev set selects the best checkpoints).

A policy ranks by its implicit reward, log p(answer) under the policy minus log p(answer) under the base, the same for all
candidates (DPO's beta scales it and changes no order). Among equals the earlier candidate is chosen.

    python scripts/select_checkpoint.py --candidates dpo/1/manifest.json dpo/2/manifest.json --weights base/manifest.json \\
        --dev pairs/dev.jsonl --out dpo/best/manifest.json --scores dpo/scores.json --settings '{"model": {...}, …}'
"""

from pathlib import Path

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.model_folders import link_model
from psychocounsel.models import ModelSpec
from psychocounsel.stage import Settings, add_reuse_argument, command_line, log, stage


class SelectSettings(Settings):
    """How a checkpoint is chosen."""

    model: ModelSpec = Field(description="chat model that the candidates were trained from, an entry of models.yaml")
    max_length: int = Field(description="most tokens of a prompt with its answer; longer answers lose their end", ge=1)
    batch_size: int = Field(description="answers read at once", ge=1)


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, SelectSettings)
    parser.add_argument("--candidates", required=True, nargs="+", type=Path, help="manifests of the checkpoints, the earliest first")
    parser.add_argument("--weights", type=Path, help="manifest of the base's local weights (default: the model's own, from the Hub)")
    parser.add_argument("--dev", required=True, type=Path, help="pair records of the dev side")
    parser.add_argument("--out", required=True, type=Path, help="manifest of the chosen model")
    parser.add_argument("--scores", required=True, type=Path, help="JSON: accuracy and mean margin of each candidate")
    add_reuse_argument(parser)
    with stage(parser) as run:
        if run.adopts([run.args.dev, run.args.weights, *run.args.candidates], [run.args.out, run.args.scores]):
            return
        from psychocounsel.rewards import load_language_model, load_tokenizer, pair_log_ratios, policy_rows

        spec = run.settings.model
        dev = run.read(run.args.dev, "pair")
        weights = run.model(run.args.weights) if run.args.weights else None
        folders = [run.model(manifest) for manifest in run.args.candidates]
        tokenizer = load_tokenizer(spec, weights)
        rows, cut = policy_rows(tokenizer, spec, dev, run.settings.max_length)
        if not rows:
            raise UserError(f"{run.args.dev}: no dev pair whose prompt is shorter than max_length: there is nothing to choose by")
        run.account("dev pairs", len(dev), len(rows), {"prompt fills max_length": len(dev) - len(rows)})
        run.note(cut_pairs=cut)

        base = pair_log_ratios(load_language_model(spec, weights), rows, tokenizer.pad_token_id, run.settings.batch_size)
        scores = []
        for manifest, folder in zip(run.args.candidates, folders, strict=True):
            ratios = pair_log_ratios(load_language_model(spec, folder), rows, tokenizer.pad_token_id, run.settings.batch_size)
            scores.append({"candidate": manifest.as_posix(), **dev_score(ratios, base)})
            log.info("%s: accuracy %.3f, mean margin %.3f nats", manifest, scores[-1]["accuracy"], scores[-1]["mean_margin"])
        best = choose([score["accuracy"] for score in scores])
        run.note(chosen=scores[best]["candidate"])
        link_model(folders[best], run.output_model(run.args.out))
        run.write_json(run.args.scores, scores)


def dev_score(ratios: list[float], base: list[float]) -> dict:
    """Return the share of pairs with a positive implicit-reward margin, and the mean margin in nats.

    Both lists hold log p(chosen) - log p(rejected) by pair, under the candidate and under the base.
    """
    margins = [ratio - reference for ratio, reference in zip(ratios, base, strict=True)]
    return {"accuracy": sum(margin > 0 for margin in margins) / len(margins), "mean_margin": sum(margins) / len(margins)}


def choose(accuracies: list[float]) -> int:
    """Return the place of the highest accuracy; among equals the earliest."""
    return max(range(len(accuracies)), key=lambda place: (accuracies[place], -place))


if __name__ == "__main__":
    main()
