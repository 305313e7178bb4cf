"""A run that starts at published pairs: what they hold becomes the run's own, once, on one side, and what does not fit is told."""

import csv
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_program
from tests.fakes.published_data import PRINCIPLES, published_rows, write_rows

from psychocounsel.config import load_study, read_config
from psychocounsel.records import dump_records, read_records
from psychocounsel.texts import normalise, speech_id
from psychocounsel.workflow import Workflow
from read_pairs import SIDES, GivenPair, drop_contradicting, drop_on_several_sides, first_sides
from read_pairs import main as read_pairs
from split_speeches import SplitSettings, split_sides

NEAR = {"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 8, "permutations": 128}
ALIASES = {"meta-llama/llama-3.1-8b-instruct": "llama-3.1-8b-instruct", "gpt-4o": "gpt-4o", "gemma-2-9b-it": "gemma-2-9b-it"}
KINDS = {"speeches": "unique_speech", "responses": "response", "scores": "score", "pairs": "pair", "dropped": "dropped_row"}


@pytest.fixture
def read(tmp_path, monkeypatch, capsys):
    """Run read_pairs on rows by side; return its outputs by kind and its accounts, or its message."""

    def run(sides: dict, adapter: str = "pairs_psychocounsel", columns: dict | None = None, **more):
        sources, raws = [], []
        for side, rows in sides.items():
            if adapter == "pairs_psychocounsel":
                raws.append(write_rows(tmp_path / f"{side}.parquet", rows))
            else:
                raws.append(tmp_path / f"{side}.jsonl")
                raws[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
            source = {"source": f"published-{side}", "adapter": adapter, "columns": columns, "split": None if side == "none" else side}
            sources.append(source)
        out = {name: tmp_path / f"{name}.jsonl" for name in KINDS}
        words = [word for name, path in out.items() for word in (f"--{name}", str(path))]
        facts = {"sources": sources, "models": ALIASES, "near_duplicates": NEAR, "seed": 1} | more
        command = ["scripts/read_pairs.py", "--raw", *map(str, raws), *words, "--settings", json.dumps(facts)]
        monkeypatch.setattr("sys.argv", command)
        try:
            read_pairs()
        except SystemExit:
            return capsys.readouterr().err
        records = {name: read_records(path, KINDS[name]) for name, path in out.items()}
        return records, json.loads(Path(f"{out['pairs']}.prov.json").read_text())

    return run


def test_what_was_published_becomes_the_runs_own(read):
    train, test = published_rows(12, 6)
    records, record = read({"train": train, "test": test})
    assert record["rows"]["pairs"] == {"in": len(train) + len(test), "out": len(train) + len(test), "dropped": {}}
    speeches = {s["speech_id"]: s for s in records["speeches"]}
    assert speeches.keys() == {speech_id(normalise(row["question"])) for row in train + test}
    assert Counter(s["side"] for s in speeches.values()) == {"train": 12, "test": len({row["ID"] for row in test})}
    responses = {r["response_id"]: r for r in records["responses"]}
    scores = {s["response_id"]: s for s in records["scores"]}
    assert len(responses) == len(records["responses"])
    assert responses.keys() == scores.keys() == {p[f"{role}_id"] for p in records["pairs"] for role in ("chosen", "rejected")}
    told = {(row["question"], row[role], row[f"{role}_model"]) for row in train + test for role in ("chosen", "rejected")}
    assert len(told) == len(responses), "each response once, however many pairs it is in"
    for pair in records["pairs"]:
        for role in ("chosen", "rejected"):
            assert pair[f"{role}_scores"] == scores[pair[f"{role}_id"]]["scores"]
            assert pair[role][0]["content"] == responses[pair[f"{role}_id"]]["text"]
        assert pair["gap"] == pytest.approx(scores[pair["chosen_id"]]["overall"] - scores[pair["rejected_id"]]["overall"])
        assert pair["gap"] >= 1


def test_models_get_our_names_and_unknown_ones_keep_theirs(read):
    train, test = published_rows(12, 6)
    records, record = read({"train": train, "test": test})
    models = {r["model"] for r in records["responses"]}
    assert {"llama-3.1-8b-instruct", "gpt-4o", "gemma-2-9b-it"} <= models
    assert record["run"]["facts"]["given_pairs"]["unknown_models"].keys() == {"Qwen/Qwen2.5-7B-Instruct", "some-model-that-nobody-knows"}


def test_a_speech_on_both_sides_stays_on_test(read):
    train, test = published_rows(6, 4)
    leaked = [row | {"prefID": 90} for row in test[:2]]
    records, record = read({"train": train + leaked, "test": test})
    assert record["rows"]["pairs"]["dropped"] == {"speech on the test side too": 2}
    assert {s["source"] for s in records["speeches"] if s["side"] == "test"} == {"published-test"}
    assert [row["source_row"] for row in records["dropped"]] == [len(train) + 1, len(train) + 2]


def test_near_duplicates_of_test_speeches_are_left_out_where_told(read):
    train, test = published_rows(6, 4)
    like = [row | {"question": row["question"] + " Please."} for row in test[:2]]
    records, record = read({"train": train + like, "test": test})
    assert record["rows"]["pairs"]["dropped"] == {"near duplicate of a test speech": 2}
    clusters = {side: {s["cluster_id"] for s in records["speeches"] if s["side"] == side} for side in ("train", "test")}
    assert not clusters["train"] & clusters["test"]
    kept, record = read({"train": train + like, "test": test}, drop_near_test=False)
    assert record["rows"]["pairs"]["dropped"] == {}
    assert len(kept["speeches"]) == len(records["speeches"]) + len({row["question"] for row in like})


def test_a_response_scored_in_two_ways_is_kept_as_it_came_first(read):
    train, test = published_rows(4, 2)
    other = next(row for row in train[1:] if row["chosen"] == train[0]["chosen"] and row["question"] == train[0]["question"])
    other["chosen_empathy_rating"] = 1 + other["chosen_empathy_rating"] % 5
    records, record = read({"train": train, "test": test})
    assert record["rows"]["pairs"]["dropped"] == {"response scored otherwise before": 1}
    assert records["dropped"][0]["detail"] == "published-train, row 1"


def test_repeated_rows_and_rows_without_ratings_are_counted(read):
    train, test = published_rows(4, 2)
    rows = [*train, train[0], train[1] | {"chosen_safety_rating": 0}, train[1] | {"question": "  "}, train[2] | {"chosen": None}]
    _, record = read({"train": rows, "test": test})
    assert record["rows"]["pairs"]["dropped"] == {"duplicate": 1, "no rating of 1 to 5": 1, "empty": 2}


@pytest.mark.parametrize(
    ("choice", "kept", "reasons"), [("mask", "[email]", {}), ("keep", "me@home.org", {}), ("drop", None, {"personal data": 1})]
)
def test_personal_data_in_a_speech_is_masked_kept_or_drops_its_pairs(read, choice, kept, reasons):
    train, test = published_rows(4, 2)
    told = train[0] | {"question": "I feel watched. Write to me@home.org, as my mother does every evening, and tell me what to do."}
    records, record = read({"train": [*train, told], "test": test}, personal_data=choice)
    assert record["rows"]["pairs"]["dropped"] == reasons
    speech = [s for s in records["speeches"] if s["text"].startswith("I feel watched")]
    assert [(kept in s["text"], s.get("masked")) for s in speech] == (
        [] if choice == "drop" else [(True, {"email": 1} if choice == "mask" else None)]
    )


def test_a_limit_keeps_whole_speeches(read):
    train, test = published_rows(20, 10)
    records, record = read({"train": train, "test": test}, limit=12)
    assert len(records["speeches"]) == 12
    assert record["rows"]["pairs"]["dropped"].keys() == {"over the limit"}
    assert {p["speech_id"] for p in records["pairs"]} == {s["speech_id"] for s in records["speeches"]}


def test_own_pairs_without_scores_models_or_sides(read):
    rows = [{"ask": f"I worry about {n} things at once, all day long.", "good": f"yes {n}", "bad": f"no {n}"} for n in range(9)]
    rows += [
        {
            "ask": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "good": "x",
            "bad": "y",
        }
    ]
    rows += [{"ask": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I feel low."}], "good": "x", "bad": "y"}]
    records, record = read({"none": rows}, "chosen_rejected", {"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert record["rows"]["pairs"]["dropped"] == {"more than one turn": 1}
    assert records["scores"] == []
    assert {r["model"] for r in records["responses"]} == {"unknown"}
    assert all(s["side"] is None for s in records["speeches"])
    assert all(p["gap"] is None for p in records["pairs"])


def test_tables_and_figures_of_pairs_without_scores_say_why(read, tmp_path):
    rows = [{"prompt": f"I worry about {n} things at once, all day.", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(9)]
    records, _ = read({"none": rows}, "chosen_rejected")
    side = {s["speech_id"]: ("train", "dev", "test")[n % 3] for n, s in enumerate(records["speeches"])}
    topic = {"topic": "anxiety", "coarse_topic": "core_mental_health_issues", "topic_from": "judge"}
    unsplit = [{key: value for key, value in s.items() if key not in ("topic_label", "side")} for s in records["speeches"]]
    dump_records(tmp_path / "split.jsonl", (s | topic | {"split": side[s["speech_id"]]} for s in unsplit), "speech")
    dump_records(tmp_path / "divided.jsonl", (p | {"split": side[p["speech_id"]]} for p in records["pairs"]), "pair")
    files = ["--speeches", tmp_path / "split.jsonl", "--scores", tmp_path / "scores.jsonl", "--pairs", tmp_path / "divided.jsonl"]
    registries = ["--taxonomy", "config/taxonomy.yaml", "--out-dir", tmp_path / "out"]
    told = ["--settings", json.dumps({"opponent": "O", "judge": "J", "pool": [{"title": "7B", "models": ["m"]}], "bootstrap": 20})]
    for name, more in (("make_tables", ["--paper", "config/paper.yaml"]), ("plot_figures", [])):
        done = run_program(name, *files, *registries, *more, *told)
        assert done.returncode == 0, done.stderr
    for table in ("dataset", "pool", "pairs", "model_groups", "judge_consistency"):
        for row in csv.DictReader((tmp_path / "out" / f"{table}.csv").open()):
            assert row["notes"] or "n/a" not in row.values(), (table, row)
            assert "nan" not in [cell.lower() for cell in row.values()], (table, row)
    for figure in ("dataset", "pairs", "chosen_models", "rejected_models", "model_groups"):
        assert (tmp_path / "out" / f"{figure}.png").stat().st_size > 5000


def test_a_side_that_is_missing_is_said(read):
    train, test = published_rows(4, 2)
    assert "no pair is on the test side" in read({"train": train})
    assert "leave `split` out" in read({"test": test})


def test_columns_that_are_missing_are_said(read):
    assert "no column 'chosen'. Did you mean 'choosen'" in read(
        {"none": [{"prompt": "a", "choosen": "b", "rejected": "c"}]}, "chosen_rejected"
    )


def test_the_published_study_asks_no_api_and_generates_nothing_for_the_data_set():
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--configfile", "config/published.yaml", "--nolock"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, flags=re.MULTILINE))
    assert {"read_pairs", "divide_pairs", "report_contamination", "train_reward_model", "train_policy", "write_release"} <= jobs.keys()
    assert not {"select_speeches", "assign_models", "generate_responses", "rate_responses", "score_responses", "build_pairs"} & jobs.keys()
    files = [Path("config/config.yaml"), Path("config/published.yaml")]
    flow = Workflow(load_study(read_config(files), files))
    evaluation, topics = flow.config["evaluation"], flow.config["topics"]
    asked = {evaluation["judge"], evaluation["opponent"], topics["judge"], *flow.rankers}
    assert not any(flow.remote_slots(model) for model in asked if flow.study.models[model]["kind"] == "chat")


def a_pair(row: int, speech: str, side: str | None, chosen: dict, rejected: dict) -> GivenPair:
    return GivenPair("s", row, speech, speech, None, side, None, chosen, rejected)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([None, *SIDES])), min_size=1))
def test_after_sorting_sides_out_no_speech_stands_on_two(found):
    pairs = [a_pair(n, speech, side, {"id": f"{n}a"}, {"id": f"{n}b"}) for n, (speech, side) in enumerate(found)]
    dropped: list = []
    kept = drop_on_several_sides(pairs, dropped)
    assert len(kept) + len(dropped) == len(pairs)
    assert {pair.speech_id for pair in kept} == {speech for speech, _ in found}
    sides: dict = {}
    for pair in kept:
        assert sides.setdefault(pair.speech_id, pair.side) == pair.side
    for speech, side in found:
        if side == "test":
            assert sides[speech] == "test"
    assert first_sides(found).keys() == sides.keys()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 2), st.integers(1, 2))))
def test_after_sorting_contradictions_out_a_response_has_one_score(found):
    def answer(number: int, score: int) -> dict:
        return {"id": str(number), "text": str(number), "model": "m", "scores": {"empathy": score}}

    pairs = [a_pair(n, "s", None, answer(a, x), answer(b, y)) for n, (a, b, x, y) in enumerate(found) if a != b]
    dropped: list = []
    kept = drop_contradicting(pairs, dropped)
    assert len(kept) + len(dropped) == len(pairs)
    scores: dict = {}
    for pair in kept:
        for one in (pair.chosen, pair.rejected):
            assert scores.setdefault(one["id"], one["scores"]) == one["scores"]


@settings(max_examples=30)
@given(st.integers(20, 80), st.integers(1, 10), st.integers(0, 99))
def test_given_sides_stay_and_dev_is_cut_from_train(train, test, seed):
    cluster_of = {f"{n:016x}": f"{n:016x}" for n in range(train + test)}
    sides = {name: "test" if n < test else "train" for n, name in enumerate(cluster_of)}
    split = split_sides(cluster_of, SplitSettings(test_speeches=5, dev_fraction=0.1, seed=seed), sides)
    assert {name for name, side in split.items() if side == "test"} == {name for name, side in sides.items() if side == "test"}
    assert Counter(split.values())["dev"] == max(1, round(0.1 * train))
    with_dev = sides | {next(reversed(sides)): "dev"}
    assert split_sides(cluster_of, SplitSettings(test_speeches=5, dev_fraction=0.1, seed=seed), with_dev) == with_dev


def test_pairs_get_their_speechs_side_and_the_responding_prompt(read, tmp_path):
    train, test = published_rows(12, 6)
    records, _ = read({"train": train, "test": test})
    rng = random.Random(2)
    labelled = [
        {key: value for key, value in s.items() if key not in ("topic_label", "side")}
        | {
            "topic": "anxiety",
            "coarse_topic": "c",
            "topic_from": "judge",
            "split": s["side"] if s["side"] == "test" else rng.choice(["train", "dev"]),
        }
        for s in records["speeches"]
    ]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(s) + "\n" for s in labelled))
    out = {side: tmp_path / f"{side}.pairs.jsonl" for side in ("train", "dev", "test")}
    words = [str(word) for side, path in out.items() for word in (f"--{side}", path)]
    files = ["--speeches", str(tmp_path / "labelled.jsonl"), "--pairs", str(tmp_path / "pairs.jsonl")]
    told = ["--settings", json.dumps({"prompt": "Answer: {{ client_speech }}"})]
    done = subprocess.run([sys.executable, "scripts/divide_pairs.py", *files, *words, *told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    side_of = {s["speech_id"]: s for s in labelled}
    divided = [pair for path in out.values() for pair in read_records(path, "pair")]
    assert len(divided) == len(records["pairs"])
    for pair in divided:
        assert pair["split"] == side_of[pair["speech_id"]]["split"]
        assert pair["prompt"] == [{"role": "user", "content": "Answer: " + side_of[pair["speech_id"]]["text"]}]
        assert pair["chosen_scores"].keys() == set(PRINCIPLES)
