"""An auditor's view of a finished run: whatever is changed by hand is found and named, and every cell of a table explained."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psychocounsel import verification
from psychocounsel.adapters import read_table
from psychocounsel.config import load_study, read_config
from psychocounsel.explanation import Node, printable, told
from psychocounsel.lineage import explain
from psychocounsel.provenance import SUFFIX, read_record, record_path, rendered, sealed
from psychocounsel.records import content_hash, file_sha256, read_records
from psychocounsel.verification import DAMAGE, Verdict, verify
from psychocounsel.workflow import Workflow

pytestmark = pytest.mark.slow

FILES = ["config/config.yaml", "tests/workflow/micro.yaml", "work/micro_sources.yaml"]
RUN = Path("results/micro")
TABLES = [
    "dataset",
    "topics",
    "pool",
    "model_groups",
    "pairs",
    "judge_consistency",
    "judge_positions",
    "contamination",
    "reward_models",
    "reward_ablation",
    "win_rates",
    "lengths",
    "win_rate_differences",
    "judge_agreement",
    "win_rates_again",
    "monitor",
]
SCORES, PAIRS = RUN / "04_ratings/scores.jsonl", RUN / "05_pairs/train.jsonl"
WEIGHTS = RUN / "06_reward_models/micro-reward/model/model.safetensors"


def load(*more: str) -> Workflow:
    files = [Path(file) for file in (*FILES, *more)]
    return Workflow(load_study(read_config(files), files))


@pytest.fixture(scope="module")
def flow(project, finished, tmp_path_factory) -> Iterator[Workflow]:
    """Copy the finished run, go there, and load its config."""
    folder = tmp_path_factory.mktemp("audited") / "project"
    shutil.copytree(project.folder, folder, symlinks=True, ignore=shutil.ignore_patterns(".snakemake", "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield load()


@contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Put files back as they were, or away where there were none."""
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    finally:
        for path, content in before.items():
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)


def damaged(verdict: Verdict) -> list[str]:
    return [finding.path for finding in verdict.findings if finding.kind in DAMAGE]


def rewrite(output: Path, edit: Callable[[dict], None]) -> None:
    """Edit the record of an output and make it consistent in itself again."""
    record = json.loads(record_path(output).read_text())
    edit(record)
    record["identity_sha256"] = content_hash(record["identity"])
    record_path(output).write_bytes(rendered(sealed(record)))


def all_records() -> list[Path]:
    return sorted(Path(str(path).removesuffix(SUFFIX)) for top in ("results", "work/micro") for path in Path(top).rglob(f"*{SUFFIX}"))


def files_with_bytes() -> list[Path]:
    places = [RUN, Path("work/micro/sources"), Path("work/models")]
    return sorted(path for place in places for path in place.rglob("*") if path.is_file() and path.stat().st_size)


# Nothing was touched


def test_a_finished_run_is_well(flow):
    verdict = verify(flow)
    assert (verdict.status, verdict.findings) == (0, [])
    assert verdict.remarks
    assert all("removed by design" in remark for remark in verdict.remarks)
    results = [path for path in RUN.rglob("*") if path.is_file() and not path.name.endswith(SUFFIX)]
    assert verdict.files > len(results)
    assert verdict.bytes > sum(path.stat().st_size for path in results)
    assert len(verdict.root) == 64


def test_times_do_not_count(flow):
    """Neither a touch of every file nor a clock that ran wrong is an alarm."""
    root = verify(flow).root
    for number, path in enumerate(files_with_bytes()):
        os.utime(path, (10**9 * (number % 3), 10**9 * (number % 2)))
    verdict = verify(flow)
    assert (verdict.status, verdict.root) == (0, root)


@pytest.mark.parametrize("part", ["10_tables", "10_tables/win_rates.csv", "07_policies/micro-dpo/model/config.json", "report.html"])
def test_a_part_is_verified_with_all_that_it_was_made_from(flow, part):
    whole, verdict = verify(flow), verify(flow, RUN / part)
    assert verdict.status == 0
    assert 0 < verdict.files < whole.files
    source = Path("work/micro/sources/demo/speeches.jsonl")
    with kept(source):
        source.write_bytes(source.read_bytes() + b"\n")
        assert damaged(verify(flow, RUN / part)) == [source.as_posix()]


# Something was


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_one_byte_in_any_file_is_found(flow, data):
    path = data.draw(st.sampled_from(files_with_bytes()))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    with kept(path):
        path.write_bytes(content)
        verdict = verify(flow)
        assert verdict.status == 1
        assert damaged(verdict) == [path.as_posix()]
        assert verdict.root is None


@settings(max_examples=25)
@given(data=st.data(), with_records=st.booleans())
def test_two_files_that_change_places_are_found(flow, data, with_records):
    outputs = [path for path in all_records() if path.stat().st_size]
    one = data.draw(st.sampled_from(outputs))
    other = data.draw(st.sampled_from([path for path in outputs if path.read_bytes() != one.read_bytes()]))
    pairs = [(one, other)] + ([(record_path(one), record_path(other))] if with_records else [])
    with kept(*(path for pair in pairs for path in pair)):
        for first, second in pairs:
            content = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(content)
        verdict = verify(flow)
        assert verdict.status == 1
        assert {path.removesuffix(SUFFIX) for path in damaged(verdict)} == {one.as_posix(), other.as_posix()}
        if not with_records and "manifest.json" not in (one.name, other.name):  # a selected model has the manifest of its checkpoint
            assert any(f"holds the bytes of {other}" in finding.detail for finding in verdict.findings)


def test_an_edit_that_keeps_size_and_time_is_found(flow):
    before = WEIGHTS.stat()
    with kept(WEIGHTS):
        content = bytearray(WEIGHTS.read_bytes())
        content[-1] ^= 1
        WEIGHTS.write_bytes(content)
        os.utime(WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert WEIGHTS.stat().st_mtime_ns == before.st_mtime_ns
        assert damaged(verify(flow)) == [WEIGHTS.as_posix()]


@pytest.mark.parametrize("output", [SCORES, RUN / "summary.txt", RUN / "06_reward_models/micro-reward/model/manifest.json"])
def test_a_deleted_record_is_found(flow, output):
    with kept(record_path(output)):
        record_path(output).unlink()
        verdict = verify(flow)
        assert [(f.kind, f.path) for f in verdict.findings] == [("unrecorded", output.as_posix())]


def test_a_deleted_record_of_a_source_is_found(flow):
    source = Path("work/micro/sources/demo/speeches.jsonl")
    with kept(record_path(source)):
        record_path(source).unlink()
        assert damaged(verify(flow)) == [source.as_posix()]


@pytest.mark.parametrize("output", [SCORES, RUN / "summary.txt", WEIGHTS])
def test_a_deleted_output_is_found(flow, output):
    with kept(output):
        output.unlink()
        verdict = verify(flow)
        assert [(f.kind, f.path) for f in verdict.findings] == [("missing", output.as_posix())]


def test_an_output_deleted_with_its_record_is_found_where_something_was_made_from_it(flow):
    with kept(SCORES, record_path(SCORES)):
        SCORES.unlink()
        record_path(SCORES).unlink()
        verdict = verify(flow)
        assert [(f.kind, f.path) for f in verdict.findings] == [("missing", SCORES.as_posix())]
        assert RUN.joinpath("10_tables/pool.csv").as_posix() in verdict.findings[0].affected


@pytest.mark.parametrize("stranger", [RUN / "10_tables/better.csv", WEIGHTS.with_name("more.bin"), RUN / "13_new/x.txt"])
def test_an_added_file_is_found(flow, stranger):
    stranger.parent.mkdir(exist_ok=True)
    with kept(stranger):
        stranger.write_text("1")
        verdict = verify(flow)
        assert [(f.kind, f.path) for f in verdict.findings] == [("unrecorded", stranger.as_posix())]


def test_what_a_killed_job_left_is_a_remark(flow):
    left = RUN / "10_tables" / ".pool.csv.0123456789ab.part"
    with kept(left):
        left.write_text("1")
        verdict = verify(flow)
        assert (verdict.status, verdict.findings) == (0, [])
        assert any(left.as_posix() in remark for remark in verdict.remarks)


def test_a_model_that_was_removed_by_design_is_told_and_one_that_is_missing_found(flow):
    folder = RUN / "07_policies/micro-dpo"
    (mark,) = folder.rglob("*.removed")
    manifest, told = mark.with_name("manifest.json"), folder / "iteration-1/removed.json"
    assert any(remark.startswith(f"{folder}: 1 checkpoint removed by design") for remark in verify(flow).remarks)
    with kept(mark):
        mark.unlink()
        assert ("missing", mark.with_name("model.safetensors").as_posix()) in {(f.kind, f.path) for f in verify(flow).findings}
    with kept(told, record_path(told)):
        told.unlink()
        record_path(told).unlink()
        assert [(f.kind, f.path) for f in verify(flow).findings] == [("missing", manifest.as_posix())], "a mark alone proves nothing"
    stranger = mark.with_name("model.safetensors.2")
    with kept(stranger):
        stranger.write_text("1")
        assert [(f.kind, f.path) for f in verify(flow).findings] == [("unrecorded", stranger.as_posix())]


EDITS = {
    "settings": lambda r: r["identity"]["settings"].update(min_gap=0.5),
    "code": lambda r: r["identity"].update(code="0" * 16),
    "a module and code": lambda r: r["identity"].update(
        modules=(modules := {**r["identity"]["modules"], "build_pairs.py": "0" * 16}), code=content_hash(modules, digits=16)
    ),
    "an input's sha256": lambda r: r["identity"]["inputs"][0].update(sha256="0" * 64),
    "an input's identity": lambda r: r["identity"]["inputs"][0].update(identity_sha256="0" * 64),
    "an input left out": lambda r: r["identity"]["inputs"].pop(),
    "sha256": lambda r: r["output"].update(sha256="0" * 64),
    "bytes": lambda r: r["output"].update(bytes=1),
    "path": lambda r: r["output"].update(path="results/micro/other"),
    "rows": lambda r: r["rows"]["train pairs"].update({"in": 1}),
    "job": lambda r: r["job"].update(rule="score_responses"),
    "commit": lambda r: r["run"]["git"].update(commit="0" * 40),
    "time": lambda r: r["run"].update(started="2020-01-01T00:00:00+00:00"),
}


@pytest.mark.parametrize("output", [PAIRS, RUN / "05_pairs/dev.jsonl"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_record_is_found_though_its_own_checksum_is_made_to_fit(flow, output, edit):
    with kept(record_path(output)):
        rewrite(output, EDITS[edit])
        verdict = verify(flow)
        assert verdict.status in (1, 3)
        assert output.as_posix() in {finding.path.removesuffix(SUFFIX) for finding in verdict.findings}


def test_a_file_rewritten_with_its_record_is_found_by_what_was_made_from_it(flow):
    with kept(SCORES, record_path(SCORES)):
        SCORES.write_bytes(SCORES.read_bytes() + b"\n")
        rewrite(SCORES, lambda r: r["output"].update(sha256=file_sha256(SCORES), bytes=SCORES.stat().st_size))
        assert damaged(verify(flow)) == [SCORES.as_posix()]


def test_a_file_made_again_from_other_inputs_leaves_what_was_made_from_it_stale(flow):
    """As if Snakemake had been stopped after one stage: the scores are new and whole, the pairs are of the old ones."""
    with kept(SCORES, record_path(SCORES)):
        SCORES.write_bytes(SCORES.read_bytes() + b"\n")
        changes = {"sha256": file_sha256(SCORES), "bytes": SCORES.stat().st_size}
        rewrite(SCORES, lambda r: (r["output"].update(changes), r["identity"]["settings"].update(principles=["empathy"])))
        verdict = verify(flow)
        stale = [finding for finding in verdict.findings if finding.kind == "stale"]
        assert PAIRS.as_posix() in {finding.path for finding in stale}
        assert all(SCORES.as_posix() in finding.detail for finding in stale)
        assert [finding.path for finding in verdict.findings if finding.kind == "other settings"] == [SCORES.as_posix()]


def test_a_raw_source_without_a_record_is_found(flow):
    raw = Path("resources/demo/speeches.jsonl")
    with kept(raw):
        raw.write_bytes(raw.read_bytes().replace(b"a", b"b", 1))
        assert raw.as_posix() in damaged(verify(flow))


def forge() -> None:
    """Make every record fit the files as they lie there, from the sources down: what only the root hash can tell."""
    waiting, done = {path.as_posix() for path in all_records()}, {}
    while waiting:
        for name in sorted(waiting):
            record = json.loads(record_path(Path(name)).read_text())
            inputs = record["identity"]["inputs"]
            if any(item["path"] in waiting for item in inputs):
                continue

            def fit(r: dict, name: str = name) -> None:
                r["output"].update(sha256=file_sha256(name), bytes=Path(name).stat().st_size)
                for item in r["identity"]["inputs"]:
                    item.update(sha256=file_sha256(item["path"]), identity_sha256=done.get(item["path"]))

            rewrite(Path(name), fit)
            done[name] = json.loads(record_path(Path(name)).read_text())["identity_sha256"]
            waiting.discard(name)


def test_only_the_root_tells_a_run_whose_records_were_all_rewritten(flow, capsys):
    root, table = verify(flow).root, RUN / "10_tables/win_rates.csv"
    records = [record_path(path) for path in all_records()]
    with kept(table, *records):
        forge()
        assert verify(flow).root == root, "a forger who changes nothing"
        table.write_bytes(table.read_bytes().replace(b"0.000", b"9.000", 1))
        forge()
        verdict = verify(flow)
        assert (verdict.status, verdict.findings) == (0, [])
        assert verdict.root != root
        assert audit("verify", "--root", root).returncode == 1
        assert audit("verify", "--root", verdict.root).returncode == 0
    assert audit("verify", "--root", root).returncode == 0


# Whole, but of an older study


def test_what_other_settings_made_is_outdated_and_says_which(flow):
    principles = yaml.safe_load(Path("config/principles.yaml").read_text())
    principles[2]["definition"] = "Something else entirely. " * 9
    Path("work/principles.yaml").write_text(yaml.safe_dump(principles))
    Path("work/other.yaml").write_text(yaml.safe_dump({"files": {"principles": "work/principles.yaml"}, "pairs": {"min_gap": 2.0}}))
    verdict = verify(load("work/other.yaml"))
    assert verdict.status == 3
    details = {finding.path: finding.detail for finding in verdict.findings}
    assert {finding.kind for finding in verdict.findings} == {"other settings"}
    assert details[PAIRS.as_posix()] == "min_gap: 1.0 -> 2.0"
    assert details[(RUN / "04_ratings/answers.jsonl").as_posix()] == "principle 'clarity' changed: definition"
    assert SCORES.as_posix() not in details
    assert max(map(len, details.values())) < 300
    assert verdict.root == verify(flow).root, "an outdated run keeps its root"


def test_what_a_changed_module_made_is_outdated_and_says_which(flow, monkeypatch):
    now = verification.code_modules

    def changed(program: str) -> dict[str, str]:
        return {name: "0" * 16 if name == "psychocounsel/winrates.py" else value for name, value in now(program).items()}

    monkeypatch.setattr(verification, "code_modules", changed)
    verdict = verify(flow)
    assert verdict.status == 3
    assert {finding.detail for finding in verdict.findings} == {"code of psychocounsel/winrates.py changed"}
    assert (RUN / "09_judgements/micro-dpo/free.win_rates.json").as_posix() in {finding.path for finding in verdict.findings}
    assert SCORES.as_posix() not in {finding.path for finding in verdict.findings}


def test_a_changed_registry_is_outdated_not_damaged(flow):
    taxonomy, root = Path("config/taxonomy.yaml"), verify(flow).root
    with kept(taxonomy):
        taxonomy.write_text(taxonomy.read_text() + "\n# a note\n")
        verdict = verify(flow)
        assert [(f.kind, f.path) for f in verdict.findings] == [("other config file", taxonomy.as_posix())]
        assert (verdict.status, verdict.root) == (3, root)


def test_a_job_that_the_config_no_longer_has_is_outdated(flow):
    Path("work/fewer.yaml").write_text(yaml.safe_dump({"policies": [], "evaluation": {"policies": [], "checkpoints": [], "ablation": []}}))
    verdict = verify(load("work/fewer.yaml"))
    assert verdict.status == 3
    assert any(
        "the config no longer has iteration 1, policy micro-dpo for the rule train_policy" in finding.detail for finding in verdict.findings
    )


# The command


def audit(*words: str, code: str = "") -> subprocess.CompletedProcess:
    """Run audit.py as users do."""
    command = [sys.executable, "scripts/audit.py", *words, "--configfile", *FILES[1:]]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_tells_its_status_and_needs_no_snakemake(flow):
    blocked = "import sys, runpy; sys.path.insert(0, 'scripts'); sys.modules['snakemake'] = None;"
    blocked += " runpy.run_path('scripts/audit.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blocked, "verify", "--json", "-", "--configfile", *FILES[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["run"], facts["status"], facts["findings"]) == ("micro", 0, [])
    sealed_as = audit("seal")
    assert (sealed_as.returncode, sealed_as.stdout.strip()) == (0, facts["root"])
    assert "exit status" in audit("verify", "--help").stdout


def test_the_text_names_the_culprit_first_and_counts_what_is_affected(flow):
    with kept(SCORES):
        SCORES.write_bytes(SCORES.read_bytes()[:-1])
        done = audit("verify")
        assert done.returncode == 1
        heading, culprit, affected = done.stdout.splitlines()[:3]
        assert heading.startswith("ALTERED")
        assert SCORES.as_posix() in culprit
        assert "files made from it" in affected
        assert len(done.stdout.splitlines()) < 10
        seal = audit("seal")
        assert (seal.returncode, seal.stdout) == (1, "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["verify", "results/other"], "not in results/micro"),
        (["verify", "results/micro/none.csv"], "no such file"),
        (["verify", "results/micro/10_tables", "--root", "0" * 64], "leave TARGET out"),
        (["explain", "winrates", "--row", "1", "--column", "Overall"], "Did you mean 'win_rates'?"),
        (["explain", "win_rates", "--row", "1", "--column", "Overal"], "Did you mean 'Overall'?"),
        (["explain", "win_rates", "--row", "micro-dpo", "--column", "Overall"], "fits several rows"),
        (["explain", "pool", "--row", "nobody", "--column", "Chosen"], "fits no row"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_message(flow, words, says):
    done = audit(*words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


# The cells


def nodes(under: list[Node]) -> Iterator[Node]:
    for node in under:
        yield node
        yield from nodes(node.under)


def cells() -> Iterator[tuple[str, int, str]]:
    """Every column of every table in a random row, every row in a random column."""
    draw = random.Random(1)
    for table in TABLES:
        with open(RUN / f"10_tables/{table}.csv", newline="") as file:
            header, *rows = csv.reader(file)
        columns = header[1:-1]
        yield from ((table, draw.randint(1, len(rows)), column) for column in columns)
        yield from ((table, number, draw.choice(columns)) for number in range(1, len(rows) + 1))


def test_every_cell_is_explained_and_agrees_with_what_is_under_it(flow):
    for table, row, column in cells():
        explanation = explain(flow, table, str(row), column, everything=False)
        assert explanation.sound, (table, row, column, explanation)
        for node in nodes(explanation.under):
            assert node.file is None or Path(node.file).is_file(), node
            if node.line:
                assert node.line <= len(Path(node.file).read_bytes().split(b"\n")), node


@pytest.mark.parametrize(
    ("table", "row", "column"),
    [
        ("win_rates", "micro-dpo | both orders | Without", "Overall"),
        ("reward_models", "micro-reward", "Brier"),
        ("reward_models", "rubric", "Acc. (%)"),
    ],
)
def test_single_records_are_traced_to_requests_and_raw_rows(flow, table, row, column):
    explanation = explain(flow, table, row, column, everything=True)
    found = list(nodes(explanation.under))
    texts = {speech["text"] for speech in read_records(RUN / "02_speeches/speeches.jsonl", "speech")}
    speeches = [node for node in found if node.what.startswith("client speech")]
    assert speeches
    for node in speeches:
        assert node.text in texts
        (as_read,) = node.under
        (raw,) = as_read.under
        rows = read_table(Path(raw.file))
        number = int(raw.what.split()[1])
        cell = next(value for value in rows[number - 1].values() if value == as_read.text)
        first = cell.split("\n")[0].split('"')[0].rstrip("\r")[:30]
        lines = Path(raw.file).read_text(encoding="utf-8").splitlines()
        assert any(json.dumps(first)[1:-1] in line or first in line for line in lines[raw.line - 1 : raw.line + 60])
    asked = [node for node in found if node.request_key]
    assert asked
    for node in asked:
        assert node.request_key in Path(node.file).read_text().splitlines()[node.line - 1]
        for journal in node.under:
            assert json.loads(Path(journal.file).read_text().splitlines()[journal.line - 1])["key"] == node.request_key
    assert any(node.under for node in asked), "no answer is traced to a journal"


def test_words_of_clients_and_models_are_shown_on_request_alone(flow):
    for row, shown in (("micro-dpo | both orders | Without", True), ("micro-dpo | one order | With a", False)):
        explanation = explain(flow, "win_rates", row, "Overall", everything=True)
        texts = [node.text.split("\n")[0] for node in nodes(explanation.under) if node.text and len(node.text.split("\n")[0]) > 12]
        assert texts
        tree, facts = told(explanation, shown), json.dumps(explanation.as_json(shown))
        assert {printable(text) in tree for text in texts} == {json.dumps(text)[1:-1] in facts for text in texts} == {shown}


def test_a_cell_that_does_not_follow_from_what_is_under_it_is_told(flow):
    judgements = RUN / "09_judgements/micro-dpo/free.jsonl"
    with kept(judgements):
        judgements.write_text(judgements.read_text().replace('"verdict":"loss"', '"verdict":"win"'))
        done = audit("explain", "win_rates", "--row", "3", "--column", "Overall")
        assert done.returncode == 1
        assert "DOES NOT AGREE" in done.stdout
    journal = Path("work/micro/journal/answers/micro-dpo.jsonl")
    ratings = RUN / "04_ratings/ratings.jsonl"
    for file, old, new, cell in (
        (journal, '"text":"', '"text":"x', ("win_rates", "3", "Overall")),
        (ratings, '"score":5', '"score":4', ("pool", "scripted, warm", "Mean score")),
    ):
        with kept(file):
            file.write_text(file.read_text().replace(old, new))
            assert not explain(flow, *cell, everything=True).sound, file
    table = RUN / "10_tables/pool.csv"
    with kept(table):
        table.write_text(table.read_text().replace(",20,", ",21,", 1))
        assert not explain(flow, "pool", "1", "Responses", everything=False).sound


# Snakemake's own


def test_an_identical_rerun_has_the_same_root(project, finished, flow):
    """The tables, the cards and the report are made again in the project itself: only times differ."""
    before = verify(flow).root
    first = read_record(record_path(project.path("summary.txt")))["run"]["started"]
    done = project.snakemake("--forcerun", "make_tables", "write_cards", "summarise_run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_record(record_path(project.path("summary.txt")))["run"]["started"] > first
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        verdict = verify(load())
    assert (verdict.findings, verdict.root) == ([], before)


def test_snakemakes_report_works_with_captions_and_leaves_the_run_whole(project, finished):
    done = project.snakemake("--report", "results/micro.snakemake_report.html")
    assert done.returncode == 0, done.stderr[-3000:]
    html = (project.folder / "results/micro.snakemake_report.html").read_text()
    for table in TABLES:
        caption = " ".join((project.folder / f"report/table_{table}.rst").read_text().split())
        assert caption[:40] in " ".join(html.split()), table
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        assert verify(load()).status == 0
