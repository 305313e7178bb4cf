"""How far two judges agree on the same comparisons; intervals are bootstrapped by speech."""

import numpy as np

from psychocounsel.metrics import cohen_kappa, known, resampled_sums, with_interval
from psychocounsel.winrates import POINTS

CLASSES = np.array(sorted(POINTS.values(), reverse=True))  # points that a speech can count: win, neither, loss
UNLIKE = 1 - np.eye(len(CLASSES))  # every disagreement costs the same


def agreement(verdicts: list[tuple[str, float, float]], resamples: int, seed: int) -> dict:
    """Share of equal verdicts, Cohen's kappa, each judge's win rate and the second's minus the first's, of (speech, points, points).

    The comparisons of one speech (several policies) are drawn together. Kappa is None where both judges gave one verdict throughout.
    """
    speeches, first, second = zip(*verdicts, strict=True)
    index = np.unique(speeches, return_inverse=True)[1]
    held = np.zeros((index.max() + 1, len(CLASSES), len(CLASSES)))  # [speeches, first judge's verdict, second judge's]
    np.add.at(held, (index, *(np.argmax(np.array(points)[:, None] == CLASSES, 1) for points in (first, second))), 1)
    total, draws = held.sum(0), resampled_sums(held, resamples, seed)

    def estimate(measure) -> dict:
        return with_interval(float(measure(total)), measure(draws))

    def rate(judge: int):
        """The win rate under a judge: the mean points of its margin of the confusions."""
        return lambda c: c.sum(-1 - judge) @ CLASSES / c.sum((-2, -1))

    with np.errstate(invalid="ignore"):
        return {
            "n": len(verdicts),
            "speeches": len(held),
            "agreement": estimate(lambda c: np.trace(c, axis1=-2, axis2=-1) / known(c.sum((-2, -1)))),
            "kappa": estimate(lambda c: cohen_kappa(c, UNLIKE)),
            "win_rates": [estimate(rate(0)), estimate(rate(1))],
            "difference": estimate(lambda c: rate(1)(c) - rate(0)(c)),
        }
