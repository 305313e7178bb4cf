"""The report of near duplicates between what is tested on and what is trained on, against a count by hand."""

import json
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psychocounsel.data_tables import contamination_table
from psychocounsel.errors import UserError
from psychocounsel.near_duplicates import find_near_duplicates
from psychocounsel.pairs import pair_record
from psychocounsel.records import dump_records, read_result
from psychocounsel.sampling import hash_order
from psychocounsel.table_settings import TableSettings
from psychocounsel.tables import to_csv
from psychocounsel.texts import speech_id
from report_contamination import main
from split_speeches import SplitSettings, split_sides

WORDS = [f"{a}{b}" for a in ("mor", "tal", "vin", "sep", "lun", "gar", "bel", "nok") for b in ("an", "est", "ily", "ound", "ick", "ome")]
NEAR = {"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 8, "permutations": 128}
SEED = 3


def text(rng: random.Random, words: int = 40) -> str:
    """Return a text of random words."""
    return " ".join(rng.choice(WORDS) + rng.choice(WORDS) for _ in range(words))


def edited(words: str, rng: random.Random, edits: int) -> str:
    """Return a text with some words in its middle replaced."""
    parts = words.split()
    parts[10 : 10 + edits] = [rng.choice(WORDS) + rng.choice(WORDS) for _ in range(edits)]
    return " ".join(parts)


def speech(words: str, split: str) -> dict:
    """Return a speech record."""
    mine = speech_id(words)
    facts = {
        "source": "s",
        "source_row": 1,
        "source_key": None,
        "topic": "others",
        "coarse_topic": "special_topics",
        "topic_from": "source",
    }
    return {"speech_id": mine, "text": words, **facts, "cluster_id": mine, "split": split}


def pair(prompt: list[str], chosen: str, rejected: str, split: str = "train") -> dict:
    """Return a pair record whose prompt is a conversation that begins and ends with the user."""
    roles = ("user", "assistant") * len(prompt)
    messages = [{"role": role, "content": words} for role, words in zip(roles, prompt, strict=False)]
    answers = ({"id": speech_id(words), "text": words, "model": None, "scores": None} for words in (chosen, rejected))
    return pair_record(speech_id(prompt[0]), split, messages, *answers, None, None)


class Run:
    """Files for the program."""

    def __init__(self, folder, monkeypatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def report(self, speeches: list[dict], own: list[dict], own_split: bool = True, **others: list[dict]) -> dict:
        """Run the program; others are named data__NAME or benchmark__NAME."""
        dump_records(self.folder / "speeches.jsonl", speeches, "speech")
        dump_records(self.folder / "pairs.jsonl", own, "pair")
        words = ["--speeches", self.folder / "speeches.jsonl", "--pairs", self.folder / "pairs.jsonl", "--out", self.folder / "report.json"]
        for key, pairs in others.items():
            option, name = key.split("__")
            dump_records(self.folder / f"{name}.jsonl", pairs, "pair")
            words += [f"--{option}", f"{name}={self.folder / name}.jsonl"]
        values = json.dumps({"near_duplicates": NEAR, "own_split": own_split, "seed": SEED})
        self.monkeypatch.setattr("sys.argv", ["scripts/report_contamination.py", *map(str, words), "--settings", values])
        main()
        return read_result(self.folder / "report.json", "contamination")


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_every_planted_prompt_and_answer_is_counted(run):
    rng = random.Random(1)
    tested, train, dev, strange = ([text(rng) for _ in range(n)] for n in (12, 9, 3, 20))
    speeches = [speech(words, side) for side, group in (("test", tested), ("train", train), ("dev", dev)) for words in group]
    own = [pair([f"Answer. {tested[0]}"], "You are not alone.", "Cheer up.", "test"), pair(["x"], "Cheer  up.", "Go on.", "train")]
    repeated, similar = edited(tested[1], rng, 1), edited(tested[2], rng, 7)
    data = [pair([words], f"a{words}", f"b{words}") for words in strange]
    data += [
        pair([repeated], "a", "b"),
        pair([strange[0] + " again", "Hm.", similar], "a", "b"),
        pair([tested[1].upper()], "Cheer up.", "c"),
    ]
    benchmark = [pair([words], "a", "b", "test") for words in (strange[3], tested[5], text(rng))]
    report = run.report(speeches, own, data__general=data, benchmark__bench=benchmark)

    found = {(c["tested"], c["data"], c["split"]): c for c in report["comparisons"]}
    assert list(found) == [
        ("psychocounsel", "psychocounsel", "train"), ("psychocounsel", "psychocounsel", "dev"),
        ("psychocounsel", "general", "train and dev"), ("psychocounsel", "bench", "test"),
        ("bench", "psychocounsel", "train"), ("bench", "psychocounsel", "dev"), ("bench", "general", "train and dev"),
    ]  # fmt: skip

    def counts(*key):
        return [found[key][name] for name in ("tested_prompts", "tested_similar", "prompts", "similar", "repeated")]

    assert counts("psychocounsel", "psychocounsel", "train") == [12, 0, 9, 0, 0]
    assert counts("psychocounsel", "psychocounsel", "dev") == [12, 0, 3, 0, 0]
    assert counts("psychocounsel", "general", "train and dev") == [12, 2, 23, 3, 2]
    assert counts("psychocounsel", "bench", "test") == [12, 1, 3, 1, 1]
    assert counts("bench", "general", "train and dev") == [3, 1, 23, 1, 1]
    assert found["psychocounsel", "psychocounsel", "train"]["equal_answers"] == 1
    assert found["psychocounsel", "general", "train and dev"]["equal_answers"] == 1
    examples = found["psychocounsel", "general", "train and dev"]["examples"]
    assert [(e["tested"], e["data"]) for e in examples] == [
        (speech_id(tested[1]), speech_id(tested[1].upper())),
        (speech_id(tested[1]), speech_id(repeated)),
        (speech_id(tested[2]), speech_id(strange[0] + " again")),
    ]
    assert [e["similarity"] for e in examples] == sorted((e["similarity"] for e in examples), reverse=True)


def test_the_report_holds_no_text(run):
    rng = random.Random(2)
    words = text(rng)
    run.report([speech(words, "test"), speech(text(rng), "train")], [], data__general=[pair([words], "a", "b")])
    written = (run.folder / "report.json").read_text() + (run.folder / "report.json.prov.json").read_text()
    assert not any(word in written for word in words.split())


def test_a_test_speech_among_our_own_training_speeches_stops_the_run(run, capsys):
    rng = random.Random(4)
    words = text(rng)
    speeches = [speech(words, "test"), speech(edited(words, rng, 5), "train"), speech(text(rng), "dev")]
    with pytest.raises(SystemExit):
        run.report(speeches, [])
    message = capsys.readouterr().err
    assert "1 train speeches are near duplicates of test speeches" in message
    assert speech_id(words) in message
    assert words.split()[0] not in message
    assert not (run.folder / "report.json").exists()
    report = run.report(speeches, [], own_split=False)  # sides that came with given pairs are told as they are
    assert [c["similar"] for c in report["comparisons"]] == [1, 0]


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_speeches_that_we_select_and_divide_are_always_clean(seed):
    """Selection, split and report agree on what a near duplicate is: the same sketches propose the same pairs."""
    rng = random.Random(seed)
    texts = [text(rng) for _ in range(25)]
    for _ in range(35):
        texts.append(edited(rng.choice(texts), rng, rng.randint(1, 10)))
    found = find_near_duplicates(texts, **NEAR, seed=SEED)
    cluster_of = {speech_id(texts[i]): speech_id(texts[first]) for i, first in found.cluster.items()}
    try:
        side = split_sides(cluster_of, SplitSettings(test_speeches=8, dev_fraction=0.1, seed=seed))
    except UserError:  # one great cluster
        return
    kept = {speech_id(words): words for words in texts if speech_id(words) in cluster_of}

    def grams(words):
        return {words[i : i + 8] for i in range(len(words) - 7)}

    missed = 0
    for a, b in product([i for i in side if side[i] == "test"], [i for i in side if side[i] != "test"]):
        one, other = grams(kept[a]), grams(kept[b])
        missed += len(one & other) / len(one | other) > 0.6
    assert missed <= 1  # what MinHash proposes with a chance of 98 % at the threshold


def test_selection_at_the_papers_scale_divides_no_cluster():
    """26,483 speeches in clusters of every size: exact sizes, no cluster on two sides."""
    rng = random.Random(6)
    cluster_of: dict[str, str] = {}
    while len(cluster_of) < 26_483:
        first = f"{rng.getrandbits(64):016x}"
        for _ in range(min(rng.choice([1, 1, 1, 1, 2, 3, 40]), 26_483 - len(cluster_of))):
            cluster_of[f"{rng.getrandbits(64):016x}"] = first
    side = split_sides(cluster_of, SplitSettings(test_speeches=3_291, dev_fraction=0.1, seed=1))
    sides_of: dict[str, set] = {}
    for one, cluster in cluster_of.items():
        sides_of.setdefault(cluster, set()).add(side[one])
    assert all(len(sides) == 1 for sides in sides_of.values())
    assert [list(side.values()).count(name) for name in ("test", "dev")] == [3_291, round(0.1 * (26_483 - 3_291))]
    shuffled = dict(sorted(cluster_of.items(), key=lambda item: hash_order([item[0]], 9, "x")))
    assert split_sides(shuffled, SplitSettings(test_speeches=3_291, dev_fraction=0.1, seed=1)) == side


def test_the_table_names_data_by_title(run):
    rng = random.Random(5)
    words = text(rng)
    report = run.report([speech(words, "test"), speech(text(rng), "train")], [], data__general=[pair([words], "a", "b")])
    titles = {"psychocounsel": "Ours", "general": "General data"}
    table = contamination_table(report, TableSettings(opponent="o", judge="j", titles=titles).title)
    rows = to_csv(table).splitlines()
    assert any("Tested on: Ours" in row and "General data,train and dev,1,1,1,1,100.00" in row for row in rows), rows
