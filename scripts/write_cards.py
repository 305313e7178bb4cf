"""Write a card for each trained model, with the Hub's YAML header, from a run's own files.

Every number comes from the run: metrics and win rates from its results, what a training read and cut from its provenance record.
The cards say who or what made the labels, carry the paper's ethics statement, and name the record from which all that made the
weights can be followed (scripts/audit.py). Written: <out-dir>/<name>.md for each model of the settings. The data set's card is the
release's (write_release.py).
"""

import re
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData
from pydantic import BaseModel, ConfigDict, Field

from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec, chat_messages
from psychocounsel.prompts import render
from psychocounsel.provenance import read_record, record_path, shown
from psychocounsel.records import file_sha256, read_result
from psychocounsel.stage import Settings, Stage, command_line, stage
from psychocounsel.templates import load_template, template_paths

HUB_LICENCES = {  # as models.yaml names them -> the Hub's identifier
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "Llama 3.1 Community License": "llama3.1",
    "Llama 3.2 Community License": "llama3.2",
    "Gemma Terms of Use": "gemma",
}
METRICS = {"accuracy": "Accuracy", "auc": "AUC", "ece": "ECE", "brier": "Brier score", "nll": "NLL"}
SETTINGS = {"free": "without a length constraint", "length": "with a length constraint"}


class Part(BaseModel):
    """A closed piece of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rounds(Part):
    """How iterative DPO went on from round to round."""

    iterations: int
    speeches_per_iteration: int | None  # None: every training speech
    samples_per_speech: int
    start: str
    reference: str


class Model(Part):
    """A trained model."""

    name: str
    title: str
    kind: Literal["reward_model", "policy"]
    base: str
    chat: ModelSpec  # the base: id, revision, and how it is spoken to
    licence: str
    method: str
    labels: str  # how the preference labels came about: "made by …"
    data: str
    data_licences: list[tuple[str, str]] = []  # [title, licence] of what it learnt from
    datasets: list[str] = []  # data sets of the Hub among them
    recipe: dict
    rounds: Rounds | None = None
    ranked_by: str | None = None  # the reward model on whose rewards a policy was trained


class CardSettings(Settings):
    """What the run's files do not say: titles, licences, recipes."""

    run: str = Field(description="name of the run")
    judge_of_answers: str = Field(description="title of the judge of the win rates")
    opponent: str = Field(description="title of the opponent")
    prompt: str = Field(description="template of the responding prompt, with {{ client_speech }}")
    models: list[Model] = Field(
        description="[{name, title, kind, base, chat, licence, method, labels, data, data_licences, datasets, recipe, rounds,"
        " ranked_by}]: what was trained"
    )
    note: str | None = Field(None, description="a sentence at the head of every card")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, CardSettings)
    parser.add_argument("--models", required=True, nargs="+", metavar="NAME=FILE", help="manifests of the models")
    parser.add_argument("--trainings", nargs="*", default=[], metavar="NAME=FILE", help="lists of a policy's checkpoints, round by round")
    parser.add_argument("--reward-metrics", nargs="*", default=[], help="metrics of reward models, on RewardBench too")
    parser.add_argument("--win-rates", nargs="*", default=[], help="win rates of policies")
    parser.add_argument("--out-dir", required=True, help="folder for the cards")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        for template in template_paths("ethics.md", "model_card.md"):
            run.uses(template)
        metrics = [read_result(run.uses(file), "metrics") for file in args.reward_metrics]
        win_rates = [read_result(run.uses(file), "win_rates") for file in args.win_rates]
        manifests, trainings = named_files(run, args.models), named_files(run, args.trainings)
        if missing := [model.name for model in settings.models if model.name not in manifests]:
            raise UserError(f"--models: no manifest of {', '.join(missing)}; name each model of the settings as NAME=FILE")
        for model in settings.models:
            text = card(
                model,
                settings,
                metrics={m["name"]: m for m in metrics if not m["sections"]},
                benchmark=next((m for m in metrics if m["sections"] and m["name"] == model.name), None),
                win_rates=[w for w in win_rates if w["policy"] == model.name],
                manifest=manifests[model.name][0],
                trainings=trainings.get(model.name, manifests[model.name]),
            )
            run.write_text(Path(args.out_dir) / f"{model.name}.md", text)
        run.account("cards", rows_in=len(settings.models), rows_out=len(settings.models))


def named_files(run: Stage, words: list[str]) -> dict[str, list[Path]]:
    """Note the files of NAME=FILE words as inputs; return them by name, in their order."""
    found: dict[str, list[Path]] = {}
    for word in words:
        name, _, file = word.partition("=")
        found.setdefault(name, []).append(run.uses(file))
    return found


def card(
    model: Model,
    settings: CardSettings,
    metrics: dict[str, dict],
    benchmark: dict | None,
    win_rates: list[dict],
    manifest: Path,
    trainings: list[Path],
) -> str:
    """Return a model's card: the Hub's header, then report/model_card.md.jinja."""
    measured = metrics.get(model.name)
    results = reward_results(model, settings, measured, benchmark) + policy_results(settings, win_rates)
    facts = {
        "metrics": measured,
        "benchmark": benchmark and benchmark["sections"],
        "ranked_by": metrics.get(model.ranked_by),
        "win_rates": win_rates,
        "provenance": provenance(manifest),
        "messages": chat_messages(model.chat, render(settings.prompt, client_speech="{client speech}")),
        "trainings": [training(file) for file in trainings],
    }
    body = load_template("model_card.md").render(
        settings=settings, model=model, setting_titles=SETTINGS, ethics=load_template("ethics.md").render(), **facts
    )
    return f"---\n{header(model, results).to_yaml()}\n---\n\n{body}\n"


def header(model: Model, results: list[EvalResult]) -> ModelCardData:
    """Return the metadata of a card as the Hub reads them; a licence that it does not know is `other`, with a name."""
    licence = HUB_LICENCES.get(model.licence, "other")
    reward_model = model.kind == "reward_model"
    return ModelCardData(
        base_model=model.chat.id,
        datasets=model.datasets or None,
        language="en",
        library_name="transformers",
        license=licence,
        license_name=re.sub(r"[^a-z0-9.]+", "-", model.licence.lower()).strip("-") if licence == "other" else None,
        pipeline_tag="text-classification" if reward_model else "text-generation",
        tags=["trl", "reward-model" if reward_model else "dpo", "psychological-counselling"],
        model_name=model.title,
        eval_results=results or None,
    )


def reward_results(model: Model, settings: CardSettings, measured: dict | None, benchmark: dict | None) -> list[EvalResult]:
    """A reward model's metrics on the test pairs and its scores on RewardBench, for the Hub's model index."""
    task = {"task_type": "text-classification", "task_name": "Ranking of preference pairs"}
    ours = {
        "dataset_type": f"psychocounsel-{settings.run}",
        "dataset_name": f"Test pairs of the run {settings.run}",
        "dataset_split": "test",
    }
    found = [
        EvalResult(**task, **ours, metric_type=kind, metric_name=name, metric_value=round(measured[kind]["value"], 4))
        for kind, name in METRICS.items()
        if measured and measured[kind] and measured[kind]["value"] is not None
    ]
    if benchmark:
        theirs = {"dataset_type": "allenai/reward-bench", "dataset_name": "RewardBench", "dataset_split": "filtered"}
        scores = {"Score": benchmark["sections"]["overall"]["value"], **benchmark["sections"]["scores"]}
        found += [
            EvalResult(**task, **theirs, metric_type="accuracy", metric_name=name, metric_value=round(value, 4))
            for name, value in scores.items()
        ]
    return found


def policy_results(settings: CardSettings, win_rates: list[dict]) -> list[EvalResult]:
    """A policy's win rates in both orders, for the Hub's model index."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"psychocounsel-{settings.run}",
            dataset_name=f"Test speeches of the run {settings.run}, {SETTINGS[result['setting']]}",
            dataset_config=result["setting"],
            dataset_split="test",
            metric_type="win_rate",
            metric_name=f"Win rate against {settings.opponent}, judged by {settings.judge_of_answers} in both orders",
            metric_value=round(result["protocols"]["robust"]["overall"]["win_rate"], 4),
        )
        for result in win_rates
    ]


def provenance(manifest: Path) -> dict:
    """Return what leads from a card to its model's record; the record's identity is None where the weights have no record.

    The identity hashes what determined the weights, down to the sources; the card is made from the record, so it cannot be part of it.
    """
    path = record_path(manifest)
    record = read_record(path) if path.is_file() else None
    found = {"record": shown(path), "identity": record and record["identity_sha256"], "manifest": file_sha256(manifest), "chosen": None}
    if record and "chosen" in record["run"]["facts"]:  # iteration-2/checkpoints/3/manifest.json, by select_checkpoint.py
        number = Path(record["run"]["facts"]["chosen"]).parent
        found["chosen"] = f"checkpoint {number.name} of round {number.parent.parent.name.removeprefix('iteration-')}"
    return found


def training(output: Path) -> list[str]:
    """Return what the record of a training says of its pairs: given, trained on, left out by reason, cut to length, share of padding."""
    record = record_path(output)
    if not record.is_file():
        return ["not recorded"] * 5
    found = read_record(record)
    pairs, facts = found["rows"]["pairs"], found["run"]["facts"]
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in pairs["dropped"].items() if count)
    cut = f"{facts['cut_conversations']:,} conversations" if "cut_conversations" in facts else f"{facts['cut_pairs']:,} pairs"
    return [f"{pairs['in']:,}", f"{pairs['out']:,}", left_out or "none", cut, f"{100 * facts['padding_share']:.1f} %"]


if __name__ == "__main__":
    main()
