"""The benchmark of the whole workflow: its raw files and its sums; tests/workflow runs it."""

import json
import sys
from pathlib import Path

import yaml

from psychocounsel.adapters import Columns, read_speeches
from psychocounsel.near_duplicates import find_near_duplicates
from psychocounsel.texts import normalise

sys.path.insert(0, "benchmarks")

from full_scale import idle, sum_up, verdict
from synthetic_sources import SOURCES, write_sources


def command(model: str) -> list[str]:
    return ["scripts/ask.py", "--settings", f'{{"job": {{"rule": "ask", "wildcards": {{"model": "{model}"}}}}}}']


JOBS = [  # two of one rule that overlap, and one after a pause
    {"command": command("a"), "started": 0.0, "ended": 4.0, "cpu": 1.0, "peak": 1000},
    {"command": command("b"), "started": 2.0, "ended": 5.0, "cpu": 2.0, "peak": 2000},
    {"command": ["scripts/fetch.py", "x"], "started": 7.0, "ended": 8.0, "cpu": 0.5, "peak": 10},
]


def record(model: str, asked: int, journalled: int) -> dict:
    return {
        "job": {"rule": "ask", "wildcards": {"model": model}},
        "rows": {"answers": {"in": asked, "out": asked - 1, "dropped": {"none": 1}}},
        "run": {"facts": {"api": {"requests": asked, "from_journal": journalled}}},
    }


def test_as_many_speeches_survive_as_were_ordered(tmp_path):
    """Of the files as the sources' own adapters read them."""
    registry = yaml.safe_load(Path("config/sources.yaml").read_text(encoding="utf-8"))
    count = write_sources(tmp_path, {name: registry[name]["file"] for name in SOURCES}, 400)
    texts = []
    for name in SOURCES:
        columns = Columns.model_validate(registry[name].get("columns") or {"text": "input"})
        texts += [normalise(s.text) for s in read_speeches(tmp_path / registry[name]["file"], registry[name]["adapter"], columns) if s.text]
    assert len(texts) == count
    unique = list(dict.fromkeys(text for text in texts if 100 <= len(text) <= 1000))
    found = find_near_duplicates(unique, drop_above=0.85, cluster_above=0.6, shingle_chars=8, permutations=128, seed=1)
    assert len(found.cluster) == 400
    assert found.twin
    assert len(set(found.cluster.values())) < 400
    assert len(unique) < len(set(texts)) < len(texts)


def test_jobs_of_a_rule_are_summed_with_what_their_records_count():
    records = {json.dumps(r["job"]): r for r in (record("a", 10, 0), record("b", 20, 5))}
    ask, fetch = sum_up(JOBS, records)
    assert (ask["rule"], ask["jobs"], ask["wall"], ask["longest"], ask["cpu"]) == ("ask", 2, 7.0, 4.0, 3.0)
    assert ask["peak"] == 2000 * 1024 / 1e6
    assert (ask["asked"], ask["journal"], ask["rows"]) == (25, 5, {"answers": [30, 28]})
    assert (fetch["rule"], fetch["asked"]) == ("fetch", 0)


def test_time_without_a_program_is_counted_once():
    assert idle(JOBS, 10.0) == 10 - 5 - 1


def test_what_takes_too_much_is_named():
    slow, large, asking = ({"rule": name, "longest": 10.0, "peak": 100.0, "asked": 0} for name in ("slow", "large", "asking"))
    assert verdict([slow, large, asking]).startswith("no stage")
    slow["longest"], large["peak"] = 121.0, 4001.0
    asking |= {"longest": 1000.0, "asked": 5}
    assert "slow (121 s, 100 MB), large (10 s, 4001 MB)" in verdict([slow, large, asking])
    assert "asking" not in verdict([slow, large, asking]).partition(":")[2]


def test_make_runs_every_benchmark():
    programs = {path.as_posix() for path in Path("benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    makefile = Path("Makefile").read_text(encoding="utf-8")
    targets = [makefile.partition(f"\n{target}:")[2].partition("\n\n")[0] for target in ("bench", "bench-train")]
    assert programs == {word for target in targets for word in target.split() if word.startswith("benchmarks/")}
    assert all(Path(program).name in Path("README.md").read_text(encoding="utf-8") for program in programs)
