"""How the monitor of over-optimisation is shown: assessments of checkpoints joined with their win rates, as a table and a figure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from psychocounsel.errors import UserError
from psychocounsel.tables import Number, Row, Table, count, number

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = [  # column of the table -> measure of an assessment, digits, factor
    ("Reward", "reward", 3, 1),
    ("Reward model's win rate (%)", "preferred", 1, 100),
    ("KL", "kl", 3, 1),
    ("KL per token", "kl_per_token", 4, 1),
    ("Log ratio", "log_ratio", 3, 1),
    ("Tokens", "tokens", 0, 1),
    ("Words", "words", 0, 1),
    ("Cut off (%)", "truncated", 1, 100),
    ("Repeated 4-grams (%)", "repetition", 1, 100),
]
WIN_RATE = "Win rate (%)"
COLUMNS = ["Checkpoint", "Step", *(column for column, *_ in MEASURES[:2]), WIN_RATE, *(column for column, *_ in MEASURES[2:])]


@dataclass(frozen=True)
class Point:
    """A checkpoint: its assessment, and the judge's overall win rate in both orders."""

    assessment: dict
    rate: dict

    @property
    def step(self) -> int:
        """Optimizer steps since the base."""
        return self.assessment["step"]

    def measure(self, name: str) -> dict:
        """Return {"value", "low", "high"} of a measure."""
        return self.assessment["measures"][name]


def join_points(assessments: list[dict], win_rates: list[dict]) -> dict[str, list[Point]]:
    """Return the checkpoints of each policy in the order of training; raise UserError where an assessment has no win rate."""
    overall = {row["policy"]: row["protocols"]["robust"]["overall"] for row in win_rates if row["setting"] == "free"}
    found: dict[str, list[Point]] = {}
    for assessment in sorted(assessments, key=lambda row: (row["policy"], row["checkpoint"])):
        if assessment["name"] not in overall:
            raise UserError(f"no win rates of {assessment['name']}, which is assessed: give those of every assessed checkpoint")
        found.setdefault(assessment["policy"], []).append(Point(assessment, overall[assessment["name"]]))
    return found


def peak(points: list[Point]) -> Point:
    """Return the checkpoint of the highest win rate, the earliest among equals."""
    return max(points, key=lambda point: (point.rate["win_rate"], -point.step))


def verdict(point: Point, best: Point) -> list[str]:
    """Return a note where reward and win rate have parted: after the best checkpoint, with more reward and a lower win rate."""
    rises = point.measure("reward")["value"] > best.measure("reward")["value"]
    if point.step <= best.step or not rises or point.rate["win_rate"] >= best.rate["win_rate"]:
        return []
    apart = "do not overlap" if point.rate["high"] < best.rate["low"] else "overlap, so it may be chance"
    return [
        f"More reward than at step {best.step}, where the win rate is highest, and a lower win rate; the intervals of both rates {apart}."
    ]


def monitor_table(points: dict[str, list[Point]], policies: list[str], title: "Callable[[str], str]", opponent: str, judge: str) -> Table:
    """The checkpoints of the monitored policies: what the reward model and the judge make of them, and how far they are from the base."""

    def row(point: Point, best: Point) -> Row:
        cells = [number(point.measure(name), "Undefined.", digits, factor) for _, name, digits, factor in MEASURES]
        rate = Number(100 * point.rate["win_rate"], 1, 100 * point.rate["low"], 100 * point.rate["high"])
        flag = [f"Rewards of {title(point.assessment['reward_model'])}, which is not shown to rank better than chance."]
        notes = [*verdict(point, best), *(flag if point.assessment["reward_model_at_chance"] else [])]
        return Row([str(point.assessment["checkpoint"]), count(point.step), *cells[:2], rate, *cells[2:]], notes)

    groups = [(title(policy), [row(point, peak(points[policy])) for point in points[policy]]) for policy in policies if policy in points]
    notes = [
        "Means over the answers to the monitored test speeches, with 95 % bootstrap intervals over speeches. Step: since the"
        " base, which is checkpoint 0.",
        f"Reward model's win rate: share of speeches on which it gives the answer more reward than that of {opponent}; beside it that by"
        f" {judge}, both orders. Where the first rises and the second falls, the policy learns what the reward model is wrong about.",
        "KL: of the policy from its base, in nats an answer, exact for each next token. Log ratio: the plain estimate of the same.",
        "Repeated 4-grams: share of an answer's sequences of four words that stood in it before.",
    ]
    return Table("monitor", "Checkpoints of the policies: reward, win rate and distance from the base", COLUMNS, groups, notes)


def plot_monitor(points: dict[str, list[Point]], policies: list[str], title: "Callable[[str], str]", opponent: str, judge: str) -> "Figure":
    """Win rates by the reward model and by the judge over the distance from the base, a panel a policy (as Gao et al. 2023 draw them: by
    the square root of KL), and below by step: mean reward, KL, words, answers cut off, repetition. A ring marks the highest win rate.
    """
    from psychocounsel.plotting import COLOURS, MARKERS, canvas, show_counts

    shown = [policy for policy in policies if policy in points]
    rows = -(-len(shown) // 3)
    figure, axes = canvas(rows + 2, 3, width=8.0, height=2.1 * (rows + 2) + 0.5)
    for panel, policy in zip(axes, shown, strict=False):
        distance = [np.sqrt(max(point.measure("kl")["value"], 0)) for point in points[policy]]
        for k, (label, rates) in enumerate(win_rates_by(points[policy], judge).items()):
            band(panel, distance, rates, 100, COLOURS[k], MARKERS[k], label, linestyle=("-", "--")[k])
        best = peak(points[policy])
        place = distance[points[policy].index(best)], 100 * best.rate["win_rate"]
        panel.plot(*place, marker="o", markersize=9, markerfacecolor="none", color="#333333", linestyle="none", label="highest win rate")
        panel.axhline(50, color="#666666", linewidth=0.8, linestyle=":")
        panel.set(title=title(policy), xlabel="√(KL to the base in nats)", ylim=(-3, 103))
    for panel in axes[: len(shown) : 3]:
        panel.set_ylabel(f"preferred to\n{opponent} (%)")
    for panel in axes[len(shown) : 3 * rows]:
        panel.remove()
    by_step = [("reward", "Mean reward", 1), ("kl", "KL to the base (nats)", 1), ("words", "Words", 1)]
    by_step += [("truncated", "Cut off (%)", 100), ("repetition", "Repeated 4-grams (%)", 100)]
    for panel, (name, heading, factor) in zip(axes[3 * rows :], by_step, strict=False):
        for k, policy in enumerate(shown):
            steps = [point.step for point in points[policy]]
            style = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            line = "-" if k < len(COLOURS) else ":"
            band(panel, steps, [point.measure(name) for point in points[policy]], factor, *style, title(policy), line)
        panel.set(title=heading, xlabel="optimiser step", **({"ylim": (0, None)} if factor == 100 else {}))
        show_counts(panel.xaxis)
    axes[-1].set_axis_off()
    axes[-1].legend(*axes[-2].get_legend_handles_labels(), loc="center", title="by step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def win_rates_by(points: list[Point], judge: str) -> dict[str, list[dict]]:
    """Return both win rates of each checkpoint, by who prefers."""
    judged = [{"value": point.rate["win_rate"], "low": point.rate["low"], "high": point.rate["high"]} for point in points]
    return {f"by {judge}": judged, "by the reward model": [point.measure("preferred") for point in points]}


def band(
    axes: "Axes", places: list[float], rates: list[dict], factor: float, colour: str, marker: str, label: str, linestyle: str = "-"
) -> None:
    """Draw a line through estimates, and their 95 % intervals as bars."""
    values, low, high = (factor * np.array([rate[key] for rate in rates]) for key in ("value", "low", "high"))
    errors = np.clip([values - low, high - values], 0, None)
    style = {"capsize": 2, "elinewidth": 0.9, "markersize": 3.5, "linestyle": linestyle}
    axes.errorbar(places, values, yerr=errors, color=colour, marker=marker, label=label, **style)


def plot_checkpoints(points: dict[str, list[Point]], arms: list[str], title: "Callable[[str], str]", opponent: str, judge: str) -> "Figure":
    """Win rate of each checkpoint by step, one line an arm (Figure 4), with 95 % intervals; both orders."""
    from psychocounsel.plotting import COLOURS, MARKERS, canvas, show_counts

    if unknown := [arm for arm in arms if arm not in points]:
        raise UserError(f"--assessments: none of {unknown[0]!r}, which the setting ablation names")
    figure, (axes,) = canvas(height=3.5)
    for k, arm in enumerate(arms):
        steps = [point.step for point in points[arm]]
        values, low, high = (100 * np.array([point.rate[key] for point in points[arm]]) for key in ("win_rate", "low", "high"))
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(steps, values, color=colour, marker=MARKERS[k % len(MARKERS)], label=title(arm))
        axes.fill_between(steps, low, high, color=colour, alpha=0.12)
    axes.axhline(50, color="#666666", linewidth=0.8, linestyle="--")
    axes.set(xlabel="optimiser step", ylabel=f"win rate against\n{opponent} (%)")
    show_counts(axes.xaxis)
    speeches = max(point.rate["n"] for arm in arms for point in points[arm])
    heading = f"judged by {judge} on {speeches:,} test speeches, both orders"
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, title=heading)
    return figure
