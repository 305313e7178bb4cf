"""Metrics against scikit-learn, torchmetrics, SciPy and naive loops; the bootstrap against direct resampling; the program on files."""

import json
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import run_program
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from evaluate_rewards import EvaluationSettings, both_orders, ranker_metrics, reward_model_metrics
from psychocounsel import metrics
from psychocounsel.records import validator

MARGINS = st.lists(st.floats(-6, 6), min_size=1, max_size=60).map(np.array)
PROBABILITIES = st.lists(st.integers(0, 20).map(lambda k: k / 20), min_size=2, max_size=60).map(np.array)  # a coarse grid: many ties
PLAIN = EvaluationSettings(name="m", seed=3, bootstrap=50)


def sample(n: int, shift: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, labels and P(first better) of n pairs."""
    rng = np.random.default_rng(seed)
    margins, labels = rng.normal(shift, 1.5, n), rng.integers(0, 2, n).astype(float)
    return margins, labels, expit(np.where(labels == 1, margins, -margins))


def naive_ece(p: np.ndarray, y: np.ndarray, bins: int) -> float:
    """Expected calibration error, bin by bin."""
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i in range(len(p)) if low <= p[i] < high or (b == bins - 1 and p[i] == 1)]
        if inside:
            total += len(inside) / len(p) * abs(np.mean([y[i] for i in inside]) - np.mean([p[i] for i in inside]))
    return total


def test_equals_scikit_learn():
    margins, labels, first_better = sample(500)
    ones = np.ones(500)
    assert metrics.auc(first_better, labels, ones) == pytest.approx(roc_auc_score(labels, first_better))
    assert metrics.brier(margins, ones) == pytest.approx(brier_score_loss(labels, first_better))
    assert metrics.negative_log_likelihood(margins, ones) == pytest.approx(log_loss(labels, first_better))
    assert metrics.accuracy(margins, ones) == pytest.approx(np.mean((first_better > 0.5) == labels))


@pytest.mark.parametrize("bins", [1, 5, 10, 15])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 3.0])
def test_equals_torchmetrics(bins, shift):
    _, labels, first_better = sample(500, shift, seed=bins)
    p, y, ones = torch.tensor(first_better), torch.tensor(labels, dtype=torch.int64), np.ones(500)
    theirs = binary_calibration_error(p, y, n_bins=bins, norm="l1").item()
    assert metrics.expected_calibration_error(first_better, labels, ones, bins) == pytest.approx(theirs, abs=1e-6)
    assert metrics.auc(first_better, labels, ones) == pytest.approx(binary_auroc(p, y).item(), abs=1e-6)


@given(PROBABILITIES, st.randoms(use_true_random=False))
def test_auc_with_ties_and_weights_counts_pairs(probabilities, random):
    labels = np.array([float(random.random() < 0.5) for _ in probabilities])
    weights = np.array([random.randrange(4) for _ in probabilities])
    won = total = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            total += weights[i] * weights[j]
            won += weights[i] * weights[j] * ((probabilities[i] > probabilities[j]) + 0.5 * (probabilities[i] == probabilities[j]))
    got = metrics.auc(probabilities, labels, weights)
    assert np.isnan(got) if total == 0 else got == pytest.approx(won / total)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60).map(np.array), st.integers(1, 15), st.randoms(use_true_random=False))
def test_calibration_error_equals_a_loop(probabilities, bins, random):
    labels = np.array([float(random.random() < 0.5) for _ in probabilities])
    edges = np.abs(probabilities * bins - np.round(probabilities * bins))
    probabilities = probabilities[(edges > 1e-9) | (probabilities == 1)]  # k / bins may round to either side
    labels = labels[: len(probabilities)]
    if len(probabilities):
        got = metrics.expected_calibration_error(probabilities, labels, np.ones(len(labels)), bins)
        assert got == pytest.approx(naive_ece(probabilities, labels, bins))


@given(MARGINS)
def test_a_tie_is_an_error_or_half(margins):
    ones = np.ones(len(margins))
    assert metrics.accuracy(margins, ones) == pytest.approx(np.mean(margins > 0))
    assert metrics.accuracy(margins, ones, tie=0.5) == pytest.approx(np.mean((margins > 0) + 0.5 * (margins == 0)))


@given(MARGINS)
def test_temperature_minimises_the_likelihood(margins):
    temperature = metrics.fitted_temperature(margins)
    if temperature is None:
        assert margins.mean() <= 0 or margins.min() > -1e-9
        return
    nll = lambda t: float(metrics.negative_log_likelihood(margins / t, np.ones(len(margins))))  # noqa: E731
    best = minimize_scalar(lambda log_t: nll(np.exp(log_t)), bounds=(-30, 30), method="bounded")
    assert nll(temperature) <= best.fun + 1e-9


def test_temperature_recovers_the_scale_of_calibrated_margins():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 200_000)
    margins = np.where(rng.random(len(logits)) < expit(logits), logits, -logits)
    assert metrics.fitted_temperature(3 * margins) == pytest.approx(3, rel=0.03)


def test_integer_weights_repeat_items():
    margins, labels, first_better = sample(40)
    weights = np.random.default_rng(2).integers(0, 4, 40)
    index = np.repeat(np.arange(40), weights)
    ones = np.ones(len(index))
    assert metrics.accuracy(margins, weights) == pytest.approx(metrics.accuracy(margins[index], ones))
    assert metrics.auc(first_better, labels, weights) == pytest.approx(metrics.auc(first_better[index], labels[index], ones))
    ece = metrics.expected_calibration_error
    assert ece(first_better, labels, weights, 10) == pytest.approx(ece(first_better[index], labels[index], ones, 10))


def test_replicates_at_once_equal_replicates_one_by_one():
    margins, labels, first_better = sample(60)
    weights = metrics.bootstrap_weights([f"s{i // 2}" for i in range(60)], 20, seed=1)
    for metric in (
        lambda w: metrics.accuracy(margins, w),
        lambda w: metrics.auc(first_better, labels, w),
        lambda w: metrics.expected_calibration_error(first_better, labels, w, 10),
        lambda w: metrics.brier(margins, w),
        lambda w: metrics.negative_log_likelihood(margins, w),
    ):
        np.testing.assert_allclose(metric(weights), [metric(row) for row in weights])


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.integers(0, 5))
def test_bootstrap_takes_whole_clusters(clusters, seed):
    weights = metrics.bootstrap_weights(clusters, 25, seed)
    names = sorted(set(clusters))
    for row in weights:
        taken = {name: {int(w) for w, cluster in zip(row, clusters, strict=True) if cluster == name} for name in names}
        assert all(len(counts) == 1 for counts in taken.values())
        assert sum(next(iter(counts)) for counts in taken.values()) == len(names)


def test_bootstrap_does_not_depend_on_the_order_of_items():
    clusters = ["b", "a", "c", "a"]
    weights = dict(zip(clusters, metrics.bootstrap_weights(clusters, 10, 7).T.tolist(), strict=True))
    turned = dict(zip(clusters[::-1], metrics.bootstrap_weights(clusters[::-1], 10, 7).T.tolist(), strict=True))
    assert weights == turned


def test_interval_agrees_with_direct_resampling_of_speeches():
    margins, _, _ = sample(300, 0.5)
    clusters = [f"s{i // 3}" for i in range(300)]
    got = metrics.estimate(lambda w: metrics.accuracy(margins, w), metrics.bootstrap_weights(clusters, 4000, 1))
    rng, by_cluster = np.random.default_rng(9), margins.reshape(100, 3) > 0
    direct = [by_cluster[rng.integers(0, 100, 100)].mean() for _ in range(4000)]
    assert [got["low"], got["high"]] == pytest.approx(np.quantile(direct, [0.025, 0.975]), abs=0.015)
    assert got["low"] <= got["value"] <= got["high"]


def test_interval_of_a_calibrated_models_ece_holds_its_value():
    rng = np.random.default_rng(4)
    p = rng.random(400)
    y = (rng.random(400) < p).astype(float)
    weights = metrics.bootstrap_weights([str(i) for i in range(400)], 500, 1)
    got = metrics.estimate(lambda w: metrics.expected_calibration_error(p, y, w, 10), weights, centred=True)
    assert 0 <= got["low"] <= got["value"] <= got["high"]


def test_undefined_metric_is_null():
    weights = metrics.bootstrap_weights(["a", "b"], 10, 1)
    got = metrics.estimate(lambda w: metrics.auc(np.array([0.2, 0.8]), np.ones(2), w), weights)
    assert got == {"value": None, "low": None, "high": None}


def test_benchmark_scores_follow_the_authors_definition():
    sections = {"Chat": {"easy": 100, "hard": 300}, "Reasoning": {"math": 984, "cpp": 492, "go": 492}, "Safety": {"refusals": 10}}
    right = {"easy": [True, False], "hard": [True], "math": [False, True, True, True], "cpp": [True], "go": [False]}
    got = metrics.benchmark_scores(right, sections, 20, seed=1)
    assert got["scores"] == {"Chat": pytest.approx((0.5 * 100 + 300) / 400), "Reasoning": pytest.approx(0.5 * 0.75 + 0.25 * 1 + 0.25 * 0)}
    assert got["overall"]["value"] == pytest.approx(np.mean(list(got["scores"].values())))
    assert got["missing"] == ["refusals"]


def test_the_interval_of_the_benchmark_agrees_with_direct_resampling_of_each_subset():
    rng = np.random.default_rng(3)
    right = {name: (rng.random(n) < share).tolist() for name, n, share in (("easy", 60, 0.9), ("hard", 40, 0.5), ("math", 80, 0.7))}
    sections = {"Chat": {"easy": 60, "hard": 40}, "Reasoning": {"math": 200}}
    direct = []
    for _ in range(4000):
        easy, hard, math = (np.mean(rng.choice(verdicts, len(verdicts))) for verdicts in right.values())
        direct.append(((60 * easy + 40 * hard) / 100 + math) / 2)
    got = metrics.benchmark_scores(right, sections, 4000, seed=1)["overall"]
    assert [got["low"], got["high"]] == pytest.approx(np.quantile(direct, [0.025, 0.975]), abs=0.008)
    assert got["low"] <= got["value"] <= got["high"]


def predictions(n: int, shift: float) -> list[dict]:
    """Predictions of n pairs of n / 2 speeches."""
    margins, labels, _ = sample(n, shift)
    return [
        {"pair_id": f"{i:016x}", "speech_id": f"{i // 2:016x}", "reward_chosen": 2 + m, "reward_rejected": 2.0, "chosen_first": bool(y)}
        for i, (m, y) in enumerate(zip(margins, labels, strict=True))
    ]


def test_a_model_at_chance_is_flagged():
    assert reward_model_metrics(predictions(200, 0.0), PLAIN)["at_chance"]
    assert not reward_model_metrics(predictions(200, 2.0), PLAIN)["at_chance"]
    assert reward_model_metrics(predictions(200, -2.0), PLAIN)["at_chance"], "worse than a coin is no better than one"


def test_order_of_predictions_changes_nothing():
    rows = predictions(60, 1.0)
    first, second = reward_model_metrics(rows, PLAIN), reward_model_metrics(rows[::-1], PLAIN)
    assert first["accuracy"] == pytest.approx(second["accuracy"])
    assert first["ece"] == pytest.approx(second["ece"])


def ranking(pair: int, chosen_first: bool, better: int | str) -> dict:
    """A ranker's raw answer."""
    raw = json.dumps({"better": better, "rationale": "because"})
    facts = {"pair_id": f"{pair:016x}", "speech_id": f"{pair:016x}", "ranker": "r", "usage": None, "request_key": "0" * 64}
    return {**facts, "chosen_first": chosen_first, "raw": raw}


def test_ranker_counts_both_orders():
    rankings = {
        "both": [ranking(0, True, 1), ranking(0, False, 2)],
        "first": [ranking(1, True, 1), ranking(1, False, 1)],
        "wrong": [ranking(2, True, 2), ranking(2, False, 1)],
        "once": [ranking(3, True, 1)],
        "broken": [ranking(4, True, 1), {**ranking(4, False, 1), "raw": "The first one."}],
    }
    verdicts, lost = both_orders(rankings)
    assert lost == {"answered in one order only": 1, "unreadable answer": 1}
    got = ranker_metrics(list(verdicts.values()), PLAIN)
    assert got["accuracy"]["value"] == pytest.approx(0.5)  # (1 + 1/2 + 0) / 3
    assert got["orders"]["consistent_right"]["value"] == pytest.approx(1 / 3)
    assert got["orders"]["first_share"]["value"] == pytest.approx((1 + 2 + 1) / 6)
    assert got["ties"] == 1


def pair_record(prediction: dict, subset: str | None = None) -> dict:
    """A pair for a prediction."""
    message = [{"role": "user", "content": "x"}]
    fixed = {"split": "test", "prompt": message, "chosen": message, "rejected": message, "chosen_id": "0" * 16, "rejected_id": "1" * 16}
    unknown = dict.fromkeys(("chosen_model", "rejected_model", "chosen_scores", "rejected_scores", "gap"))
    return {"pair_id": prediction["pair_id"], "speech_id": prediction["speech_id"], **fixed, **unknown, "subset": subset}


def evaluate(folder, pairs: list[dict], rows: list[dict], **extra) -> subprocess.CompletedProcess:
    """Run evaluate_rewards.py on files in a folder."""
    for name, records in (("pairs", pairs), ("predictions", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--pairs", folder / "pairs.jsonl", "--predictions", folder / "predictions.jsonl", "--out", folder / "metrics.json"]
    options = json.dumps({"name": "m", "seed": 1, "bootstrap": 20, **extra})
    return run_program("evaluate_rewards", *words, "--settings", options)


def test_program_counts_what_it_leaves_out(tmp_path):
    rows = predictions(20, 1.0)
    done = evaluate(tmp_path, [pair_record(row, "math") for row in rows], rows[:-3], sections={"Reasoning": {"math": 5, "code": 5}})
    assert done.returncode == 0, done.stderr
    result = validator("metrics")(json.loads((tmp_path / "metrics.json").read_text()))
    assert (result["pairs"], result["n"]) == (20, 17)
    assert result["sections"]["missing"] == ["code"]
    provenance = json.loads((tmp_path / "metrics.json.prov.json").read_text())
    assert provenance["rows"]["pairs"] == {"in": 20, "out": 17, "dropped": {"no verdict": 3}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs, rows: (pairs[1:], rows), "not in the file of pairs"),
        (lambda pairs, rows: (pairs, [*rows, rows[0]]), "stands 2 times"),
        (lambda pairs, rows: (pairs, []), "nothing to measure"),
    ],
)
def test_program_refuses_files_that_do_not_belong_together(tmp_path, change, message):
    rows = predictions(4, 1.0)
    done = evaluate(tmp_path, *change([pair_record(row) for row in rows], rows))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_subset_without_a_section_is_refused(tmp_path):
    rows = predictions(4, 1.0)
    done = evaluate(tmp_path, [pair_record(row, "chess") for row in rows], rows, sections={"Chat": {"easy": 1}})
    assert done.returncode == 1
    assert "'chess'" in done.stderr
