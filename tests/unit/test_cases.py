"""Case studies: chosen by their rule, in both settings, and quoting nothing that must not be quoted."""

import csv

import pytest

from choose_cases import CaseSettings, median_speech, quotable
from psychocounsel.records import dump_records
from test_ratings import rows_account, run
from test_winrates import SPEECH, judgement, response, speech

SETTINGS = {"policy": "P", "opponent": "O", "judge": "J", "quotable": ["open"], "crisis_topics": ["self-harm", "crisis_and_safety"]}
GROUPS = [f"{setting} a length constraint, {verdict}" for setting in ("Without", "With") for verdict in ("won", "lost")]


def write(folder, **changes) -> None:
    """Six speeches, the longer the later; the policy wins 0 to 2 freely, and 3 alone at the opponent's length, and loses the others."""
    texts = [{"text": f"I feel tired\n& alone <{i}>." + " It goes on." * i, "source": "open"} | changes for i in range(6)]
    dump_records(folder / "speeches.jsonl", [speech(i) | text for i, text in enumerate(texts)], "speech")
    for setting, won in (("free", {0, 1, 2}), ("length", {3})):
        rows = [
            judgement(i, first, "win" if i in won else "loss", setting=setting, rationale=f"{setting} {first}")
            for i in range(6)
            for first in (True, False)
        ]
        dump_records(folder / f"{setting}.jsonl", rows, "judgement")
        dump_records(folder / f"{setting}.p.jsonl", [response(i, "p", 3) | {"text": f"{setting} answer {i}"} for i in range(6)], "response")
    dump_records(folder / "o.jsonl", [response(i, "o", 3) | {"text": f"other answer {i}"} for i in range(6)], "response")


def choose(monkeypatch, folder, **changes) -> list[dict]:
    """Run choose_cases.py; return the rows of its CSV."""
    files = {
        "judgements": [folder / f"{s}.jsonl" for s in ("free", "length")],
        "answers": [folder / f"{s}.p.jsonl" for s in ("free", "length")],
    }
    speeches, opponent = folder / "speeches.jsonl", folder / "o.jsonl"
    run(monkeypatch, "choose_cases", SETTINGS | changes, speeches=speeches, opponent=opponent, **files, **{"out-dir": folder / "out"})
    with (folder / "out" / "case_studies.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_won_and_a_lost_comparison_of_median_length_in_both_settings(monkeypatch, tmp_path):
    write(tmp_path)
    rows = choose(monkeypatch, tmp_path)
    assert [row["group"] for row in rows] == [group for group in GROUPS for _ in range(4)]
    chosen = [row["notes"].split(",")[0] for row in rows if row["Part"] == "Client speech"]
    assert chosen == [SPEECH(1), SPEECH(4), SPEECH(3), SPEECH(2)]
    assert [row["Text"] for row in rows if row["Part"] == "P"] == [f"free answer {i}" for i in (1, 4)] + [
        f"length answer {i}" for i in (3, 2)
    ]
    assert rows[3]["Text"] == "P first: free True\n\nO first: free False"


def test_the_rule_and_the_judge_stand_under_the_table(monkeypatch, tmp_path):
    write(tmp_path)
    choose(monkeypatch, tmp_path, note="A demonstration.")
    for ending in ("md", "tex", "html"):
        text = (tmp_path / "out" / f"case_studies.{ending}").read_text()
        assert "Chosen by rule" in text
        assert "Compared by J." in text
        assert "A demonstration." in text
    html = (tmp_path / "out" / "case_studies.html").read_text()
    assert "tired\n&amp; alone &lt;1&gt;." in html
    tex = (tmp_path / "out" / "case_studies.tex").read_text()
    assert r"tired\newline \& alone \textless{}1\textgreater{}." in tex
    assert "longtable" in tex


@pytest.mark.parametrize(
    "words",
    [
        "My brother killed himself in May.", "He shot himself.", "She took her own life.", "He ended his life.", "I keep cutting myself.",
        "I don’t want to live like this.", "I wish I was dead.", "They would be better off without me.", "My ex was abusing me.",
    ],
)  # fmt: skip
def test_words_of_a_crisis_are_known_whatever_the_topic(words):
    told = {"source": "open", "topic": "grief-and-loss", "coarse_topic": "emotional_well_being"}
    settings = CaseSettings(**SETTINGS)
    assert not quotable({**told, "text": words}, settings)
    assert quotable({**told, "text": "I want to live by the sea, cut down on grapes, and end it with him."}, settings)


@pytest.mark.parametrize(
    "change",
    [{"source": "closed"}, {"topic": "self-harm"}, {"coarse_topic": "crisis_and_safety"}, {"text": "Some days I want to die."}],
    ids=["not quotable", "crisis topic", "coarse crisis topic", "words of crisis"],
)
def test_no_speech_is_quoted_that_must_not_be(monkeypatch, tmp_path, change):
    write(tmp_path, **change)
    rows = choose(monkeypatch, tmp_path)
    assert [(row["group"], row["Text"]) for row in rows] == [(group, "n/a") for group in GROUPS]
    for path in (tmp_path / "out").glob("case_studies.*"):
        assert not {"tired", "want to die", "answer 1"} & {
            word for word in ("tired", "want to die", "answer 1") if word in path.read_text()
        }
    account = rows_account(tmp_path / "out" / "case_studies.csv")["judged speeches"]
    assert account == {"in": 12, "out": 0, "dropped": {"must not be quoted": 12}}


def test_the_same_files_give_the_same_bytes(monkeypatch, tmp_path):
    write(tmp_path)
    choose(monkeypatch, tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("case_studies.*") if path.suffix != ".json"}
    choose(monkeypatch, tmp_path)
    assert first == {name: (tmp_path / "out" / name).read_bytes() for name in first}


@pytest.mark.parametrize(
    "text", ["suicidal", "I was raped", "he is abusive", "killing myself", "cutting myself", "self harm", "overdosed", "bulimia"]
)
def test_words_of_crisis_are_known(text):
    settings = CaseSettings(**SETTINGS)
    assert quotable(speech(0) | {"source": "open"}, settings)
    assert not quotable(speech(0) | {"source": "open", "text": f"A year ago {text}."}, settings)


def test_the_case_is_the_speech_of_lower_median_length():
    speeches = [speech(i) | {"text": "x" * i} for i in (5, 0, 3, 2)]
    assert median_speech(speeches)["speech_id"] == SPEECH(2)
    assert median_speech(speeches[::-1])["speech_id"] == SPEECH(2)
    assert median_speech([]) is None
