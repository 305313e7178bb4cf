"""A round of iterative DPO: a policy's answers ranked by a reward model, the best against the worst."""

import importlib
import json

import pytest
from toy_training import PROMPT, SPEC, a_sample, a_speech, an_id, program, toy_pair

from psychocounsel.records import dump_records, read_records

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers, whose versions are pinned


def test_rank_samples_takes_the_best_against_the_worst(reward_model, tmp_path):
    texts = [
        "I hear how hard this is. What would help you now?",
        "You must stop it. Just do more.",
        "You must do less.",
        "What would help you?",
    ]
    samples = [a_sample(n, i, text) for n in range(4) for i, text in enumerate(texts)]
    samples += [a_sample(4, i, "All alike.") for i in range(3)]  # speech 4 makes no pair, and speech 5 has no samples
    dump_records(tmp_path / "speeches.jsonl", [a_speech(n) for n in range(6)], "speech")
    dump_records(tmp_path / "samples.jsonl", samples, "response")
    settings = {"model": SPEC.model_dump(), "prompt": PROMPT, "policy": "p", "max_length": 320, "batch_size": 4}
    out = {key: tmp_path / f"{key}.jsonl" for key in ("pairs", "rewards", "dropped")}
    inputs = {"speeches": tmp_path / "speeches.jsonl", "samples": tmp_path / "samples.jsonl"}
    assert program("rank_samples", **inputs, reward_weights=reward_model / "model/manifest.json", **out, settings=settings) == 0

    reward_of = {row["response_id"]: row["reward"] for row in read_records(out["rewards"], "reward")}
    assert len(reward_of) == len(samples)
    assert len({reward_of[an_id("response", 4, i)] for i in range(3)}) == 1, "equal texts have equal rewards"
    pairs = read_records(out["pairs"], "pair")
    assert {pair["speech_id"] for pair in pairs} == {an_id("speech", n) for n in range(4)}
    for pair in pairs:
        mine = [reward_of[s["response_id"]] for s in samples if s["speech_id"] == pair["speech_id"]]
        assert reward_of[pair["chosen_id"]] == max(mine)
        assert reward_of[pair["rejected_id"]] == min(mine)
        assert pair["gap"] == max(mine) - min(mine) > 0
        assert pair["split"] == "train"
        assert pair["chosen_model"] == pair["rejected_model"] == "p"
        assert pair["prompt"][0]["content"].startswith("Answer the client.\n\nClient Speech: I feel bad")
    dropped = read_records(out["dropped"], "dropped_row")
    reasons = {an_id("speech", 4): "all answers equal", an_id("speech", 5): "no answer: all were empty or failed"}
    assert {row["detail"]: row["reason"] for row in dropped} == reasons


def test_a_reward_model_at_chance_stops_what_would_train_on_it(reward_model, data, tmp_path, capsys, caplog):
    """By the programs: half of the pairs name the other answer the better one, so that no model can rank them."""
    pairs = [toy_pair(n, "test") for n in range(200, 240)]
    for pair in pairs[::2]:
        pair.update(chosen=pair["rejected"], rejected=pair["chosen"])
    dump_records(tmp_path / "test.jsonl", pairs, "pair")
    weights, predictions, metrics = reward_model / "model/manifest.json", tmp_path / "predictions.jsonl", tmp_path / "metrics.json"
    scoring = {"model": SPEC.model_dump(), "max_length": 320, "batch_size": 4}
    assert program("score_pairs", pairs=tmp_path / "test.jsonl", weights=weights, out=predictions, settings={**scoring, "seed": 1}) == 0
    evaluation = {"name": "coin", "bootstrap": 100, "seed": 1}
    assert program("evaluate_rewards", pairs=tmp_path / "test.jsonl", predictions=predictions, out=metrics, settings=evaluation) == 0
    assert json.loads(metrics.read_text())["at_chance"]

    dump_records(tmp_path / "speeches.jsonl", [a_speech(1)], "speech")
    dump_records(tmp_path / "samples.jsonl", [a_sample(1, i, text) for i, text in enumerate(("I hear you.", "You must stop."))], "response")
    ranking = {
        "speeches": tmp_path / "speeches.jsonl", "samples": tmp_path / "samples.jsonl", "reward_weights": weights, "metrics": metrics,
        **{key: tmp_path / f"{key}.jsonl" for key in ("pairs", "rewards", "dropped")},
        "settings": {**scoring, "prompt": PROMPT, "policy": "p"},
    }  # fmt: skip
    capsys.readouterr()
    assert program("rank_samples", **ranking, stop_at_chance=[]) == 1
    told = capsys.readouterr().err
    for words in ("the reward model coin", "0.500", "on 40 test pairs", str(metrics), "reward_evaluation.stop_at_chance to false"):
        assert words in told
    assert not (tmp_path / "pairs.jsonl").exists()
    assert program("rank_samples", **ranking) == 0
    assert "trained on its rewards nevertheless" in caplog.text


def test_samples_with_one_reward_make_no_pair():
    rank_samples = importlib.import_module("rank_samples")
    two = [a_sample(1, 0, "a"), a_sample(1, 1, "b")]
    one, other = (sample["response_id"] for sample in two)
    assert rank_samples.no_pair(two, {one: 0.5, other: 0.5}) == "all rewards equal"
    assert rank_samples.no_pair(two, {one: 0.5, other: 0.4}) is None
    assert rank_samples.no_pair(two[:1], {one: 0.5}) == "one answer alone"
