"""The monitor of over-optimisation: its measures against other ways to them, where reward and win rate part, what is shown."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_training import PROMPT, RECIPE, SPEC, a_sample, a_speech, an_id, program, reward_training, toy_pair

from psychocounsel import rewards, tables
from psychocounsel.errors import UserError
from psychocounsel.monitor import repetition, summarise
from psychocounsel.monitor_views import join_points, monitor_table, plot_checkpoints, plot_monitor
from psychocounsel.records import dump_records, validator

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of trl's use of transformers

# --- measures


@given(st.lists(st.sampled_from(["a", "B", "b", "c"]), max_size=12), st.integers(1, 5))
def test_repetition_counts_what_stood_there_before(words, n):
    seen, repeated = [], 0
    grams = [[word.lower() for word in words[i : i + n]] for i in range(max(len(words) - n + 1, 0))]
    for gram in grams:
        repeated += gram in seen
        seen.append(gram)
    assert repetition(" ".join(words), n) == pytest.approx(repeated / len(grams) if grams else 0)


def an_answer(number: int, **changes) -> dict:
    """What an answer measures."""
    names = {"speech_id": an_id("speech", number), "response_id": an_id("response", number)}
    facts = {"reward": float(number), "opponent_reward": 2.0, "tokens": 10 + number, "log_ratio": 1.0, "kl": 2.0 + number}
    return {**names, **facts, "words": 7, "truncated": number == 0, "repetition": 0.25, **changes}


def test_measures_are_means_and_their_order_does_not_matter():
    answers = [an_answer(number) for number in range(5)]
    found = summarise(answers, resamples=200, seed=3)
    assert found["reward"]["value"] == 2.0
    assert found["preferred"]["value"] == (2 + 0.5) / 5, "two rewards are above the opponent's and one equals it"
    assert found["truncated"]["value"] == 0.2
    assert found["kl_per_token"]["value"] == pytest.approx(sum(2 + n for n in range(5)) / sum(10 + n for n in range(5)))
    assert found["reward"]["low"] < 2.0 < found["reward"]["high"]
    assert found["words"] == {"value": 7.0, "low": 7.0, "high": 7.0}
    assert found == summarise(answers[::-1], resamples=200, seed=3)


# --- reading, with the micro model


@pytest.fixture(scope="module")
def models(data):
    """The micro model, and one that has moved away from it."""
    base, moved = (rewards.load_language_model(SPEC, data / "base") for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return base, moved, rewards.load_tokenizer(SPEC, data / "base")


def test_what_was_generated_ends_with_its_turn_or_its_last_word(models):
    tokenizer = models[2]
    prompt = toy_pair(1)["prompt"]
    for finished, end in ((True, "<|im_end|>"), (False, "")):
        asked, answer = rewards.generated_ids(tokenizer, SPEC, prompt, "I hear you.", finished=finished)
        assert tokenizer.decode(answer) == f"I hear you.{end}"
        assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n")


def test_divergences_against_a_loop_over_the_vocabulary(models):
    base, moved, tokenizer = models
    read = [
        rewards.generated_ids(tokenizer, SPEC, toy_pair(n)["prompt"], toy_pair(n)["chosen"][0]["content"], finished=bool(n % 2))
        for n in range(5)
    ]
    by_hand = []
    for prompt, answer in read:
        p, q = (torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].double(), -1) for model in (moved, base))
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        ratio = sum((p[place] - q[place])[token].item() for place, token in zip(places, answer, strict=True))
        kl = sum(sum(math.exp(a) * (a - b) for a, b in zip(p[place].tolist(), q[place].tolist(), strict=True)) for place in places)
        by_hand.append((ratio, kl))
    for batch_size in (1, 3):
        found = rewards.divergences(moved, base, read, tokenizer.pad_token_id, batch_size)
        assert np.array(found) == pytest.approx(np.array(by_hand), rel=1e-3, abs=1e-3)
    assert all(kl > 0 for _, kl in by_hand)
    same = rewards.divergences(base, base, read, tokenizer.pad_token_id, 2)
    assert np.array(same) == pytest.approx(0, abs=1e-4), "a model is no way from itself"


def test_the_log_ratio_estimates_the_same_divergence(models):
    """Over answers that the moved model samples, both have the same mean, within the noise of the plain one."""
    base, moved, tokenizer = models
    prompt = rewards.chat_ids(tokenizer, SPEC, rewards.conversation(SPEC, toy_pair(1)["prompt"]), add_generation_prompt=True)
    torch.manual_seed(2)
    sampled = moved.generate(
        torch.tensor([prompt] * 300), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=4, eos_token_id=-1
    )
    read = [(prompt, row[len(prompt) :].tolist()) for row in sampled]
    log_ratio, kl = np.array(rewards.divergences(moved, base, read, tokenizer.pad_token_id, 64)).T
    error = (log_ratio - kl).std() / np.sqrt(len(read))
    assert abs(log_ratio.mean() - kl.mean()) < 4 * error
    assert kl.std() < log_ratio.std(), "less noise is why it is used"


# --- the program


@pytest.fixture(scope="module")
def assessed(data, tmp_path_factory) -> Path:
    """A trained reward model, two rounds of one checkpoint, answers, and the assessment of the second."""
    folder = tmp_path_factory.mktemp("assessed")
    assert program("train_reward_model", **reward_training(data, folder / "reward")) == 0
    weights = data / "base/manifest.json"
    for number in (1, 2):
        out = folder / f"round-{number}"
        settings = {"model": SPEC.model_dump(), "recipe": RECIPE | {"beta": 0.1}, "seed": number, "checkpoints": 1}
        files = {"resume_dir": out / "work", "checkpoints": out / "checkpoints", "out": out / "checkpoints.json", "log": out / "log.json"}
        assert program("train_policy", pairs=data / "train.jsonl", weights=weights, **files, settings=settings) == 0
        weights = out / "checkpoints/1/manifest.json"
    dump_records(folder / "speeches.jsonl", [a_speech(n) for n in range(6)], "speech")
    texts = ["I hear how hard this is. What would help you now?", "You must stop it. Just do more."]
    mine = [a_sample(n, 0, texts[0]) | {"finish_reason": ("stop", "length")[n % 2]} for n in range(5)]
    theirs = [a_sample(n, 1, texts[1]) for n in range(1, 6)]
    dump_records(folder / "answers.jsonl", mine, "response")
    dump_records(folder / "opponent.jsonl", theirs, "response")
    half = {"value": 0.9, "low": 0.8, "high": 1.0}
    facts = {"name": "rm", "pairs": 9, "n": 9, "kind": "reward_model", "speeches": 9, "accuracy": half, "at_chance": False, "ties": 0}
    facts |= dict.fromkeys(("accuracy_ties_half", "auc", "ece", "brier", "nll"), half)
    (folder / "metrics.json").write_text(json.dumps(facts | dict.fromkeys(("temperature", "orders", "sections"))))
    assert program("assess_checkpoint", **assessment(folder, data)) == 0
    return folder


def assessment(folder: Path, data: Path, **changes) -> dict:
    """Arguments of assess_checkpoint."""
    settings = {
        "policy": "p", "checkpoint": 2, "name": "p.checkpoint-2", "model": SPEC.model_dump(), "prompt": PROMPT,
        "reward_model": SPEC.model_dump() | {"name": "rm"}, "max_length": 320, "batch_size": 4, "bootstrap": 50, "seed": 1,
    }  # fmt: skip
    return {
        "speeches": folder / "speeches.jsonl", "answers": folder / "answers.jsonl", "opponent": folder / "opponent.jsonl",
        "checkpoints": [folder / f"round-{n}/checkpoints.json" for n in (1, 2)], "weights": folder / "round-2/checkpoints/1/manifest.json",
        "base": data / "base/manifest.json", "reward_weights": folder / "reward/model/manifest.json", "metrics": folder / "metrics.json",
        "out": folder / "out.json", "settings": settings,
    } | changes  # fmt: skip


def test_a_checkpoint_is_assessed(assessed):
    result = validator("assessment")(json.loads((assessed / "out.json").read_text()))
    assert (result["step"], result["n"], result["reward_model_at_chance"]) == (12, 4, False), "six steps a round"
    rows = json.loads((assessed / "out.json.prov.json").read_text())["rows"]["speeches"]
    assert rows == {"in": 6, "out": 4, "dropped": {"no answer of the checkpoint": 1, "no answer of the opponent": 1}}
    assert result["measures"]["preferred"]["value"] == 1.0, "the reward model has learned which of the two is better"
    assert result["measures"]["truncated"]["value"] == 0.5
    assert result["measures"]["kl"]["low"] > 0
    for row in result["answers"]:
        assert row["words"] == 11
        assert (row["repetition"], row["truncated"]) == (0.0, int(row["speech_id"] in {an_id("speech", n) for n in (1, 3)}))


def test_a_checkpoint_of_another_place_is_refused(assessed, data, tmp_path, capsys):
    first = assessment(assessed, data, weights=assessed / "round-1/checkpoints/1/manifest.json", out=tmp_path / "o.json")
    assert program("assess_checkpoint", **first) == 1
    assert "not the model that --checkpoints lists as checkpoint 2" in capsys.readouterr().err
    third = assessment(assessed, data, out=tmp_path / "o.json")
    third["settings"] |= {"checkpoint": 3}
    assert program("assess_checkpoint", **third) == 1
    assert "2 checkpoints are listed, so there is no checkpoint 3" in capsys.readouterr().err


def test_the_base_is_assessed_as_checkpoint_0(assessed, data, tmp_path, capsys):  # noqa: F811
    """It is no way from itself, and its rewards are those that the same answers have at any checkpoint."""
    start = assessment(assessed, data, checkpoints=[], weights=None, out=tmp_path / "start.json")
    start["settings"] |= {"checkpoint": 0, "name": "micro.checkpoint-0"}
    assert program("assess_checkpoint", **{name: value for name, value in start.items() if value}) == 0
    result, later = (validator("assessment")(json.loads(file.read_text())) for file in (start["out"], assessed / "out.json"))
    assert (result["step"], result["name"]) == (0, "micro.checkpoint-0")
    for measure in ("kl", "kl_per_token", "log_ratio"):
        assert result["measures"][measure] == {"value": 0.0, "low": 0.0, "high": 0.0}
    same = ("reward", "opponent_reward", "tokens", "words", "truncated", "repetition")
    assert [[row[key] for key in same] for row in result["answers"]] == [[row[key] for key in same] for row in later["answers"]]
    for changes in ({"weights": None}, {"settings": start["settings"]}):
        wrong = {name: value for name, value in assessment(assessed, data, **changes).items() if value}
        assert program("assess_checkpoint", **wrong) == 1
        assert "checkpoint 0 is the base, which --base names" in capsys.readouterr().err


# --- what is shown


def a_point(policy: str, number: int, reward: float, rate: tuple[float, float, float], chance: bool = False) -> tuple[dict, dict]:
    """An assessment and the win rates of the same checkpoint."""
    answers = [an_answer(n, reward=reward + n, kl=number + 0.1 * n) for n in range(4)]
    name = f"{policy}.checkpoint-{number}"
    facts = {
        "policy": policy,
        "checkpoint": number,
        "name": name,
        "step": 100 * number,
        "reward_model": "rm",
        "reward_model_at_chance": chance,
    }
    overall = {"win_rate": rate[1], "n": 4, "low": rate[0], "high": rate[2]}
    protocols = {"robust": {"overall": overall, "topics": {}}}
    measures = summarise(answers, 20, 1)
    return facts | {"n": 4, "measures": measures, "answers": answers}, {"policy": name, "setting": "free", "protocols": protocols}


def joined(*points: tuple[dict, dict]):
    return join_points([assessment for assessment, _ in points], [rates for _, rates in points])


HUMP = [a_point("p", k, reward, rate) for k, reward, rate in (
    (1, 0.0, (0.3, 0.4, 0.5)), (2, 1.0, (0.6, 0.7, 0.8)), (10, 2.0, (0.5, 0.6, 0.7)),
    (11, 3.0, (0.1, 0.2, 0.3)), (12, 0.5, (0.1, 0.2, 0.3)),
)]  # fmt: skip


def rows_of(points: dict) -> list[dict]:
    table = monitor_table(points, ["q", "p"], str.upper, "O", "J")
    return list(csv.DictReader(io.StringIO(tables.to_csv(table))))


def test_the_table_says_where_reward_and_win_rate_part():
    rows = rows_of(joined(*HUMP, a_point("q", 1, 0.0, (0.1, 0.2, 0.3), chance=True)))
    assert [(row["group"], row["Checkpoint"], row["Step"]) for row in rows] == [
        ("Q", "1", "100"), ("P", "1", "100"), ("P", "2", "200"), ("P", "10", "1000"), ("P", "11", "1100"), ("P", "12", "1200"),
    ]  # fmt: skip
    assert "Rewards of RM, which is not shown to rank better than chance." in rows[0]["notes"]
    parted = [row["notes"] for row in rows[1:]]
    assert parted[:2] == ["", ""], "up to the highest win rate nothing has parted"
    assert "than at step 200" in parted[2]
    assert "overlap, so it may be chance" in parted[2]
    assert "do not overlap" in parted[3]
    assert parted[4] == "", "without more reward there is no over-optimisation"
    assert float(rows[4]["Win rate (%)"]) == 20.0
    assert float(rows[4]["Reward low"]) <= float(rows[4]["Reward"]) == 4.5


def test_an_assessment_without_win_rates_is_refused():
    with pytest.raises(UserError, match="no win rates of p.checkpoint-1"):
        join_points([HUMP[0][0]], [])


def test_the_figures_draw_every_policy(tmp_path):
    from matplotlib import pyplot

    points = joined(*HUMP, *(a_point(name, 1, 0.0, (0.1, 0.2, 0.3)) for name in "abcq"))
    figure = plot_monitor(points, ["p", "q", "a", "b", "c"], str.upper, "O", "J")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["P", "Q", "A", "B", "C", "Mean reward", "KL to the base (nats)", "Words", "Cut off (%)", "Repeated 4-grams (%)", ""]
    drawn = figure.axes[0].lines[0].get_xdata()
    assert list(drawn) == sorted(drawn), "in the order of training, here that of the distance"
    figure.savefig(tmp_path / "monitor.png")
    figure = plot_checkpoints(points, ["p", "q"], str.upper, "O", "J")
    arms, (legend,) = figure.axes[0], figure.legends
    assert list(arms.lines[0].get_xdata()) == [100, 200, 1000, 1100, 1200]
    assert [text.get_text() for text in legend.get_texts()] == ["P", "Q"]
    assert legend.get_title().get_text().startswith("judged by J on")
    pyplot.close("all")
    with pytest.raises(UserError, match="none of 'z'"):
        plot_checkpoints(points, ["z"], str.upper, "O", "J")
