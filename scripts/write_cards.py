"""Write a card for each trained model, with the Hub's YAML header, from a run's own files.

Every number comes from the run; the cards say who or what made the labels and carry the paper's ethics statement. Written:
<out-dir>/<name>.md for each model of the settings. The data set's card is the release's (write_release.py).
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from psychocounsel.records import read_result
from psychocounsel.stage import Settings, command_line, stage
from psychocounsel.templates import load_template, template_paths


class Model(BaseModel):
    """A trained model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    kind: Literal["reward_model", "policy"]
    base: str
    base_id: str | None
    licence: str
    method: str
    data: str
    recipe: dict
    ranked_by: str | None = None  # the reward model on whose rewards a policy was trained


class CardSettings(Settings):
    """What the run's files do not say: titles, licences, recipes."""

    labels: str = Field(description='how the preference labels came about: "made by …"')
    judge_of_answers: str = Field(description="title of the judge of the win rates")
    opponent: str = Field(description="title of the opponent")
    models: list[Model] = Field(description="[{name, title, kind, base, base_id, licence, method, data, recipe, ranked_by}]: models")
    note: str | None = Field(None, description="a sentence at the head of every card")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, CardSettings)
    parser.add_argument("--reward-metrics", nargs="*", default=[], help="metrics of reward models on the test pairs")
    parser.add_argument("--win-rates", nargs="*", default=[], help="win rates of policies")
    parser.add_argument("--out-dir", required=True, help="folder for the cards")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        for template in template_paths("ethics.md", "model_card.md"):
            run.uses(template)
        metrics = [read_result(run.uses(file), "metrics") for file in args.reward_metrics]
        win_rates = [read_result(run.uses(file), "win_rates") for file in args.win_rates]
        ethics = load_template("ethics.md").render()
        for model in settings.models:
            on_test_pairs = {m["name"]: m for m in metrics if not m["sections"]}
            results = {
                "metrics": on_test_pairs.get(model.name),
                "ranked_by": on_test_pairs.get(model.ranked_by),
                "win_rates": [w for w in win_rates if w["policy"] == model.name],
            }
            card = load_template("model_card.md").render(settings=settings, model=model, ethics=ethics, **results)
            run.write_text(Path(args.out_dir) / f"{model.name}.md", card + "\n")
        run.account("cards", rows_in=len(settings.models), rows_out=len(settings.models))


if __name__ == "__main__":
    main()
