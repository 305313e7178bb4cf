"""The registry of sources, and what becomes of the real files that tests have: read and selected by the programs, and counted."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

import read_source
import select_speeches
from count_speeches import table
from psychocounsel.adapters import SPEECHES, read_table
from psychocounsel.config import load_registry, load_study, read_config
from psychocounsel.errors import UserError
from psychocounsel.records import read_records
from psychocounsel.texts import normalise

PAPER = Path("config/config.yaml")
SOURCES = load_registry([Path("config/sources.yaml")], "sources")
REAL = {  # sources whose files tests have -> cells, cells without a text, distinct texts, of these with 100 to 1,000 characters, kept
    "counsel-chat": (2129, 0, 824, 710, 710),
    "counselchat-data": (1482, 99, 718, 617, 617),
    "mentalchat16k-sample": (500, 0, 484, 480, 479),
    "mentalchat16k-synthetic": (779, 0, 779, 779, 779),
    "mentalchat16k-generated": (1580, 0, 1580, 1580, 1580),
    "counselling-bench": (229, 0, 229, 220, 220),
}


def test_the_papers_seven_sources_say_how_to_get_them():
    config = read_config([PAPER])
    assert len({name.partition("-interview")[0] for name in config["sources"]}) == 7
    for name in config["sources"]:
        source = SOURCES[name]
        assert source["adapter"] in SPEECHES
        assert source["licence"]
        assert "hub" in source or source.get("address") or source["access"], name
    assert {name for name in config["sources"] if SOURCES[name]["gated"]} == {"therapistqa", "psych8k"}
    assert [name for name in config["sources"] if "columns" not in SOURCES[name]] == ["phi2mental"]


def test_every_gated_source_says_how_and_no_other_does():
    for name, source in SOURCES.items():
        assert ("access" in source) == bool(source.get("gated")), name
        assert source.get("address") is None or source["revision"] in source["address"], name


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"gated": True, "file": "a.csv"}, "lacks the key 'access'"),
        ({"gated": False, "file": "a.csv", "access": "Ask."}, "a"),
        ({}, "a"),
        ({"file": "a.csv", "address": "https://example.org/main/a.csv"}, "address"),
        ({"file": "a.csv", "hub": {"repository": "a/b"}}, "lacks the key 'path'"),
        ({"file": "a.csv", "hub": {"repository": "a/b", "path": "c"}, "address": "https://example.org/a.csv"}, "a"),
    ],
)
def test_the_schema_refuses_incomplete_entries(tmp_path, entry, complaint):
    whole = {"kind": "speeches", "title": "A", "adapter": "psych8k", "licence": "MIT", "quotable": True}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"a": whole | entry}))
    with pytest.raises(UserError, match=complaint):
        load_registry([tmp_path / "sources.yaml"], "sources")


def test_a_file_of_ones_own_names_the_columns_that_were_not_known(tmp_path):
    (tmp_path / "mine.yaml").write_text("phi2mental: {columns: {text: prompt}}\nmentalagora: {path: my/copy.parquet}\n")
    merged = load_registry([Path("config/sources.yaml"), tmp_path / "mine.yaml"], "sources")
    assert merged["phi2mental"] == SOURCES["phi2mental"] | {"columns": {"text": "prompt"}}
    assert merged["mentalagora"]["path"] == "my/copy.parquet"
    (tmp_path / "mine.yaml").write_text("phi2mental: {column: {text: prompt}}\n")
    with pytest.raises(UserError, match=r"mine\.yaml:1: unknown key phi2mental\.column\. Did you mean 'columns'"):
        load_registry([Path("config/sources.yaml"), tmp_path / "mine.yaml"], "sources")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a program's main with settings; return the records of its two outputs and its account of rows."""

    def main(program, kind: str, *words: str, **settings) -> tuple[list[dict], list[dict], dict]:
        out, dropped = tmp_path / f"{kind}.jsonl", tmp_path / f"{kind}.dropped.jsonl"
        words = [program.__name__, *words, "--out", str(out), "--dropped", str(dropped), "--settings", json.dumps(settings)]
        monkeypatch.setattr("sys.argv", words)
        program.main()
        (account,) = json.loads(Path(f"{out}.prov.json").read_text())["rows"].values()
        return read_records(out, kind), read_records(dropped, "dropped_row"), account

    return main


@pytest.mark.parametrize("name", REAL)
def test_a_real_file_passes_through_the_programs_and_every_row_is_accounted_for(run, source_cache, tmp_path, name):
    cells, empty, distinct, fitting, kept = REAL[name]
    source, config = SOURCES[name], read_config([PAPER])
    raw = source_cache / source["file"]
    rows, without_text, account = run(
        read_source, "source_row", "--raw", str(raw), source=name, adapter=source["adapter"], columns=source["columns"]
    )
    assert (account["in"], account["out"]) == (cells, cells - empty)
    assert Counter(row["reason"] for row in without_text) == ({"empty": empty} if empty else {})
    assert len({row["text"] for row in rows}) == distinct
    assert sum(100 <= len(text) <= 1000 for text in {row["text"] for row in rows}) == fitting

    words = ("--sources", str(tmp_path / "source_row.jsonl"))
    speeches, dropped, account = run(select_speeches, "unique_speech", *words, **config["speeches"], seed=config["seed"])
    assert account["in"] == len(rows) == len(speeches) + len(dropped) == account["out"] + sum(account["dropped"].values())
    assert len(speeches) == kept
    assert {speech["text"] for speech in speeches} <= {normalise(row["text"]) for row in rows}, "nothing is masked in these files"
    assert {(row["source"], row["source_row"]) for row in [*speeches, *dropped]} == {(name, row["source_row"]) for row in rows}


@pytest.mark.parametrize(("name", "topic"), [("counsel-chat", "topic"), ("counselchat-data", "topics")])
def test_of_counsel_chat_the_question_alone_is_taken(run, source_cache, name, topic):
    """Neither the title nor a therapist's name, page or answer."""
    source = SOURCES[name]
    raw = read_table(source_cache / source["file"])
    rows, dropped, _ = run(
        read_source,
        "source_row",
        "--raw",
        str(source_cache / source["file"]),
        source=name,
        adapter=source["adapter"],
        columns=source["columns"],
    )
    taken = {row["source_row"]: row for row in rows}
    for number, cells in enumerate(raw, start=1):
        if number in taken:
            first_topic = cells[topic].split(",")[0].strip() or None
            expected = {"text": cells["questionText"], "source_key": cells["questionID"], "topic_label": first_topic}
            assert taken[number] == {"source": name, "source_row": number, **expected}
        else:
            assert cells["questionText"].strip() == ""
    therapists = {cells.get("therapistInfo") or cells.get("therapistName") for cells in raw} - {"", None}
    written = json.dumps([rows, dropped])
    assert len(therapists) > 150
    assert not [name for name in therapists if len(name.split()) > 1 and name in written]


def test_the_documented_counts_are_those_of_the_program(source_cache, monkeypatch):
    monkeypatch.setenv("PSYCHOCOUNSEL_SOURCES", str(source_cache))
    study = load_study(read_config([PAPER]), [PAPER])
    assert table(study, []) in Path("docs/sources.md").read_text()
    with pytest.raises(UserError, match="Did you mean 'psych8k'"):
        table(study, ["psych8"])
    with pytest.raises(UserError, match="psych8k: not at hand"):
        table(study, ["psych8k"])
