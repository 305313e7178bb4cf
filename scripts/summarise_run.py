"""Write the main figures of a run as a page of plain text: sizes, reward models, win rates, and where the rest lies.

`make demo` prints it at its end. Every figure stands with its 95 % interval and its number of cases.
"""

from collections import Counter

import orjson
from pydantic import Field

from psychocounsel.stage import Settings, command_line, stage


class SummarySettings(Settings):
    """Titles, and what the figures mean."""

    title: str = Field(description="heading")
    note: str | None = Field(None, description="what the figures do not mean")
    titles: dict[str, str] = Field({}, description="name of a model or policy -> its title")
    ranked_by: dict[str, str] = Field({}, description="policy -> the reward model on whose rewards it was trained")
    opponent: str = Field(description="title of the opponent")
    judge: str = Field(description="title of the judge of the answers")
    places: dict[str, str] = Field({}, description="what -> where it lies")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, SummarySettings)
    parser.add_argument("--speeches", required=True, help="speeches of the run")
    parser.add_argument("--pairs", nargs="+", required=True, help="pairs: train, dev and test")
    parser.add_argument("--reward-metrics", nargs="*", default=[], help="metrics on the test pairs")
    parser.add_argument("--win-rates", nargs="*", default=[], help="win rates of policies")
    parser.add_argument("--out", required=True, help="the page")
    with stage(parser) as run:
        settings: SummarySettings = run.settings
        splits = Counter(speech["split"] for speech in run.read(run.args.speeches, "speech"))
        pairs = Counter(pair["split"] for file in run.args.pairs for pair in run.read(file, "pair"))
        metrics = [orjson.loads(run.uses(file).read_bytes()) for file in run.args.reward_metrics]
        win_rates = [orjson.loads(run.uses(file).read_bytes()) for file in run.args.win_rates]
        lines = [settings.title, "=" * len(settings.title), ""]
        lines += [f"{name:<9} {counts.total():>6,}   {sides(counts)}" for name, counts in (("speeches", splits), ("pairs", pairs))]
        if metrics:
            lines += ["", "accuracy on the test pairs", *map(aligned, (accuracy_row(m, settings.titles) for m in metrics))]
        if win_rates:
            lines += ["", f"win rate against {settings.opponent}, judged by {settings.judge}"]
            lines += map(aligned, (row for rates in win_rates for row in win_rate_rows(rates, settings.titles)))
            lines += doubts(settings, {m["name"] for m in metrics if m["at_chance"]}, {rates["policy"] for rates in win_rates})
        lines += ["", *(f"{what:<9} {where}" for what, where in settings.places.items())]
        run.write_text(run.args.out, "\n".join(lines + (["", settings.note] if settings.note else [])) + "\n")


def sides(counts: Counter) -> str:
    """Return the sizes of the split's sides."""
    return " · ".join(f"{side} {counts[side]:,}" for side in ("train", "dev", "test"))


def accuracy_row(metrics: dict, titles: dict[str, str]) -> tuple[str, str, str]:
    """Return a scorer's title, accuracy and number of pairs."""
    chance = ", no better than chance" if metrics["at_chance"] else ""
    return titles.get(metrics["name"], metrics["name"]), percent(metrics["accuracy"], "value"), f"{metrics['n']} pairs{chance}"


def win_rate_rows(rates: dict, titles: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return a policy's win rates in one setting, in both protocols."""
    setting = {"free": "free", "length": "at the opponent's length"}[rates["setting"]]
    title = f"{titles.get(rates['policy'], rates['policy'])}, {setting}"
    return [
        (title, percent(protocol["overall"], "win_rate"), f"{protocol['overall']['n']} speeches, protocol {name}")
        for name, protocol in rates["protocols"].items()
    ]


def doubts(settings: SummarySettings, at_chance: set[str], policies: set[str]) -> list[str]:
    """Return a line for each policy that was trained on the rewards of a model at chance."""
    return [
        f"  {settings.titles.get(policy, policy)} was trained on rewards that are not shown to rank better than chance"
        for policy, reward_model in settings.ranked_by.items()
        if reward_model in at_chance and policy in policies
    ]


def percent(estimate: dict, key: str) -> str:
    """Return an estimate with its interval in percent."""
    if estimate[key] is None:
        return "n/a"
    return f"{100 * estimate[key]:5.1f} %  [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def aligned(row: tuple[str, str, str]) -> str:
    """Return a line of three columns."""
    return f"  {row[0]:<52} {row[1]:<24} {row[2]}"


if __name__ == "__main__":
    main()
