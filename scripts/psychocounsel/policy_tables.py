"""Tables of the policies against their opponent (paper, section 4.2): win rates, their differences, what stands behind them, and how
far a second judge agrees."""

from collections import Counter
from collections.abc import Collection, Iterable

from psychocounsel.comparisons import SETTING_TITLES
from psychocounsel.table_settings import Reported, TableSettings
from psychocounsel.tables import NOT_REPORTED, ORIENTATION, Cell, Missing, Number, Row, Table, count, number, reported_row

PAPERS = {"free": "without_length_constraint", "length": "with_length_constraint"}  # keys of its win rates in config/paper.yaml
SETTINGS = {setting: (title, PAPERS[setting]) for setting, title in SETTING_TITLES.items()}
SOURCES = {"paper": "one order", "robust": "both orders"}  # protocol -> how its rows are named, beside those of the paper itself
ASKED = {  # protocol of the judge's calls -> sentence
    "together": "The judge was asked about all principles in one call (protocol together).",
    "one_by_one": "The judge was asked about one principle a call, and its verdict is that of most principles (protocol one_by_one).",
}
ORDERS = "One order: the order of the two answers drawn by seed, as in the paper. Both orders: a win in both counts 1, a disagreement half."
NOT_JUDGED = Missing("Not judged in this run.")
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
            rows += [win_rate_row(settings.title(policy), win_rates.get((policy, setting)), protocol, topics) for protocol in SOURCES]
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
        *asked(win_rates.values()),
        ORDERS,
        "In brackets: 95 % bootstrap intervals over speeches; those of the topics stand in the CSV file. Where all speeches came out alike,"
        " as a single one does, an interval has no width and tells nothing.",
    ]
    return Table("win_rates", f"Win rates against {settings.opponent} (Table 3)", columns, [*groups, *others], notes)


def second_win_rate_table(win_rates: dict[tuple[str, str], dict], topics: dict[str, str], settings: TableSettings) -> Table:
    """The same under the second judge, on the speeches that it saw; without the paper's rows, which stand beside the first."""
    shown = [policy for policy in settings.policies if any((policy, setting) in win_rates for setting in SETTINGS)]
    alone = settings.model_copy(update={"judge": settings.second_judge, "policies": shown, "reported": Reported()})
    table = win_rate_table(win_rates, [], topics, {"columns": []} | dict.fromkeys(PAPERS.values(), {}), alone)
    title = f"Win rates against {settings.opponent}, judged by {settings.second_judge} (as Table 3)"
    return Table("win_rates_again", title, table.columns, table.groups, table.notes)


def asked(results: Iterable[dict]) -> list[str]:
    """Return the sentence on how the judge of some results was asked."""
    return [ASKED[protocol] for protocol in sorted({result["protocol"] for result in results})]


def win_rate_row(title: str, result: dict | None, protocol: str, topics: Collection[str]) -> Row:
    """A measured row of Table 3."""
    rates = result and result["protocols"][protocol]
    return Row([title, SOURCES[protocol], *by_topic(rates, "win_rate", topics)])


def by_topic(rates: dict | None, name: str, topics: Collection[str]) -> list[Cell]:
    """Return the cells of a protocol's rates under this name, in percent: by topic, overall, and their number of speeches."""
    if rates is None:
        return [NOT_JUDGED] * (len(topics) + 2)

    def cell(rate: dict | None, show_interval: bool) -> Cell:
        if rate is None:
            return Missing("No test speech on this topic was judged.")
        return Number(100 * rate[name], 1, 100 * rate["low"], 100 * rate["high"], show_interval)

    cells = [cell(rates["topics"].get(topic), False) for topic in topics]
    return [*cells, cell(rates["overall"], True), count(rates["overall"]["n"])]


def reported_win_rate_row(title: str, figures: dict[str, float], topics: Collection[str]) -> Row:
    """A row of the paper's Table 3."""
    cells = [Number(figures[topic], 1) if topic in figures else NOT_REPORTED for topic in [*topics, "overall"]]
    return Row([title, "paper", *cells, NOT_REPORTED])


def difference_table(differences: dict | None, topics: dict[str, str], paper: dict, settings: TableSettings) -> Table:
    """Differences of the win rates of policies that differ in one thing, paired by speech, beside those of Table 3."""
    mapped, groups = settings.reported.policies, []
    for setting, (heading, key) in SETTINGS.items():
        reported = {name: dict(zip(paper["columns"], figures, strict=True)) for name, figures in paper[key].items()}
        rows = []
        for pair in differences["differences"] if differences else []:
            if pair["setting"] == setting:
                title = f"{settings.title(pair['policy'])} minus {settings.title(pair['other'])}"
                rows += [
                    Row([title, source, *by_topic(pair["protocols"][protocol], "difference", topics)])
                    for protocol, source in SOURCES.items()
                ]
                if mapped.keys() >= {pair["policy"], pair["other"]}:
                    first, second = (reported_row(reported, mapped[pair[side]]) for side in ("policy", "other"))
                    rows.append(reported_win_rate_row(title, {topic: first[topic] - second[topic] for topic in first}, topics))
        groups.append((heading, rows))
    columns = ["Policies", "Source", *(SHORT_TOPICS.get(topic, title) for topic, title in topics.items()), "Overall", "Speeches"]
    notes = [
        f"Points between two policies' percentages of comparisons won against {settings.opponent}, judged by {settings.judge}.",
        *asked([differences] if differences else []),
        ORDERS,
        "In brackets: 95 % intervals of a bootstrap paired by speech; those of the topics stand in the CSV file. Where one holds 0, this"
        " run does not tell the two policies apart.",
        "Policies with the same base, or trained by the same method. Paper: differences of the percentages that its Table 3 prints.",
    ]
    return Table("win_rate_differences", "Differences between policies (Table 3)", columns, groups, notes)


def principle_table(win_rates: dict[tuple[str, str], dict], settings: TableSettings) -> Table:
    """Win rates on each principle, of a judge that was asked about one at a time."""
    names, groups = dict(settings.ratings.principles), []

    def row(policy: str, result: dict) -> Row:
        rates = [result["principles"][name] for name in names]
        cells = [Number(100 * rate["win_rate"], 1, 100 * rate["low"], 100 * rate["high"], False) for rate in rates]
        return Row([settings.title(policy), *cells, count(rates[0]["n"])])

    for setting, (heading, _) in SETTINGS.items():
        results = [(policy, win_rates.get((policy, setting))) for policy in settings.policies]
        groups.append((heading, [row(policy, result) for policy, result in results if result and result["principles"]]))
    notes = [
        f"Percent of comparisons won against {settings.opponent} on a principle, judged by {settings.judge}, both orders: a disagreement of"
        " the two counts half. The 95 % bootstrap intervals over speeches stand in the CSV file.",
    ]
    return Table("win_rate_principles", "Win rates by principle", ["Policy", *names.values(), "Speeches"], groups, notes)


def agreement_table(agreement: dict | None, settings: TableSettings) -> Table:
    """How far two judges agree on the same answers, and the win rates under each."""
    groups = []
    for setting, (heading, _) in SETTINGS.items():
        found = [row for row in agreement["agreement"] if row["setting"] == setting] if agreement else []
        by_policy = {row["policy"]: row["protocols"] for row in found}
        shown = [policy for policy in [*settings.policies, None] if policy in by_policy]
        groups.append((heading, [agreement_row(policy, by_policy[policy], protocol, settings) for policy in shown for protocol in SOURCES]))
    columns = ["Policy", "Source", "Comparisons", "Agreement (%)", "Cohen's kappa", "Win rate (%)", "Win rate, second (%)", "Difference"]
    notes = [
        f"Win rate: against {settings.opponent}, judged by {settings.judge}; second: by {settings.second_judge}, on the same answers.",
        *asked([agreement] if agreement else []),
        "One order: of the order drawn by seed, a win or not. Both orders: a win, a loss, or a disagreement of the two orders.",
        "Kappa: without weights; 0 is what two judges with these win rates would reach by chance. Difference: points, second minus first.",
        "In brackets: 95 % bootstrap intervals over speeches. All policies: the comparisons of one speech are drawn together.",
    ]
    return Table("judge_agreement", f"Agreement of {settings.judge} and {settings.second_judge}", columns, groups, notes)


def agreement_row(policy: str | None, protocols: dict, protocol: str, settings: TableSettings) -> Row:
    """Two judges on one policy, or on all."""
    found = protocols[protocol]
    undefined = "Undefined: both judges gave one verdict throughout."
    first, second = found["win_rates"]
    return Row(
        [
            "All policies" if policy is None else settings.title(policy),
            SOURCES[protocol],
            count(found["n"]),
            number(found["agreement"], "", 1, 100),
            number(found["kappa"], undefined, 2),
            *(number(rate, "", 1, 100) for rate in (first, second, found["difference"])),
        ]
    )


def length_table(win_rates: dict[tuple[str, str], dict], settings: TableSettings) -> Table:
    """What stands behind the win rates: lengths, how well a constraint was kept, and the judge's order effects."""
    columns = [
        "Policy",
        "Speeches",
        "Win rate (%)",
        "At equal length (%)",
        "Words",
        "Opponent's words",
        "Cut off (%)",
        "Off target (%)",
        "Within 10 % (%)",
        "Orders agree (%)",
        "First wins (%)",
    ]
    groups = []
    for setting, (heading, _) in SETTINGS.items():
        groups.append((heading, [length_row(settings.title(policy), win_rates.get((policy, setting))) for policy in settings.policies]))
    notes = [
        f"Win rate: against {settings.opponent}, judged by {settings.judge}, both orders.",
        "At equal length: predicted by a logistic regression on the difference in length, after AlpacaEval 2, without what needs its own"
        " data: each instruction's difficulty, and the pull towards its baseline told to be verbose or concise.",
        "Cut off: share of the policy's answers that reached max_tokens. Off target: mean of |words - asked words| / asked words.",
        "First wins: share of the judge's decided verdicts that prefer the answer shown first; 50 means no position bias.",
    ]
    return Table("lengths", "Answer lengths and order effects behind the win rates", columns, groups, notes)


def length_row(title: str, result: dict | None) -> Row:
    """A row of the table of lengths."""
    if result is None:
        return Row([title, *[NOT_JUDGED] * 10])
    overall, controlled, lengths = result["protocols"]["robust"]["overall"], result["length_controlled"], result["lengths"]
    constraint, free = lengths["constraint"], Missing("No length was asked for.")
    notes = ["At equal length: extrapolated, since its answers are nearly all longer, or nearly all shorter, than the opponent's."]
    return Row(
        [
            title,
            count(overall["n"]),
            Number(100 * overall["win_rate"], 1, 100 * overall["low"], 100 * overall["high"]),
            number({**controlled, "value": controlled["win_rate"]}, f"{controlled['reason']}.".capitalize(), 1, 100),
            Number(lengths["policy_words"], 0),
            Number(lengths["opponent_words"], 0),
            Missing("Not known of recorded answers.") if lengths["cut_off"] is None else Number(100 * lengths["cut_off"], 1),
            Number(100 * constraint["mean_relative_error"], 1) if constraint else free,
            Number(100 * constraint["within_tenth"], 1) if constraint else free,
            Number(100 * result["orders"]["agreement"], 1),
            Number(100 * result["orders"]["first_share"], 1),
        ],
        notes if controlled["extrapolated"] and controlled["win_rate"] is not None else [],
    )
