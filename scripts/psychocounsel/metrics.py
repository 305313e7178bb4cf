"""Metrics of reward models and rankers on preference pairs (paper, section 4.1), with bootstrap intervals clustered by speech.

A pair's margin is m = r(chosen) - r(rejected); the Bradley-Terry model gives P(chosen better) = sigmoid(m). AUC and ECE
need pairs of both labels, so each pair is shown in an order drawn by seed: label y = 1 where the chosen answer comes
first, and p = P(first better). Accuracy, Brier and NLL are the same for either order.

Every metric takes weights [..., pairs] and returns an array [...]: ones give the estimate, the counts of a bootstrap
draw its replicate, and a matrix of counts all replicates at once.
"""

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

LEVEL = 0.95  # of all intervals


def accuracy(margins: np.ndarray, weights: np.ndarray, tie: float = 0.0) -> np.ndarray:
    """Share of pairs whose chosen answer has the higher reward; a tie (equal rewards) counts `tie`, as an error by default."""
    return mean(np.where(margins == 0, tie, margins > 0), weights)


def auc(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: the chance that a pair of label 1 has a higher p than one of label 0, equal p counting half.

    NaN where all labels are alike.
    """
    order = np.argsort(probabilities, kind="stable")
    starts = np.flatnonzero(np.diff(probabilities[order], prepend=-np.inf))  # first place of each distinct p
    labels, weights = labels[order], np.asarray(weights, dtype=float)[..., order]
    positive = np.add.reduceat(weights * labels, starts, axis=-1)
    negative = np.add.reduceat(weights * (1 - labels), starts, axis=-1)
    below = np.cumsum(negative, axis=-1) - negative
    comparisons = positive.sum(-1) * negative.sum(-1)
    with np.errstate(invalid="ignore"):
        return (positive * (below + negative / 2)).sum(-1) / comparisons


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    """ECE over equal-width bins of p: sum over bins of n_b / n * |share of label 1 - mean p| (Naeini et al. 2015)."""
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    excess = np.eye(bins)[index] * (labels - probabilities)[:, None]  # [pairs, bins]
    weights = np.asarray(weights, dtype=float)
    return np.abs(weights @ excess).sum(-1) / weights.sum(-1)


def brier(margins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Brier score: mean of (p - y)^2, which is sigmoid(-m)^2 in either order."""
    return mean(expit(-margins) ** 2, weights)


def negative_log_likelihood(margins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of -log sigmoid(m), in nats: the training loss of section 4.1, on these pairs."""
    return mean(np.logaddexp(0, -margins), weights)


def fitted_temperature(margins: np.ndarray) -> float | None:
    """The T > 0 that minimises the NLL of m / T; above 1 the model is too sure of itself, below 1 too unsure.

    The NLL is convex in 1 / T, so its minimum is the root of its derivative. None where there is none: a model that
    ranks every pair right gains without end by T -> 0, one that is wrong on average by T -> infinity.
    """
    if margins.mean() <= 0 or margins.min() >= 0:
        return None
    scale = np.abs(margins).max()
    units = margins / scale

    def slope(inverse: float) -> float:
        return -float(np.mean(units * expit(-units * inverse)))

    brackets = (2.0**k for k in range(41))  # a minimum beyond them is one at T = 0 but for rounding
    high = next((inverse for inverse in brackets if slope(inverse) >= 0), None)
    return None if high is None else float(scale / brentq(slope, 0, high, xtol=1e-12, rtol=1e-10))


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of values [pairs] under weights [..., pairs]."""
    weights = np.asarray(weights, dtype=float)
    return weights @ np.asarray(values, dtype=float) / weights.sum(-1)


def bootstrap_weights(clusters: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """Return counts [resamples, len(clusters)]: how often each draw of whole clusters, with replacement, takes each item.

    Pairs of one speech stand or fall together, so they are drawn together. The counts do not depend on the items' order.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return draws[:, index]


def estimate(metric: Callable[[np.ndarray], np.ndarray], weights: np.ndarray, centred: bool = False) -> dict:
    """Return {"value", "low", "high"} of a metric: its value on all items and a percentile bootstrap interval.

    A replicate on which the metric is undefined is left out; a metric that is undefined on all items has null values.
    `centred` shifts the replicates so that their mean is the value, and cuts at 0: for the ECE, a sum of absolute values,
    into which every resampling brings further noise, so that its replicates lie above it, at times all of them.
    """
    return with_interval(float(metric(np.ones(weights.shape[-1]))), np.asarray(metric(weights)), centred)


def with_interval(value: float, replicates: np.ndarray, centred: bool = False) -> dict:
    """Return {"value", "low", "high"} of a value and its bootstrap replicates [resamples]; as `estimate` says."""
    replicates = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or not len(replicates):
        return {"value": None, "low": None, "high": None}
    if centred:
        replicates = np.maximum(replicates + value - replicates.mean(), 0)
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def resampled_sums(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return [resamples, …]: the sums over clusters of what each holds, [clusters, …], for draws of whole clusters, with replacement.

    For statistics of many clusters that are functions of sums: a matrix of all draws by all clusters is never held.
    """
    rng, n = np.random.default_rng(seed), len(sums)
    flat, batch = np.asarray(sums, dtype=float).reshape(n, -1), 50
    counts = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples))
    drawn = [np.array(list(islice(counts, batch)), dtype=float) @ flat for _ in range(0, resamples, batch)]
    return np.concatenate(drawn).reshape(resamples, *np.shape(sums)[1:])


def cohen_kappa(confusion: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Cohen's kappa of [..., classes, classes] counts: 1 - cost of what was found / cost expected of the same raters by chance.

    `costs` [classes, classes] weighs each disagreement: all alike, or as the square of its distance. NaN where chance costs nothing:
    both raters gave one and the same class throughout.
    """
    n = known(confusion.sum((-2, -1)))
    expected = confusion.sum(-1)[..., :, None] * confusion.sum(-2)[..., None, :] / n[..., None, None]
    return 1 - (confusion * costs).sum((-2, -1)) / known((expected * costs).sum((-2, -1)))


def known(divisor: np.ndarray) -> np.ndarray:
    """Return a divisor with NaN for 0, so that a quotient without cases is undefined."""
    return np.where(divisor == 0, np.nan, divisor)


def at_chance(accuracy: dict) -> bool:
    """Whether an accuracy's interval reaches down to one half: such a model is not shown to rank better than a coin."""
    return accuracy["low"] <= 0.5


def benchmark_scores(right: dict[str, list[bool]], sections: dict[str, dict[str, int]], resamples: int, seed: int) -> dict:
    """Section scores of RewardBench from the verdicts of each subset, and their mean, as its authors define them.

    "For all the subsets except for Reasoning, we perform per-prompt weighted averaging across all the prompts in the
    subset to get the section score. For Reasoning, we increase the weight of the PRM-Math subset so code and math
    abilities are weighed equally" (data set card of allenai/reward-bench; Lambert et al. 2024, arXiv 2403.13787; in their
    code calculate_scores_per_section). The overall score is the mean of the sections; the Prior Sets, which they dropped
    later, are left out. `sections` holds each subset's weight (config/paper.yaml). A tie of rewards is wrong, as in their
    code. A subset without pairs counts in no section and is listed; so is a section without subsets, which they score 0.

    The overall score is an estimate with a bootstrap interval over the prompts of each subset, whose numbers are part of the
    benchmark and stay: with replacement, n verdicts of which a share a is right have Binomial(n, a) right ones.
    """
    rng = np.random.default_rng(seed)
    subsets = {name: {"accuracy": float(np.mean(verdicts)), "n": len(verdicts)} for name, verdicts in sorted(right.items())}
    drawn = {  # subset -> its accuracy, then those of its replicates
        name: np.append(found["accuracy"], rng.binomial(found["n"], found["accuracy"], resamples) / found["n"])
        for name, found in subsets.items()
    }
    scores = {}
    for section, subset_weights in sections.items():
        present = [name for name in subset_weights if name in subsets]
        if present:
            scores[section] = np.average([drawn[n] for n in present], axis=0, weights=[subset_weights[n] for n in present])
    overall = np.mean(list(scores.values()), axis=0) if scores else np.full(1, np.nan)
    return {
        "scores": {section: float(score[0]) for section, score in scores.items()},
        "overall": with_interval(float(overall[0]), overall[1:]),
        "subsets": subsets,
        "missing": sorted(name for weights in sections.values() for name in weights if name not in subsets),
    }
