"""The release: what load_dataset reads offline, what the card says, what may not go in, the same bytes twice, and the way back."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from programs import run_program, start_program
from tests.fakes.micro_model import build_micro_model
from tests.fakes.published_data import PRINCIPLES, RATINGS, published_rows, write_rows

from psychocounsel.records import canonical_json, content_hash, dump_records, file_sha256, read_records
from write_release import LICENCES, combined_licence

PUBLISHED = ["ID", "prefID", "question", "chosen", "rejected", "chosen_model", "rejected_model", *RATINGS]
SPLITS = ("train", "validation", "test")
NEAR = {"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 8, "permutations": 128}
OPEN = {"title": "Open | data", "licence": "MIT", "address": "https://example.org/open", "allowed": True, "reason": "MIT", "right": False}
SHUT = {"title": "Shut", "licence": "CC BY-NC-SA 4.0", "address": None, "allowed": False, "reason": "its terms forbid it", "right": False}


def program(name: str, *words: object, how=run_program, **settings) -> subprocess.CompletedProcess:
    """Run a program."""
    return how(name, *words, "--settings", canonical_json(settings))  # as rules write them


def succeed(name: str, *words: object, **settings) -> None:
    """Run a program to its end."""
    done = program(name, *words, **settings)
    assert done.returncode == 0, done.stderr[-3000:]


def start(folder: Path, raws: dict[str, Path], source: str = "given") -> Path:
    """Start a run at files of pairs by side: read, label (without a judge), split, divide; return its folder."""
    folder.mkdir(parents=True)
    sources = [{"source": f"{source}-{side}", "adapter": "pairs_psychocounsel", "split": side} for side in raws]
    out = {name: folder / f"{name}.jsonl" for name in ("speeches", "responses", "scores", "pairs", "dropped")}
    out["speeches"] = folder / "unique.jsonl"
    words = [word for name, path in out.items() for word in (f"--{name}", path)]
    succeed("read_pairs", "--raw", *raws.values(), *words, sources=sources, near_duplicates=NEAR, seed=1)
    unique = read_records(folder / "unique.jsonl", "unique_speech")
    labels = [{"topic": s["topic_label"] or ("anxiety", "stress")[int(s["speech_id"], 16) % 2], "topic_from": "source"} for s in unique]
    facts = {"coarse_topic": "core_mental_health_issues", "judge": None, "raw": None, "request_key": None}
    topics = [{"speech_id": s["speech_id"]} | label | facts for s, label in zip(unique, labels, strict=True)]
    dump_records(folder / "topics.jsonl", topics, "topic")
    words = ["--speeches", folder / "unique.jsonl", "--topics", folder / "topics.jsonl", "--out", folder / "speeches.jsonl"]
    succeed("split_speeches", *words, test_speeches=1, dev_fraction=0.2, seed=1)
    words = [word for side in ("train", "dev", "test") for word in (f"--{side}", folder / f"{side}.jsonl")]
    files = ["--speeches", folder / "speeches.jsonl", "--pairs", folder / "pairs.jsonl"]
    succeed("divide_pairs", *files, *words, prompt="Answer the client.\n\nClient Speech: {{ client_speech }}")
    return folder


def release(run: Path, out: Path, **changes) -> Path:
    """Write the release of a run."""
    files = [word for name in ("speeches", "responses", "scores", "train", "dev", "test") for word in (f"--{name}", run / f"{name}.jsonl")]
    sources = [{"name": f"given-{side}", **OPEN} for side in ("train", "validation", "dev", "test")]
    models = [{"name": "GPT-4o", "title": "GPT-4o", "id": "gpt-4o", "licence": "OpenAI Terms of Use", "withheld": None}]
    told = {
        "title": 'A "set"',
        "labels": "made by a judge",
        "judge": "a-judge",
        "min_gap": 1.0,
        "note": "A demonstration.",
        "personal_data": "masked",
    }
    told |= {"principles": [(name, name.capitalize()) for name in PRINCIPLES], "sources": sources, "models": models}
    succeed("write_release", *files, "--taxonomy", "config/taxonomy.yaml", "--out-dir", out, **told | changes)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that starts at generated pairs."""
    folder = tmp_path_factory.mktemp("run")
    train, test = published_rows(20, 8)
    return start(folder / "run", {"train": write_rows(folder / "a.parquet", train), "test": write_rows(folder / "b.parquet", test)})


@pytest.fixture(scope="module")
def released(run) -> Path:
    """Its release."""
    return release(run, run.parent / "release")


def header(folder: Path) -> dict:
    """The YAML header of the card."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def loaded(folder: Path, *config: str) -> dict:
    """What load_dataset makes of a folder, offline and in a process of its own."""
    code = (
        "import json, sys; from datasets import load_dataset; d = load_dataset(*sys.argv[1:]);"
        "print(json.dumps({s: {'features': {k: str(v) for k, v in t.features.items()}, 'rows': t.to_list()} for s, t in d.items()}))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hf"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder), *config], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def pairs_of(run: Path) -> dict[str, list[dict]]:
    """The pairs of a run by side."""
    return {side: read_records(run / f"{side}.jsonl", "pair") for side in ("train", "dev", "test")}


def test_load_dataset_reads_the_published_columns_and_ours(run, released):
    data = loaded(released)
    assert list(data) == list(SPLITS)
    for split, side in zip(SPLITS, ("train", "dev", "test"), strict=True):
        features = data[split]["features"]
        assert list(features)[: len(PUBLISHED)] == PUBLISHED, "the published columns stand first, in their order"
        assert {features[name] for name in ["prefID", *RATINGS]} == {"Value('int64')"}
        assert {features[name] for name in PUBLISHED if name not in ("prefID", *RATINGS)} == {"Value('string')"}
        pairs = {pair["pair_id"]: pair for pair in pairs_of(run)[side]}
        rows = data[split]["rows"]
        assert [row["pair_id"] for row in rows] == sorted(pairs)
        for row in rows:
            pair = pairs[row["pair_id"]]
            assert row["pair_id"] == content_hash(row["chosen_id"], row["rejected_id"], digits=16)
            assert row["chosen"] == pair["chosen"][0]["content"]
            assert {name: row[f"rejected_{name}_rating"] for name in PRINCIPLES} == pair["rejected_scores"]
            assert row["question"] in pair["prompt"][0]["content"]
        assert len({(row["ID"], row["prefID"]) for row in rows}) == len(rows)


def test_trl_config_holds_the_pairs_as_conversations(run, released):
    data = loaded(released, "trl")
    for split, side in zip(SPLITS, ("train", "dev", "test"), strict=True):
        kept = {row["pair_id"]: row for row in data[split]["rows"]}
        for pair in pairs_of(run)[side]:
            assert {key: kept[pair["pair_id"]][key] for key in ("prompt", "chosen", "rejected")} == {
                key: pair[key] for key in ("prompt", "chosen", "rejected")
            }


@pytest.mark.slow
def test_trl_takes_the_conversations_as_they_are(released):
    """In a process of its own: trl's own functions on the rows, as its trainers call them."""
    code = """
import sys
from datasets import load_dataset
from trl import is_conversational, extract_prompt
data = load_dataset(sys.argv[1], "trl", split="train")
for row in data:
    assert is_conversational(row)
    assert [m["role"] for m in row["prompt"] + row["chosen"]] == ["user", "assistant"]
    assert set(extract_prompt({"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]})) == {
        "prompt", "chosen", "rejected"}
print(len(data))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(released.parent / "hf")}
    done = subprocess.run([sys.executable, "-c", code, str(released)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 0


TRAIN = """
import sys
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

folder, base, out = sys.argv[1:]
data, tokenizer = load_dataset(folder, "trl"), AutoTokenizer.from_pretrained(base)
common = dict(output_dir=out, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False, max_length=512,
              gradient_checkpointing=False, dataloader_pin_memory=False, logging_steps=1, save_strategy="no")
scorer = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
for trainer in (
    RewardTrainer(scorer, args=RewardConfig(**common), train_dataset=data["train"], processing_class=tokenizer),
    DPOTrainer(base, args=DPOConfig(**common), train_dataset=data["train"], processing_class=tokenizer),
):
    trainer.train()
    print("trained", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][0])
"""


@pytest.mark.slow
def test_trls_trainers_train_on_the_release_as_it_is(released, tmp_path):
    build_micro_model(tmp_path / "base")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(released.parent / "hf"), "OMP_NUM_THREADS": "1"}
    words = [str(released), str(tmp_path / "base"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", TRAIN, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("trained")]
    assert losses[1] == pytest.approx(0.6931, abs=1e-3), "DPO begins at ln 2"
    assert len(losses) == 2


def test_responses_stand_once_with_their_scores(run, released):
    data = loaded(released, "responses")
    rows = [row for split in SPLITS for row in data[split]["rows"]]
    scores = {score["response_id"]: score for score in read_records(run / "scores.jsonl", "score")}
    assert sorted(row["response_id"] for row in rows) == sorted(scores)
    for row in rows:
        assert {name: row[f"{name}_rating"] for name in PRINCIPLES} == scores[row["response_id"]]["scores"]
        assert row["overall"] == scores[row["response_id"]]["overall"]


def test_the_release_read_again_gives_the_same_pairs(run, released, tmp_path):
    raws = {side: released / "pairs" / f"{split}.parquet" for side, split in zip(("train", "dev", "test"), SPLITS, strict=True)}
    again = start(tmp_path / "again", raws)
    assert pairs_of(again) == pairs_of(run)
    for name, kind in (("scores", "score"), ("responses", "response")):
        assert read_records(again / f"{name}.jsonl", kind) == read_records(run / f"{name}.jsonl", kind)
    where = ("source", "source_row", "source_key")
    same = [
        [{key: value for key, value in speech.items() if key not in where} for speech in read_records(folder / "speeches.jsonl", "speech")]
        for folder in (run, again)
    ]
    assert [s | {"topic_from": "source"} for s in same[0]] == same[1]


def test_the_same_inputs_give_the_same_bytes(run, released, tmp_path):
    again = release(run, tmp_path / "again", how=start_program)
    files = [f.relative_to(released) for f in released.rglob("*") if f.is_file() and not f.name.endswith(".prov.json")]
    assert len(files) == 11
    for file in files:
        assert (released / file).read_bytes() == (again / file).read_bytes(), file


def test_checksums_cover_every_other_file(released):
    sums = dict(line.split("  ")[::-1] for line in (released / "SHA256SUMS").read_text().splitlines())
    files = {f.relative_to(released).as_posix() for f in released.rglob("*") if f.is_file() and not f.name.endswith(".prov.json")}
    assert sums.keys() == files - {"SHA256SUMS"}
    assert all(file_sha256(released / name) == digest for name, digest in sums.items())
    for name in files:
        record = json.loads((released / f"{name}.prov.json").read_text())
        assert record["output"]["sha256"] == file_sha256(released / name)


def test_the_card_has_a_header_that_fits_the_files_and_says_what_must_be_said(run, released):
    head, text = header(released), (released / "README.md").read_text()
    assert "Personal data: masked." in text
    assert head["license"] == "mit"
    assert head["pretty_name"] == 'A "set"'
    assert head["size_categories"] == ["n<1K"]
    for config in head["dataset_info"]:
        folder = "pairs" if config["config_name"] == "default" else config["config_name"]
        for split in config["splits"]:
            table = pq.read_table(released / folder / f"{split['name']}.parquet")
            assert split["num_examples"] == table.num_rows
            assert [feature["name"] for feature in config["features"]] == table.column_names
            for name in table.column_names:
                assert f"| `{name}` |" in text, f"the card explains the column {name}"
    for words in ("made by a judge", "A demonstration.", "licensed professional", "institutional review board", "for research"):
        assert words in text
    assert "OpenAI Terms of Use" in text
    assert r"Open \| data" in text
    unsafe = sum(p["rejected_scores"]["safety"] > p["chosen_scores"]["safety"] for side in pairs_of(run).values() for p in side)
    assert f"In {unsafe} of" in text
    assert not any(s["text"][:40] in text for s in read_records(run / "speeches.jsonl", "speech")), "a card quotes no speech"


def test_a_source_whose_licence_forbids_it_stays_out_and_is_counted(run, tmp_path):
    sources = [{"name": "given-train", **OPEN}, {"name": "given-test", **SHUT}]
    out = release(run, tmp_path / "release", sources=sources)
    pairs = pairs_of(run)
    assert pq.read_table(out / "pairs/test.parquet").num_rows == 0
    assert list(loaded(out)) == ["train", "validation"]
    rows = json.loads((out / "README.md.prov.json").read_text())["rows"]
    kept = len(pairs["train"]) + len(pairs["dev"])
    assert rows["pairs"] == {"in": kept + len(pairs["test"]), "out": kept, "dropped": {"Shut: its terms forbid it": len(pairs["test"])}}
    text = (out / "README.md").read_text()
    assert f"| Shut: its terms forbid it | {len(pairs['test'])} |" in text
    assert "| Shut | `given-test` | 0 | CC BY-NC-SA 4.0 | no: its terms forbid it |" in text
    forbidden = {s["text"] for s in read_records(run / "speeches.jsonl", "speech") if s["source"] == "given-test"}
    for file in out.rglob("*.parquet"):
        assert not any(text in json.dumps(pq.read_table(file).to_pylist()) for text in forbidden), file


def test_with_the_right_to_it_a_source_goes_in_and_the_licence_follows(run, tmp_path):
    out = release(run, tmp_path / "release", sources=[{"name": "given-train", **OPEN}, {"name": "given-test", **SHUT | {"right": True}}])
    assert header(out)["license"] == "cc-by-nc-sa-4.0"
    assert "yes, by a right that its publisher declares to have" in (out / "README.md").read_text()
    assert set(pq.read_table(out / "pairs/test.parquet")["licence"].to_pylist()) == {"CC BY-NC-SA 4.0"}


def test_answers_that_may_not_be_passed_on_stay_out(run, tmp_path):
    models = [{"name": "GPT-4o", "title": "GPT-4o", "id": "gpt-4o", "licence": "terms", "withheld": "recorded without leave"}]
    out = release(run, tmp_path / "release", models=models)
    told = Counter()
    for file in out.glob("*/*.parquet"):
        table = pq.read_table(file)
        for name in {"chosen_model", "rejected_model", "model"} & set(table.column_names):
            told.update(table[name].to_pylist())
    assert told
    assert "GPT-4o" not in told
    assert "answers of GPT-4o: recorded without leave" in (out / "README.md").read_text()


def test_where_nothing_may_be_passed_on_the_release_says_so(run, tmp_path):
    out = release(run, tmp_path / "release", sources=[{"name": "given-train", **SHUT}, {"name": "given-test", **SHUT}])
    assert "This release holds no pair" in (out / "README.md").read_text()
    assert "configs" not in header(out)
    assert all(pq.read_table(file).num_rows == 0 for file in out.rglob("*.parquet"))


def test_a_source_without_a_licence_is_refused(run, tmp_path):
    files = [word for name in ("speeches", "responses", "scores", "train", "dev", "test") for word in (f"--{name}", run / f"{name}.jsonl")]
    told = {
        "title": "t",
        "labels": "l",
        "min_gap": 1,
        "personal_data": "masked",
        "principles": [],
        "sources": [{"name": "given-train", **OPEN}],
    }
    done = program("write_release", *files, "--taxonomy", "config/taxonomy.yaml", "--out-dir", tmp_path, **told)
    assert done.returncode == 1
    assert "sources lacks 'given-test'" in done.stderr
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_combined_licence_is_the_strictest():
    assert combined_licence(["MIT", "CC BY 4.0", "CC0-1.0"]) == "cc-by-4.0"
    assert combined_licence(["MIT", "RAIL-D"]) == combined_licence([]) == "other"
    assert combined_licence(list(LICENCES)) == "cc-by-nc-sa-4.0"
