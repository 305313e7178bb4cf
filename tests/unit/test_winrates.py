"""Win rates: both protocols against naive counts, topics, the length-controlled rate, lengths, and the program on files."""

import json
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import run_program
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from psychocounsel import winrates
from psychocounsel.records import validator

VERDICTS = st.dictionaries(
    st.integers(0, 500).map(lambda i: f"{i:016x}"),
    st.fixed_dictionaries({order: st.sampled_from(["win", "loss", "tie"]) for order in (True, False)}),
    min_size=1,
    max_size=30,
)
SPEECH = "{:016x}".format


@given(VERDICTS, st.integers(0, 9))
def test_paper_protocol_takes_one_order_and_gives_no_half_wins(verdicts, seed):
    scores = winrates.paper_scores(verdicts, seed)
    assert scores == {speech: float(orders[winrates.coin(seed, speech)] == "win") for speech, orders in verdicts.items()}
    assert set(scores.values()) <= {0.0, 1.0}


@given(VERDICTS)
def test_robust_protocol_scores_disagreement_half(verdicts):
    for speech, score in winrates.robust_scores(verdicts).items():
        orders = list(verdicts[speech].values())
        assert score == {("win", "win"): 1.0, ("loss", "loss"): 0.0}.get(tuple(orders), 0.5)


def test_the_coin_is_fair_and_seeded():
    heads = [winrates.coin(1, SPEECH(i)) for i in range(2000)]
    assert 0.45 < np.mean(heads) < 0.55
    assert heads == [winrates.coin(1, SPEECH(i)) for i in range(2000)]
    assert heads != [winrates.coin(2, SPEECH(i)) for i in range(2000)]


@given(VERDICTS)
def test_a_judge_who_always_prefers_the_first_wins_half_when_asked_twice(verdicts):
    biased = {speech: {True: "win", False: "loss"} for speech in verdicts}
    assert set(winrates.robust_scores(biased).values()) == {0.5}
    assert winrates.order_effects(biased) == {"agreement": 0.0, "first_share": 1.0}


@given(VERDICTS)
def test_swapping_policy_and_opponent_mirrors_the_robust_rate(verdicts):
    mirror = {"win": "loss", "loss": "win", "tie": "tie"}
    swapped = {speech: {order: mirror[orders[not order]] for order in orders} for speech, orders in verdicts.items()}
    total = np.add(list(winrates.robust_scores(verdicts).values()), list(winrates.robust_scores(swapped).values()))
    assert (total == 1).all()


def test_rates_by_topic_add_up_to_the_overall_rate():
    rng = np.random.default_rng(0)
    scores = {SPEECH(i): float(rng.choice([0, 0.5, 1])) for i in range(90)}
    topic_of = {speech: f"topic{i % 4}" for i, speech in enumerate(scores)}
    rates = winrates.win_rates(scores, topic_of, resamples=200, seed=1)
    topics = rates["topics"].values()
    assert sum(rate["n"] for rate in topics) == rates["overall"]["n"] == 90
    assert sum(rate["n"] * rate["win_rate"] for rate in topics) == pytest.approx(90 * rates["overall"]["win_rate"])
    assert all(rate["low"] <= rate["win_rate"] <= rate["high"] for rate in [*topics, rates["overall"]])
    normal = 1.96 * np.std(list(scores.values())) / np.sqrt(90)
    assert (rates["overall"]["high"] - rates["overall"]["low"]) / 2 == pytest.approx(normal, rel=0.2)


def lengths_and_scores(n: int = 600, at_zero: float = 0.0, slope: float = 2.0) -> tuple[dict, dict]:
    """Comparisons whose log-odds of a win are at_zero + slope * tanh(d / sd(d)), with longer answers on the policy's side."""
    rng = np.random.default_rng(5)
    difference = rng.normal(150, 200, n)
    odds = at_zero + slope * np.tanh(difference / difference.std(ddof=1))
    won = rng.random(n) < 1 / (1 + np.exp(-odds))
    lengths = {SPEECH(i): (int(1000 + d), 1000) for i, d in enumerate(difference)}
    return {SPEECH(i): float(w) for i, w in enumerate(won)}, lengths


def test_length_control_takes_out_a_liking_for_long_answers():
    scores, lengths = lengths_and_scores()
    assert np.mean(list(scores.values())) > 0.65
    got = winrates.length_controlled(scores, lengths, resamples=30, seed=1)
    assert got["win_rate"] == pytest.approx(0.5, abs=0.06)
    assert got["coefficient"] == pytest.approx(2, abs=0.5)
    assert got["low"] < got["win_rate"] < got["high"]
    assert not got["extrapolated"]


def test_length_control_equals_a_fit_by_hand_with_half_wins():
    scores, lengths = lengths_and_scores(120)
    scores |= {speech: 0.5 for speech in list(scores)[::3]}
    difference = np.array([lengths[s][0] - lengths[s][1] for s in sorted(scores)], dtype=float)
    points, feature = np.array([scores[s] for s in sorted(scores)]), np.tanh(difference / difference.std(ddof=1))

    def loss(theta: np.ndarray) -> float:
        odds = theta[0] + theta[1] * feature
        return float(np.sum(points * np.logaddexp(0, -odds) + (1 - points) * np.logaddexp(0, odds)) + theta[1] ** 2 / (2 * 100))

    by_hand = minimize(loss, np.zeros(2), method="BFGS").x
    got = winrates.length_controlled(scores, lengths, resamples=5, seed=1)
    assert got["win_rate"] == pytest.approx(1 / (1 + np.exp(-by_hand[0])), abs=1e-3)
    assert got["coefficient"] == pytest.approx(by_hand[1], abs=1e-2)


def test_length_control_is_alpacaevals_fit_without_its_own_data():
    """Its code's estimator: tanh of the standardised difference and a column of ones, an L1 penalty by liblinear, no intercept."""
    scores, lengths = lengths_and_scores(800, at_zero=-0.7)
    scores |= {speech: 0.5 for speech in list(scores)[::4]}
    difference = np.array([lengths[s][0] - lengths[s][1] for s in sorted(scores)], dtype=float)
    points, std = np.array([scores[s] for s in sorted(scores)]), difference.std(ddof=1)
    design = np.stack([np.tanh(difference / std), np.ones(len(points))], 1)
    model = LogisticRegression(C=100, l1_ratio=1, solver="liblinear", fit_intercept=False)
    model.fit(np.concatenate([design, design]), np.repeat([1, 0], len(points)), sample_weight=np.concatenate([points, 1 - points]))
    got = winrates.length_controlled(scores, lengths, resamples=1, seed=1)
    assert got["win_rate"] == pytest.approx(model.predict_proba([[0.0, 1.0]])[0, 1], abs=2e-3)


def test_at_equal_length_policy_and_opponent_share_all_points():
    scores, lengths = lengths_and_scores(200, at_zero=0.8)
    mirrored = {s: 1 - score for s, score in scores.items()}, {s: (other, own) for s, (own, other) in lengths.items()}
    rates = [winrates.length_controlled(*each, resamples=1, seed=1)["win_rate"] for each in ((scores, lengths), mirrored)]
    assert sum(rates) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("scores", "lengths", "reason"),
    [
        ([1, 1, 1], [(5, 1), (2, 1), (9, 4)], "every comparison was a win"),
        ([0, 0, 0], [(5, 1), (2, 1), (9, 4)], "every comparison was a loss"),
        ([1, 0, 1], [(5, 1), (6, 2), (7, 3)], "the same length"),
    ],
)
def test_length_control_says_why_it_has_no_value(scores, lengths, reason):
    named = {SPEECH(i): float(score) for i, score in enumerate(scores)}, {SPEECH(i): pair for i, pair in enumerate(lengths)}
    got = winrates.length_controlled(*named, resamples=5, seed=1)
    assert got["win_rate"] is None
    assert reason in got["reason"]


def test_extrapolation_is_told():
    scores, lengths = lengths_and_scores(100)
    longer = {speech: (2000 + i, 1000) for i, speech in enumerate(lengths)}
    assert winrates.length_controlled(scores, longer, resamples=3, seed=1)["extrapolated"]


def test_lengths_and_how_the_constraint_is_kept():
    answers = {
        "a": {"text": "one two three four", "target_words": 5, "finish_reason": "length"},
        "b": {"text": "one two  three\nfour", "target_words": 4, "finish_reason": "stop"},
    }
    opponent = {"a": {"text": "x " * 5}, "b": {"text": "x " * 4}}
    got = winrates.answer_lengths(answers, opponent)
    assert got == {
        "policy_words": 4.0,
        "opponent_words": 4.5,
        "cut_off": 0.5,
        "constraint": {"n": 2, "mean_relative_error": pytest.approx(0.1), "within_tenth": 0.5},
    }
    free = {name: {**answer, "target_words": None} for name, answer in answers.items()}
    assert winrates.answer_lengths(free, opponent)["constraint"] is None
    recorded = {name: {**answer, "finish_reason": None} for name, answer in answers.items()}
    assert winrates.answer_lengths(recorded, opponent)["cut_off"] is None


def speech(i: int, split: str = "test") -> dict:
    """A speech record."""
    facts = {"text": "x", "source": "s", "source_row": i, "source_key": None, "topic": "anxiety", "coarse_topic": f"topic{i % 2}"}
    return {"speech_id": SPEECH(i), **facts, "topic_from": "judge", "cluster_id": SPEECH(i), "split": split}


def judgement(i: int, first: bool, verdict: str, **changes) -> dict:
    """A judgement record."""
    facts = {"policy": "p", "opponent": "o", "setting": "free", "protocol": "together", "judge": "j", "principles": None, "rationale": "r"}
    return {"speech_id": SPEECH(i), **facts, "policy_first": first, "verdict": verdict, **changes}


def response(i: int, model: str, words: int) -> dict:
    """A response record."""
    facts = {"sample": 0, "finish_reason": "stop", "usage": None, "request_key": "0" * 64, "served_model": None, "target_words": None}
    return {"response_id": SPEECH(i), "speech_id": SPEECH(i), "model": model, "text": "word " * words, **facts}


def count(folder, files: dict[str, list[dict]], **settings) -> subprocess.CompletedProcess:
    """Run compute_win_rates.py on records."""
    words = []
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += [f"--{name}", str(folder / f"{name}.jsonl")]
    options = json.dumps({"policy": "p", "setting": "free", "seed": 1, "bootstrap": 10, **settings})
    return run_program("compute_win_rates", *words, "--out", folder / "out.json", "--settings", options)


@pytest.fixture
def files() -> dict[str, list[dict]]:
    """Six test speeches, one judged in one order only, one not at all."""
    judged = [judgement(i, first, "win" if i % 2 else "loss") for i in range(5) for first in (True, False)]
    return {
        "speeches": [*(speech(i) for i in range(6)), speech(6, "train")],
        "judgements": judged[:-1],
        "answers": [response(i, "p", 3 + i) for i in range(6)],
        "opponent": [response(i, "o", 5) for i in range(6)],
    }


def test_program_counts_speeches_that_were_not_judged(tmp_path, files):
    done = count(tmp_path, files)
    assert done.returncode == 0, done.stderr
    result = validator("win_rates")(json.loads((tmp_path / "out.json").read_text()))
    assert result["protocols"]["robust"]["overall"]["n"] == 4
    assert result["protocols"]["robust"]["overall"]["win_rate"] == 0.5
    rows = json.loads((tmp_path / "out.json.prov.json").read_text())["rows"]["speeches"]
    assert rows == {"in": 6, "out": 4, "dropped": {"judged in one order only": 1, "not judged": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["judgements"].append(judgement(6, True, "win")), "is no test speech"),
        (lambda f: f["judgements"].append(judgement(0, True, "win")), "was judged 2 times"),
        (lambda f: f["judgements"].append(judgement(5, True, "win", policy="q")), "alone"),
        (lambda f: f["judgements"].append(judgement(5, True, "win", protocol="one_by_one", principles={"a": "win"})), "alone"),
        (
            lambda f: f.update(judgements=[judgement(1, True, "win", policy="q")]),
            "judgements of 'q' in setting 'free'; expected those of 'p'",
        ),
        (lambda f: f["answers"].pop(0), "has 0 answers"),
        (lambda f: f["judgements"].clear(), "no judgements"),
    ],
)
def test_program_refuses_files_that_do_not_belong_together(tmp_path, files, change, message):
    change(files)
    done = count(tmp_path, files)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
