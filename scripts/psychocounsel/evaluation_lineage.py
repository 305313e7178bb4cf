"""What stands behind the cells of the tables of reward models and policies: predictions or rankings, and judgements.

A function a table: from a cell to its formula in words and the nodes under it. Metrics and win rates are computed again from
single verdicts, by the programs that computed them.
"""

from pathlib import Path

import evaluate_rewards
import parse_judgements
from psychocounsel import winrates
from psychocounsel.explanation import Node
from psychocounsel.policy_tables import SETTINGS, SHORT_TOPICS
from psychocounsel.record_lineage import RecordLineage, parsed
from psychocounsel.records import read_result
from psychocounsel.stage import parse_settings
from psychocounsel.table_cells import Cell, named
from psychocounsel.table_settings import TableSettings

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
    "Pairs": ("n", "number of pairs with a usable verdict"),
}
PROTOCOLS = {  # sources of a row of win rates -> protocol, formula
    "one order": ("paper", "100 x share of speeches won in the one order that a seeded coin picks"),
    "both orders": ("robust", "100 x mean over speeches of 1 (won in both orders), 0 (lost in both), 0.5 (they disagree)"),
}
LENGTHS = {  # columns of the table of lengths -> formula
    "Win rate (%)": PROTOCOLS["both orders"][1],
    "At equal length (%)": "100 x sigmoid(a) of the fit log-odds(win) = a + b tanh(d / sd(d)), d their difference in characters",
    "Words": "mean number of words of the policy's answers",
    "Opponent's words": "mean number of words of the opponent's answers",
    "Off target (%)": "100 x mean of |words - asked words| / asked words over the policy's answers",
    "Within 10 % (%)": "100 x share of the policy's answers within 10 % of the words that were asked for",
    "Orders agree (%)": "100 x share of speeches judged alike in both orders",
    "First wins (%)": "100 x share of the judge's verdicts that prefer the answer shown first",
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
        "sections": evaluate_rewards.benchmark(right, by_id, settings.sections) if settings.sections else None,
    }
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
    value = metric.get("value", metric.get("overall")) if isinstance(metric, dict) else metric
    return "n/a" if value is None else f"{value:.5f}" if isinstance(value, float) else str(value)


def under_win_rates(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Judgements of a policy's answers against the opponent's."""
    coarse = run.flow.study.taxonomy["coarse"]
    topics = {SHORT_TOPICS.get(name, entry["title"]): name for name, entry in coarse.items()}
    topic = topics.get(cell.base)
    if cell.row["Source"] == "this run":
        on_topic = run.counted(cell.path, "speech", lambda row: row["split"] == "test" and topic in (None, row["coarse_topic"]))
        return "number of test speeches", on_topic
    protocol, formula = PROTOCOLS[cell.row["Source"]]
    if cell.base == "Speeches":
        formula = "number of test speeches that were judged in both orders"
    return formula, win_rate(cell, run, settings, protocol, topic)


def under_lengths(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Answers and judgements behind the win rates."""
    return LENGTHS[cell.base], win_rate(cell, run, settings, "robust", None)


def win_rate(cell: Cell, run: RecordLineage, settings: TableSettings, protocol: str, topic: str | None) -> list[Node]:
    """A policy's win rate, computed again from the judgements."""
    policy = named(cell.name, settings.policies, settings)
    setting = next(name for name, (heading, _) in SETTINGS.items() if heading == cell.group)
    for path in run.inputs(cell.path, "win_rates"):
        result = read_result(Path(path), "win_rates")
        if (result["policy"], result["setting"]) == (policy, setting):
            break
    else:
        return []
    made_with = run.record(path)["identity"]["settings"]
    seed, resamples = made_with["seed"], made_with["bootstrap"]
    (judgement_file,), (speech_file,) = run.inputs(path, "judgement"), run.inputs(path, "speech")
    topic_of = {row["speech_id"]: row["coarse_topic"] for _, row in run.rows(speech_file)}
    verdicts = winrates.verdicts_by_speech(row for _, row in run.rows(judgement_file))
    judged = {speech: orders for speech, orders in sorted(verdicts.items()) if len(orders) == 2}
    scores = winrates.paper_scores(judged, seed) if protocol == "paper" else winrates.robust_scores(judged)
    again = winrates.win_rates(scores, topic_of, resamples, seed)
    counting = [speech for speech in judged if topic in (None, topic_of[speech])]

    def rate(rates: dict) -> dict | None:
        return rates["topics"].get(topic) if topic else rates["overall"]

    stored, new = rate(result["protocols"][protocol]), rate(again)
    if stored is None:
        return [Node("no test speech on this topic was judged", path)]
    what = f"win rate of {policy}: {stored['win_rate']:.5f}; again from {2 * len(counting)} judgements of {len(counting)} speeches"
    node = Node(f"{what}: {new['win_rate']:.5f}" if new else what, path, agrees=stored == new)
    for speech in run.few(counting):
        taken = winrates.coin(seed, speech) if protocol == "paper" else None
        node.under.append(comparison(run, path, judgement_file, speech_file, speech, scores[speech], taken))
    node.more = len(counting) - len(node.under)
    return [node]


def comparison(run: RecordLineage, path: str, judgement_file: str, speech_file: str, speech: str, score: float, taken: bool | None) -> Node:
    """One speech: the judgements in both orders with the judge's answers, both answers, the speech."""
    node = Node(f"speech {speech} scores {score:g}")
    raw_files = run.inputs(judgement_file, "judgement_answer")
    raw = {row["policy_first"]: (file, line, row) for file, line, row in run.find(raw_files, "speech_id", speech)}
    for file, line, row in run.find([judgement_file], "speech_id", speech):
        first = row["policy_first"]
        unused = "" if taken in (None, first) else " (not the coin's order)"
        judgement = Node(f"{row['verdict']}, the policy shown {'first' if first else 'second'}{unused}", file, line, text=row["rationale"])
        if first in raw:
            raw_file, raw_line, answer = raw[first]
            judged = Node(f"raw answer of {answer['judge']}", raw_file, raw_line, answer["request_key"], answer["raw"])
            judged.under = run.journal(answer["request_key"], answer["raw"])
            judgement.agrees = (parsed(parse_judgements.judgement, answer) or {}).get("verdict") == row["verdict"]
            judgement.under.append(judged)
        node.under.append(judgement)
    for file, line, row in run.find(run.inputs(path, "response"), "speech_id", speech):
        node.under.append(run.response(file, line, row))
    node.under.append(run.speech(speech_file, speech))
    return node
