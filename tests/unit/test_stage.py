"""The frame of a program: settings are typed and closed, outputs are whole or absent, rows add up, records are kept."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel import provenance
from psychocounsel.errors import UserError
from psychocounsel.provenance import read_record
from psychocounsel.records import check_manifest, content_hash

PROGRAM = '''
"""Copy assignments."""
from pathlib import Path
from pydantic import Field
from psychocounsel.errors import UserError
from psychocounsel.stage import Settings, add_reuse_argument, command_line, stage


class CopySettings(Settings):
    """Settings."""
    keep: int = Field(description="how many rows to keep")
    fail: str | None = Field(None, description="where to fail")
    model: dict | None = Field(None, description="a model that is asked")


def main():
    """Copy."""
    parser = command_line(__doc__, CopySettings)
    parser.add_argument("--rows", required=True, help="rows")
    parser.add_argument("--out", required=True, help="copy")
    parser.add_argument("--model", help="a model")
    add_reuse_argument(parser)
    with stage(parser) as run:
        models = [Path(run.args.model)] if run.args.model else []
        if run.args.reuse and run.adopts([Path(run.args.rows)], [Path(run.args.out), *models]):
            return
        rows = run.read(run.args.rows, "assignment")
        kept = rows[: run.settings.keep]
        run.write(run.args.out, kept, "assignment", sort_by="speech_id")
        if run.args.model:
            (run.output_model(run.args.model) / "weights").write_text("w")
        if run.settings.fail == "user":
            raise UserError("this is wrong; mend it")
        if run.settings.fail == "disk":
            raise OSError(28, "No space left on device")
        if run.settings.fail == "bug":
            raise RuntimeError("a bug")
        over = 0 if run.settings.fail == "count" else len(rows) - len(kept)
        run.account("rows", rows_in=len(rows), rows_out=len(kept), dropped={"over": over})


main()
'''


@pytest.fixture
def program(tmp_path):
    """Return a function that runs the program in tmp_path and returns the finished process."""
    shutil.copytree("scripts/psychocounsel", tmp_path / "scripts/psychocounsel")
    shutil.copytree("config/schemas", tmp_path / "config/schemas")
    (tmp_path / "scripts/copy_rows.py").write_text(PROGRAM)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"speech_id":"{i:016x}","model":"m"}}\n' for i in (3, 1, 2)))

    def run(*settings: str, more: tuple[str, ...] = ()):
        words = [sys.executable, "scripts/copy_rows.py", "--rows", "rows.jsonl", "--out", "out/copy.jsonl", "--settings", *settings, *more]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    return run


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if ".part" in p.name)


def test_outputs_are_sorted_and_recorded(program, tmp_path):
    done = program('{"keep": 2}', more=("--model", "out/model/manifest.json"))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["speech_id"][-1] for line in (tmp_path / "out/copy.jsonl").read_text().splitlines()] == ["1", "3"]
    record = json.loads((tmp_path / "out/copy.jsonl.prov.json").read_text())
    assert record["rows"] == {"rows": {"in": 3, "out": 2, "dropped": {"over": 1}}}
    assert record["identity"]["settings"] == {"keep": 2}
    assert record["identity"]["defaults"] == {"fail": None, "model": None}
    assert [i["path"] for i in record["identity"]["inputs"]] == ["rows.jsonl"]
    assert json.loads((tmp_path / "out/model/manifest.json").read_text())["files"].keys() == {"weights"}
    assert (tmp_path / "out/model/manifest.json.prov.json").is_file()
    assert not leftovers(tmp_path)


def test_identity_does_not_change_from_run_to_run(program, tmp_path):
    records = []
    for _ in range(2):
        assert program("keep=2").returncode == 0
        records.append(json.loads((tmp_path / "out/copy.jsonl.prov.json").read_text()))
    assert records[0]["identity_sha256"] == records[1]["identity_sha256"]
    assert program("keep=1").returncode == 0
    assert json.loads((tmp_path / "out/copy.jsonl.prov.json").read_text())["identity_sha256"] != records[0]["identity_sha256"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['{"kep": 2}'], "kep: Extra inputs are not permitted. Did you mean 'keep'?"),
        (["{}"], "keep: Field required"),
        (["keep=many"], "keep: Input should be a valid integer"),
        (["keep"], "expected a JSON object or key=value"),
        (['{"keep": '], "not JSON"),
        (["keep=2", "fail=user"], "error: this is wrong; mend it"),
        (["keep=2", "fail=disk"], "error: out: No space left on device; mend that and run it again"),
    ],
)
def test_user_errors_are_one_message(program, tmp_path, settings, message):
    done = program(*settings)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/copy.jsonl").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("fail", ["bug", "count"])
def test_a_failure_leaves_the_old_output_and_nothing_half_written(program, tmp_path, fail):
    assert program("keep=3").returncode == 0
    before = (tmp_path / "out/copy.jsonl").read_bytes()
    done = program("keep=1", f"fail={fail}")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert (tmp_path / "out/copy.jsonl").read_bytes() == before
    assert not leftovers(tmp_path)


def test_missing_input_is_a_user_error(program, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    done = program("keep=1")
    assert "error: rows.jsonl: no such file" in done.stderr


def record(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".prov.json").read_text())


def test_a_rule_s_settings_name_its_job(program, tmp_path):
    job = {"rule": "copy_rows", "wildcards": {"model": "m"}}
    assert program(json.dumps({"job": job, "keep": 2})).returncode == 0
    named = record(tmp_path / "out/copy.jsonl")
    assert named["job"] == job
    assert program("keep=2").returncode == 0
    assert record(tmp_path / "out/copy.jsonl")["identity_sha256"] == named["identity_sha256"]


def test_an_altered_result_is_refused_as_input(program, tmp_path):
    """Before anything is spent: Snakemake would build on it."""
    assert program("keep=3").returncode == 0
    copy = tmp_path / "out/copy.jsonl"
    copy.write_bytes(copy.read_bytes().replace(b'"m"', b'"n"', 1))
    done = program("keep=1", more=("--rows", "out/copy.jsonl", "--out", "out/second.jsonl"))
    assert done.returncode == 1
    assert "out/copy.jsonl: altered by hand, or damaged" in done.stderr
    assert "snakemake --forcerun out/copy.jsonl" in done.stderr
    assert not (tmp_path / "out/second.jsonl").exists()


@pytest.mark.parametrize("place", range(0, 3000, 97))
def test_every_byte_of_a_record_counts(tmp_path, place):
    """Flip one bit of a record: it is refused, wherever the bit stands."""
    path = tmp_path / "out/copy.jsonl.prov.json"
    path.parent.mkdir()
    path.write_bytes(example_record())
    read_record(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="copy.jsonl.prov.json: "):
        read_record(path)


def test_a_result_without_its_record_is_refused_as_input(program, tmp_path):
    (tmp_path / "results/run").mkdir(parents=True)
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "results/run/rows.jsonl")
    done = program("keep=1", more=("--rows", "results/run/rows.jsonl"))
    assert done.returncode == 1
    assert "results/run/rows.jsonl: a result without its provenance record" in done.stderr


def test_an_equal_run_is_adopted_and_another_is_not(program, tmp_path):
    more = ("--model", "out/model/manifest.json", "--reuse", "cache")
    assert program("keep=2", more=more).returncode == 0
    copy, first = tmp_path / "out/copy.jsonl", record(tmp_path / "out/copy.jsonl")
    assert "adopted" not in first["run"]["facts"]
    copy.unlink()
    shutil.rmtree(tmp_path / "out/model")
    assert program("keep=2", more=more).returncode == 0
    second = record(copy)
    assert second["run"]["facts"]["adopted"] is True
    for part in ("output", "rows", "identity", "identity_sha256"):
        assert second[part] == first[part]
    assert check_manifest(tmp_path / "out/model/manifest.json")
    assert program("keep=1", more=more).returncode == 0
    assert "adopted" not in record(copy)["run"]["facts"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"m"', '"n"'))
    assert program("keep=2", more=more).returncode == 0
    assert "adopted" not in record(copy)["run"]["facts"]


def test_inputs_of_other_origin_with_the_same_bytes_are_adopted(program, tmp_path):
    """The stage above was made by other code: the chain differs, the bytes and the result do not."""
    assert program("keep=3", more=("--out", "out/above.jsonl")).returncode == 0
    more = ("--rows", "out/above.jsonl", "--reuse", "cache")
    assert program("keep=2", more=more).returncode == 0
    before = record(tmp_path / "out/copy.jsonl")
    assert program("keep=4", more=("--out", "out/above.jsonl")).returncode == 0
    assert program("keep=2", more=more).returncode == 0
    after = record(tmp_path / "out/copy.jsonl")
    assert after["run"]["facts"]["adopted"] is True
    assert after["identity_sha256"] != before["identity_sha256"]
    assert after["identity"]["inputs"][0]["identity_sha256"] == record(tmp_path / "out/above.jsonl")["identity_sha256"]


def test_a_kept_output_that_was_edited_through_its_link_is_not_adopted(program, tmp_path):
    assert program("keep=2", more=("--reuse", "cache")).returncode == 0
    copy = tmp_path / "out/copy.jsonl"
    with copy.open("r+b") as file:
        file.write(b" ")
    assert program("keep=2", more=("--reuse", "cache")).returncode == 0
    assert "adopted" not in record(copy)["run"]["facts"]
    assert copy.read_bytes()[:1] == b"{"


def example_record() -> bytes:
    """A small valid record."""
    identity = provenance.identity("build_pairs", {"min_gap": 1}, {}, [])
    run = provenance.surroundings(datetime.now(UTC)) | {"model": None, "chat_templates": {}, "prompts": {}, "facts": {}}
    output = {"path": "out/copy.jsonl", "sha256": "0" * 64, "bytes": 3}
    parts = {"format": provenance.FORMAT, "output": output, "job": None, "rows": {}, "identity": identity}
    return provenance.rendered(provenance.sealed(parts | {"identity_sha256": content_hash(identity), "run": run}))


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=9), st.data())
def test_what_is_given_and_what_is_left_out_make_the_whole(resolved, data):
    def part(value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: part(inner) for key, inner in value.items() if data.draw(st.booleans())}

    def joined(one: dict, other: dict) -> dict:
        both = {key: joined(one[key], other[key]) if isinstance(one[key], dict) else one[key] for key in one.keys() & other.keys()}
        return {**one, **other, **both}

    whole = {"settings": resolved}
    given_part = part(whole)
    assert joined(given_part, provenance.left_out(whole, given_part)) == whole


@pytest.mark.parametrize("known", [{"revision": "a" * 40}, {"revision": None}, {"revision": None, "unpinned": True}])
def test_a_record_says_of_a_model_what_it_was_and_whether_that_is_known(program, tmp_path, known):
    model = {"name": "m", "id": "org/m", **known}
    assert program(json.dumps({"keep": 3, "model": model})).returncode == 0
    assert read_record(tmp_path / "out/copy.jsonl.prov.json")["run"]["model"] == model


def test_a_library_tells_nothing_on_standard_output(program, tmp_path):
    (tmp_path / "scripts/read_nothing.py").write_text(
        "from psychocounsel.stage import Settings, command_line, stage\n"
        "with stage(command_line('Read nothing.', Settings)):\n    import deepspeed\n"
    )
    words = [sys.executable, "scripts/read_nothing.py", "--settings", "{}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
