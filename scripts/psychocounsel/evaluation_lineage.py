"""What stands behind the cells of the tables of reward models: predictions or rankings.

A function a table: from a cell to its formula in words and the nodes under it. Metrics are computed again from single
verdicts, by the program that computed them.
"""

from pathlib import Path

import evaluate_rewards
from psychocounsel.explanation import Node
from psychocounsel.record_lineage import RecordLineage
from psychocounsel.records import read_result
from psychocounsel.stage import parse_settings
from psychocounsel.table_cells import Cell, named
from psychocounsel.table_settings import TableSettings, section_column

METRICS = {  # columns of the tables of reward models -> metric, and how it is computed
    "Acc. (%)": (
        "accuracy",
        "100 x share of pairs whose chosen answer has the higher reward; for a ranker, right in one order counts half",
    ),
    "AUC": ("auc", "chance that a pair with the chosen answer first has a higher P(first better) than one with it second"),
    "ECE": ("ece", "sum over equal-width bins of P(first better): share of pairs in the bin x |share of chosen-first - mean P|"),
    "Brier": ("brier", "mean of (1 - sigmoid(reward of chosen - reward of rejected))^2 over the pairs"),
    "NLL": ("nll", "mean of -log sigmoid(reward of chosen - reward of rejected) over the pairs"),
    "Temperature": ("temperature", "the T > 0 for which the margins divided by T have the least NLL"),
    "Both orders (%)": ("consistent_right", "100 x share of pairs that the ranker ranks right in both orders"),
    "First named (%)": ("first_share", "100 x share of the ranker's answers that name the response shown first"),
    "Pairs": ("n", "number of pairs with a usable verdict"),
}


def under_reward_models(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Metrics on the test pairs."""
    metric, formula = METRICS[cell.base]
    name = named(cell.name, [name for group in settings.reward_models for name in group.models], settings)
    return formula, metrics(cell, run, name, metric, benchmark=False)


def under_reward_ablation(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Metrics on the test pairs, or the score on the general benchmark."""
    rows = settings.ablation
    name = next(entry.model for entry in rows if (entry.base, entry.data) == (cell.row["Base"], cell.row["Training data"]))
    if cell.base == "RewardBench (%)":
        formula = "100 x mean of the section scores, each a weighted mean over the pairs of its subsets"
        return formula, metrics(cell, run, name, "sections", benchmark=True)
    if section := {section_column(section): section for section in run.flow.study.paper["rewardbench_sections"]}.get(cell.base):
        return "100 x weighted mean over the subsets of this section", metrics(cell, run, name, section, benchmark=True)
    metric, formula = METRICS[cell.base]
    return formula, metrics(cell, run, name, metric, benchmark=False)


def metrics(cell: Cell, run: RecordLineage, name: str, metric: str, benchmark: bool) -> list[Node]:
    """A model's metrics, computed again from its verdicts on the pairs."""
    for path in run.inputs(cell.path, "metrics"):
        result = read_result(Path(path), "metrics")
        if result["name"] == name and bool(result["sections"]) == benchmark:
            break
    else:
        return []
    settings = parse_settings(evaluate_rewards.EvaluationSettings, run.record(path)["identity"]["settings"])
    (pair_file,) = run.inputs(path, "pair")
    pairs = {row["pair_id"]: (line, row) for line, row in run.rows(pair_file)}
    ranker = result["kind"] == "ranker"
    (verdict_file,) = run.inputs(path, "ranking_answer" if ranker else "prediction")
    rows = run.rows(verdict_file)
    by_id = {pair_id: row for pair_id, (_, row) in pairs.items()}
    grouped = evaluate_rewards.by_pair((row for _, row in rows), by_id, verdict_file, per_pair=1 + ranker)
    if ranker:
        verdicts, _ = evaluate_rewards.both_orders(grouped)
        again = evaluate_rewards.ranker_metrics(list(verdicts.values()), settings)
        right = {pair_id: all(row["right"]) for pair_id, row in verdicts.items()}
    else:
        verdicts = {pair_id: row for pair_id, (row,) in grouped.items()}
        again = evaluate_rewards.reward_model_metrics(list(verdicts.values()), settings)
        right = {pair_id: row["reward_chosen"] > row["reward_rejected"] for pair_id, row in verdicts.items()}
    again |= {
        "n": len(verdicts),
        "sections": evaluate_rewards.benchmark(right, by_id, settings) if settings.sections else None,
    }
    absent = dict.fromkeys(("consistent_right", "first_share", metric))
    parts = [(found["orders"] or {}) | (found["sections"] or {"scores": {}})["scores"] for found in (result, again)]
    result, again = (absent | found | part for found, part in zip((result, again), parts, strict=True))
    label = "mean of the sections" if metric == "sections" else metric
    what = f"{label} of {name}: {value_of(result[metric])}; again from {len(rows)} verdicts: {value_of(again[metric])}"
    node = Node(what, path, agrees=again[metric] == result[metric])
    for pair_id in run.few(list(verdicts)):
        line, pair = pairs[pair_id]
        verdict = Node(f"pair {pair_id}: {'right' if right[pair_id] else 'not right'}{' in both orders' * (ranker and right[pair_id])}")
        for file, number, row in run.find([verdict_file], "pair_id", pair_id):
            verdict.under.append(ranking(run, file, number, row) if ranker else prediction(file, number, row))
        verdict.under.append(run.pair(pair_file, line, pair))
        node.under.append(verdict)
    node.more = len(verdicts) - len(node.under)
    return [node]


def ranking(run: RecordLineage, file: str, line: int, row: dict) -> Node:
    """A ranker's raw answer on a pair in one order."""
    order = "first" if row["chosen_first"] else "second"
    node = Node(f"answer of {row['ranker']}, the chosen answer shown {order}", file, line, row["request_key"], row["raw"])
    node.under = run.journal(row["request_key"], row["raw"])
    return node


def prediction(file: str, line: int, row: dict) -> Node:
    """A reward model's rewards of a pair."""
    return Node(f"rewards: chosen {row['reward_chosen']:.4f}, rejected {row['reward_rejected']:.4f}", file, line)


def value_of(metric: object) -> str:
    """Return a metric as text."""
    if isinstance(metric, dict):
        return value_of(metric["overall"] if "overall" in metric else metric["value"])
    return "n/a" if metric is None else f"{metric:.5f}" if isinstance(metric, float) else str(metric)
