"""The judge assessed: agreement against scikit-learn and plain counts, an effect of the place found where it is and not where it is not."""

import json
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare
from sklearn.metrics import cohen_kappa_score

import assess_judge
from psychocounsel.consistency import APART, as_ratings, position_effects, self_consistency
from psychocounsel.data_tables import judge_consistency_table, judge_positions_table
from psychocounsel.metrics import cohen_kappa
from psychocounsel.records import dump_records, validator
from psychocounsel.tables import Missing

PRINCIPLES = ["empathy", "safety"]
NAMES = {"empathy": "Empathy", "safety": "Safety first"}


def rows(scores: np.ndarray, places: np.ndarray | None = None, judge: str = "j") -> list[dict]:
    """Rating records of [speeches, responses, principles] scores (0: none), each response shown at its place, [speeches, responses]."""
    return [
        {
            "speech_id": f"{speech:016x}",
            "response_id": f"{(speech * 7919 + response * 104729) % 2**40:016x}",  # the order of ids is not that of speeches
            "principle": principle,
            "judge": judge,
            "position": int(places[speech, response]) if places is not None else response + 1,
            "score": int(scores[speech, response, k]),
            "rationale": "",
        }
        for speech in range(scores.shape[0])
        for response in range(scores.shape[1])
        for k, principle in enumerate(PRINCIPLES)
        if scores[speech, response, k]
    ]


def ratings(scores: np.ndarray, places: np.ndarray | None = None):
    return as_ratings(rows(scores, places), PRINCIPLES)


def reverse(scores: np.ndarray) -> np.ndarray:
    """The places of responses that are shown in reverse order."""
    return np.tile(np.arange(scores.shape[1], 0, -1), (scores.shape[0], 1))


TWICE = st.tuples(st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**32 - 1), st.booleans())


@settings(max_examples=80)
@given(TWICE)
def test_agreement_is_that_of_plain_counts_and_of_scikit_learn(drawn):
    speeches, responses, seed, holes = drawn
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0 if holes else 1, 6, (2, speeches, responses, 2))
    found = self_consistency(ratings(first), ratings(second, reverse(second)), PRINCIPLES, 3, 10, 1)
    both = (first > 0) & (second > 0)
    assert found["ratings"] == both.sum()
    for name, cells in (("empathy", (..., 0)), ("safety", (..., 1)), ("all", (...,))):
        one, other, there = first[cells], second[cells], both[cells]
        one, other = one[there], other[there]
        scores = {measure: estimate["value"] for measure, estimate in found["scores"][name].items()}
        if len(one):
            assert scores["equal"] == pytest.approx((one == other).mean())
            assert scores["difference"] == pytest.approx(np.abs(one - other).mean())
            if len(set(one) | set(other)) > 1:
                assert scores["kappa"] == pytest.approx(cohen_kappa_score(one, other, labels=[1, 2, 3, 4, 5], weights="quadratic"))
            else:
                assert scores["kappa"] is None
        place = np.broadcast_to(np.arange(1, responses + 1)[None, :, None], first.shape)[cells]
        moved = [
            (a - b) * np.sign(responses + 1 - 2 * p)
            for a, b, p, t in zip(first[cells].flat, second[cells].flat, place.flat, there.flat, strict=True)
            if t and 2 * p != responses + 1
        ]
        assert scores["earlier_minus_later"] == (pytest.approx(np.mean(moved)) if moved else None)
    fates = {"kept": 0, "weaker": 0, "flipped": 0}
    for speech in range(speeches):
        whole = [r for r in range(responses) if both[speech, r].all()]
        for one, other in combinations(whole, 2):
            before = int(first[speech, one].sum() - first[speech, other].sum())
            after = int(second[speech, one].sum() - second[speech, other].sum()) * (1 if before > 0 else -1)
            if abs(before) >= 3:
                fates["kept" if after >= 3 else "flipped" if after < 0 else "weaker"] += 1
    labels = found["labels"]
    assert labels["pairs"] == sum(fates.values())
    for fate, count in fates.items():
        assert labels[fate]["value"] == (pytest.approx(count / labels["pairs"]) if labels["pairs"] else None)


def test_the_same_ratings_agree_fully_and_move_nothing():
    scores = np.random.default_rng(1).integers(1, 6, (30, 4, 2))
    found = self_consistency(ratings(scores), ratings(scores), PRINCIPLES, 3, 50, 1)
    for measures in found["scores"].values():
        assert measures["equal"] == measures["kappa"] == {"value": 1, "low": 1, "high": 1}
        assert measures["difference"]["value"] == 0
        assert measures["earlier_minus_later"] == {"value": None, "low": None, "high": None}
    assert found["labels"]["kept"] == {"value": 1, "low": 1, "high": 1}


def test_kappa_of_many_matrices_at_once():
    tables = np.random.default_rng(1).integers(0, 9, (7, 3, 5, 5)).astype(float)
    assert np.allclose(cohen_kappa(tables, APART**2)[4, 2], cohen_kappa(tables[4, 2], APART**2))
    assert np.isnan(cohen_kappa(np.zeros((5, 5)), APART**2))


def shuffled(rng, speeches: int, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of four responses at random places; with a bias, the first place is worth so much more."""
    worth = rng.normal(3, 1, (speeches, 1, 1)) + rng.normal(0, 0.7, (speeches, 4, 2))
    places = np.argsort(rng.random((speeches, 4)), 1) + 1
    return np.clip(np.round(worth + bias * (places == 1)[..., None]), 1, 5).astype(int), places


def test_an_effect_of_the_place_is_found_with_its_size():
    scores, places = shuffled(np.random.default_rng(3), 1500, 0.4)
    found = position_effects(ratings(scores, places), PRINCIPLES, 300, 1)
    assert (found["places"], found["speeches"]) == (4, 1500)
    for measured in found["scores"].values():
        first, *others = measured["places"]
        assert 0.2 < first["low"] < first["value"] < first["high"] < 0.4  # 0.3: the first place gains 0.4, the mean of four 0.1
        assert all(other["high"] < 0 for other in others)
        assert sum(place["value"] for place in measured["places"]) == pytest.approx(0)
        assert measured["p"] < 1e-6
    assert found["scores"]["empathy"]["mean"] == pytest.approx(scores[..., 0].mean())


def test_without_an_effect_the_test_is_rarely_sure():
    rng, sure = np.random.default_rng(5), 0
    for _ in range(60):
        scores, places = shuffled(rng, 120, 0)
        sure += position_effects(ratings(scores, places), PRINCIPLES, 1, 1)["scores"]["all"]["p"] < 0.05
    assert sure <= 8  # 3 expected, standard deviation 1.7


def test_only_complete_speeches_of_the_usual_size_count():
    scores, places = shuffled(np.random.default_rng(7), 40, 0)
    scores[0, 2, 1] = 0  # a rating on safety is missing
    records = rows(scores, places)
    few = [row | {"speech_id": "f" * 16, "response_id": f"{row['position']:016x}"} for row in records[:4] if row["position"] <= 2]
    found = position_effects(as_ratings([*records, *few], PRINCIPLES), PRINCIPLES, 20, 1)
    assert found["speeches"] == 40
    by_place = np.take_along_axis(scores, np.argsort(places, 1)[..., None], 1).astype(float)
    assert found["scores"]["empathy"]["p"] == pytest.approx(friedmanchisquare(*by_place[..., 0].T).pvalue)
    assert found["scores"]["safety"]["p"] == pytest.approx(friedmanchisquare(*by_place[1:, :, 1].T).pvalue)
    assert found["scores"]["safety"]["places"][0]["value"] == pytest.approx((by_place[1:, 0, 1] - by_place[1:, :, 1].mean(1)).mean())


def test_two_places_or_equal_scores_have_no_test():
    scores = np.random.default_rng(1).integers(1, 6, (20, 2, 2))
    assert position_effects(ratings(scores), PRINCIPLES, 5, 1)["scores"]["all"]["p"] is None
    assert position_effects(ratings(np.full((20, 4, 2), 3)), PRINCIPLES, 5, 1)["scores"]["all"]["p"] is None


@pytest.fixture
def assess(tmp_path, monkeypatch, capsys):
    """Run assess_judge on rating records; return its result, or the error."""

    def run(first: list[dict], **again: list[dict]):
        words = ["assess_judge.py", "--ratings", tmp_path / "ratings.jsonl", "--out", tmp_path / "judge.json"]
        dump_records(tmp_path / "ratings.jsonl", first, "rating")
        for order, records in again.items():
            dump_records(tmp_path / f"{order}.jsonl", records, "rating")
            words += ["--again", f"{order}={tmp_path / order}.jsonl"]
        settings = {"principles": PRINCIPLES, "min_gap": 1.0, "bootstrap": 20, "seed": 1}
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--settings", json.dumps(settings)])
        try:
            assess_judge.main()
        except SystemExit:
            return capsys.readouterr().err
        return validator("judge")(json.loads((tmp_path / "judge.json").read_text()))

    return run


def test_the_program_and_its_tables(assess):
    rng = np.random.default_rng(2)
    scores, places = shuffled(rng, 30, 0)
    other = np.clip(scores + rng.integers(-1, 2, scores.shape), 1, 5)
    result = assess(rows(scores, places), same=rows(other[:10], places[:10]), reversed=rows(other[:10], 5 - places[:10]))
    assert [(again["order"], again["speeches"], again["ratings"]) for again in result["again"]] == [("same", 10, 80), ("reversed", 10, 80)]
    assert result["positions"]["speeches"] == 30
    table = judge_consistency_table(result, NAMES, offline=True)
    cells = {(group, row.cells[0]): row.cells[1:] for group, row in table.rows()}
    equal = (scores[:10] == other[:10]).mean()
    assert cells["Equal scores (%)", "All principles"][0].value == pytest.approx(100 * equal)
    assert cells["Equal scores (%)", "Safety first"][1].value == pytest.approx(100 * (scores[:10] == other[:10])[..., 1].mean())
    assert isinstance(cells["Score at the earlier place minus at the later", "Empathy"][0], Missing)
    assert any("by construction" in note for note in table.notes)
    positions = judge_positions_table(result, NAMES, offline=True)
    assert positions.columns == ["Scores of", "Mean", "Place 1", "Place 2", "Place 3", "Place 4", "p"]
    assert [row.cells[0] for _, row in positions.rows()] == ["All principles", "Empathy", "Safety first"]


def test_without_a_sample_or_ratings_the_tables_say_so(assess):
    scores, places = shuffled(np.random.default_rng(2), 5, 0)
    result = assess(rows(scores, places))
    cells = [row.cells[1:] for _, row in judge_consistency_table(result, NAMES, offline=False).rows()]
    assert {cell for two in cells for cell in two} == {Missing("No sample was rated again in this run.")}
    for table in (judge_consistency_table(None, NAMES, offline=False), judge_positions_table(None, NAMES, offline=False)):
        assert all(isinstance(cell, Missing) for _, row in table.rows() for cell in row.cells[1:])


def test_ratings_that_do_not_belong_together_are_refused(assess):
    scores, places = shuffled(np.random.default_rng(2), 5, 0)
    first = rows(scores, places)
    assert "is this the reversed order?" in assess(first, same=rows(scores, 5 - places))
    assert "is this the same order?" in assess(first, reversed=first)
    assert "ratings of 'k', but" in assess(first, same=rows(scores, places, judge="k"))
    assert "expected ratings of one judge, found none" in assess([])
    assert "unknown principle 'clarity'" in assess([first[0] | {"principle": "clarity"}])
    assert "expected same=FILE or reversed=FILE" in assess(first, later=first)
    strangers = [row | {"response_id": "f" * 16, "speech_id": "f" * 16} for row in first[:2]]
    assert assess(first, same=first + strangers)["again"][0]["speeches"] == 5
