"""How far a judge agrees with itself, and follows the place at which it sees a response; intervals are bootstrapped by speech.

Ratings are held as arrays [responses, principles], NaN where there is none. Whatever is reported is a function of sums over
speeches: of confusion matrices, of differences, of labels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from scipy.stats import friedmanchisquare

from psychocounsel.metrics import cohen_kappa, known, resampled_sums, with_interval

SCORES = np.arange(1, 6)
APART = np.abs(SCORES[:, None] - SCORES)  # [first score, second score]
ALL = "all"  # the seven principles together


@dataclass
class Ratings:
    """The scores of responses, [responses, principles], NaN where one is missing; the place of each, from 1; its speech."""

    responses: list[str]
    speech: np.ndarray
    place: np.ndarray
    scores: np.ndarray

    def of(self, responses: Iterable[str]) -> "Ratings":
        """Return the ratings of some responses, in the order given."""
        row = {response: number for number, response in enumerate(self.responses)}
        rows = [row[response] for response in responses]
        return Ratings([self.responses[r] for r in rows], self.speech[rows], self.place[rows], self.scores[rows])


def as_ratings(rows: Iterable[dict], principles: list[str]) -> Ratings:
    """Return rating records as arrays, responses in the order of speech and id."""
    column = {principle: number for number, principle in enumerate(principles)}
    found: dict[tuple[str, str], tuple[int, list[float]]] = {}
    for row in rows:
        _, scores = found.setdefault((row["speech_id"], row["response_id"]), (row["position"], [np.nan] * len(principles)))
        scores[column[row["principle"]]] = row["score"]
    keys = sorted(found)
    places, scores = [found[key][0] for key in keys], [found[key][1] for key in keys]
    return Ratings(
        [response for _, response in keys],
        np.array([speech for speech, _ in keys]),
        np.array(places, dtype=int),
        np.array(scores, dtype=float).reshape(len(keys), len(principles)),
    )


# The place at which a response is shown


def position_effects(ratings: Ratings, principles: list[str], resamples: int, seed: int) -> dict:
    """Mean score by place, as its difference from the mean of the same speeches over all places; the order of responses is a shuffle.

    Of the speeches with the most frequent number of responses, those whose scores on the principle are complete; "all" is the mean over
    the principles. `p` is Friedman's test of the places' equality (ranks within a speech); None for two places, or where all are equal.
    """
    speeches, index, counts = np.unique(ratings.speech, return_inverse=True, return_counts=True)
    places = int(np.bincount(counts).argmax()) if len(counts) else 0
    table = np.full((len(speeches), places, len(principles)), np.nan)
    kept = (counts == places)[index]
    table[index[kept], ratings.place[kept] - 1] = ratings.scores[kept]
    table = table[counts == places]
    table = np.concatenate([table.mean(2, keepdims=True), table], 2)  # [speeches, places, all and each principle]
    complete = ~np.isnan(table).any(1)  # [speeches, scores]
    means = np.where(complete, table.mean(1), 0)
    effects = np.where(complete[:, None], table - means[:, None], 0).transpose(0, 2, 1)  # [speeches, scores, places]
    held = np.concatenate([effects, complete[..., None], means[..., None]], -1)
    total, draws = held.sum(0), resampled_sums(held, resamples, seed) if len(held) else np.zeros((0, *held.shape[1:]))
    found = {}
    for k, name in enumerate([ALL, *principles]):
        effects, replicates = (rows[..., k, :places] / known(rows[..., k, places, None]) for rows in (total, draws))
        found[name] = {
            "mean": finite(total[k, places + 1] / known(total[k, places])),
            "places": [with_interval(effects[place], replicates[:, place]) for place in range(places)],
            "p": friedman(table[complete[:, k], :, k]),
        }
    return {"places": places, "speeches": int((counts == places).sum()), "scores": found}


def friedman(table: np.ndarray) -> float | None:
    """Return the p value of Friedman's test that all places of [speeches, places] are alike; None where it is undefined."""
    if len(table) < 2 or table.shape[1] < 3 or (table == table[:, :1]).all():
        return None
    return finite(friedmanchisquare(*table.T).pvalue)


# The same asked again


def self_consistency(first: Ratings, second: Ratings, principles: list[str], least: int, resamples: int, seed: int) -> dict:
    """Agreement of two ratings of the same responses: equal scores, mean difference, quadratic weighted kappa, labels of pairs.

    `earlier_minus_later` is the mean of a response's score where it stood nearer to the head minus that where it stood farther from it,
    over responses that moved. Labels: of every two responses to a speech whose sums of scores differed by `least` in the first rating,
    the share that still does so in the same direction (kept), in the same direction or not at all, by less (weaker), or in the other
    direction (flipped).
    """
    again = set(second.responses)
    shared = [response for response in first.responses if response in again]  # by speech
    first, second = first.of(shared), second.of(shared)
    index = np.unique(first.speech, return_inverse=True)[1]
    speeches = int(index.max()) + 1 if len(index) else 0
    confusion = confusions(first.scores, second.scores, index, speeches)  # [speeches, all and each principle, 5, 5]
    moves = moved(first, second, index, speeches)  # [speeches, all and each principle, sum and count]
    labels = label_changes(first, second, index, speeches, least)  # [speeches, kept, weaker, flipped]
    drawn = [resampled_sums(held, resamples, seed) if speeches else np.zeros((0, *held.shape[1:])) for held in (confusion, moves, labels)]
    sums = [held.sum(0) for held in (confusion, moves, labels)]

    def estimates(measure, part: int, k: int) -> dict:
        return with_interval(float(measure(sums[part])[k]), measure(drawn[part])[..., k])

    measures = {
        "equal": (lambda c: c.trace(axis1=-2, axis2=-1) / known(c.sum((-2, -1))), 0),
        "difference": (lambda c: (c * APART).sum((-2, -1)) / known(c.sum((-2, -1))), 0),
        "kappa": (partial(cohen_kappa, costs=APART**2), 0),
        "earlier_minus_later": (lambda m: m[..., 0] / known(m[..., 1]), 1),
    }
    shares = {name: estimates(lambda found: found / known(found.sum(-1, keepdims=True)), 2, k) for k, name in enumerate(LABELS)}
    return {
        "speeches": speeches,
        "ratings": int(sums[0][0].sum()),
        "scores": {
            name: {measure: estimates(function, part, k) for measure, (function, part) in measures.items()}
            for k, name in enumerate([ALL, *principles])
        },
        "labels": {"pairs": int(sums[2].sum()), **shares},
    }


LABELS = ("kept", "weaker", "flipped")


def confusions(first: np.ndarray, second: np.ndarray, index: np.ndarray, speeches: int) -> np.ndarray:
    """Return how often each score became each score, [speeches, all and each principle, 5, 5]; ratings that either lacks do not count."""
    found = np.zeros((speeches, 1 + first.shape[1], 5, 5))
    response, principle = np.nonzero(~np.isnan(first) & ~np.isnan(second))
    before, after = (scores[response, principle].astype(int) - 1 for scores in (first, second))
    np.add.at(found, (index[response], 1 + principle, before, after), 1)
    found[:, 0] = found[:, 1:].sum(1)
    return found


def moved(first: Ratings, second: Ratings, index: np.ndarray, speeches: int) -> np.ndarray:
    """Return the sums and numbers of score differences, earlier place minus later, [speeches, all and each principle, 2]."""
    direction = np.sign(second.place - first.place)
    difference = (first.scores - second.scores) * direction[:, None]
    counts = ~np.isnan(difference) & (direction != 0)[:, None]
    found = np.zeros((speeches, 1 + difference.shape[1], 2))
    np.add.at(found[:, 1:], index, np.stack([np.where(counts, difference, 0), counts], -1))
    found[:, 0] = found[:, 1:].sum(1)
    return found


def label_changes(first: Ratings, second: Ratings, index: np.ndarray, speeches: int, least: int) -> np.ndarray:
    """Return the number of labels kept, weaker and flipped, [speeches, 3]."""
    totals = np.stack([first.scores.sum(1), second.scores.sum(1)], 1)  # NaN where a response lacks a score
    found = np.zeros((speeches, 3))
    starts = np.searchsorted(index, np.arange(speeches + 1))  # the responses of a speech stand together
    for speech in range(speeches):
        for one, other in combinations(range(starts[speech], starts[speech + 1]), 2):
            before, after = totals[one] - totals[other]
            if abs(before) >= least and not np.isnan(after):
                same = after * np.sign(before)
                found[speech, 0 if same >= least else 1 if same >= 0 else 2] += 1
    return found


def finite(value: float) -> float | None:
    """Return a number, or None for NaN."""
    return float(value) if np.isfinite(value) else None
