"""What make_tables.py is told beyond the run's files: rows and their order, titles, and which rows of the paper belong to them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from psychocounsel.pool import SizeClass
from psychocounsel.stage import Settings


class Part(BaseModel):
    """A closed piece of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(Part):
    """Models that stand together in a table, in their order."""

    title: str
    models: list[str]


class Ablation(Part):
    """A row of Table 2."""

    model: str
    base: str
    data: str


def section_column(section: str) -> str:
    """Return the column of Table 2 that holds a section of RewardBench."""
    return f"{section} (%)"


class Reported(Part):
    """Which rows of the paper are those of this run's models: name -> the paper's row."""

    reward_models: dict[str, str] = {}
    ablation: dict[str, str] = {}
    policies: dict[str, str] = {}


class Ratings(Part):
    """Who scored the responses, and how."""

    judge: str | None = None  # None where the scores came with the pairs at which the run starts
    protocol: Literal["one_by_one", "together"] = "one_by_one"
    offline: bool = False  # computed from each response alone, without a model
    principles: list[tuple[str, str]] = []

    def note(self) -> str:
        """Return the sentence that stands under tables of scores."""
        how = {"one_by_one": "one call a principle, as in the paper", "together": "all principles in one call, unlike the paper"}
        return (
            f"Scores by {self.judge}: {how[self.protocol]} (protocol {self.protocol})." if self.judge else "The scores came with the pairs."
        )


class TableSettings(Settings):
    """Rows and their order, titles, and which rows of the paper belong to them."""

    titles: dict[str, str] = Field({}, description="name of a model, policy or source -> its title; a name without one stands for itself")
    pool: list[SizeClass] = Field([], description="[{title, models}]: the response pool by size class (Table 6)")
    languages: dict[str, str] = Field({}, description="model of the pool -> the main language of its institution")
    reward_models: list[Group] = Field([], description="[{title, models}]: the rows of Table 1")
    ablation: list[Ablation] = Field([], description="[{model, base, data}]: the rows of Table 2")
    policies: list[str] = Field([], description="the rows of Table 3")
    monitored: list[str] = Field([], description="policies whose checkpoints are assessed, in their order")
    ranked_by: dict[str, str] = Field({}, description="policy -> the reward model on whose rewards it was trained")
    opponent: str = Field(description="title of the opponent")
    judge: str = Field(description="title of the judge of the answers")
    second_judge: str | None = Field(None, description="title of the second judge of the answers, if there is one")
    judged_again_by: str | None = Field(None, description="its name in judgements and win rates")
    ratings: Ratings = Field(
        Ratings(), description="{judge, protocol, offline, principles}: who scored the responses, and how (principles: [[id, name], …])"
    )
    note: str | None = Field(None, description="a sentence under every table")
    starts_at_pairs: bool = Field(False, description="whether the pairs were given: what made no pair is not known then")
    bootstrap: int = Field(2000, description="resamples of the intervals of rates, clustered by speech", ge=1)
    seed: int = Field(0, description="seed of the resamples")
    reported: Reported = Field(
        Reported(), description='{reward_models, ablation, policies}: name -> row of the paper (of Table 2: "Llama-3B, HelpSteer2 + Ours")'
    )

    def title(self, name: str) -> str:
        """Return what readers see for a name."""
        return self.titles.get(name, name)
