"""General preference data and RewardBench through the programs: read, train the micro model, score, measure (paper, Table 2)."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from toy_training import RECIPE, SPEC, program

from psychocounsel.config import load_registry
from psychocounsel.records import dump_records, read_records, validator

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
BENCHMARK = Path(__file__).parents[1] / "workflow" / "preferences" / "rewardbench.jsonl"  # one pair of ours for each of its subsets
SCORING = {"model": SPEC.model_dump(), "max_length": 320, "batch_size": 8, "seed": 1}


def read(raw: Path, folder: Path, **settings) -> dict[str, list[dict]]:
    """Read a file of preferences by the program; return the pairs of each side."""
    sides = {name: folder / f"{name}.jsonl" for name in ("train", "dev", "test")}
    assert program("read_preferences", raw=raw, **sides, dropped=folder / "dropped.jsonl", settings={"seed": 1} | settings) == 0
    return {name: read_records(file, "pair") for name, file in sides.items()}


def measure(pairs: Path, weights: Path, folder: Path, **settings) -> tuple[dict, list[dict]]:
    """Score pairs and measure the predictions, by the programs; return the metrics and the predictions."""
    predictions, metrics = folder / "predictions.jsonl", folder / "metrics.json"
    assert program("score_pairs", pairs=pairs, weights=weights, out=predictions, settings=SCORING) == 0
    settings = {"name": "m", "seed": 1, "bootstrap": 50} | settings
    assert program("evaluate_rewards", pairs=pairs, predictions=predictions, out=metrics, settings=settings) == 0
    return validator("metrics")(json.loads(metrics.read_text())), read_records(predictions, "prediction")


@pytest.mark.parametrize("source", ["hh-rlhf-harmless", "llmbar"])
def test_real_general_preferences_train_a_reward_model(source, source_cache, data, tmp_path):
    entry = load_registry([Path("config/sources.yaml")], "sources")[source]
    pairs = read(source_cache / entry["file"], tmp_path, source=source, adapter=entry["adapter"], dev_fraction=0.2)
    everything = [pair for side in pairs.values() for pair in side]
    dropped = read_records(tmp_path / "dropped.jsonl", "dropped_row")
    assert len(everything) + len(dropped) == {"hh-rlhf-harmless": 2312, "llmbar": 100}[source]
    assert {row["reason"] for row in dropped} <= {"empty", "turns do not alternate"}
    turns = Counter(len(pair["prompt"]) for pair in everything)
    assert (max(turns) > 1) == (source == "hh-rlhf-harmless"), "conversations of several turns stay whole"

    some = [pair | {"split": "train"} for pair in everything[:24]]
    dump_records(tmp_path / "some.jsonl", some, "pair")
    recipe = RECIPE | {"epochs": None, "max_steps": 3}
    files = {"pairs": tmp_path / "some.jsonl", "dev": tmp_path / "some.jsonl", "weights": data / "base/manifest.json"}
    outputs = {"resume_dir": tmp_path / "work", "out": tmp_path / "model/manifest.json", "log": tmp_path / "log.json"}
    settings = {"model": SPEC.model_dump(), "recipe": recipe, "seed": 7}
    assert program("train_reward_model", **files, **outputs, settings=settings) == 0
    result, predictions = measure(tmp_path / "some.jsonl", outputs["out"], tmp_path)
    assert (result["pairs"], result["n"]) == (24, 24)
    assert result["accuracy"]["value"] == pytest.approx(sum(p["reward_chosen"] > p["reward_rejected"] for p in predictions) / 24)
    assert json.loads(outputs["log"].read_text())[-1]["dev_accuracy"] == pytest.approx(result["accuracy"]["value"])


def test_general_preferences_merged_with_ours_train_one_model_with_both_dev_sides(data, tmp_path):
    """Table 2's second rows: two files to train on, two dev files."""
    general = BENCHMARK.with_name("general.jsonl")
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    sides = read(general, tmp_path, source="general", adapter="chosen_rejected", columns=columns, dev_fraction=0.3)
    assert (len(sides["train"]) + len(sides["dev"]), len(sides["test"])) == (14, 0)
    recipe = RECIPE | {"epochs": 1, "batch_size": 4}
    files = {"pairs": [data / "train.jsonl", tmp_path / "train.jsonl"], "dev": [data / "dev.jsonl", tmp_path / "dev.jsonl"]}
    outputs = {"resume_dir": tmp_path / "work", "out": tmp_path / "model/manifest.json", "log": tmp_path / "log.json"}
    settings = {"model": SPEC.model_dump(), "recipe": recipe, "seed": 7}
    assert program("train_reward_model", **files, weights=data / "base/manifest.json", **outputs, settings=settings) == 0
    account = json.loads((tmp_path / "model/manifest.json.prov.json").read_text())["rows"]["pairs"]
    assert account["in"] == account["out"] == 21 + len(sides["train"])
    assert json.loads(outputs["log"].read_text())[-1]["dev_pairs"] == 16 + len(sides["dev"])


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_rewardbench_from_file_to_section_scores(ending, reward_model, tmp_path):
    """Its own columns, in each format; the sections recounted over single prompts, as many times as its authors count them."""
    rows = [json.loads(line) for line in BENCHMARK.read_text().splitlines()]
    assert list(rows[0]) == ["prompt", "chosen", "chosen_model", "rejected", "rejected_model", "subset", "id"]
    raw = tmp_path / f"bench.{ending}"
    if ending == "parquet":
        pd.DataFrame(rows).to_parquet(raw)
    else:
        raw.write_text(json.dumps(rows) if ending == "json" else BENCHMARK.read_text())
    pairs = read(raw, tmp_path, source="bench", adapter="rewardbench")["test"]
    assert {pair["subset"] for pair in pairs} == {row["subset"] for row in rows}

    sections = load_registry([Path("config/paper.yaml")], "paper")["rewardbench_sections"]
    assert {subset for weights in sections.values() for subset in weights} == {row["subset"] for row in rows}
    result, predictions = measure(tmp_path / "test.jsonl", reward_model / "model/manifest.json", tmp_path, sections=sections)
    subset_of = {pair["pair_id"]: pair["subset"] for pair in pairs}
    right = {subset_of[p["pair_id"]]: p["reward_chosen"] > p["reward_rejected"] for p in predictions}
    scores = {}
    for section, weights in sections.items():
        verdicts = [right[subset] for subset, weight in weights.items() for _ in range(weight)]
        scores[section] = sum(verdicts) / len(verdicts)
    assert result["sections"]["scores"] == pytest.approx(scores)
    assert result["sections"]["overall"]["value"] == pytest.approx(sum(scores.values()) / 4)
    assert result["sections"]["missing"] == []


def test_the_weights_are_those_of_rewardbenchs_code():
    """2,985 prompts, but that mathematics counts as much as code; XSTest's two subsets have each other's number, as there."""
    sections = load_registry([Path("config/paper.yaml")], "paper")["rewardbench_sections"]
    weights = {subset: weight for section in sections.values() for subset, weight in section.items()}
    assert sum(weights.values()) - weights["math-prm"] + 447 == 2985
    code = sum(weight for subset, weight in weights.items() if subset.startswith("hep-"))
    assert weights["math-prm"] == code == 984
    assert (weights["xstest-should-refuse"], weights["xstest-should-respond"]) == (250, 154)
