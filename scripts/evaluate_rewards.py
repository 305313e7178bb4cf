"""Measure how well a reward model, or an LLM as ranker, tells the better answer of each pair (paper, section 4.1, Tables 1 and 2).

Of a reward model's predictions: accuracy (the chosen answer has the higher reward; a tie is an error, and a second figure
counts it half), AUC, expected calibration error, Brier score, negative log-likelihood and the temperature that would
calibrate it. Of a ranker's answers, each pair asked in both orders: accuracy over both orders (right in both counts 1,
in one of them half), and the share of answers that name the answer shown first (0.5 means no position bias). Intervals
are 95 % bootstrap percentiles over speeches. With the setting sections also RewardBench's section scores.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from pydantic import Field
from scipy.special import expit

from psychocounsel import metrics
from psychocounsel.errors import UserError
from psychocounsel.parsing import parse_better
from psychocounsel.records import validator
from psychocounsel.stage import Settings, command_line, log, stage


class EvaluationSettings(Settings):
    """What is measured and how."""

    name: str = Field(description="name of the model in the tables")
    bins: int = Field(10, description="equal-width bins of the calibration error", ge=1)
    bootstrap: int = Field(2000, description="bootstrap resamples", ge=1)
    seed: int = Field(description="seed of the bootstrap")
    sections: dict[str, dict[str, int]] | None = Field(None, description="RewardBench: section -> subset -> weight; null for other pairs")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, EvaluationSettings)
    parser.add_argument("--pairs", required=True, help="pairs to rank")
    answers = parser.add_mutually_exclusive_group(required=True)
    answers.add_argument("--predictions", help="a reward model's rewards of these pairs")
    answers.add_argument("--rankings", help="a ranker's raw answers on these pairs")
    parser.add_argument("--out", required=True, help="metrics, as JSON")
    with stage(parser) as run:
        pairs = {pair["pair_id"]: pair for pair in run.read(run.args.pairs, "pair")}
        if run.args.predictions:
            grouped = by_pair(run.read(run.args.predictions, "prediction"), pairs, run.args.predictions)
            verdicts = {pair_id: row for pair_id, (row,) in grouped.items()}
            right = {pair_id: row["reward_chosen"] > row["reward_rejected"] for pair_id, row in verdicts.items()}
            measure, lost = reward_model_metrics, {}
        else:
            grouped = by_pair(run.read(run.args.rankings, "ranking_answer"), pairs, run.args.rankings, per_pair=2)
            verdicts, lost = both_orders(grouped)
            right = {pair_id: all(row["right"]) for pair_id, row in verdicts.items()}
            measure = ranker_metrics
        if not verdicts:
            raise UserError(f"{run.args.pairs}: no pair has a usable verdict, so there is nothing to measure")
        run.account("pairs", rows_in=len(pairs), rows_out=len(verdicts), dropped={**lost, "no verdict": len(pairs.keys() - grouped.keys())})
        result = {
            "name": run.settings.name,
            "pairs": len(pairs),
            "n": len(verdicts),
            **measure(list(verdicts.values()), run.settings),
            "sections": benchmark(right, pairs, run.settings) if run.settings.sections else None,
        }
        if result["at_chance"]:
            log.warning("%s is not shown to rank better than chance: the interval of its accuracy reaches down to 0.5", run.settings.name)
        run.write_json(run.args.out, validator("metrics")(result))


def by_pair(rows: Iterable[dict], pairs: dict[str, dict], file: str, per_pair: int = 1) -> dict[str, list[dict]]:
    """Group verdicts by pair; raise UserError where one belongs to no pair or a pair has too many."""
    grouped: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if row["pair_id"] not in pairs:
            raise UserError(f"{file}: pair {row['pair_id']} is not in the file of pairs; score or rank these pairs again")
        grouped[row["pair_id"]].append(row)
    for pair_id, found in grouped.items():
        if len(found) > per_pair:
            raise UserError(f"{file}: pair {pair_id} stands {len(found)} times, at most {per_pair} expected")
    return grouped


def both_orders(rankings: dict[str, list[dict]]) -> tuple[dict[str, dict], dict[str, int]]:
    """Return for each pair whether the ranker was right with the chosen answer shown first and second, and the pairs lost by reason."""
    verdicts, lost = {}, Counter()
    for pair_id, rows in rankings.items():
        try:
            right = {row["chosen_first"]: (parse_better(row["raw"])[0] == 1) == row["chosen_first"] for row in rows}
        except ValueError:
            lost["unreadable answer"] += 1
            continue
        if len(right) == 2:
            verdicts[pair_id] = {"speech_id": rows[0]["speech_id"], "right": (right[True], right[False])}
        else:
            lost["answered in one order only"] += 1
    return verdicts, dict(lost)


def reward_model_metrics(predictions: list[dict], settings: EvaluationSettings) -> dict:
    """Metrics of a reward model (Table 1)."""
    margins = np.array([row["reward_chosen"] - row["reward_rejected"] for row in predictions])
    labels = np.array([row["chosen_first"] for row in predictions], dtype=float)
    first_better = expit(np.where(labels == 1, margins, -margins))
    speeches = [row["speech_id"] for row in predictions]
    weights = metrics.bootstrap_weights(speeches, settings.bootstrap, settings.seed)
    accuracy = metrics.estimate(lambda w: metrics.accuracy(margins, w), weights)
    return {
        "kind": "reward_model",
        "speeches": len(set(speeches)),
        "accuracy": accuracy,
        "at_chance": metrics.at_chance(accuracy),
        "ties": int((margins == 0).sum()),
        "accuracy_ties_half": metrics.estimate(lambda w: metrics.accuracy(margins, w, tie=0.5), weights),
        "auc": metrics.estimate(lambda w: metrics.auc(first_better, labels, w), weights),
        "ece": metrics.estimate(
            lambda w: metrics.expected_calibration_error(first_better, labels, w, settings.bins), weights, centred=True
        ),
        "brier": metrics.estimate(lambda w: metrics.brier(margins, w), weights),
        "nll": metrics.estimate(lambda w: metrics.negative_log_likelihood(margins, w), weights),
        "temperature": metrics.fitted_temperature(margins),
        "orders": None,
    }


def ranker_metrics(verdicts: list[dict], settings: EvaluationSettings) -> dict:
    """Metrics of an LLM as ranker (Table 1, "Generative LLMs"): a pair ranked differently in its two orders counts half."""
    right = np.array([row["right"] for row in verdicts], dtype=float)  # [pairs, (chosen shown first, shown second)]
    speeches = [row["speech_id"] for row in verdicts]
    weights = metrics.bootstrap_weights(speeches, settings.bootstrap, settings.seed)
    accuracy = metrics.estimate(lambda w: metrics.mean(right.mean(axis=1), w), weights)
    return {
        "kind": "ranker",
        "speeches": len(set(speeches)),
        "accuracy": accuracy,
        "at_chance": metrics.at_chance(accuracy),
        "ties": int((right[:, 0] != right[:, 1]).sum()),
        "accuracy_ties_half": accuracy,
        **dict.fromkeys(("auc", "ece", "brier", "nll", "temperature")),
        "orders": {
            "consistent_right": metrics.estimate(lambda w: metrics.mean(right.min(axis=1), w), weights),
            "first_share": metrics.estimate(lambda w: metrics.mean((right[:, 0] + 1 - right[:, 1]) / 2, w), weights),
        },
    }


def benchmark(right: dict[str, bool], pairs: dict[str, dict], settings: EvaluationSettings) -> dict:
    """RewardBench's scores; raise UserError for a pair whose subset is in no section."""
    known = {subset for weights in settings.sections.values() for subset in weights}
    by_subset: dict[str, list[bool]] = defaultdict(list)
    for pair_id, verdict in right.items():
        if (subset := pairs[pair_id]["subset"]) not in known:
            raise UserError(f"pair {pair_id}: its subset {subset!r} is in no section; add it to the setting sections")
        by_subset[subset].append(verdict)
    scores = metrics.benchmark_scores(by_subset, settings.sections, settings.bootstrap, settings.seed)
    if scores["missing"]:
        log.warning("subsets without a pair, left out of their sections: %s", ", ".join(scores["missing"]))
    return scores


if __name__ == "__main__":
    main()
