"""Plot the paper's figures from a run, each as SVG and PNG.

dataset (topics and lengths of speeches), pairs (gaps and lengths), chosen_models and rejected_models (Figures 5 and 6:
counts, and rates per candidate pair), model_groups (the same rates by size and language), judge_positions (scores by the
place of a response), win_rates and win_rate_topics (Table 3), training_reward_models and training_policies (loss by step),
monitor (where reward and win rate of checkpoints part) and checkpoints (Figure 4: win rate by step).
A figure is drawn where its inputs are given:

  dataset                                         --speeches
  pairs                                           --pairs
  chosen_models, rejected_models, model_groups    --pairs, and --scores where there are such
  judge_positions                                 --judge
  win_rates, win_rate_topics                      --win-rates
  training_reward_models                          --reward-logs
  training_policies                               --policy-logs
  monitor, checkpoints                            --assessments and --checkpoint-win-rates
"""

import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson
from pydantic import Field

from psychocounsel.comparisons import SETTING_TITLES
from psychocounsel.config import load_registry
from psychocounsel.data_tables import pair_facts
from psychocounsel.errors import UserError
from psychocounsel.monitor_views import join_points, plot_checkpoints, plot_monitor
from psychocounsel.pool import CANDIDATES, ENGLISH, SIDES, Pool, SizeClass, by_language, splits
from psychocounsel.records import read_result
from psychocounsel.stage import Settings, Stage, command_line, stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_SCORES = ("pairs", "chosen_models", "rejected_models", "model_groups", "judge_positions")
NO_SCORES = "none of the run's pairs has scores"


class FigureSettings(Settings):
    """What figures show, in which order and under which titles."""

    titles: dict[str, str] = Field({}, description="name of a model or policy -> its title; a name without one stands for itself")
    pool: list[SizeClass] = Field(
        [], description="[{title, models}]: the response pool by size class; its models are drawn even where none was chosen"
    )
    languages: dict[str, str] = Field({}, description="model of the pool -> the main language of its institution")
    policies: list[str] = Field([], description="order of the policies in the win-rate figures")
    opponent: str = Field(description="title of the opponent")
    judge: str = Field(description="title of the judge")
    scored_by: str | None = Field(None, description="sentence on who scored the responses, under the figures of scores")
    reported: dict[str, dict[str, float]] = Field(
        {}, description="{free, length}: policy -> overall win rate, in percent, that the paper reports of it"
    )
    monitored: list[str] = Field([], description="policies whose checkpoints are assessed, in their order")
    ablation: list[str] = Field([], description="those of them that Figure 4 shows")
    note: str | None = Field(None, description="a sentence under every figure")
    starts_at_pairs: bool = Field(False, description="whether the pairs were given: they are the only candidates known then")
    bootstrap: int = Field(2000, description="resamples of the intervals of rates, clustered by speech", ge=1)
    seed: int = Field(0, description="seed of the resamples")

    def title(self, name: str) -> str:
        """Return what readers see for a name."""
        return self.titles.get(name, name)


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, FigureSettings)
    parser.add_argument("--speeches", nargs="*", default=[], help="speeches of the run")
    parser.add_argument("--scores", nargs="*", default=[], help="scores of the responses")
    parser.add_argument("--pairs", nargs="*", default=[], help="pairs of this run: train, dev and test")
    parser.add_argument("--judge", nargs="*", default=[], help="assessment of the judge of the responses")
    parser.add_argument("--win-rates", nargs="*", default=[], help="win rates of policies")
    parser.add_argument("--checkpoint-win-rates", nargs="*", default=[], help="win rates of checkpoints")
    parser.add_argument("--assessments", nargs="*", default=[], help="assessments of the same checkpoints")
    parser.add_argument("--reward-logs", nargs="*", default=[], metavar="NAME=JSON", help="training logs of reward models")
    parser.add_argument(
        "--policy-logs", nargs="*", default=[], metavar="NAME=JSON", help="training logs of policies; a name again for each further round"
    )
    parser.add_argument("--taxonomy", required=True, help="config/taxonomy.yaml")
    parser.add_argument("--out-dir", required=True, help="folder for <figure>.svg and .png")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        speeches = [row for file in args.speeches for row in run.read(file, "speech")]
        scores = [row for file in args.scores for row in run.read(file, "score")]
        pairs = [row for file in args.pairs for row in run.read(file, "pair")]
        judge = [read_result(run.uses(file), "judge") for file in args.judge]
        win_rates = [read_result(run.uses(file), "win_rates") for file in args.win_rates]
        assessments = [read_result(run.uses(file), "assessment") for file in args.assessments]
        points = join_points(assessments, [read_result(run.uses(file), "win_rates") for file in args.checkpoint_win_rates])
        topics = {name: entry["title"] for name, entry in load_registry([run.uses(args.taxonomy)], "taxonomy")["coarse"].items()}
        figures: dict[str, Figure] = {}
        if speeches:
            figures["dataset"] = plot_dataset(speeches, topics)
        if pairs:
            figures["pairs"] = plot_pairs(pairs)
            models = [model for size in settings.pool for model in size.models]
            pool = Pool(scores, pairs, splits(speeches, pairs), models, settings.bootstrap, settings.seed, settings.starts_at_pairs)
            figures["chosen_models"] = plot_pool(pool, "chosen", settings)
            figures["rejected_models"] = plot_pool(pool, "rejected", settings)
            figures["model_groups"] = plot_model_groups(pool, settings)
        for result in judge:
            figures["judge_positions"] = plot_judge_positions(result["positions"], settings)
        if win_rates:
            figures["win_rates"] = plot_win_rates(win_rates, settings)
            figures["win_rate_topics"] = plot_win_rate_topics(win_rates, topics, settings)
        if args.reward_logs:
            figures["training_reward_models"] = plot_losses(read_logs(run, args.reward_logs), "Bradley-Terry loss", settings)
        if args.policy_logs:
            figures["training_policies"] = plot_losses(read_logs(run, args.policy_logs), "DPO loss", settings)
        if points:
            figures["monitor"] = plot_monitor(points, settings.monitored, settings.title, settings.opponent, settings.judge)
        if settings.ablation:
            figures["checkpoints"] = plot_checkpoints(points, settings.ablation, settings.title, settings.opponent, settings.judge)
        if not figures:
            raise UserError("no figure can be drawn from these inputs; see --help for what each figure needs")
        from psychocounsel.plotting import note_below, save

        for name, figure in figures.items():
            note_below(figure, " ".join(filter(None, (settings.scored_by if name in OF_SCORES else None, settings.note))))
            save(figure, *(run.output(Path(args.out_dir) / f"{name}.{ending}") for ending in ("svg", "png")))
        run.account("figures", rows_in=len(figures), rows_out=len(figures))


def read_logs(run: Stage, words: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Read NAME=JSON files of [{step, loss, …}]; return (step, loss) by name.

    A name that comes again continues its curve: the rounds of iterative DPO count their steps from one each.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals:
            raise UserError(f"{word}: expected NAME=JSON")
        losses = [(entry["step"], entry["loss"]) for entry in orjson.loads(run.uses(file).read_bytes()) if "loss" in entry]
        if not losses:
            raise UserError(f"{file}: no entry has a loss")
        curve = curves.setdefault(name, [])
        before = curve[-1][0] if curve else 0
        curve += [(before + step, loss) for step, loss in losses]
    return curves


def plot_dataset(speeches: list[dict], topics: dict[str, str]) -> "Figure":
    """Coarse topics and lengths of the speeches (section 3.1)."""
    from psychocounsel.plotting import COLOURS, canvas, show_counts

    figure, (by_topic, lengths) = canvas(1, 2, width=6.5, height=3.0, width_ratios=[1.25, 1])
    counts = Counter(speech["coarse_topic"] for speech in speeches)
    names = sorted(topics, key=lambda topic: counts[topic])
    bars = by_topic.barh([wrapped(topics[name]) for name in names], [counts[name] for name in names], color=COLOURS[0])
    by_topic.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
    by_topic.tick_params(axis="y", labelsize=7)
    by_topic.margins(x=0.18)
    by_topic.set(title="Speeches by topic", xlabel="speeches")
    show_counts(by_topic.xaxis)
    by_topic.grid(axis="y", visible=False)
    lengths.hist([len(speech["text"]) for speech in speeches], bins=30, color=COLOURS[0])
    lengths.set(title="Length of a speech", xlabel="characters", ylabel="speeches")
    show_counts(lengths.xaxis)
    show_counts(lengths.yaxis)
    return figure


def plot_pairs(pairs: list[dict]) -> "Figure":
    """Score gaps by side of the split, lengths of both responses, and their differences in length (section 3.3)."""
    from psychocounsel.plotting import COLOURS, canvas, say_empty, show_counts

    figure, (gaps, lengths, differences) = canvas(1, 3, width=8.0, height=2.8)
    sides = {"train and dev": [p for p in pairs if p["split"] != "test"], "test": [p for p in pairs if p["split"] == "test"]}
    below: Counter = Counter()
    for k, (title, side) in enumerate(sides.items()):  # gaps are sevenths: one bar each
        held = Counter(round(pair["gap"] * 7) for pair in side if pair["gap"] is not None)
        steps = sorted(held)
        bars = {"bottom": [below[step] for step in steps], "width": 0.8 / 7, "color": COLOURS[k]}
        gaps.bar([step / 7 for step in steps], [held[step] for step in steps], label=f"{title} ({len(side):,})", **bars)
        below += held
    gaps.set(title="Score gap", xlabel="difference of mean scores", ylabel="pairs")
    gaps.set_ylim(0, 1.35 * gaps.get_ylim()[1])  # room for the legend
    gaps.legend(loc="upper right")
    if not below:
        say_empty(gaps, NO_SCORES)
    facts = pair_facts(pairs)
    chosen, rejected = facts["chosen words"], facts["rejected words"]
    edges = whole_edges(0, np.quantile(np.concatenate([chosen, rejected]), 0.995))
    for words, title, colour, line in ((chosen, "chosen", COLOURS[0], "-"), (rejected, "rejected", COLOURS[1], "--")):
        lengths.hist(words, bins=edges, histtype="step", linewidth=1.4, linestyle=line, color=colour, label=title)
    lengths.set(title="Length of a response", xlabel="words", ylabel="pairs", ylim=(0, 1.3 * lengths.get_ylim()[1]))
    lengths.legend(loc="upper right", ncols=2)
    difference = chosen - rejected
    reach = np.quantile(np.abs(difference), 0.995)
    differences.hist(difference, bins=whole_edges(-reach, reach), color=COLOURS[2])
    differences.axvline(0, color="#333333", linewidth=0.8, linestyle="--")
    differences.set(title="Chosen minus rejected", xlabel=f"words; chosen longer: {100 * (difference > 0).mean():.1f} %", ylabel="pairs")
    for axes in (gaps, lengths, differences):
        show_counts(axes.yaxis)
    return figure


def whole_edges(low: float, high: float, bins: int = 30) -> np.ndarray:
    """Return the edges of about so many bins, each as wide as the others in whole numbers, with 0 among them."""
    width = max(1, round((high - low) / bins))
    return np.arange(np.floor(low / width), np.ceil(high / width) + 2) * width


def plot_pool(pool: Pool, side: str, settings: FigureSettings) -> "Figure":
    """How often each model's responses were chosen or rejected: counts (Figures 5 and 6), and per candidate pair.

    Counts depend on how often a model was drawn and whom it met; the rate takes the first out.
    """
    from psychocounsel.plotting import COLOURS, MARKERS, canvas, say_empty, show_counts

    what = SIDES[side]
    size_of = {model: k for k, size in enumerate(settings.pool) for model in size.models}
    models = sorted(pool.models, key=lambda model: (pool.count([model], what), settings.title(model)))
    foreign = [settings.languages.get(model, ENGLISH) not in (ENGLISH, "none") for model in models]
    names = [f"{settings.title(model)}{' *' if far else ''}" for model, far in zip(models, foreign, strict=True)]
    colours = [COLOURS[size_of.get(model, -1) % len(COLOURS)] for model in models]
    figure, (counts, rates) = canvas(1, 2, width=7.0, height=1.5 + 0.2 * len(models), sharey=True, width_ratios=[1.15, 1])
    bars = counts.barh(names, [pool.count([model], what) for model in models], color=colours)
    counts.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
    counts.set(title=f"{side.capitalize()} responses", xlabel="pairs")
    strangers = ["not in the pool"] if any(model not in size_of for model in models) else []  # of published pairs
    for k, title in [*enumerate(size.title for size in settings.pool), *((-1, title) for title in strangers)]:
        held = [(place, pool.rate([model], what)) for place, model in enumerate(models) if size_of.get(model, -1) == k]
        known = [(place, rate) for place, rate in held if rate["value"] is not None]
        intervals(rates, known, COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)], title)
    rates.set(title="Per pair it stood in" if settings.starts_at_pairs else "Per candidate pair", xlabel=f"{side} (%)")
    show_counts(counts.xaxis)
    counts.margins(x=0.16, y=0.02)
    for axes in (counts, rates):
        axes.grid(axis="y", visible=False)
    note = {"title": "size class; * the institution's main language is not English"} if any(foreign) else {"title": "size class"}
    if not pool.count(models, CANDIDATES):
        say_empty(rates, NO_SCORES)
    figure.legend(*rates.get_legend_handles_labels(), loc="outside upper center", ncols=5, **note)
    return figure


def plot_model_groups(pool: Pool, settings: FigureSettings) -> "Figure":
    """Rates of chosen and rejected responses by size class and by the institution's main language (findings of section 3.3)."""
    from psychocounsel.plotting import COLOURS, MARKERS, canvas, say_empty

    by_size = {size.title: size.models for size in settings.pool}
    spoken = by_language(settings.languages, [model for models in by_size.values() for model in models])
    panels = {"By size class": by_size, "By the institution's language": spoken}
    most = max(map(len, panels.values()))
    figure, axes_of = canvas(1, 2, width=7.0, height=1.7 + 0.34 * most)
    for axes, (title, groups) in zip(axes_of, panels.items(), strict=True):
        names = list(groups)[::-1]
        for k, side in enumerate(SIDES):
            rates = [(place + 0.13 - 0.26 * k, pool.rate(groups[name], SIDES[side])) for place, name in enumerate(names)]
            intervals(axes, [(place, rate) for place, rate in rates if rate["value"] is not None], COLOURS[k], MARKERS[k], side)
        axes.set(
            title=title,
            xlabel=f"of {'pairs' if settings.starts_at_pairs else 'candidate pairs'} (%)",
            ylim=(-0.6, most - 0.4 - (most - len(names))),
        )
        axes.set_yticks(range(len(names)), [f"{name} ({len(groups[name])})" for name in names])
        axes.grid(axis="y", visible=False)
    shared = [axes.get_xlim() for axes in axes_of]
    for axes in axes_of:
        axes.set_xlim(min(low for low, _ in shared), max(high for _, high in shared))
        if not pool.count(pool.models, CANDIDATES):
            say_empty(axes, NO_SCORES)
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def plot_judge_positions(positions: dict, settings: FigureSettings) -> "Figure":
    """Mean score by the place at which the judge saw a response, as its difference from the mean of the same speeches."""
    from psychocounsel.plotting import COLOURS, MARKERS, canvas

    figure, (axes,) = canvas(height=3.0)
    places = np.arange(1, positions["places"] + 1)
    principles = [name for name in positions["scores"] if name != "all"]
    for k, name in enumerate(principles):
        values = [effect["value"] for effect in positions["scores"][name]["places"]]
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linewidth": 0.8, "markersize": 3, "alpha": 0.6}
        axes.plot(places, np.array(values, dtype=float), label=settings.title(name), **style)
    overall = np.array([[effect[end] for end in ("value", "low", "high")] for effect in positions["scores"]["all"]["places"]], dtype=float)
    spread = np.abs(overall[:, 1:] - overall[:, :1]).T
    axes.errorbar(places, overall[:, 0], yerr=spread, color="#222222", capsize=2.5, linewidth=1.8, label="all principles")
    axes.axhline(0, color="#666666", linewidth=0.8, linestyle="--")
    axes.set(xlabel="place at which the judge saw the response", ylabel="points from the speech's mean", xticks=places)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def intervals(axes: "Axes", rates: list[tuple[float, dict]], colour: str, marker: str, label: str, **changes) -> None:
    """Draw estimates in percent with their 95 % intervals, each at its place on the vertical axis."""
    values = np.array([[rate["value"], rate["value"] - rate["low"], rate["high"] - rate["value"]] for _, rate in rates]).reshape(-1, 3)
    style = {"fmt": marker, "color": colour, "capsize": 2, "elinewidth": 1.1, "markersize": 4, "label": label} | changes
    axes.errorbar(100 * values[:, 0], [place for place, _ in rates], xerr=100 * values[:, 1:].T.clip(min=0), **style)


def plot_win_rates(win_rates: list[dict], settings: FigureSettings) -> "Figure":
    """Overall win rates by policy, one panel a setting, one mark a protocol, with 95 % intervals; beside them the paper's."""
    from psychocounsel.plotting import COLOURS, GREY, MARKERS, canvas

    shown = settings_in_order(win_rates)
    policies = policies_in_order(win_rates, settings)[::-1]
    figure, panels = canvas(1, len(shown), width=3.4 * len(shown) + 1.2, height=1.6 + 0.36 * len(policies), sharey=True)
    for axes, setting in zip(panels, shown, strict=True):
        by_policy = {row["policy"]: row["protocols"] for row in win_rates if row["setting"] == setting}
        judged = [(place, policy) for place, policy in enumerate(policies) if policy in by_policy]
        for k, (protocol, label) in enumerate((("paper", "one order"), ("robust", "both orders"))):
            rates = [(place + 0.22 - 0.22 * k, as_estimate(by_policy[policy][protocol]["overall"])) for place, policy in judged]
            intervals(axes, rates, COLOURS[k], MARKERS[k], label)
        if known := {place: settings.reported[setting][policy] for place, policy in judged if policy in settings.reported.get(setting, {})}:
            style = {"fmt": MARKERS[3], "color": GREY, "fillstyle": "none", "markersize": 4.5, "label": "paper, one order"}
            axes.errorbar([*known.values()], [place - 0.22 for place in known], **style)
        axes.axvline(50, color="#666666", linewidth=0.8, linestyle="--")
        axes.set(title=SETTING_TITLES[setting], xlabel=f"win rate against\n{settings.opponent} (%)", xlim=(-2, 102))
        axes.set_yticks(range(len(policies)), [settings.title(policy) for policy in policies])
        axes.set_ylim(-0.6, len(policies) - 0.4)
        axes.grid(axis="y", visible=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, title=judged_by(win_rates, settings))
    return figure


def judged_by(win_rates: list[dict], settings: FigureSettings) -> str:
    """Return who judged, and on how many test speeches."""
    counts = sorted({row["protocols"]["robust"]["overall"]["n"] for row in win_rates})
    speeches = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")
    return f"judged by {settings.judge} on {speeches} test speeches"


def as_estimate(rate: dict) -> dict:
    """Return a win rate as an estimate."""
    return {"value": rate["win_rate"], "low": rate["low"], "high": rate["high"]}


def plot_win_rate_topics(win_rates: list[dict], topics: dict[str, str], settings: FigureSettings) -> "Figure":
    """Win rates by coarse topic (both orders; in brackets the speeches judged), one panel a setting, one series a policy."""
    from psychocounsel.plotting import COLOURS, MARKERS, canvas

    shown, policies = settings_in_order(win_rates), policies_in_order(win_rates, settings)
    names = list(topics)[::-1]
    n = {name: max((row["protocols"]["robust"]["topics"].get(name, {"n": 0})["n"] for row in win_rates), default=0) for name in names}
    spread = np.linspace(0.28, -0.28, len(policies)) if len(policies) > 1 else [0.0]
    figure, panels = canvas(1, len(shown), width=3.0 * len(shown) + 2.0, height=1.6 + 0.1 * len(names) * max(len(policies), 3), sharey=True)
    for axes, setting in zip(panels, shown, strict=True):
        by_policy = {row["policy"]: row["protocols"]["robust"]["topics"] for row in win_rates if row["setting"] == setting}
        for k, policy in enumerate(policies):
            rates = [
                (i + spread[k], as_estimate(by_policy[policy][name])) for i, name in enumerate(names) if name in by_policy.get(policy, {})
            ]
            intervals(axes, rates, COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)], settings.title(policy), capsize=0, markersize=3.5)
        axes.axvline(50, color="#666666", linewidth=0.8, linestyle="--")
        axes.set(title=SETTING_TITLES[setting], xlabel=f"win rate against\n{settings.opponent} (%)", xlim=(-2, 102))
        axes.set_yticks(range(len(names)), [f"{wrapped(topics[name])} ({n[name]:,})" for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        for line in range(1, len(names)):
            axes.axhline(line - 0.5, color="#E6E6E6", linewidth=0.6)
        axes.grid(axis="y", visible=False)
    title = f"{judged_by(win_rates, settings)}, both orders"
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(policies), 3), title=title)
    return figure


def plot_losses(curves: dict[str, list[tuple[int, float]]], loss: str, settings: FigureSettings) -> "Figure":
    """Training loss by optimiser step; ln 2, the loss of a model that prefers neither answer, as a line.

    A long curve is drawn pale, with its running mean over a fortieth of its steps in full colour.
    """
    from psychocounsel.plotting import COLOURS, MARKERS, canvas, show_counts

    figure, (axes,) = canvas(height=3.2)
    for k, (name, curve) in enumerate(curves.items()):
        steps, losses = np.array(curve).T
        colour, marker, window = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)], len(steps) // 40
        if window > 1:
            axes.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.25)
            means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
            steps, losses, marker = steps[window // 2 : window // 2 + len(means)], means, None
        axes.plot(steps, losses, color=colour, marker=marker, label=settings.title(name))
    axes.axhline(np.log(2), color="#666666", linewidth=0.8, linestyle="--", label="ln 2")
    axes.set(xlabel="optimiser step", ylabel=loss)
    show_counts(axes.xaxis)
    axes.legend(ncols=1 + len(curves) // 7)
    return figure


def settings_in_order(win_rates: list[dict]) -> list[str]:
    """The settings that were judged, free first."""
    return [setting for setting in SETTING_TITLES if any(row["setting"] == setting for row in win_rates)]


def policies_in_order(win_rates: list[dict], settings: FigureSettings) -> list[str]:
    """The policies that were judged, in the order of the settings, others after them by name."""
    found = {row["policy"] for row in win_rates}
    return [name for name in settings.policies if name in found] + sorted(found - set(settings.policies))


def wrapped(title: str, width: int = 24) -> str:
    """Break a long label into lines."""
    return "\n".join(textwrap.wrap(title, width))


if __name__ == "__main__":
    main()
