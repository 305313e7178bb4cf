"""Records: what is written is read back; what does not fit names file and line; a manifest notices every change."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel.errors import UserError
from psychocounsel.records import canonical_json, check_manifest, content_hash, dump_records, iter_records, read_records, write_manifest

ASSIGNMENTS = st.lists(
    st.fixed_dictionaries({"speech_id": st.text("0123456789abcdef", min_size=16, max_size=16), "model": st.text(min_size=1)}), max_size=20
)


@given(rows=ASSIGNMENTS)
def test_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("r") / "a.jsonl"
    assert dump_records(path, rows, "assignment") == len(rows)
    assert read_records(path, "assignment") == rows


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "not a line of JSON"),
        ("[1]", "must be a JSON object"),
        ('{"speech_id": "0123456789abcdef"}', "must contain"),
        ('{"speech_id": "0123456789abcdef", "model": 3}', "model must be string"),
        ('{"speech_id": "0123456789abcdef", "model": "m", "extra": 1}', "extra"),
        ('{"speech_id": "short", "model": "m"}', "speech_id must match pattern"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text('{"speech_id": "0123456789abcdef", "model": "m"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{complaint}"):
        read_records(path, "assignment")


def test_records_come_one_by_one(tmp_path):
    """A file is not read further than it is asked for: the good line comes before the bad one is met."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"speech_id": "0123456789abcdef", "model": "m"}\n{broken\n')
    records = iter_records(path, "assignment")
    assert next(records)["model"] == "m"
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        next(records)


def test_complaints_do_not_quote_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"speech_id": "0123456789abcdef", "model": {"secret words": 1}}) + "\n")
    with pytest.raises(UserError) as caught:
        read_records(path, "assignment")
    assert "secret" not in str(caught.value)


@given(st.dictionaries(st.text(), st.integers(-(2**53), 2**53) | st.text() | st.booleans() | st.none()))
def test_hash_ignores_the_order_of_keys_and_nothing_else(value):
    shuffled = dict(reversed(value.items()))
    assert content_hash(value) == content_hash(shuffled)
    assert json.loads(canonical_json(value)) == value
    assert content_hash(value) != content_hash({**value, "one more": 1}) or "one more" in value


def test_a_manifest_notices_every_change(tmp_path):
    def fresh(name: str):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "weights").write_bytes(b"1234")
        (folder / "weights").chmod(0o600)
        (folder / "sub" / "config").write_bytes(b"{}")
        return folder, write_manifest(folder)

    folder, manifest = fresh("good")
    assert check_manifest(manifest) == folder
    assert (folder / "weights").stat().st_mode & 0o777 == 0o644
    (folder / "manifest.json.prov.json").write_text("{}")
    assert check_manifest(manifest) == folder
    for name, change in {
        "altered": lambda f: (f / "weights").write_bytes(b"1235"),
        "missing": lambda f: (f / "sub" / "config").unlink(),
        "added": lambda f: (f / "more").write_bytes(b""),
        "swapped": lambda f: shutil.copy(f / "sub" / "config", f / "weights"),
    }.items():
        folder, manifest = fresh(name)
        change(folder)
        with pytest.raises(UserError, match=str(folder)):
            check_manifest(manifest)
    with pytest.raises(UserError, match="no such model"):
        check_manifest(tmp_path / "nowhere" / "manifest.json")
