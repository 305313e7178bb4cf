"""Tables of the policies against their opponent (paper, section 4.2): win rates, and the lengths and order effects behind them."""

from collections import Counter
from collections.abc import Collection

from psychocounsel.table_settings import TableSettings
from psychocounsel.tables import NOT_REPORTED, ORIENTATION, Cell, Missing, Number, Row, Table, count, number, reported_row

SETTINGS = {
    "free": ("Without a length constraint", "without_length_constraint"),
    "length": ("With a length constraint", "with_length_constraint"),
}
SHORT_TOPICS = {  # column heads of Table 3
    "core_mental_health_issues": "Mental Issues",
    "emotional_well_being": "Emotional Well-being",
    "relationships_and_interpersonal": "Relationships",
    "life_transitions": "Life Changes",
    "social_issues": "Social Issues",
    "youth_and_development": "Youth",
    "crisis_and_safety": "Safety",
    "special_topics": "Special Topics",
}


def doubts(metrics: dict[str, dict], settings: TableSettings) -> dict[str, str]:
    """Return a note on each policy, by its title, that was trained on the rewards of a model at chance on the test pairs."""
    return {
        settings.title(policy): f"Trained on the rewards of {settings.title(name)}, which is not shown to rank better than chance."
        for policy, name in settings.ranked_by.items()
        if name in metrics and metrics[name]["at_chance"]
    }


def win_rate_table(
    win_rates: dict[tuple[str, str], dict], speeches: list[dict], topics: dict[str, str], paper: dict, settings: TableSettings
) -> Table:
    """Win rates against the opponent by coarse topic and overall, in both settings and protocols (Table 3)."""
    mapped, groups, others = settings.reported.policies, [], []
    test = Counter(speech["coarse_topic"] for speech in speeches if speech["split"] == "test")
    for setting, (heading, key) in SETTINGS.items():
        reported = {name: dict(zip(paper["columns"], figures, strict=True)) for name, figures in paper[key].items()}
        rows = []
        for policy in settings.policies:
            rows += [
                win_rate_row(settings.title(policy), win_rates.get((policy, setting)), protocol, topics) for protocol in ("paper", "robust")
            ]
            if policy in mapped:
                rows.append(reported_win_rate_row(settings.title(policy), reported_row(reported, mapped[policy]), topics))
        if rows and speeches:
            rows.insert(
                0, Row(["Test speeches", "this run", *(count(test[topic]) for topic in topics), count(test.total()), count(test.total())])
            )
        groups.append((heading, rows))
        left = [reported_win_rate_row(name, figures, topics) for name, figures in reported.items() if name not in mapped.values()]
        others.append((f"{ORIENTATION}: {heading[0].lower()}{heading[1:]}", left))
    columns = ["Policy", "Source", *(SHORT_TOPICS.get(topic, title) for topic, title in topics.items()), "Overall", "Speeches"]
    notes = [
        f"Percent of comparisons won against {settings.opponent}, judged by {settings.judge}.",
        "One order: the order of the two answers drawn by seed, as in the paper. Both orders: a win in both counts 1, a disagreement half.",
        "In brackets: 95 % bootstrap intervals over speeches; those of the topics stand in the CSV file.",
    ]
    return Table("win_rates", f"Win rates against {settings.opponent} (Table 3)", columns, [*groups, *others], notes)


def win_rate_row(title: str, result: dict | None, protocol: str, topics: Collection[str]) -> Row:
    """A measured row of Table 3."""
    source = {"paper": "one order", "robust": "both orders"}[protocol]
    if result is None:
        return Row([title, source, *[Missing("Not judged in this run.")] * (len(topics) + 2)])
    rates = result["protocols"][protocol]

    def cell(rate: dict | None, show_interval: bool) -> Cell:
        if rate is None:
            return Missing("No test speech on this topic was judged.")
        return Number(100 * rate["win_rate"], 1, 100 * rate["low"], 100 * rate["high"], show_interval)

    by_topic = [cell(rates["topics"].get(topic), False) for topic in topics]
    return Row([title, source, *by_topic, cell(rates["overall"], True), count(rates["overall"]["n"])])


def reported_win_rate_row(title: str, figures: dict[str, float], topics: Collection[str]) -> Row:
    """A row of the paper's Table 3."""
    cells = [Number(figures[topic], 1) if topic in figures else NOT_REPORTED for topic in [*topics, "overall"]]
    return Row([title, "paper", *cells, NOT_REPORTED])


def length_table(win_rates: dict[tuple[str, str], dict], settings: TableSettings) -> Table:
    """What stands behind the win rates: lengths, how well a constraint was kept, and the judge's order effects."""
    columns = [
        "Policy",
        "Win rate (%)",
        "At equal length (%)",
        "Words",
        "Opponent's words",
        "Off target (%)",
        "Within 10 % (%)",
        "Orders agree (%)",
        "First wins (%)",
    ]
    groups = []
    for setting, (heading, _) in SETTINGS.items():
        groups.append((heading, [length_row(settings.title(policy), win_rates.get((policy, setting))) for policy in settings.policies]))
    notes = [
        "Win rate: both orders. At equal length: predicted by a logistic regression on the difference in length.",
        "The regression is that of AlpacaEval 2 without its term for the instruction's difficulty, which needs a leader board of models.",
        "Off target: mean of |words - asked words| / asked words.",
        "First wins: share of the judge's decided verdicts that prefer the answer shown first; 50 means no position bias.",
    ]
    return Table("lengths", "Answer lengths and order effects behind the win rates", columns, groups, notes)


def length_row(title: str, result: dict | None) -> Row:
    """A row of the table of lengths."""
    if result is None:
        return Row([title, *[Missing("Not judged in this run.")] * 8])
    overall, controlled, lengths = result["protocols"]["robust"]["overall"], result["length_controlled"], result["lengths"]
    constraint, free = lengths["constraint"], Missing("No length was asked for.")
    notes = ["At equal length: extrapolated, since its answers are nearly all longer, or nearly all shorter, than the opponent's."]
    return Row(
        [
            title,
            Number(100 * overall["win_rate"], 1, 100 * overall["low"], 100 * overall["high"]),
            number({**controlled, "value": controlled["win_rate"]}, f"{controlled['reason']}.".capitalize(), 1, 100),
            Number(lengths["policy_words"], 0),
            Number(lengths["opponent_words"], 0),
            Number(100 * constraint["mean_relative_error"], 1) if constraint else free,
            Number(100 * constraint["within_tenth"], 1) if constraint else free,
            Number(100 * result["orders"]["agreement"], 1),
            Number(100 * result["orders"]["first_share"], 1),
        ],
        notes if controlled["extrapolated"] and controlled["win_rate"] is not None else [],
    )
