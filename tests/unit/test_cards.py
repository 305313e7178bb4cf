"""Model cards of models that were really trained: read by the Hub's own parser, leading to the record of the weights."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from toy_training import PROMPT, RECIPE, program

from psychocounsel.config import load_registry
from psychocounsel.models import ModelSpec, chat_messages
from psychocounsel.prompts import render
from psychocounsel.provenance import read_record, record_path
from psychocounsel.records import file_sha256
from test_general_preferences import BENCHMARK, measure, read
from write_cards import HUB_LICENCES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
ROUNDS = {"iterations": 1, "speeches_per_iteration": None, "samples_per_speech": 8, "start": "previous", "reference": "base"}
CHAT = {
    "name": "micro", "id": "tests/micro", "revision": "c0ffee", "instruction": "You listen.",
    "chat_template_kwargs": {"date_string": "1 May"},
}  # fmt: skip
MODEL = {
    "title": "A model", "base": "Micro", "chat": CHAT, "licence": "Apache-2.0",
    "labels": "made by J, not by people", "data": "toy pairs", "recipe": RECIPE,
    "data_licences": [["Toy", "CC0-1.0"]], "datasets": ["nvidia/HelpSteer2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def cards(reward_model, policy, data, tmp_path_factory):
    """The cards of a reward model, measured on pairs and on the benchmark, and of a policy, ranked by it."""
    folder = tmp_path_factory.mktemp("cards")
    weights = reward_model / "model/manifest.json"
    measure(data / "dev.jsonl", weights, folder, name="rm")
    files = [folder / "metrics.json"]
    bench = folder / "bench"
    bench.mkdir()
    sections = load_registry([Path("config/paper.yaml")], "paper")["rewardbench_sections"]
    read(BENCHMARK, bench, source="bench", adapter="rewardbench")
    measure(bench / "test.jsonl", weights, bench, name="rm", sections=sections)
    models = [
        MODEL | {"name": "rm", "kind": "reward_model", "method": "Bradley-Terry reward model"},
        MODEL
        | {"name": "p", "kind": "policy", "method": "DPO", "ranked_by": "rm", "rounds": ROUNDS, "licence": "Jamba Open Model License"},
    ]
    settings = {"run": "toy", "judge_of_answers": "J", "opponent": "O", "prompt": PROMPT, "models": models}
    arguments = {
        "models": [f"rm={weights}", f"p={policy / 'checkpoints/3/manifest.json'}"], "trainings": [f"p={policy / 'checkpoints.json'}"],
        "reward_metrics": [*files, bench / "metrics.json"], "out_dir": folder,
    }  # fmt: skip
    assert program("write_cards", **arguments, settings=settings) == 0
    return {name: folder / f"{name}.md" for name in ("rm", "p")}


def test_the_hubs_parser_reads_header_and_results(cards):
    card = ModelCard.load(cards["rm"])
    assert (card.data.license, card.data.base_model, card.data.language) == ("apache-2.0", "tests/micro", "en")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert card.data.datasets == ["nvidia/HelpSteer2"]
    measured = json.loads((cards["rm"].parent / "metrics.json").read_text())
    found = {(result.dataset_type, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert found["psychocounsel-toy", "Accuracy"] == pytest.approx(measured["accuracy"]["value"], abs=1e-4)
    assert found["psychocounsel-toy", "ECE"] == pytest.approx(measured["ece"]["value"], abs=1e-4)
    assert {name for kind, name in found if kind == "allenai/reward-bench"} == {"Score", "Chat", "Chat Hard", "Safety", "Reasoning"}
    (index,) = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert index == card.data.to_dict()["model-index"][0]
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict(), "written and read again, it is the same"


def test_an_unknown_licence_is_named_as_the_hub_wants_it(cards):
    card = ModelCard.load(cards["p"])
    assert (card.data.license, card.data.license_name) == ("other", "jamba-open-model-license")
    assert card.data.pipeline_tag == "text-generation"
    assert set(HUB_LICENCES) <= {entry["licence"] for entry in load_registry([Path("config/models.yaml")], "models").values()}


def test_a_card_leads_to_the_record_of_its_weights(cards, reward_model):
    manifest, text = reward_model / "model/manifest.json", cards["rm"].read_text()
    record = read_record(record_path(manifest))
    assert f"| Provenance id | `{record['identity_sha256']}` |" in text
    assert file_sha256(manifest) in text
    made_from = {item["sha256"]: item["identity_sha256"] for item in read_record(record_path(cards["rm"]))["identity"]["inputs"]}
    assert made_from[file_sha256(manifest)] == record["identity_sha256"], "the card's own record goes on from there"


def test_a_card_tells_what_training_read_and_cut(cards, reward_model, policy):
    facts = read_record(record_path(reward_model / "model/manifest.json"))["run"]["facts"]
    padding = f"{100 * facts['padding_share']:.1f} %"
    assert f"| 1 | 21 | 21 | none | {facts['cut_conversations']} conversations | {padding} |" in cards["rm"].read_text()
    text = cards["p"].read_text()
    assert "| 1 | 21 | 21 | none | 0 pairs |" in text
    assert "1 round. Each samples 8 answers to each of all training speeches" in text
    assert "start" not in ModelCard.load(cards["p"]).data.to_dict()


@pytest.mark.parametrize("name", ["rm", "p"])
def test_a_card_tells_how_its_model_is_asked_and_of_which_base(cards, name):
    """As the pipeline asks: the same messages, and the pinned arguments of the template."""
    text = cards[name].read_text()
    for message in chat_messages(ModelSpec(**CHAT), render(PROMPT, client_speech="{client speech}")):
        assert f"\n{message['role']}:\n\n```\n{message['content']}\n```\n" in text
    assert "the chat template of the tokenizer with `date_string: 1 May`." in text
    assert "Base: Micro (`tests/micro` at `c0ffee`; licence: " in text


def test_the_card_of_a_policy_names_the_checkpoint_that_was_chosen(policy, tmp_path):
    """Of one chosen by select_checkpoint; a model that nothing chose says nothing of it."""
    iteration = tmp_path / "p/iteration-1"
    shutil.copytree(policy, iteration)
    scores = [
        {"manifest_sha256": file_sha256(iteration / f"checkpoints/{k}/manifest.json"), "accuracy": k == 2, "mean_margin": 0.0}
        for k in (1, 2, 3)
    ]
    (iteration / "dev_scores.json").write_text(json.dumps(scores))
    files = {"checkpoints": iteration / "checkpoints.json", "round_scores": iteration / "dev_scores.json"}
    chosen = tmp_path / "p/model/manifest.json"
    assert program("select_checkpoint", **files, out=chosen, scores=tmp_path / "scores.json", settings={}) == 0
    for manifest, said in ((chosen, True), (iteration / "checkpoints/3/manifest.json", False)):
        model = MODEL | {"name": "p", "kind": "policy", "method": "DPO"}
        settings = {"run": "toy", "judge_of_answers": "J", "opponent": "O", "prompt": PROMPT, "models": [model]}
        arguments = {"models": [f"p={manifest}"], "trainings": [f"p={iteration / 'checkpoints.json'}"], "out_dir": tmp_path}
        assert program("write_cards", **arguments, settings=settings) == 0
        assert ("The policy is checkpoint 2 of round 1: " in (tmp_path / "p.md").read_text()) == said


@pytest.mark.parametrize("name", ["rm", "p"])
def test_every_card_carries_ethics_labels_and_licences(cards, name):
    text = cards[name].read_text()
    for words in (
        "made by J, not by people", "licensed professional", "No autonomous operation", "institutional review board",
        "60 dollars an hour", "- Toy: CC0-1.0", "## Limits", "audit.py verify",
    ):  # fmt: skip
        assert words in text


def test_a_model_without_a_manifest_is_named(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    model = MODEL | {"name": "rm", "kind": "reward_model", "method": "m"}
    settings = {"run": "toy", "judge_of_answers": "J", "opponent": "O", "prompt": PROMPT, "models": [model]}
    assert program("write_cards", models=[f"other={tmp_path / 'manifest.json'}"], out_dir=tmp_path, settings=settings) == 1
    assert "no manifest of rm" in capsys.readouterr().err
