"""A run that starts at published pairs, from the raw Parquet to the report and the release, without a request to any API."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tests.fakes.micro_model import build_micro_model
from tests.fakes.published_data import published_rows, write_rows
from tests.project import copy_project

from psychocounsel.records import read_records

pytestmark = pytest.mark.slow

STUDY = "tests/workflow/published.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the project with the made-up published data, and its finished run."""
    folder = tmp_path_factory.mktemp("published")
    copy_project(folder)
    build_micro_model(folder / "work" / "models" / "micro")
    micro = yaml.safe_load((folder / "tests/workflow/micro_models.yaml").read_text())["micro"]  # the others need a server
    (folder / "work" / "published_models.yaml").write_text(yaml.safe_dump({"micro": micro}))
    train, test = published_rows(16, 8)
    sources = {}
    for name, rows, split in (("made-up", [*train, test[0]], "train"), ("made-up-test", test, "test")):
        write_rows(folder / "work" / f"{name}.parquet", rows)
        sources[name] = {
            "kind": "preferences", "title": name, "adapter": "pairs_psychocounsel", "split": split, "path": f"work/{name}.parquet",
            "licence": "CC BY-NC 4.0", "quotable": False, "redistribution": {"allowed": True, "reason": "made up"},
        }  # fmt: skip
    (folder / "work" / "published_sources.yaml").write_text(yaml.safe_dump(sources))
    done = snakemake(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def snakemake(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Snakemake on the study."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--configfile", STUDY, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_product_is_there_and_nothing_was_generated_for_the_data_set(folder):
    run = folder / "results" / "given"
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == [
        "02_speeches", "03_responses", "04_ratings", "05_pairs", "06_reward_models", "07_policies", "08_answers", "09_judgements",
        "10_tables", "11_figures", "12_cards", "13_release",
    ]  # fmt: skip
    assert [p.name for p in (run / "03_responses").glob("*.jsonl")] == ["given.jsonl"]
    for name in ("report.html", "summary.txt", "12_cards/micro-reward.md", "11_figures/chosen_models.png", "13_release/README.md"):
        assert (run / name).stat().st_size > 100
    dropped = read_records(run / "02_speeches" / "dropped.jsonl", "dropped_row")
    assert [row["reason"] for row in dropped] == ["speech on the test side too"]


def test_tables_say_why_a_cell_is_empty(folder):
    tables = sorted((folder / "results" / "given" / "10_tables").glob("*.csv"))
    assert {"dataset", "pool", "win_rates"} <= {table.stem for table in tables}
    for table in tables:
        for row in csv.DictReader(table.open()):
            cells = [cell.strip().lower() for name, cell in row.items() if name not in ("group", "notes")]
            assert all(cell and cell != "nan" for cell in cells), (table.name, row)
            assert row["notes"] or "n/a" not in row.values(), (table.name, row)
    rows = list(csv.DictReader((folder / "results" / "given" / "10_tables" / "pool.csv").open()))
    assert {row["Model"] for row in rows if row["Chosen"] not in ("0", "n/a")} == {
        "GPT-4o", "Llama-3.1-8B-Instruct", "gemma-2-9b-it", "Qwen2.5-7B-Instruct", "some-model-that-nobody-knows",
    }  # fmt: skip


def test_the_release_holds_the_runs_pairs(folder):
    run = folder / "results" / "given"
    for side, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
        pairs = read_records(run / "05_pairs" / f"{side}.jsonl", "pair")
        assert pq.read_table(run / "13_release" / "pairs" / f"{split}.parquet")["pair_id"].to_pylist() == [p["pair_id"] for p in pairs]
    assert "license: cc-by-nc-4.0" in (run / "13_release" / "README.md").read_text()
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=run / "13_release").returncode == 0


def test_no_near_duplicate_of_a_test_speech_is_trained_on(folder):
    report = json.loads((folder / "results" / "given" / "05_pairs" / "contamination.json").read_text())
    own = [c for c in report["comparisons"] if c["tested"] == c["data"] == "psychocounsel"]
    assert [(c["split"], c["similar"], c["repeated"]) for c in own] == [("train", 0, 0), ("dev", 0, 0)]


def test_a_second_run_does_nothing_and_the_audit_finds_all_well(folder):
    again = snakemake(folder)
    assert "Nothing to be done" in again.stdout + again.stderr
    verify = [sys.executable, "scripts/audit.py", "verify", "--configfile", STUDY]
    done = subprocess.run(verify, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for table, column in (("judge_positions", "Mean"), ("judge_consistency", "Same order")):
        words = [sys.executable, "scripts/audit.py", "explain", table, "--row", "1", "--column", column, "--configfile", STUDY]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "no ratings of its own" in done.stdout
    parquet = folder / "results" / "given" / "13_release" / "pairs" / "train.parquet"
    before = parquet.read_bytes()
    parquet.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    done = subprocess.run(verify, cwd=folder, capture_output=True, text=True)
    parquet.write_bytes(before)
    assert done.returncode == 1
    assert "13_release/pairs/train.parquet" in done.stdout


@pytest.mark.parametrize(
    ("table", "row", "column", "down_to"),
    [
        ("dataset", "Pairs, test", "This run", r"row \d+ of the raw file ✓  work/given/sources/made-up-test/made-up-test.parquet"),
        ("dataset", "made-up-test", "This run", r"row \d+ of the raw file ✓  work/given/sources/made-up-test/made-up-test.parquet"),
        ("pool", "gemma-2-9b-it", "Mean score", r"of 7 published ratings ✓  .*\n +raw file of published pairs  work/given/sources/"),
    ],
)
def test_a_cell_is_explained_down_to_the_published_rows(folder, table, row, column, down_to):
    command = [sys.executable, "scripts/audit.py", "explain", table, "--row", row, "--column", column, "--configfile", STUDY]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(down_to, done.stdout), done.stdout


def test_another_responding_prompt_reads_no_pair_anew(folder):
    prompt = folder / "config" / "prompts" / "respond.jinja"
    before = prompt.read_text()
    prompt.write_text(before.replace("{{", "Client: {{", 1))
    done = snakemake(folder, "-n", "--quiet", "rules")
    prompt.write_text(before)
    shown = done.stdout + done.stderr
    assert "divide_pairs" in shown
    assert "read_pairs" not in shown
    assert "label_topics" not in shown
