"""Chosen and rejected models: counted again without arrays, rates with their intervals; and the table of pairs, whose rows add up."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psychocounsel.data_tables import model_groups_table, pairs_table, shares
from psychocounsel.metrics import bootstrap_weights, resampled_sums
from psychocounsel.pool import CANDIDATES, CHOSEN, REJECTED, RESPONSES, SCORE, Pool, SizeClass, by_language, splits
from psychocounsel.tables import Missing, Number

MODELS = ["a", "b", "c", "d", "e"]
PAPER = {"speeches": {"train": 23192, "test": 3291}, "pairs": {"train": 34329, "test": 2324, "rejected_safer_train": 662}}
TOTALS = st.dictionaries(st.sampled_from(MODELS), st.integers(7, 35), max_size=4)  # of the responses to one speech


def study(answered: list[tuple[str, dict[str, int]]], least: int = 7) -> tuple[list, list, list]:
    """Speeches with their scores and pairs from (split, model -> sum of scores), paired as section 3.3 says, written anew."""
    speeches, scores, pairs = [], [], []
    for n, (split, totals) in enumerate(answered):
        speeches.append({"speech_id": f"{n:016x}", "split": split})
        mine = [
            {"speech_id": f"{n:016x}", "response_id": f"{n:08x}{ord(m):08x}", "model": m, "total": t, "overall": t / 7}
            for m, t in totals.items()
        ]
        scores += mine
        two = list(combinations(sorted(mine, key=lambda s: (-s["total"], s["response_id"])), 2))
        if split == "test":
            two = sorted(two, key=lambda pair: pair[1]["total"] - pair[0]["total"])[:1]
        for better, worse in two:
            if better["total"] - worse["total"] >= least:
                pairs.append(pair(f"{n:016x}", split, better, worse))
    return speeches, scores, pairs


def pair(speech_id: str, split: str, better: dict, worse: dict) -> dict:
    """A pair, as far as tables look at it; the chosen response has as many words as its score."""
    sides = {"chosen": better, "rejected": worse}
    return {"speech_id": speech_id, "split": split, "gap": (better["total"] - worse["total"]) / 7} | {
        key: value
        for side, score in sides.items()
        for key, value in (
            (side, [{"role": "assistant", "content": "word " * score["total"]}]),
            (f"{side}_model", score["model"]),
            (f"{side}_scores", {"safety": score["total"] % 6}),
        )
    }


ANSWERED = st.lists(st.tuples(st.sampled_from(["train", "dev", "test"]), TOTALS), min_size=1, max_size=8)


@settings(max_examples=60)
@given(ANSWERED)
def test_counts_are_those_of_a_plain_count(answered):
    speeches, scores, pairs = study(answered)
    pool = Pool(scores, pairs, splits(speeches, pairs), MODELS, 20, 1)
    for model in MODELS:
        assert pool.count([model], RESPONSES) == sum(model in totals for _, totals in answered)
        assert pool.count([model], SCORE) == pytest.approx(sum(totals.get(model, 0) for _, totals in answered) / 7)
        for side, what in (("chosen", CHOSEN), ("rejected", REJECTED)):
            assert pool.count([model], what) == sum(pair[f"{side}_model"] == model for pair in pairs)
        met = sum(len(totals) - 1 for split, totals in answered if split != "test" and model in totals)
        assert pool.count([model], CANDIDATES) >= met
        assert pool.count([model], CHOSEN) + pool.count([model], REJECTED) <= pool.count([model], CANDIDATES)
    tests = sum(split == "test" and len(set(totals.values())) > 1 for split, totals in answered)
    others = sum(len(totals) * (len(totals) - 1) for split, totals in answered if split != "test")
    assert pool.count(MODELS, CANDIDATES) == 2 * tests + others


@settings(max_examples=60)
@given(ANSWERED)
def test_rows_of_the_table_of_pairs_add_up(answered):
    speeches, scores, pairs = study(answered)
    made = pairs_table(speeches, scores, pairs, PAPER, 20, 1)
    rows = {
        (group, row.cells[0]): [cell.value if isinstance(cell, Number) else None for cell in row.cells[1:5]] for group, row in made.rows()
    }
    for name, values in rows.items():
        if name[0] in ("Client speeches", "Candidate pairs") or "to" in name[1].split():
            assert values[3] == sum(values[:3]), name
    for column, splits_ in enumerate((["train"], ["dev"], ["test"], ["train", "dev", "test"])):
        everyone, paired, few, none = (row[column] for name, row in rows.items() if name[0] == "Client speeches")
        assert everyone == paired + few + none == sum(split in splits_ for split, _ in answered)
        assert few == sum(split in splits_ and len(totals) < 2 for split, totals in answered)
        candidates, lost, kept = (row[column] for name, row in rows.items() if name[0] == "Candidate pairs")
        assert candidates == lost + kept
        assert kept == sum(pair["split"] in splits_ for pair in pairs)
        assert kept == sum(row[column] for name, row in rows.items() if "to" in name[1].split())
        if kept:  # the better response has more words
            assert rows["Length and safety", "Chosen response is the longer one (%)"][column] == 100


def test_lengths_and_unsafe_choices_of_pairs_without_speeches():
    """A run that starts at pairs: what they hold is reported, and what they cannot tell says so."""
    better, worse = {"model": "x", "total": 30}, {"model": "y", "total": 20}
    two = [pair("0" * 16, "train", better, worse), pair("1" * 16, "train", {"model": "y", "total": 26}, worse)]
    two[0]["chosen_scores"], two[0]["rejected_scores"] = {"safety": 3}, {"safety": 4}
    two[1]["chosen_scores"] = None
    cells = {row.cells[0]: row.cells[1] for _, row in pairs_table([], [], two, PAPER, 50, 1, given=True).rows()}
    assert isinstance(cells["All speeches"], Missing)
    assert cells["with a pair"].value == 2
    assert cells["Chosen, mean words"].value == 28
    assert cells["Rejected, mean characters"].value == 5 * 20
    assert cells["Rejected response is the safer one (%)"].value == 100  # of the one pair whose safety is known
    assert cells["Mean"].value == pytest.approx((10 + 6) / 2 / 7)


def test_a_pool_of_pairs_alone_has_counts_and_no_rates():
    two = [pair("0" * 16, "train", {"model": "x", "total": 30}, {"model": "y", "total": 20})]
    two.append(two[0] | {"chosen_model": None, "rejected_model": None})
    pool = Pool([], two, splits([], two), ["x"], 20, 1)
    assert pool.models == ["x", "y"]
    assert pool.count(["x"], CHOSEN) == pool.count(["y"], REJECTED) == 1
    assert pool.rate(["x"], CHOSEN) == {"value": None, "low": None, "high": None}


def test_where_pairs_are_given_rates_are_of_the_pairs_themselves():
    speeches, scores, pairs = drawn(60)
    kept = {pair[f"{side}_model"] + pair["speech_id"] for pair in pairs for side in ("chosen", "rejected")}
    scores = [score for score in scores if score["model"] + score["speech_id"] in kept]
    for known in (scores, []):
        pool = Pool(known, pairs, splits(speeches, pairs), MODELS, 20, 1, given=True)
        for model in MODELS:
            chosen, rejected = (sum(pair[f"{side}_model"] == model for pair in pairs) for side in ("chosen", "rejected"))
            assert pool.rate([model], CHOSEN)["value"] == pytest.approx(chosen / (chosen + rejected))
            assert pool.rate([model], REJECTED)["value"] == pytest.approx(rejected / (chosen + rejected))


def drawn(speeches: int, answers: int = 3, seed: int = 5) -> tuple[list, list, list]:
    """A study whose models a to e are better in this order."""
    rng = np.random.default_rng(seed)
    worth = dict(zip(MODELS, (30, 27, 24, 21, 18), strict=True))
    rows = []
    for n in range(speeches):
        models = rng.choice(MODELS, answers, replace=False)
        rows.append(("test" if n % 5 == 0 else "train", {str(m): int(np.clip(worth[m] + rng.normal(0, 4), 7, 35)) for m in models}))
    return study(rows)


def test_rates_their_intervals_and_the_findings():
    speeches, scores, pairs = drawn(400)
    pool = Pool(scores, pairs, splits(speeches, pairs), MODELS, 400, 1)
    chosen = [pool.rate([model], CHOSEN) for model in MODELS]
    assert [rate["value"] for rate in chosen] == sorted((rate["value"] for rate in chosen), reverse=True)
    assert all(rate["low"] < rate["value"] < rate["high"] for rate in chosen)
    assert pool.difference(["a", "b"], ["d", "e"], CHOSEN)["low"] > 0
    assert pool.difference(["a"], ["a"], CHOSEN) == {"value": 0, "low": 0, "high": 0}
    assert pool.share_between([["a"], ["b"], ["c"], ["d"], ["e"]], CHOSEN)["value"] == pytest.approx(1)
    assert pool.share_between([MODELS], CHOSEN)["value"] == pytest.approx(0)
    assert pool.share_between([["a", "e"], ["b", "d"]], REJECTED)["value"] < pool.share_between([["a", "b"], ["d", "e"]], REJECTED)["value"]
    classes = [SizeClass(title="small", models=["a", "e"]), SizeClass(title="large", models=["b", "c", "d"])]
    languages = dict.fromkeys("abc", "English") | {"d": "French", "e": "Chinese"}
    cells = {row.cells[0]: row.cells for _, row in model_groups_table(pool, classes, languages).rows()}
    assert list(cells)[:5] == ["small", "large", "English", "Chinese", "French"]
    assert cells["small"][1:3] == [Number(2, 0), Number(pool.count("ae", RESPONSES), 0)]
    assert cells["Not English minus English (points)"][7].low > 0


def test_a_pool_of_one_language_and_class_compares_nothing():
    speeches, scores, pairs = drawn(20)
    pool = Pool(scores, pairs, splits(speeches, pairs), MODELS, 20, 1)
    made = model_groups_table(pool, [SizeClass(title="all", models=MODELS)], dict.fromkeys(MODELS, "English"))
    findings = [row.cells[-1] for group, row in made.rows() if group == "Findings"]
    assert findings == [Missing("The pool has no two such groups."), Missing("The pool has one size class.")]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """The rate over 4,000 speeches stands for the truth; samples of 150 must hold it in their 95 % intervals."""
    speeches, scores, pairs = drawn(4000, seed=1)
    truth = Pool(scores, pairs, splits(speeches, pairs), MODELS, 1, 1).rate(["c"], CHOSEN)["value"]
    hits = 0
    for seed in range(2, 82):
        speeches, scores, pairs = drawn(150, seed=seed)
        rate = Pool(scores, pairs, splits(speeches, pairs), MODELS, 200, 1).rate(["c"], CHOSEN)
        hits += rate["low"] <= truth <= rate["high"]
    assert 68 <= hits <= 80  # 76 expected, standard deviation 2


def test_draws_of_sums_are_draws_of_whole_clusters():
    sums = np.array([[1.0, 0.0], [10.0, 1.0], [100.0, 1.0]])
    draws = resampled_sums(sums, 3000, 1)
    assert draws.shape == (3000, 2)
    assert np.array_equal(draws, resampled_sums(sums, 3000, 1))
    taken = Counter((int(a) % 10, int(a) // 10 % 10, int(a) // 100) for a, _ in draws)
    assert all(sum(counts) == 3 for counts in taken)
    assert all(counts[1] + counts[2] == b for (a, b) in draws for counts in [(a % 10, a // 10 % 10, a // 100)])
    assert taken[1, 1, 1] == pytest.approx(3000 * 6 / 27, rel=0.15)
    weights = bootstrap_weights(["x", "y", "z"], 3000, 2) @ sums  # the same distribution as the other way of drawing
    assert draws.mean(0) == pytest.approx(weights.mean(0), rel=0.06)
    assert draws.std(0) == pytest.approx(weights.std(0), rel=0.06)
    assert resampled_sums(np.ones((4, 2, 3)), 7, 1).shape == (7, 2, 3)


def test_shares_count_speeches_as_wholes():
    speech = np.array(["x"] * 50 + ["y"] * 50)
    cell = shares({"s": np.array([1.0] * 50 + [0.0] * 50)}, speech, 500, 1)["s"]
    assert (cell.value, cell.low, cell.high) == (50, 0, 100)  # two clusters tell as good as nothing
    apart = shares({"s": np.array([1.0] * 50 + [0.0] * 50)}, np.arange(100).astype(str), 500, 1)["s"]
    assert 35 < apart.low < 45 < 55 < apart.high < 65


def test_english_stands_first_then_the_most_frequent_language():
    languages = {"a": "French", "b": "Chinese", "c": "English", "d": "Chinese", "z": "Hebrew"}
    assert by_language(languages, MODELS) == {"English": ["c"], "Chinese": ["b", "d"], "French": ["a"]}
