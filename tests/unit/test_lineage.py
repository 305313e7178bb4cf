"""Where rows of raw files begin, and what names a cell."""

import csv
import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel.adapters import read_table
from psychocounsel.errors import UserError
from psychocounsel.explanation import Explanation, Node, printable, told
from psychocounsel.run_files import raw_lines
from psychocounsel.table_cells import Cell

CELLS = st.text("ab ,\"\n'", max_size=8)


@given(rows=st.lists(st.tuples(st.text("xyz", min_size=1), CELLS), min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"]))
def test_each_row_of_a_csv_file_begins_on_the_line_that_is_told(tmp_path_factory, rows, end):
    path = tmp_path_factory.mktemp("raw") / "raw.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("key", "text"), *rows])
    path.write_bytes(text.getvalue().encode())
    lines = list(raw_lines(path))
    assert len(lines) == len(read_table(path)) == len(rows)
    split = path.read_bytes().decode().split("\n")
    for line, (key, _) in zip(lines, rows, strict=True):
        assert split[line - 1].startswith(f'"{key}"')


def test_blank_lines_of_json_lines_and_a_gzip_are_seen_through(tmp_path):
    rows = [json.dumps({"text": text}) for text in "abc"]
    path = tmp_path / "raw.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join([rows[0], "", *rows[1:], ""]).encode()))
    assert list(raw_lines(path)) == [1, 3, 4]


def test_formats_without_lines_of_their_own_have_none(tmp_path):
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([{"text": "a"}], indent=1))
    assert list(raw_lines(path)) == []


def flow_in(folder: Path) -> SimpleNamespace:
    """A workflow that knows where tables lie."""
    return SimpleNamespace(results=lambda path: f"{folder}/{path}")


TABLE = """group,Policy,Source,Overall,Overall low,notes
Free,dpo,one order,1,0,
Free,dpo,both orders,2,0,
Free,dpo-iter,both orders,3,0,
Length,dpo,both orders,4,0,
"""


@pytest.mark.parametrize(
    ("row", "value"), [("2", "2"), ("dpo-iter", "3"), ("one", "1"), ("Length", "4"), ("dpo | both orders | free", "2")]
)
def test_a_row_is_named_by_its_number_or_by_words_of_its_label(tmp_path, row, value):
    (tmp_path / "10_tables").mkdir()
    (tmp_path / "10_tables" / "wins.csv").write_text(TABLE)
    assert Cell(flow_in(tmp_path), "wins", row, "Overall").value == value
    assert Cell(flow_in(tmp_path), str(tmp_path / "10_tables/wins.csv"), row, "Overall low").base == "Overall"


@pytest.mark.parametrize("row", ["dpo", "0", "5", "nobody", "dpo | nobody"])
def test_a_row_that_is_none_or_several_is_refused_with_the_choices(tmp_path, row):
    (tmp_path / "10_tables").mkdir()
    (tmp_path / "10_tables" / "wins.csv").write_text(TABLE)
    with pytest.raises(UserError, match=r"2  Free \| dpo \| both orders"):
        Cell(flow_in(tmp_path), "wins", row, "Overall")


@given(st.text())
def test_a_text_is_shown_on_one_line_without_control_characters(text):
    assert printable(text).isprintable()


def test_a_text_without_control_characters_is_shown_as_it_is():
    assert printable("naïve “quotes” \x1b[2J") == "naïve “quotes” \\x1b[2J"


def explanation(agrees: bool) -> Explanation:
    """A cell with one judgement under it, which does or does not follow from the raw answer."""
    judgement = Node("win", "judgements.jsonl", 3, text="secret words", agrees=agrees, under=[Node("raw answer", "raw.jsonl", 4)], more=2)
    return Explanation("wins.csv", 2, "dpo", "Overall", "1.000", "mean", "1.000", True, [Node("rate", under=[judgement])])


def test_what_does_not_agree_deep_under_a_cell_is_told():
    for agrees in (True, False):
        whole = explanation(agrees)
        facts = whole.as_json(show_text=False)
        assert whole.sound is facts["sound"] is facts["under"][0]["under"][0]["agrees"] is agrees
        assert ("DOES NOT AGREE" in told(whole, show_text=False)) is not agrees


def test_json_has_texts_on_request_alone_and_no_empty_fields():
    (rate,) = explanation(True).as_json(show_text=False)["under"]
    assert rate["under"] == [
        {"what": "win", "file": "judgements.jsonl", "line": 3, "agrees": True, "more": 2}
        | {"under": [{"what": "raw answer", "file": "raw.jsonl", "line": 4}]}
    ]
    assert explanation(True).as_json(show_text=True)["under"][0]["under"][0]["text"] == "secret words"
