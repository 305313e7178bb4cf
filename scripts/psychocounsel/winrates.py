"""Win rates of a policy against the opponent (paper, section 4.2, Table 3) from judgements in both orders.

Protocol "paper": one of the two orders, picked for each speech by a seeded coin; the verdict is a win or it is not.
Protocol "robust": both orders; two wins score 1, two losses 0, and a disagreement or a tie one half, so that a judge's
liking for the answer shown first cancels out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from psychocounsel.comparisons import kind_of
from psychocounsel.errors import UserError
from psychocounsel.metrics import bootstrap_weights, estimate, mean
from psychocounsel.records import content_hash

POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}

Verdicts = dict[str, dict[bool, str]]  # speech id -> was the policy's answer shown first? -> its verdict


def verdicts_by_speech(judgements: Iterable[dict]) -> Verdicts:
    """Group judgements by speech and order."""
    verdicts: Verdicts = defaultdict(dict)
    for row in judgements:
        verdicts[row["speech_id"]][row["policy_first"]] = row["verdict"]
    return verdicts


def judged_twice(verdicts: Verdicts) -> Verdicts:
    """Return the speeches that were judged in both orders, by id."""
    return {speech: orders for speech, orders in sorted(verdicts.items()) if len(orders) == 2}


def read_by_one_judge(files: dict[str, list[dict]], flag: str) -> tuple[dict[tuple[str, str], Verdicts], tuple[str, str, str]]:
    """Return a judge's verdicts in both orders by (setting, policy), and (judge, opponent, protocol); raise UserError where files differ.

    `files` holds the judgements of each file, given by the argument `flag`.
    """
    verdicts, asked = {}, set()
    for file, judgements in files.items():
        kind = kind_of(judgements, file)
        verdicts[kind["setting"], kind["policy"]] = judged_twice(verdicts_by_speech(judgements))
        asked.add((kind["judge"], kind["opponent"], kind["protocol"]))
    if len(asked) > 1:
        raise UserError(f"{flag}: of several judges, opponents or protocols: {' and '.join(map(str, sorted(asked)))}")
    return verdicts, asked.pop()


def coin(seed: int, speech_id: str) -> bool:
    """Whether protocol "paper" takes the order with the policy's answer first: a fair coin, the same for every policy."""
    return int(content_hash(seed, speech_id, digits=1), 16) < 8


def paper_scores(verdicts: Verdicts, seed: int) -> dict[str, float]:
    """Score of each speech under protocol "paper": 1 for a win in the order of the coin, else 0 (Table 3 has no half wins)."""
    return {speech: float(orders[coin(seed, speech)] == "win") for speech, orders in verdicts.items()}


def robust_scores(verdicts: Verdicts) -> dict[str, float]:
    """Score of each speech under protocol "robust": 1, 0.5 or 0."""
    return {speech: POINTS[orders[True]] if orders[True] == orders[False] else 0.5 for speech, orders in verdicts.items()}


def protocols(seed: int) -> dict[str, Callable[[Verdicts], dict[str, float]]]:
    """Return by protocol what scores the speeches."""
    return {"paper": partial(paper_scores, seed=seed), "robust": robust_scores}


def win_rates(scores: dict[str, float], topic_of: dict[str, str], resamples: int, seed: int) -> dict:
    """Win rate overall and by coarse topic, each with n and a bootstrap interval over its speeches."""
    return means_by_topic(scores, topic_of, "win_rate", resamples, seed)


def win_rate_differences(first: dict[str, float], second: dict[str, float], topic_of: dict[str, str], resamples: int, seed: int) -> dict:
    """The first policy's win rate minus the second's over the speeches that both were judged on, overall and by coarse topic.

    The interval is that of a paired bootstrap: a draw of speeches takes both policies' scores.
    """
    return means_by_topic({s: first[s] - second[s] for s in first.keys() & second.keys()}, topic_of, "difference", resamples, seed)


def means_by_topic(values: dict[str, float], topic_of: dict[str, str], name: str, resamples: int, seed: int) -> dict:
    """Mean of the values of speeches overall and by coarse topic, under this name, with n and a bootstrap interval over the speeches."""
    by_topic: dict[str, list[str]] = defaultdict(list)
    for speech in sorted(values):
        by_topic[topic_of[speech]].append(speech)

    def average(speeches: list[str]) -> dict:
        numbers = np.array([values[speech] for speech in speeches])
        interval = estimate(lambda w: mean(numbers, w), bootstrap_weights(speeches, resamples, seed))
        return {name: interval["value"], "n": len(speeches), "low": interval["low"], "high": interval["high"]}

    return {"overall": average(sorted(values)), "topics": {topic: average(speeches) for topic, speeches in sorted(by_topic.items())}}


def principle_rates(judgements: Iterable[dict], judged: Verdicts, topic_of: dict[str, str], resamples: int, seed: int) -> dict | None:
    """Win rate on each principle, both orders, over the judged speeches; None where all were asked about in one call."""
    found: dict[str, Verdicts] = defaultdict(lambda: defaultdict(dict))
    for row in judgements:
        for principle, verdict in (row["principles"] or {}).items():
            if row["speech_id"] in judged:
                found[principle][row["speech_id"]][row["policy_first"]] = verdict
    rates = {name: win_rates(robust_scores(verdicts), topic_of, resamples, seed) for name, verdicts in found.items()}
    return {name: rate["overall"] for name, rate in sorted(rates.items())} or None


def order_effects(verdicts: Verdicts) -> dict:
    """How far the judge follows the order: share of speeches judged alike in both, share of decided verdicts for the first."""
    decided = [first == (verdict == "win") for orders in verdicts.values() for first, verdict in orders.items() if verdict != "tie"]
    return {
        "agreement": float(np.mean([orders[True] == orders[False] for orders in verdicts.values()])),
        "first_share": float(np.mean(decided)) if decided else 0.5,
    }


def length_controlled(scores: dict[str, float], lengths: dict[str, tuple[int, int]], resamples: int, seed: int) -> dict:
    """Win rate that a logistic model predicts at equal length, after AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475).

    log-odds(win) = a + b * tanh(d / sd(d)), d = characters of the policy's answer minus the opponent's; the value is
    sigmoid(a). A half score counts as half a win and half a loss, as there. Left out is what needs AlpacaEval's own data: the
    term for each instruction's difficulty, estimated from the models on its leader board, and the pull of b towards that of
    its baseline told to be verbose or concise (weight 0.2). Its code chooses the strength of an L1 penalty by
    cross-validation; with two coefficients and thousands of speeches there is nothing to choose: the fit is scikit-learn's with
    its ridge penalty on b at C = 100, so weak that it matters only where wins and losses are all but separated by length.
    A bootstrap draw with wins only, or losses only, counts as 1 or 0, the limit of its fit. `extrapolated` says that less
    than 5 % of the speeches lie on one side of equal length, so that the value stands on the shape of the model alone.
    """
    from sklearn.linear_model import LogisticRegression

    speeches = sorted(scores)
    points = np.array([scores[speech] for speech in speeches])
    difference = np.array([lengths[speech][0] - lengths[speech][1] for speech in speeches], dtype=float)
    extrapolated = bool(min((difference <= 0).mean(), (difference >= 0).mean()) < 0.05)
    nothing = {"win_rate": None, "low": None, "high": None, "coefficient": None, "extrapolated": extrapolated}
    if points.min() == points.max() and points[0] != 0.5:
        return {**nothing, "reason": f"every comparison was a {'win' if points[0] else 'loss'}, so no effect of length can be fitted"}
    if len(speeches) < 2 or difference.std() == 0:
        return {**nothing, "reason": "the answers differ by the same length everywhere, so no effect of length can be fitted"}
    feature = np.tanh(difference / difference.std(ddof=1))
    features, labels = np.concatenate([feature, feature])[:, None], np.repeat([1, 0], len(speeches))

    def fit(weights: np.ndarray) -> tuple[float, float]:
        """Return (win rate at equal length, coefficient) under weights [speeches]."""
        won, lost = weights * points, weights * (1 - points)
        if not won.sum() or not lost.sum():
            return float(won.sum() > 0), 0.0
        model = LogisticRegression(C=100).fit(features, labels, sample_weight=np.concatenate([won, lost]))
        return float(1 / (1 + np.exp(-model.intercept_[0]))), float(model.coef_[0, 0])

    def rates(weights: np.ndarray) -> np.ndarray:
        return np.array([fit(row)[0] for row in np.atleast_2d(weights)]).squeeze()

    interval = estimate(rates, bootstrap_weights(speeches, resamples, seed))
    return {
        "win_rate": interval["value"],
        "low": interval["low"],
        "high": interval["high"],
        "coefficient": fit(np.ones(len(speeches)))[1],
        "extrapolated": extrapolated,
        "reason": None,
    }


def words(text: str) -> int:
    """Number of words: what the length constraint counts."""
    return len(text.split())


def answer_lengths(answers: dict[str, dict], opponent: dict[str, dict]) -> dict:
    """Mean lengths in words, the share of answers cut off at max_tokens, and how well the policy keeps the length that it was asked for."""
    targeted = [(words(answer["text"]), answer["target_words"]) for answer in answers.values() if answer["target_words"]]
    errors = np.array([abs(count - target) / target for count, target in targeted])
    ends = [answer["finish_reason"] == "length" for answer in answers.values() if answer["finish_reason"]]
    return {
        "policy_words": float(np.mean([words(answer["text"]) for answer in answers.values()])),
        "opponent_words": float(np.mean([words(answer["text"]) for answer in opponent.values()])),
        "cut_off": float(np.mean(ends)) if ends else None,
        "constraint": {"n": len(targeted), "mean_relative_error": float(errors.mean()), "within_tenth": float((errors <= 0.1).mean())}
        if targeted
        else None,
    }
