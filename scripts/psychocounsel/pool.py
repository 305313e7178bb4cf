"""What became of the pool's responses in pairs (paper, section 3.3, Figures 5 and 6): counts, and rates with intervals by speech.

How often a model's responses are chosen depends on how often it was drawn and how many others answered the same speeches. The
rates take both out: of the candidate pairs in which a model's response stood, the share in which it was chosen, or rejected.
A run that starts at given pairs knows no other candidates than these.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from psychocounsel.metrics import resampled_sums, with_interval
from psychocounsel.pairs import best_and_worst

RESPONSES, SCORE, CANDIDATES, CHOSEN, REJECTED = range(5)  # what is counted of each speech and model
SIDES = {"chosen": CHOSEN, "rejected": REJECTED}
ENGLISH = "English"


class SizeClass(BaseModel):
    """Models of the pool that stand together, in their order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    models: list[str]


class Pool:
    """Counts of the pool's models, and their bootstrap replicates by speech."""

    def __init__(
        self,
        scores: list[dict],
        pairs: list[dict],
        split_of: Mapping[str, str],
        models: Sequence[str],
        resamples: int,
        seed: int,
        given: bool = False,
    ) -> None:
        met = {score["model"] for score in scores} | {pair[f"{side}_model"] for pair in pairs for side in SIDES} - {None}
        self.models = [*models, *sorted(met - set(models))]
        counts = pool_counts(scores, pairs, split_of, self.models)  # [speeches, models, 5]
        if given:
            counts[..., CANDIDATES] = counts[..., CHOSEN] + counts[..., REJECTED]
        self.sums = counts.sum(0)
        self.draws = resampled_sums(counts, resamples, seed) if len(counts) else np.zeros((0, *self.sums.shape))

    def count(self, models: Iterable[str], what: int) -> float:
        """Return a count over some models."""
        return float(self.sums[self._places(models), what].sum())

    def rate(self, models: Iterable[str], what: int, per: int = CANDIDATES) -> dict:
        """Return {"value", "low", "high"} of a count over some models per another of their counts; null values where that is 0."""
        places = self._places(models)
        return with_interval(ratio(self.sums, places, what, per), ratio(self.draws, places, what, per))

    def difference(self, models: Iterable[str], others: Iterable[str], what: int, per: int = CANDIDATES) -> dict:
        """Return the rate of some models minus that of others, with its interval."""
        here, there = self._places(models), self._places(others)
        values = (ratio(sums, here, what, per) - ratio(sums, there, what, per) for sums in (self.sums, self.draws))
        return with_interval(*values)

    def share_between(self, groups: list[list[str]], what: int, per: int = CANDIDATES) -> dict:
        """Return the share of the variance of the models' rates that lies between groups of models (eta squared), with its interval."""
        places = [self._places(models) for models in groups]
        return with_interval(*(variance_between(sums, places, what, per) for sums in (self.sums, self.draws)))

    def _places(self, models: Iterable[str]) -> list[int]:
        return [self.models.index(model) for model in models]


def pool_counts(scores: list[dict], pairs: list[dict], split_of: Mapping[str, str], models: list[str]) -> np.ndarray:
    """Return [speeches, models, 5]: scored responses, sum of their overall scores, places in candidate pairs, chosen, rejected.

    Candidates are every two scored responses of a speech, on the test side the best and the worst alone (section 3.3).
    """
    by_speech: dict[str, list[dict]] = defaultdict(list)
    for score in scores:
        by_speech[score["speech_id"]].append(score)
    rows = {speech_id: row for row, speech_id in enumerate(sorted(by_speech.keys() | {pair["speech_id"] for pair in pairs}))}
    place = {model: column for column, model in enumerate(models)}
    counts = np.zeros((len(rows), len(models), 5))
    for speech_id, answered in by_speech.items():
        row = counts[rows[speech_id]]
        for score in answered:
            row[place[score["model"]], [RESPONSES, SCORE]] += 1, score["overall"]
        if split_of[speech_id] != "test":
            for score in answered:
                row[place[score["model"]], CANDIDATES] += len(answered) - 1
        else:
            best, worst = best_and_worst(answered)
            if best is not worst:
                row[[place[best["model"]], place[worst["model"]]], CANDIDATES] += 1
    for pair in pairs:
        for side, what in SIDES.items():
            if (model := pair[f"{side}_model"]) in place:
                counts[rows[pair["speech_id"]], place[model], what] += 1
    return counts


def ratio(sums: np.ndarray, places: list[int], what: int, per: int) -> np.ndarray:
    """Return the ratio of two counts of [..., models, 5] over some models; NaN where there is nothing to divide by."""
    chosen = sums[..., places, :].sum(-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return chosen[..., what] / np.where(chosen[..., per] == 0, np.nan, chosen[..., per])


def variance_between(sums: np.ndarray, groups: list[list[int]], what: int, per: int) -> np.ndarray:
    """Return the share of the variance of the models' rates, [..., models, 5], that lies between groups; each model counts alike."""
    rates = [np.stack([ratio(sums, [place], what, per) for place in places], -1) for places in groups]
    everything = np.concatenate(rates, -1)
    centre = everything.mean(-1)
    between = sum(group.shape[-1] * (group.mean(-1) - centre) ** 2 for group in rates)
    with np.errstate(invalid="ignore", divide="ignore"):
        return between / ((everything - centre[..., None]) ** 2).sum(-1)


def by_language(languages: Mapping[str, str], models: Iterable[str]) -> dict[str, list[str]]:
    """Return the models by the main language of their institution: English first, then by the number of models."""
    groups: dict[str, list[str]] = defaultdict(list)
    for model in models:
        if model in languages:
            groups[languages[model]].append(model)
    return dict(sorted(groups.items(), key=lambda item: (item[0] != ENGLISH, -len(item[1]), item[0])))


def splits(speeches: Iterable[dict], pairs: Iterable[dict]) -> dict[str, str]:
    """Return the side of the split of each speech; a run that starts at pairs knows those of its pairs."""
    return {row["speech_id"]: row["split"] for rows in (pairs, speeches) for row in rows}
