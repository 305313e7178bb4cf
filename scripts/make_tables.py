"""Make the paper's tables from a run: each as CSV, Markdown, LaTeX and HTML, the paper's figures beside the measured ones.

dataset (section 3), topics (Table 5), pool (Table 6), model_groups and pairs (section 3.3), judge_consistency and
judge_positions (how steady the judge of the responses is), contamination (near duplicates of what is tested on),
reward_models (Table 1), reward_ablation (Table 2), win_rates (Table 3), and lengths (answer lengths and order effects
behind Table 3); where there is such, win_rate_differences (between policies), win_rate_principles (of a judge that was
asked about one principle at a time), judge_agreement (of two judges of the answers) and win_rates_again (Table 3 under
the second). A row of the paper stands under the row of the model that the settings map to it; the paper's other rows
stand apart, at the end. A cell without a value is "n/a" with a footnote that says why. Inputs that a run does not have
(no speeches where it starts at pairs) are left out.
"""

from collections import Counter
from pathlib import Path

from psychocounsel.config import load_registry
from psychocounsel.data_tables import (
    candidates_note,
    contamination_table,
    judge_consistency_table,
    judge_positions_table,
    model_groups_table,
    pairs_table,
)
from psychocounsel.errors import UserError
from psychocounsel.monitor_views import join_points, monitor_table
from psychocounsel.policy_tables import (
    agreement_table,
    difference_table,
    doubts,
    length_table,
    principle_table,
    second_win_rate_table,
    win_rate_table,
)
from psychocounsel.pool import CHOSEN, REJECTED, RESPONSES, SCORE, Pool, splits
from psychocounsel.records import read_result
from psychocounsel.stage import command_line, dropped_by_reason, stage
from psychocounsel.table_settings import Ablation, TableSettings, section_column
from psychocounsel.tables import (
    AT_CHANCE,
    FORMATS,
    NOT_REPORTED,
    ORIENTATION,
    Cell,
    Missing,
    Number,
    Row,
    Table,
    count,
    number,
    reported_row,
)  # fmt: skip

OF_SCORES = (  # tables that name who scored the responses, or labelled the pairs by these scores
    "dataset", "pool", "model_groups", "pairs", "judge_consistency", "judge_positions", "reward_models", "reward_ablation",
)  # fmt: skip
# tables whose rows begin with a policy, or with one minus another
OF_POLICIES = ("win_rates", "lengths", "win_rate_differences", "win_rate_principles", "judge_agreement", "win_rates_again")
UNANSWERED = "no usable answer of the model"
PERSONAL_DATA = {"email": "e-mail addresses", "phone": "telephone numbers", "url": "web addresses"}
TOPIC_FROM = "Where the topic is from"
TOPICS_FROM = {"source": "The source's label", "judge": "The judge's choice", "embedding": "Nearest by embedding"}


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, TableSettings)
    parser.add_argument("--speeches", nargs="*", default=[], help="speeches of the run")
    parser.add_argument("--dropped", nargs="*", default=[], help="rows that reading and selecting speeches left out")
    parser.add_argument("--unanswered", nargs="*", default=[], help="requests to the pool without a usable answer")
    parser.add_argument("--unscored", nargs="*", default=[], help="responses without an overall score")
    parser.add_argument("--scores", nargs="*", default=[], help="scores of the responses")
    parser.add_argument("--pairs", nargs="*", default=[], help="pairs of this run: train, dev and test")
    parser.add_argument("--judge", nargs="*", default=[], help="assessment of the judge of the responses")
    parser.add_argument("--reward-metrics", nargs="*", default=[], help="metrics of reward models and rankers, RewardBench's among them")
    parser.add_argument("--win-rates", nargs="*", default=[], help="win rates of policies, by a second judge too, and of checkpoints")
    parser.add_argument("--differences", nargs="*", default=[], help="differences between policies")
    parser.add_argument("--agreement", nargs="*", default=[], help="agreement of two judges of the answers")
    parser.add_argument("--assessments", nargs="*", default=[], help="assessments of the same checkpoints")
    parser.add_argument("--contamination", nargs="*", default=[], help="report of near duplicates")
    parser.add_argument("--taxonomy", required=True, help="config/taxonomy.yaml")
    parser.add_argument("--paper", required=True, help="config/paper.yaml: the figures that the paper reports")
    parser.add_argument("--out-dir", required=True, help="folder for <table>.csv, .md, .tex and .html")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        speeches = [row for file in args.speeches for row in run.read(file, "speech")]
        dropped = [row for file in args.dropped for row in run.read(file, "dropped_row")]
        unanswered = [row for file in args.unanswered for row in run.read(file, "failure")]
        unscored = [row for file in args.unscored for row in run.read(file, "unscored")]
        scores = [row for file in args.scores for row in run.read(file, "score")]
        pairs = [row for file in args.pairs for row in run.read(file, "pair")]
        judge = [read_result(run.uses(file), "judge") for file in args.judge]
        metrics = [read_result(run.uses(file), "metrics") for file in args.reward_metrics]
        win_rates = [read_result(run.uses(file), "win_rates") for file in args.win_rates]
        assessments = [read_result(run.uses(file), "assessment") for file in args.assessments]
        contamination = [read_result(run.uses(file), "contamination") for file in args.contamination]
        differences = [read_result(run.uses(file), "differences") for file in args.differences]
        agreement = [read_result(run.uses(file), "agreement") for file in args.agreement]
        taxonomy = load_registry([run.uses(args.taxonomy)], "taxonomy")["coarse"]
        paper = load_registry([run.uses(args.paper)], "paper")
        records = (speeches, dropped, unanswered, unscored, scores, pairs)
        results = (judge, metrics, win_rates, assessments, contamination, differences, agreement)
        tables = all_tables(*records, *results, taxonomy, paper, settings)
        for table in tables:
            for ending, render in FORMATS.items():
                run.write_text(Path(args.out_dir) / f"{table.name}.{ending}", render(table))
        run.account("tables", rows_in=len(tables), rows_out=len(tables))


def all_tables(
    speeches: list[dict],
    dropped: list[dict],
    unanswered: list[dict],
    unscored: list[dict],
    scores: list[dict],
    pairs: list[dict],
    judge: list[dict],
    metrics: list[dict],
    win_rates: list[dict],
    assessments: list[dict],
    contamination: list[dict],
    differences: list[dict],
    agreement: list[dict],
    taxonomy: dict,
    paper: dict,
    settings: TableSettings,
) -> list[Table]:
    """Return the tables, each with the note of the settings below it."""
    on_test_pairs, on_benchmark = sort_metrics(metrics)
    topics = {name: entry["title"] for name, entry in taxonomy.items()}
    once, again = ([r for r in win_rates if (r["judge"] == settings.judged_again_by) == second] for second in (False, True))
    rates, rates_again = index_win_rates(once), index_win_rates(again)
    models = [model for size in settings.pool for model in size.models]
    given = settings.starts_at_pairs
    pool = Pool(scores, pairs, splits(speeches, pairs), models, settings.bootstrap, settings.seed, given)
    left_out = {UNANSWERED: len(unanswered)} | dropped_by_reason(unscored)
    tables = [
        dataset_table(speeches, dropped, left_out, scores, pairs, paper["dataset"], settings),
        topic_table(speeches, taxonomy, settings),
        pool_table(pool, settings),
        model_groups_table(pool, settings.pool, settings.languages, given),
        pairs_table(speeches, scores, pairs, paper["dataset"], settings.bootstrap, settings.seed, given),
        judge_consistency_table(judge[0] if judge else None, dict(settings.ratings.principles), settings.ratings.offline),
        judge_positions_table(judge[0] if judge else None, dict(settings.ratings.principles), settings.ratings.offline),
        contamination_table(contamination[0] if contamination else None, settings.title),
        reward_model_table(on_test_pairs, paper, settings),
        ablation_table(on_test_pairs, on_benchmark, list(paper["rewardbench_sections"]), paper["reward_ablation"], settings),
        win_rate_table(rates, speeches, topics, paper["win_rates"], settings),
        length_table(rates, settings),
    ]
    optional = [
        difference_table(differences[0] if differences else None, topics, paper["win_rates"], settings),
        principle_table(rates, settings),
        agreement_table(agreement[0] if agreement else None, settings),
        second_win_rate_table(rates_again, topics, settings),
        monitor_table(join_points(assessments, once), settings.monitored, settings.title, settings.opponent, settings.judge),
    ]
    tables += [table for table in optional if table.groups]
    doubted = doubts(on_test_pairs, settings)
    for table in tables:
        if table.name in OF_POLICIES:
            for _, row in table.rows():
                policies = row.cells[0].split(" minus ") if row.cells[1] != "paper" else []
                row.notes += [doubted[policy] for policy in policies if policy in doubted]
        table.notes += [settings.ratings.note()] if table.name in OF_SCORES else []
        table.notes += [settings.note] if settings.note else []
    return tables


def sort_metrics(results: list[dict]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return ({name: metrics on the test pairs}, {name: metrics on RewardBench, which have sections})."""
    test: dict[str, dict] = {}
    benchmark: dict[str, dict] = {}
    for result in results:
        side = benchmark if result["sections"] else test
        if result["name"] in side:
            raise UserError(f"--reward-metrics: two files measure {result['name']!r} on the same pairs")
        side[result["name"]] = result
    return test, benchmark


def index_win_rates(results: list[dict]) -> dict[tuple[str, str], dict]:
    """Return {(policy, setting): win rates}; raise UserError where one stands twice."""
    index = {(result["policy"], result["setting"]): result for result in results}
    if len(index) < len(results):
        raise UserError("--win-rates: two files have the same policy and setting")
    return index


# Section 3: the data set


def dataset_table(
    speeches: list[dict],
    dropped: list[dict],
    left_out: dict[str, int],
    scores: list[dict],
    pairs: list[dict],
    paper: dict,
    settings: TableSettings,
) -> Table:
    """Sizes of the data set, what was dropped on the way and why (sections 3.1 and 3.3)."""
    no_speeches = Missing("This run starts at pairs, without speeches of its own.")
    no_scores = Missing("This run starts at pairs, without responses of its own.")
    unknown, apart = NOT_REPORTED, Missing("The paper does not count its dev set apart: it is within train.")
    lengths = [len(speech["text"]) for speech in speeches]
    sides = Counter(speech["split"] for speech in speeches)
    sources = Counter(speech["source"] for speech in speeches)
    pair_sides = Counter(pair["split"] for pair in pairs)
    reasons = Counter(row["reason"] for row in dropped)

    def sized(value: int) -> Cell:
        return count(value) if speeches else no_speeches

    not_looked_for = Missing("This run keeps personal data.")

    def masked(kind: str) -> Cell:
        looked_for = all("masked" in speech for speech in speeches)
        return sized(sum(kind in speech["masked"] for speech in speeches)) if looked_for else not_looked_for

    reported = {**paper["speeches"], **{f"{side} pairs": paper["pairs"][side] for side in ("train", "test")}}
    groups = [
        (
            "Client speeches",
            [
                Row(["All", sized(len(speeches)), count(reported["total"])]),
                Row(["Train, with dev", sized(sides["train"] + sides["dev"]), count(reported["train"])]),
                Row(["of these dev", sized(sides["dev"]), apart]),
                Row(["Test", sized(sides["test"]), count(reported["test"])]),
                Row(
                    ["Characters, mean", Number(sum(lengths) / len(lengths), 0) if lengths else no_speeches, count(reported["mean_chars"])]
                ),
                Row(["Characters, least", sized(min(lengths, default=0)), count(reported["min_chars"])]),
                Row(["Characters, most", sized(max(lengths, default=0)), count(reported["max_chars"])]),
                *[Row([f"With masked {what}", masked(kind), unknown]) for kind, what in PERSONAL_DATA.items()],
            ],
        ),
        ("Speeches by source", [Row([settings.title(source), count(n), unknown]) for source, n in sources.most_common()]),
        (
            "Rows left out, by reason",
            [Row([reason, count(n), unknown]) for reason, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))],
        ),
        (
            "Responses left out, by reason",
            [Row([reason, count(n), unknown]) for reason, n in left_out.items() if n],
        ),
        (
            "Responses and preference pairs",
            [
                Row(["Responses scored", count(len(scores)) if scores else no_scores, unknown]),
                Row(
                    [
                        "Models that answered",
                        count(len({score["model"] for score in scores})) if scores else no_scores,
                        count(paper["pool_size"]),
                    ]
                ),
                Row(["Pairs, train with dev", count(pair_sides["train"] + pair_sides["dev"]), count(reported["train pairs"])]),
                Row(["of these dev", count(pair_sides["dev"]), apart]),
                Row(["Pairs, test", count(pair_sides["test"]), count(reported["test pairs"])]),
            ],
        ),
    ]
    return Table("dataset", "The data set (section 3)", ["Quantity", "This run", "Paper"], groups, [])


def topic_table(speeches: list[dict], taxonomy: dict, settings: TableSettings) -> Table:
    """Speeches by topic (Table 5)."""
    cells = Counter((speech["topic"], speech["split"]) for speech in speeches)
    groups = []
    for coarse in taxonomy.values():
        rows = [topic_row(topic, [topic], cells, len(speeches), count(entry["paper_count"])) for topic, entry in coarse["fine"].items()]
        groups.append(
            (coarse["title"], [topic_row("All of these", list(coarse["fine"]), cells, len(speeches), count(coarse["paper_count"])), *rows])
        )
    origins = Counter((speech["topic_from"], speech["split"]) for speech in speeches)
    unknown = NOT_REPORTED
    groups.append((TOPIC_FROM, [topic_row(title, [name], origins, len(speeches), unknown) for name, title in TOPICS_FROM.items()]))
    columns = ["Topic", "Train", "Dev", "Test", "All", "Share (%)", "Paper"]
    return Table("topics", "Client speeches by topic (Table 5)", columns, groups, [])


def topic_row(title: str, topics: list[str], cells: Counter, total: int, reported: Cell) -> Row:
    """Counts of one or several topics, or origins of topics, by split."""
    if not total:
        return Row([title, *[Missing("This run starts at pairs, without speeches of its own.")] * 5, reported])
    sides = [sum(cells[topic, side] for topic in topics) for side in ("train", "dev", "test")]
    return Row([title, *map(count, sides), count(sum(sides)), Number(100 * sum(sides) / total, 1), reported])


def pool_table(pool: Pool, settings: TableSettings) -> Table:
    """The response pool: what each model's responses were worth (Table 6, Figures 5 and 6)."""
    none = "No response of this model was scored in this run."

    def row(model: str) -> Row:
        responses, chosen, rejected = (round(pool.count([model], what)) for what in (RESPONSES, CHOSEN, REJECTED))
        score = pool.rate([model], SCORE, RESPONSES)["value"]
        return Row(
            [
                settings.title(model),
                count(responses),
                Missing(none) if score is None else Number(score, 2),
                count(chosen),
                count(rejected),
                *(Number(n / responses, 2) if responses else Missing(none) for n in (chosen, rejected)),
                *(number(pool.rate([model], what), none, 1, 100) for what in (CHOSEN, REJECTED)),
            ]
        )

    groups = [(group.title, [row(model) for model in group.models]) for group in settings.pool]
    listed = {model for group in settings.pool for model in group.models}
    groups.append(("Not in this run's pool", [row(model) for model in pool.models if model not in listed]))  # of published pairs
    columns = ["Model", "Responses", "Mean score", "Chosen", "Rejected", "Chosen per response", "Rejected per response"]
    notes = [
        "Mean score: over the seven principles, 1 to 5. Chosen and rejected: places in train, dev and test pairs.",
        "Chosen (%) and rejected (%): of the candidate pairs in which a response of the model stood, with 95 % bootstrap intervals over"
        f" speeches. {candidates_note(settings.starts_at_pairs)}",
    ]
    return Table("pool", "The response pool (Table 6)", [*columns, "Chosen (%)", "Rejected (%)"], groups, notes)


# Section 4.1: reward models


def reward_model_table(metrics: dict[str, dict], paper: dict, settings: TableSettings) -> Table:
    """Reward models and rankers on the test pairs (Table 1)."""
    mapped = settings.reported.reward_models
    groups = []
    for group in settings.reward_models:
        rows = []
        for name in group.models:
            rows.append(reward_model_row(settings.title(name), metrics.get(name)))
            if name in mapped:
                rows.append(reported_reward_model_row(settings.title(name), reported_row(paper["reward_models"], mapped[name]), paper))
        groups.append((group.title, rows))
    others = [
        reported_reward_model_row(name, entry, paper) for name, entry in paper["reward_models"].items() if name not in mapped.values()
    ]
    columns = ["Model", "Source", "Acc. (%)", "AUC", "ECE", "Brier", "NLL", "Temperature", "Both orders (%)", "First named (%)", "Pairs"]
    notes = [
        "Higher is better for accuracy and AUC, lower for ECE, Brier and NLL. In brackets: 95 % bootstrap intervals over speeches.",
        "Temperature: what the margins would have to be divided by to be calibrated.",
        "A ranker sees each pair in both orders; right in one of them alone counts half. Both orders: pairs ranked right in both. First"
        " named: its answers that name the response shown first; 50 means no position bias.",
    ]
    return Table("reward_models", "Reward models on the test pairs (Table 1)", columns, [*groups, (ORIENTATION, others)], notes)


def reward_model_row(title: str, result: dict | None) -> Row:
    """A row of measured metrics."""
    if result is None:
        return Row([title, "this run", *[Missing("Not measured in this run.")] * 9])
    undefined = "A ranker gives no probability." if result["kind"] == "ranker" else "Undefined: the pairs are all of one order."
    no_temperature = (
        undefined if result["kind"] == "ranker" else "No temperature fits: every pair is ranked right, or the margins are wrong on average."
    )
    no_order, orders = "A reward model reads one response at a time.", result["orders"] or {}
    return Row(
        [
            title,
            "this run",
            number(result["accuracy"], undefined, 1, 100),
            *(number(result[metric], undefined) for metric in ("auc", "ece", "brier", "nll")),
            Missing(no_temperature) if result["temperature"] is None else Number(result["temperature"], 2),
            *(number(orders.get(share), no_order, 1, 100) for share in ("consistent_right", "first_share")),
            count(result["n"]),
        ],
        [AT_CHANCE] if result["at_chance"] else [],
    )


def reported_reward_model_row(title: str, entry: dict, paper: dict) -> Row:
    """A row of the paper's Table 1."""
    cells = [Number(entry[key], 3) if key in entry else NOT_REPORTED for key in ("auc", "ece", "brier")]
    return Row([title, "paper", Number(entry["acc"], 1), *cells, *[NOT_REPORTED] * 4, count(paper["dataset"]["pairs"]["test"])])


def ablation_table(
    metrics: dict[str, dict], benchmark: dict[str, dict], sections: list[str], paper: list[dict], settings: TableSettings
) -> Table:
    """General preference data alone and with ours (Table 2), with RewardBench's sections."""
    by_row = {f"{entry['base']}, {entry['data']}": entry for entry in paper}
    mapped = settings.reported.ablation
    rows = []
    for entry in settings.ablation:
        rows.append(ablation_row(entry, metrics.get(entry.model), benchmark.get(entry.model), sections))
        if entry.model in mapped:
            rows.append(reported_ablation_row(entry.base, entry.data, reported_row(by_row, mapped[entry.model]), sections))
    unmapped = [entry for row, entry in by_row.items() if row not in mapped.values()]
    others = [reported_ablation_row(entry["base"], entry["data"], entry, sections) for entry in unmapped]
    columns = ["Base", "Training data", "Source", "Acc. (%)", "AUC", "Brier", "ECE", "RewardBench (%)", *map(section_column, sections)]
    notes = [
        f"RewardBench: mean of its sections {', '.join(sections)}, each a mean over prompts, mathematics as much as code.",
        "In brackets: 95 % bootstrap intervals over speeches; of RewardBench over the prompts of each subset.",
    ]
    title = "Reward models trained on general data, without and with ours (Table 2)"
    return Table("reward_ablation", title, columns, [("Reward models of this run", rows), (ORIENTATION, others)], notes)


def ablation_row(entry: Ablation, result: dict | None, benchmark: dict | None, sections: list[str]) -> Row:
    """A measured row of Table 2."""
    absent = Missing("Not measured in this run.")
    cells = (
        [absent] * 4
        if result is None
        else [number(result["accuracy"], "", 1, 100), *(number(result[m], "Undefined.") for m in ("auc", "brier", "ece"))]
    )
    scores: list[Cell] = [Missing("RewardBench was not run for this model.")] * (1 + len(sections))
    notes = [AT_CHANCE] if result and result["at_chance"] else []
    if benchmark:
        found = benchmark["sections"]["scores"]
        scores = [number(benchmark["sections"]["overall"], "No subset had a pair.", 1, 100)]
        scores += [Number(100 * found[name], 1) if name in found else Missing("No subset of this section had a pair.") for name in sections]
        if benchmark["sections"]["missing"]:
            notes.append(f"RewardBench without the subsets that had no pair: {', '.join(benchmark['sections']['missing'])}.")
    return Row([entry.base, entry.data, "this run", *cells, *scores], notes)


def reported_ablation_row(base: str, data: str, entry: dict, sections: list[str]) -> Row:
    """A row of the paper's Table 2."""
    figures = [Number(entry["acc"], 1), *(Number(entry[m], 3) for m in ("auc", "brier", "ece")), Number(entry["rewardbench"], 1)]
    return Row([base, data, "paper", *figures, *[NOT_REPORTED] * len(sections)])


if __name__ == "__main__":
    main()
