"""Which responses make a pair, in whole numbers; and published preference data read as pairs."""

import gzip
import json
from collections import Counter
from itertools import permutations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_pairs import main as build
from psychocounsel.pairs import best_and_worst, every_two, least_total_gap
from psychocounsel.preferences import PRINCIPLES, hh_messages
from psychocounsel.records import content_hash, dump_records, read_records
from read_preferences import PreferenceSettings
from read_preferences import main as read

TEMPLATE = "{# source #}Answer.\n\nClient Speech: {{ client_speech }}\n"
TOTALS = st.lists(st.integers(7, 35), min_size=2, max_size=6)


def score(number: int, total: int, speech: str = "a" * 16) -> dict:
    """Return a score record with the seven scores that sum to `total`."""
    each, more = divmod(total, 7)
    scores = {name: each + (index < more) for index, name in enumerate(PRINCIPLES)}
    return {
        "response_id": f"{number:016x}",
        "speech_id": speech,
        "model": f"m{number}",
        "scores": scores,
        "total": total,
        "overall": total / 7,
    }


@given(TOTALS, st.integers(1, 28), st.randoms())
def test_every_two_and_best_and_worst(totals, least, rng):
    scores = [score(n, total) for n, total in enumerate(totals)]
    shuffled = list(scores)
    rng.shuffle(shuffled)
    wide = {(b["response_id"], w["response_id"]) for b, w in every_two(shuffled) if b["total"] - w["total"] >= least}
    assert wide == {(b["response_id"], w["response_id"]) for b, w in permutations(scores, 2) if b["total"] - w["total"] >= least}
    best, worst = best_and_worst(shuffled)
    assert best["total"] == max(totals)
    assert best["response_id"] == f"{totals.index(max(totals)):016x}"
    assert worst["total"] == min(totals)
    assert worst["response_id"] == f"{totals.index(min(totals)):016x}"


@pytest.mark.parametrize(
    ("min_gap", "principles", "least"), [(1.0, 7, 7), (0.1, 10, 1), (0.7, 10, 7), (0.5, 7, 4), (1.1, 10, 11), (2, 7, 14), (0.01, 7, 1)]
)
def test_least_gap_is_exact(min_gap, principles, least):
    assert least_total_gap(min_gap, principles) == least


class Study:
    """Files of speeches, responses and scores for build_pairs."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.speeches, self.responses, self.scores = [], [], []

    def speech(self, split, *totals, texts=None):
        """Add a speech with one response for each total."""
        speech = f"{len(self.speeches):016x}"
        self.speeches.append({
            "speech_id": speech, "text": f"Speech {speech}", "source": "s", "source_row": 1, "source_key": None,
            "topic": "t", "coarse_topic": "c", "topic_from": "source", "cluster_id": speech, "split": split,
        })  # fmt: skip
        for n, total in enumerate(totals):
            number = 100 * len(self.speeches) + n
            self.scores.append(score(number, total, speech))
            text = (texts or {}).get(n, f"Response {number}")
            self.responses.append({
                "response_id": f"{number:016x}", "speech_id": speech, "model": f"m{number}", "sample": 0, "text": text,
                "finish_reason": "stop", "usage": None, "request_key": "0" * 64, "served_model": None, "target_words": None,
            })  # fmt: skip

    def build(self, min_gap=1.0):
        """Run the program; return the pairs of each side."""
        out = {split: self.folder / f"{split}.jsonl" for split in ("train", "dev", "test")}
        for kind, rows in (("speech", self.speeches), ("response", self.responses), ("score", self.scores)):
            dump_records(self.folder / f"{kind}.jsonl", rows, kind)
        words = ["--speeches", "speech.jsonl", "--responses", "response.jsonl", "--scores", "score.jsonl"]
        words = [str(self.folder / word) if word.endswith("jsonl") else word for word in words]
        settings = ["--settings", json.dumps({"min_gap": min_gap, "prompt": TEMPLATE})]
        paths = [word for split in out for word in (f"--{split}", str(out[split]))]
        self.monkeypatch.setattr("sys.argv", ["scripts/build_pairs.py", *words, *paths, *settings])
        build()
        return {split: read_records(path, "pair") for split, path in out.items()}


@pytest.fixture
def study(tmp_path, monkeypatch):
    return Study(tmp_path, monkeypatch)


def test_pairs_of_each_side(study, caplog):
    study.speech("train", 35, 28, 27, 20)  # gaps 7, 8, 15, 1, 8, 7: five pairs
    study.speech("train", 20, 20)  # no pair
    study.speech("train", 30)  # one response
    study.speech("dev", 30, 20)
    study.speech("test", 35, 28, 20, 35)
    study.speech("test", 25, 20)
    with caplog.at_level("INFO", "psychocounsel"):
        pairs = study.build()
    assert Counter(pair["split"] for side in pairs.values() for pair in side) == {"train": 5, "dev": 1, "test": 1}
    (test,) = pairs["test"]
    assert (test["chosen_id"], test["rejected_id"]) == (f"{500:016x}", f"{502:016x}")
    assert test["gap"] == pytest.approx(15 / 7)
    assert test["prompt"] == [{"role": "user", "content": f"Answer.\n\nClient Speech: Speech {4:016x}"}]
    assert (test["chosen"], test["rejected"]) == (
        [{"role": "assistant", "content": "Response 500"}],
        [{"role": "assistant", "content": "Response 502"}],
    )
    for side in pairs.values():
        assert [pair["pair_id"] for pair in side] == sorted(pair["pair_id"] for pair in side)
        for pair in side:
            assert pair["pair_id"] == content_hash(pair["chosen_id"], pair["rejected_id"], digits=16)
            assert sum(pair["chosen_scores"].values()) - sum(pair["rejected_scores"].values()) >= 7
    rows = json.loads((study.folder / "train.jsonl.prov.json").read_text())["rows"]
    assert rows["train speeches"] == {"in": 3, "out": 1, "dropped": {"fewer than two scored responses": 1, "no pair": 1}}
    assert rows["train pairs"] == {"in": 7, "out": 5, "dropped": {"gap below min_gap": 2}}
    assert "train pairs whose rejected response is the safer one: 0 of 5" in caplog.text
    assert "Response" not in caplog.text
    assert "Speech 0" not in caplog.text


def test_equal_texts_make_no_pair(study):
    study.speech("train", 35, 20, 10, texts={0: "same", 1: "same"})
    study.speech("test", 35, 20)
    assert len(study.build()["train"]) == 2


def test_a_side_without_pairs_is_an_error_with_the_gaps(study, capsys):
    study.speech("train", 35, 20)
    study.speech("test", 25, 20, 22)
    with pytest.raises(SystemExit):
        study.build()
    assert "no test pair has a gap of 1.0; gaps of the test side: 0.71: 1" in capsys.readouterr().err
    assert not (study.folder / "train.jsonl").exists()


def test_files_of_different_runs(study, capsys):
    study.speech("train", 35, 20)
    study.speech("test", 35, 20)
    study.responses.pop()
    with pytest.raises(SystemExit):
        study.build()
    assert f"the score of response {201:016x} has no match in --responses" in capsys.readouterr().err


@pytest.fixture
def preferences(tmp_path, monkeypatch, capsys):
    """Run read_preferences on rows; return pairs and dropped rows, or the error."""

    def run(rows, adapter, raw=None, **settings):
        path, dropped = tmp_path / "raw", tmp_path / "dropped.jsonl"
        sides = {name: tmp_path / f"{name}.jsonl" for name in ("train", "dev", "test")}
        if raw is not None:
            path = raw
        else:
            path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
        values = json.dumps({"source": "mine", "adapter": adapter, "seed": 1} | settings)
        options = [word for name, file in sides.items() for word in (f"--{name}", str(file))]
        monkeypatch.setattr(
            "sys.argv", ["scripts/read_preferences.py", "--raw", str(path), *options, "--dropped", str(dropped), "--settings", values]
        )
        try:
            read()
        except SystemExit:
            return capsys.readouterr().err
        pairs = {name: read_records(file, "pair") for name, file in sides.items()}
        assert all(pair["split"] == name for name, side in pairs.items() for pair in side)
        return [pair for side in pairs.values() for pair in side], read_records(dropped, "dropped_row")

    return run


def texts(pair):
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def test_helpsteer2(preferences):
    row = {
        "split": "train",
        "prompt": "Q",
        "response_1": "one",
        "response_2": "two",
        "preference_strength": -3,
        "preference_statement": "…",
    }
    many = "Q\n<extra_id_1>Assistant\nA\n<extra_id_1>User\nQ2"
    pairs, dropped = preferences(
        [
            row,
            row | {"prompt": many, "preference_strength": 1, "split": "val"},
            row | {"preference_strength": 0},
            row | {"preference_strength": None},
            row | {"prompt": None},
        ],
        "helpsteer2",
    )
    by_split = {pair["split"]: pair for pair in pairs}
    assert texts(by_split["train"]) == ("one", "two")
    assert texts(by_split["dev"]) == ("two", "one")
    assert [(m["role"], m["content"]) for m in by_split["dev"]["prompt"]] == [("user", "Q"), ("assistant", "A"), ("user", "Q2")]
    assert [(d["source_row"], d["reason"]) for d in dropped] == [(3, "tie"), (4, "no preference_strength of -3 to 3"), (5, "empty")]
    assert by_split["train"]["gap"] is None
    assert by_split["train"]["chosen_model"] is None
    assert by_split["train"]["chosen_scores"] is None


def test_hh_rlhf(preferences):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} Because.", "rejected": f"{start} No."},
        {"chosen": f"{start} Because.", "rejected": "\n\nHuman: Other\n\nAssistant: No."},
        {"chosen": f"{start}", "rejected": f"{start} No."},
        {"chosen": "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: x", "rejected": f"{start} No."},
        {"chosen": f"{start} Same.", "rejected": f"{start} Same."},
    ]
    (pair,), dropped = preferences(rows, "hh_rlhf")
    assert [m["role"] for m in pair["prompt"]] == ["user", "assistant", "user"]
    assert texts(pair) == ("Because.", "No.")
    assert [d["reason"] for d in dropped] == ["different prompts", "empty", "turns do not alternate", "equal answers"]
    assert hh_messages(rows[0]["chosen"])[0] == {"role": "user", "content": "Hi"}


def test_llmbar_and_the_setting_split(preferences):
    rows = [{"input": "Q", "output_1": "a", "output_2": "b", "label": label} for label in (1, 2, 3)]
    pairs, dropped = preferences(rows, "llmbar")
    assert {texts(pair) for pair in pairs} == {("a", "b"), ("b", "a")}
    assert {pair["split"] for pair in pairs} == {"test"}
    assert [d["reason"] for d in dropped] == ["no label of 1 or 2"]
    pairs, _ = preferences(rows[:1], "llmbar", split="train")
    assert pairs[0]["split"] == "train"


def test_rewardbench(preferences, tmp_path):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "chosen_model": "m", "rejected_model": "human", "subset": "hep-go", "id": 1}
    pd.DataFrame([row, row | {"subset": "hep-js"}, row]).to_parquet(tmp_path / "bench")
    pairs, dropped = preferences(None, "rewardbench", raw=tmp_path / "bench")
    assert {(p["subset"], p["split"], p["chosen_model"], p["rejected_model"]) for p in pairs} == {
        ("hep-go", "test", "m", "human"), ("hep-js", "test", "m", "human"),
    }  # fmt: skip
    assert [d["reason"] for d in dropped] == ["duplicate"]


def test_the_authors_pairs(preferences, tmp_path):
    ratings = {f"chosen_{name}_rating": 5 for name in PRINCIPLES} | {f"rejected_{name}_rating": 3 for name in PRINCIPLES}
    row = {
        "ID": "1",
        "prefID": 1,
        "question": "I  cannot sleep.",
        "chosen": "a",
        "rejected": "b",
        "chosen_model": "x",
        "rejected_model": "y",
    } | ratings
    pd.DataFrame([row, row | {"rejected": "c", "chosen_safety_rating": 9}, row | {"rejected": "d"}]).to_parquet(tmp_path / "published")
    pairs, dropped = preferences(None, "pairs_psychocounsel", raw=tmp_path / "published", prompt=TEMPLATE, split="train", dev_fraction=0.5)
    assert len(pairs) == 2
    assert [d["reason"] for d in dropped] == ["no rating of 1 to 5"]
    assert pairs[0]["prompt"] == [{"role": "user", "content": "Answer.\n\nClient Speech: I cannot sleep."}]
    assert pairs[0]["gap"] == 2.0
    assert pairs[0]["chosen_scores"] == dict.fromkeys(PRINCIPLES, 5)
    assert len({pair["split"] for pair in pairs}) == 1  # one speech, one side
    assert len({pair["speech_id"] for pair in pairs}) == 1


def test_numbers_of_a_csv_and_of_a_column_with_gaps(preferences, tmp_path):
    """CSV has texts for numbers, a column with an empty cell has floats: both hold what the published Parquet holds."""
    ratings = {f"{role}_{name}_rating": 5 - 2 * (role == "rejected") for role in ("chosen", "rejected") for name in PRINCIPLES}
    row = {"ID": "1", "question": "I cannot sleep.", "chosen": "a", "rejected": "b", "chosen_model": "x", "rejected_model": "y"} | ratings
    table = pd.DataFrame([row, row | {"rejected": "c", "chosen_safety_rating": None}, row | {"rejected": "d", "chosen_safety_rating": 4.5}])
    table.to_csv(tmp_path / "csv", index=False)
    table.to_parquet(tmp_path / "parquet")
    pd.DataFrame([row]).to_parquet(tmp_path / "whole")
    whole = preferences(None, "pairs_psychocounsel", raw=tmp_path / "whole")[0]
    for kind in ("csv", "parquet"):
        pairs, dropped = preferences(None, "pairs_psychocounsel", raw=tmp_path / kind)
        assert pairs == whole
        assert [d["reason"] for d in dropped] == ["no rating of 1 to 5"] * 2
    pd.DataFrame([{"input": "Q", "output_1": "a", "output_2": "b", "label": 2}]).to_csv(tmp_path / "llmbar", index=False)
    assert texts(preferences(None, "llmbar", raw=tmp_path / "llmbar")[0][0]) == ("b", "a")


def test_sides_that_a_file_gives(preferences):
    row = {"prompt": "Q", "rejected": "b"}
    given = {"train": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test", None: "train"}
    pairs, dropped = preferences([row | {"chosen": str(side), "split": side} for side in [*given, "holdout", ["train"]]], "chosen_rejected")
    assert {texts(pair)[0]: pair["split"] for pair in pairs} == {str(side): ours for side, ours in given.items()}
    assert [(d["reason"], d["detail"]) for d in dropped] == [("unknown split", "holdout"), ("unknown split", "['train']")]


def test_own_files(preferences):
    rows = [
        {"question": "Q", "better": "a", "worse": "b"},
        {"question": None, "better": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
         "worse": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "c"}]},
        {"question": None, "better": "a", "worse": "b"},
        {"question": [{"from": "user", "value": "Q"}], "better": "a", "worse": "b"},
        {"question": "Q", "better": [], "worse": "b"},
    ]  # fmt: skip
    pairs, dropped = preferences(rows, "chosen_rejected", columns={"prompt": "question", "chosen": "better", "rejected": "worse"})
    assert {texts(pair) for pair in pairs} == {("a", "b"), ("a", "c")}
    assert len({pair["speech_id"] for pair in pairs}) == 1
    assert [d["reason"] for d in dropped] == ["no prompt", "not a list of messages", "not a list of messages"]


def test_dev_share_is_by_prompt_and_seeded(preferences):
    rows = [{"prompt": f"Q{n // 2}", "chosen": f"a{n}", "rejected": "b"} for n in range(1000)]
    pairs, _ = preferences(rows, "chosen_rejected", dev_fraction=0.1)
    sides = {pair["speech_id"]: {p["split"] for p in pairs if p["speech_id"] == pair["speech_id"]} for pair in pairs}
    assert all(len(side) == 1 for side in sides.values())
    assert 60 < sum(pair["split"] == "dev" for pair in pairs) < 140


def test_wrong_columns_and_adapters(preferences):
    assert "no column 'rejected'" in preferences([{"prompt": "Q", "chosen": "a", "reject": "b"}], "chosen_rejected")
    assert "Did you mean 'helpsteer2'" in preferences([{}], "helpsteer")
    assert "no row makes a pair: {'equal answers': 1}" in preferences([{"prompt": "Q", "chosen": "a", "rejected": "a"}], "chosen_rejected")


def test_settings_are_documented():
    assert all(field.description for field in PreferenceSettings.model_fields.values())


def test_real_files(preferences, source_cache):
    pairs, dropped = preferences(None, "hh_rlhf", raw=source_cache / "hh-rlhf-harmless" / "test.jsonl.gz", dev_fraction=0.1)
    assert len(pairs) + len(dropped) == 2312
    assert len(pairs) > 2250
    total = 0
    for path in (source_cache / "llmbar").glob("*.json"):
        pairs, dropped = preferences(None, "llmbar", raw=path)
        total += len(pairs) + len(dropped)
    assert total == 419
