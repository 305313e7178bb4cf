"""Raw files as users have them: each source's columns, every format, and what is wrong with broken ones."""

import csv
import gzip
import json

import pandas as pd
import pytest

from psychocounsel.adapters import SPEECHES, Columns, answers_counselling_bench, read_speeches, read_table
from psychocounsel.errors import UserError
from psychocounsel.records import read_records
from read_source import main

ROWS = [{"text": "I feel lost.", "topic": "anxiety", "id": 7}, {"text": 'It is, well, "fine".\r\nNo.', "topic": "", "id": 8}]


def write_csv(path, rows, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_as(path, kind, rows):
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    match kind:
        case "csv":
            write_csv(path, rows)
        case "csv with a byte-order mark":
            write_csv(path, rows, "utf-8-sig")
        case "csv with semicolons" | "csv with tabs":
            pd.DataFrame(rows).to_csv(path, index=False, sep=";" if "semicolons" in kind else "\t")
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "jsonl":
            path.write_text(text)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "parquet":
            pd.DataFrame(rows).to_parquet(path)


@pytest.mark.parametrize(
    "kind", ["csv", "csv with a byte-order mark", "csv with semicolons", "csv with tabs", "json", "jsonl", "jsonl.gz", "parquet"]
)
def test_generic_reads_every_format(tmp_path, kind):
    path = tmp_path / "raw"  # without an ending: the format is told by the content
    write_as(path, kind, ROWS)
    speeches = list(read_speeches(path, "generic", Columns(text="text", topic="topic", key="id")))
    assert [(s.row, s.key, s.topic, s.text) for s in speeches] == [(1, "7", "anxiety", ROWS[0]["text"]), (2, "8", None, ROWS[1]["text"])]


@pytest.mark.parametrize(
    ("adapter", "row", "expected"),
    [
        (
            "counsel_chat",
            {"questionID": "3", "questionTitle": "T", "questionText": "Q", "topic": "trauma", "answerText": "A"},
            ("3", "trauma", "Q"),
        ),
        ("therapistqa", {"Id_Number": 4, "Patient Question": "Q", "Distorted part": "d", "Dominant Distortion": "x"}, ("4", None, "Q")),
        ("psych8k", {"instruction": "Be a counsellor.", "input": "Q", "output": "A"}, (None, None, "Q")),
        ("amod_counsel", {"Context": "Q", "Response": "A"}, (None, None, "Q")),
        ("mentalchat16k", {"instruction": "Be a counsellor.", "input": "Q", "output": "A"}, (None, None, "Q")),
        ("counselling_bench", {"question_id": 5, "turns": ["Q", "later"], "category": "generic"}, ("5", None, "Q")),
    ],
)
def test_columns_of_each_source(tmp_path, adapter, row, expected):
    (tmp_path / "raw").write_text(json.dumps([row]))
    (speech,) = read_speeches(tmp_path / "raw", adapter)
    assert (speech.key, speech.topic, speech.text) == expected
    assert speech.row == 1


@pytest.mark.parametrize("adapter", ["mentalagora", "phi2mental", "generic"])
def test_sources_whose_columns_are_not_known_need_them(tmp_path, adapter):
    (tmp_path / "raw").write_text(json.dumps([{"post1": "One.", "post2": None, "post3": "Three."}]))
    with pytest.raises(UserError, match="post1, post2, post3"):
        list(read_speeches(tmp_path / "raw", adapter))
    assert [s.text for s in read_speeches(tmp_path / "raw", adapter, Columns(text="post1"))] == ["One."]
    several = list(read_speeches(tmp_path / "raw", adapter, Columns(text=["post1", "post2", "post3"])))
    assert [(s.row, s.text) for s in several] == [(1, "One."), (1, None), (1, "Three.")]


@pytest.mark.parametrize("adapter", SPEECHES)
def test_wrong_columns_are_named_with_the_nearest(tmp_path, adapter):
    write_csv(tmp_path / "raw", [{"question_text": "Q", "answer": "A"}])
    with pytest.raises(UserError) as error:
        list(read_speeches(tmp_path / "raw", adapter, Columns(text="questionText")))
    assert "no column 'questionText'. Did you mean 'question_text'?" in str(error.value)
    assert "'question_text', 'answer'" in str(error.value)


def test_unknown_adapter():
    with pytest.raises(UserError, match="Did you mean 'counsel_chat'"):
        list(read_speeches(None, "counsel-chat"))


def test_a_field_longer_than_the_csv_module_allows(tmp_path):
    write_csv(tmp_path / "raw", [{"questionID": 1, "questionText": "x" * 223_973, "topic": "t"}])
    (speech,) = read_speeches(tmp_path / "raw", "counsel_chat")
    assert len(speech.text) == 223_973


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("text\nfine\nnot fine: caf\u00e9\n".encode("latin-1"), ":3: not UTF-8 (byte 23 of the file is 0xe9)"),
        (b'{"text": "a"}\n\n{"text": \n', ":3: not a line of JSON"),
        (b'{"text": "a"}\n[1]\n', ":2: a row must be a JSON object, not list"),
        (b'[{"text": "a"},\n{"text" "b"}]', ":2: broken JSON"),
        (b'["a"]', "entry 1 of the list is no object"),
        (b"text,topic\na,b\nc\n", ":3: this row has not as many fields as the header (2)"),
        (b'text,topic\na,"b\n', ":2: broken CSV in the row that begins here"),
        (b'text,topic\n"a\nb",c\n"d" e,f\n', ":4: broken CSV in the row that begins here"),
        (b"text,topic,text\na,b,c\n", "several columns are named 'text'"),
        (b"\n<!DOCTYPE html>\n<title>Sign in, please</title>\n", "a web page, not a table"),
        (b"text,topic\n", "no data rows"),
        (b"", "no data rows"),
        (b"\x1f\x8b broken", "broken gzip"),
        (b"PK\x03\x04 a workbook", "as Excel's files are"),
        (b"PAR1 broken", "broken Parquet"),
    ],
)
def test_broken_files_say_where(tmp_path, raw, message):
    (tmp_path / "raw").write_bytes(raw)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / "raw")
    assert message in str(error.value)


def run_read(tmp_path, monkeypatch, settings):
    out, dropped = tmp_path / "out.jsonl", tmp_path / "dropped.jsonl"
    words = [
        "scripts/read_source.py",
        "--raw",
        str(tmp_path / "raw"),
        "--out",
        str(out),
        "--dropped",
        str(dropped),
        "--settings",
        json.dumps(settings),
    ]
    monkeypatch.setattr("sys.argv", words)
    main()
    return read_records(out, "source_row"), read_records(dropped, "dropped_row")


def test_what_is_no_text_goes_to_the_side_file(tmp_path, monkeypatch):
    texts = ["  Fine. \u00a0", None, float("nan"), "", " \t\n", 12, "half \ud83d", "Also fine."]
    (tmp_path / "raw").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    kept, dropped = run_read(tmp_path, monkeypatch, {"source": "mine", "adapter": "generic", "columns": {"text": "text"}})
    assert [(row["source_row"], row["text"]) for row in kept] == [(1, texts[0]), (8, texts[7])]
    assert [row["source_row"] for row in dropped] == [2, 3, 4, 5, 6, 7]
    assert [row["reason"] for row in dropped] == ["empty"] * 4 + ["not a text"] * 2
    assert dropped[4]["detail"] == "int"


def test_a_broken_letter_in_a_label_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "raw").write_text('{"text": "Fine.", "topic": "grief \\ud83d"}\n')
    kept, _ = run_read(tmp_path, monkeypatch, {"source": "mine", "adapter": "generic", "columns": {"text": "text", "topic": "topic"}})
    assert kept[0]["topic_label"] == "grief ?"


def test_a_quoted_name_in_the_header_does_not_choose_the_separator(tmp_path):
    (tmp_path / "raw").write_text('"text; as it came; whole",topic\n"a; b",c\n')
    assert read_table(tmp_path / "raw") == [{"text; as it came; whole": "a; b", "topic": "c"}]


def test_no_text_at_all_is_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "raw").write_text('{"Context": null}\n')
    with pytest.raises(SystemExit):
        run_read(tmp_path, monkeypatch, {"source": "mine", "adapter": "amod_counsel"})
    assert "no cell holds a text ({'empty': 1})" in capsys.readouterr().err


def test_recorded_answers(tmp_path):
    rows = [{"question_id": n, "model_id": "m", "choices": [{"index": 0, "turns": [f"Answer {n}"]}]} for n in (1, 2)]
    path = tmp_path / "raw"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert answers_counselling_bench(path) == {"1": "Answer 1", "2": "Answer 2"}
    path.write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    with pytest.raises(UserError, match="row 3: a second answer to question 1"):
        answers_counselling_bench(path)
    path.write_text(json.dumps({"question_id": 1, "choices": []}))
    with pytest.raises(UserError, match="row 1 holds no question_id or no text"):
        answers_counselling_bench(path)


@pytest.mark.parametrize(
    ("file", "adapter", "rows", "labels"),
    [
        ("counsel-chat/20200325_counsel_chat.csv", "counsel_chat", 2129, 31),
        ("mentalchat16k/sample500.csv", "mentalchat16k", 500, 0),
        ("counselling-bench/question.jsonl", "counselling_bench", 229, 0),
    ],
)
def test_real_files(source_cache, file, adapter, rows, labels):
    speeches = list(read_speeches(source_cache / file, adapter))
    assert len(speeches) == rows
    assert len({s.topic for s in speeches} - {None}) == labels


def test_real_answers(source_cache):
    keys = {s.key for s in read_speeches(source_cache / "counselling-bench" / "question.jsonl", "counselling_bench")}
    for path in (source_cache / "counselling-bench" / "model_answer").glob("*.jsonl"):
        assert answers_counselling_bench(path).keys() == keys
