"""The micro study from sources to report: killed and resumed, complete, accounted for, idempotent, silent about clients."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from tests.project import is_comparison

from psychocounsel.config import load_registry
from psychocounsel.records import check_manifest, is_removed, read_records

pytestmark = pytest.mark.slow

KINDS = {  # files of a run -> their record type
    "01_sources/*.dropped.jsonl": "dropped_row",
    "01_sources/*[!d].jsonl": "source_row",
    "02_speeches/unique.jsonl": "unique_speech",
    "02_speeches/topics.jsonl": "topic",
    "02_speeches/speeches.jsonl": "speech",
    "03_responses/assignments/*.jsonl": "assignment",
    "03_responses/*[!d].jsonl": "response",
    "03_responses/*.failed.jsonl": "failure",
    "04_ratings/answers.jsonl": "rating_answer",
    "04_ratings/ratings.jsonl": "rating",
    "04_ratings/again/*.answers.jsonl": "rating_answer",
    "04_ratings/again/same.jsonl": "rating",
    "04_ratings/again/reversed.jsonl": "rating",
    "04_ratings/scores.jsonl": "score",
    "05_pairs/*.jsonl": "pair",
    "05_pairs/*/train.jsonl": "pair",
    "05_pairs/*/test.jsonl": "pair",
    "05_pairs/*/dropped.jsonl": "dropped_row",
    "06_reward_models/*/*predictions.jsonl": "prediction",
    "06_reward_models/*/rankings.jsonl": "ranking_answer",
    "07_policies/*/*/samples.jsonl": "response",
    "07_policies/*/*/rewards.jsonl": "reward",
    "07_policies/*/*/pairs.jsonl": "pair",
    "08_answers/checkpoint_speeches.jsonl": "speech",
    "08_answers/*/checkpoint-?.jsonl": "response",
    "08_answers/*/free.jsonl": "response",
    "08_answers/*/length.jsonl": "response",
    "09_judgements/*/*.answers.jsonl": "judgement_answer",
    "09_judgements/*/free.jsonl": "judgement",
    "09_judgements/*/length.jsonl": "judgement",
    "09_judgements/second_judge/*/*.answers.jsonl": "judgement_answer",
}


def test_a_killed_run_resumes_without_asking_anything_again(project, killed, finished):
    assert killed, "the kill came before anything was asked"
    again = [len(read_records(file, "rating_answer")) for file in sorted(project.path("04_ratings/again").glob("*.answers.jsonl"))]
    assert again == [4 * 7, 4 * 7]  # reversed, which makes other requests; same, which means to ask the same twice
    compared = sum(is_comparison(question) * times for (_, question), times in project.asked().items())
    assert compared == 2 * 2 * 2 * 4  # by the second judge: two policies, two settings, two orders, four speeches
    asked = Counter(times for (_, question), times in project.asked().items() if not is_comparison(question))
    assert asked == {1: asked[1], 2: 4 * 7}
    assigned = sum(len(read_records(f, "assignment")) for f in project.path("03_responses/assignments").glob("scripted-*.jsonl"))
    rated = len(read_records(project.path("04_ratings/answers.jsonl"), "rating_answer"))
    assert len(project.server.requests) == assigned + rated + sum(again) + compared


def test_every_file_is_valid_and_sorted(project, finished):
    for pattern, kind in KINDS.items():
        files = [f for f in project.path(".").glob(pattern) if not f.name.startswith(".")]
        assert files, pattern
        for file in files:
            read_records(file, kind)
    assert not list((project.folder / "results").rglob("*.part*"))


def test_rows_are_accounted_for_from_source_to_pairs(project, finished):
    def rows(name: str, kind: str) -> list[dict]:
        return read_records(project.path(name), kind)

    raw = sum(1 for line in (project.folder / "resources/demo/speeches.jsonl").open() if line.strip())
    assert raw == len(rows("01_sources/demo.jsonl", "source_row")) + len(rows("01_sources/demo.dropped.jsonl", "dropped_row"))
    reasons = Counter(row["reason"] for row in rows("02_speeches/dropped.jsonl", "dropped_row"))
    assert {"too short", "too long", "exact duplicate", "near duplicate", "over the limit"} <= set(reasons)
    speeches = rows("02_speeches/speeches.jsonl", "speech")
    assert len(speeches) == 24
    read = sum(len(rows(f"01_sources/{source}.jsonl", "source_row")) for source in project.sources)
    assert read == 24 + sum(reasons.values())
    assert {s["source"] for s in speeches} == set(project.sources)
    assert Counter(s["split"] for s in speeches) == {"test": 8, "dev": 3, "train": 13}
    scores = {s["response_id"]: s for s in rows("04_ratings/scores.jsonl", "score")}
    sides = {s["speech_id"]: s["split"] for s in speeches}
    for split in ("train", "dev", "test"):
        for pair in rows(f"05_pairs/{split}.jsonl", "pair"):
            assert sides[pair["speech_id"]] == split
            assert scores[pair["chosen_id"]]["total"] - scores[pair["rejected_id"]]["total"] >= 7


def test_models_are_whole_and_differ_and_only_what_the_config_keeps_is_there(project, finished):
    """Without keep_checkpoints: the best checkpoint, the last of iterative DPO, and of the others nothing but the manifest."""
    whole, removed = {}, set()
    for manifest in project.path(".").rglob("manifest.json"):
        name = manifest.parent.relative_to(project.path("."))
        if is_removed(manifest):
            removed.add(name)
            assert {p.name for p in manifest.parent.iterdir()} == {f"manifest.json{end}" for end in ("", ".prov.json", ".removed")}
        else:
            check_manifest(manifest)
            whole[name] = json.loads(manifest.read_text())["files"]["model.safetensors"]["sha256"]
    expected, chosen = set(), []
    for policy, rounds in (("micro-dpo", [2]), ("micro-dpo-iter", [1, 1])):
        folder = Path("07_policies") / policy
        names = [folder / f"iteration-{i}/checkpoints/{k}" for i, count in enumerate(rounds, 1) for k in range(1, count + 1)]
        scores = json.loads(project.path(folder / "dev_scores.json").read_text())
        assert [Path(score["checkpoint"]).parent.relative_to("results/micro") for score in scores] == names
        best = names[max(range(len(names)), key=lambda place: (scores[place]["accuracy"], -place))]
        assert whole[folder / "model"] == whole[best]
        chosen += [folder / "model", best]
        expected |= {best, names[-1]} if policy == "micro-dpo-iter" else {best}
        told = json.loads(project.path(folder / f"iteration-{len(rounds)}/removed.json").read_text())
        assert {Path(entry["checkpoint"]).parent.relative_to("results/micro") for entry in told["removed"]} == set(names) - expected
        assert set(names) - expected == {name for name in removed if policy in name.parts}
    reward_models = {Path("06_reward_models") / name / "model" for name in ("micro-reward", "micro-general", "micro-merged")}
    assert set(whole) == expected | reward_models | {name for name in chosen if name.name == "model"}
    assert len({whole[name] for name in expected}) == len(expected)
    assert removed, "one of DPO's two checkpoints at least"
    kept = {p.stat().st_ino for p in project.path(".").rglob("*.safetensors")}
    elsewhere = [p for folder in ("cache", "micro/checkpoints") for p in (project.folder / "work" / folder).rglob("*.safetensors")]
    assert elsewhere
    assert {p.stat().st_ino for p in elsewhere} <= kept, "what work/ holds besides are links: it takes no room of its own"


def test_tables_have_no_empty_cell(project, finished):
    tables = sorted(project.path("10_tables").glob("*.csv"))
    assert len(tables) == 18
    for table in tables:
        for row in csv.DictReader(table.open()):
            assert all(cell.strip() and cell.strip().lower() != "nan" for name, cell in row.items() if name != "notes"), (table.name, row)
            assert row["notes"] or "n/a" not in row.values(), (table.name, row)
    for name in ("report.html", "13_release/README.md", "12_cards/micro-reward.md", "11_figures/win_rates.png"):
        assert project.path(name).stat().st_size > 500


def test_the_ablation_is_measured_and_its_benchmark_recounted(project, finished):
    """Table 2: general pairs alone and merged with ours; the benchmark's sections recounted from the predictions by hand."""
    with project.path("10_tables/reward_ablation.csv").open() as file:
        measured = [row for row in csv.DictReader(file) if row["Source"] == "this run"]
    assert [row["Training data"] for row in measured] == [
        "General pairs (tests)", "General pairs (tests) + PsychoCounsel-Preference (this run)",
    ]  # fmt: skip
    assert len(read_records(project.path("05_pairs/rewardbench-shape/test.jsonl"), "pair")) == 23
    assert [row["reason"] for row in read_records(project.path("05_pairs/general-pairs/dropped.jsonl"), "dropped_row")] == ["equal answers"]
    sections = load_registry([project.folder / "config/paper.yaml"], "paper")["rewardbench_sections"]
    pairs = {pair["pair_id"]: pair for pair in read_records(project.path("05_pairs/rewardbench-shape/test.jsonl"), "pair")}
    for name, row in zip(("micro-general", "micro-merged"), measured, strict=True):
        right = {
            pairs[p["pair_id"]]["subset"]: p["reward_chosen"] > p["reward_rejected"]
            for p in read_records(project.path(f"06_reward_models/{name}/benchmark.predictions.jsonl"), "prediction")
        }
        by_section = [sum(w * right[s] for s, w in weights.items()) / sum(weights.values()) for weights in sections.values()]
        assert float(row["RewardBench (%)"]) == pytest.approx(100 * sum(by_section) / 4, abs=0.001)
        assert [float(row[f"{section} (%)"]) / 100 for section in sections] == pytest.approx(by_section, abs=0.00001)
        assert row["Acc. (%)"] != "n/a"


def test_win_rates_follow_from_the_judgements(project, finished):
    """Recount protocol `robust` by hand."""
    for setting in ("free", "length"):
        judgements = read_records(project.path(f"09_judgements/micro-dpo/{setting}.jsonl"), "judgement")
        verdicts: dict[str, list[float]] = {}
        for row in judgements:
            verdicts.setdefault(row["speech_id"], []).append(1.0 if row["verdict"] == "win" else 0.0)
        by_hand = sum(sum(v) / 2 for v in verdicts.values()) / len(verdicts)
        reported = json.loads(project.path(f"09_judgements/micro-dpo/{setting}.win_rates.json").read_text())
        assert reported["protocols"]["robust"]["overall"]["win_rate"] == pytest.approx(by_hand)


def test_the_judges_agreement_follows_from_both_judges_files(project, finished):
    """Recount by hand: the share of the four speeches on which both judges' verdicts in the two orders are the same."""

    def points(file: str) -> dict[str, float]:
        rows = read_records(project.path(file), "judgement")
        found: dict[str, list[float]] = {}
        for row in rows:
            found.setdefault(row["speech_id"], []).append(float(row["verdict"] == "win"))
        return {speech: sum(each) / 2 for speech, each in found.items()}

    result = json.loads(project.path("09_judgements/second_judge/agreement.json").read_text())
    assert result["judges"] == ["rubric", "scripted-judge"]
    for row in (row for row in result["agreement"] if row["policy"]):
        first, second = (points(f"09_judgements/{folder}{row['policy']}/{row['setting']}.jsonl") for folder in ("", "second_judge/"))
        assert len(second) == 4 < len(first)
        by_hand = sum(first[speech] == second[speech] for speech in second) / 4
        assert row["protocols"]["robust"]["agreement"]["value"] == pytest.approx(by_hand)
        place = f"09_judgements/second_judge/{row['policy']}/{row['setting']}.win_rates.json"
        rate = json.loads(project.path(place).read_text())["protocols"]["robust"]["overall"]
        assert (rate["n"], rate["win_rate"]) == (4, pytest.approx(sum(second.values()) / 4))


def test_checkpoints_of_all_rounds_are_monitored(project, finished):
    steps = {
        (row["group"], row["Checkpoint"]): (row["Step"], row["notes"])
        for row in csv.DictReader(project.path("10_tables/monitor.csv").open())
    }
    assert {place: step for place, (step, _) in steps.items()} == {
        ("micro-dpo", "0"): "0", ("micro-dpo", "1"): "1", ("micro-dpo", "2"): "2",
        ("micro-dpo-iter", "0"): "0", ("micro-dpo-iter", "1"): "2", ("micro-dpo-iter", "2"): "4",
    }  # fmt: skip
    at_chance = json.loads(project.path("06_reward_models/micro-reward/metrics.json").read_text())["at_chance"]
    assert {"not shown to rank better than chance" in notes for _, notes in steps.values()} == {at_chance}
    for figure in ("monitor", "checkpoints"):
        assert project.path(f"11_figures/{figure}.png").stat().st_size > 5000


def test_every_result_has_a_provenance_record(project, finished):
    for file in project.path(".").rglob("*"):
        inside_a_model = (file.parent / "manifest.json").is_file() and file.name != "manifest.json"
        if file.is_file() and not file.name.endswith((".prov.json", ".removed")) and not inside_a_model:
            record = json.loads(file.with_name(file.name + ".prov.json").read_text())
            assert record["output"]["path"] == file.relative_to(project.folder).as_posix()


def test_no_key_and_no_client_text_where_they_do_not_belong(project, finished):
    speeches = [s["text"][:60] for s in read_records(project.path("02_speeches/speeches.jsonl"), "speech")]
    places = [project.folder / name for name in ("logs", ".snakemake", "work", "results")]
    for file in (file for place in places for file in place.rglob("*")):
        if not file.is_file():
            continue
        content = file.read_bytes()
        assert b"canary-key-7c1d" not in content, file
        if "logs" in file.parts or ".snakemake" in file.parts or file.name.endswith((".prov.json", ".server.log")):
            assert not any(text.encode() in content for text in speeches), file


def test_a_second_run_does_nothing(project, finished):
    before = len(project.server.requests)
    again = project.snakemake()
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout + again.stderr
    assert len(project.server.requests) == before


def test_a_config_mistake_stops_before_any_job(project, finished):
    (project.folder / "mistake.yaml").write_text("ratings: {judge: rubrik}\n")
    done = project.snakemake("--configfile", "tests/workflow/micro.yaml", "mistake.yaml")  # the later --configfile counts
    assert done.returncode != 0
    assert "mistake.yaml:1" in done.stdout + done.stderr
    assert "Did you mean 'rubric'?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
