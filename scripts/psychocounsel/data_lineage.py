"""What stands behind the cells of the tables of the data set: speeches, topics, responses, their judge, pairs, contamination.

A function a table: from a cell to its formula in words and the nodes under it. The judge's assessment is computed again from
single ratings.
"""

from collections.abc import Callable
from pathlib import Path

from make_tables import TOPIC_FROM, TOPICS_FROM, UNANSWERED
from psychocounsel import consistency, data_tables, pool
from psychocounsel.explanation import Node
from psychocounsel.pairs import least_total_gap
from psychocounsel.record_lineage import RecordLineage
from psychocounsel.records import read_result
from psychocounsel.run_files import lines
from psychocounsel.table_cells import Cell, named
from psychocounsel.table_settings import TableSettings
from psychocounsel.tables import MISSING

SPEECHES, RESPONSES = "Client speeches", "Responses and preference pairs"
DATASET = {  # rows of the table of the data set -> formula, records that count, their sides of the split
    (SPEECHES, "All"): ("number of speeches", "speech", None),
    (SPEECHES, "Train, with dev"): ("number of speeches", "speech", ("train", "dev")),
    (SPEECHES, "of these dev"): ("number of speeches", "speech", ("dev",)),
    (SPEECHES, "Test"): ("number of speeches", "speech", ("test",)),
    (SPEECHES, "Characters, mean"): ("mean number of characters of the speeches", "speech", None),
    (SPEECHES, "Characters, least"): ("least number of characters of a speech", "speech", None),
    (SPEECHES, "Characters, most"): ("greatest number of characters of a speech", "speech", None),
    (SPEECHES, "With masked e-mail addresses"): ("number of speeches with at least one", "speech", None),
    (SPEECHES, "With masked telephone numbers"): ("number of speeches with at least one", "speech", None),
    (SPEECHES, "With masked web addresses"): ("number of speeches with at least one", "speech", None),
    (RESPONSES, "Responses scored"): ("number of scored responses", "score", None),
    (RESPONSES, "Models that answered"): ("number of distinct models among the scored responses", "score", None),
    (RESPONSES, "Pairs, train with dev"): ("number of preference pairs", "pair", ("train", "dev")),
    (RESPONSES, "of these dev"): ("number of preference pairs", "pair", ("dev",)),
    (RESPONSES, "Pairs, test"): ("number of preference pairs", "pair", ("test",)),
}
UNRATED = "nothing: this run has no ratings of its own"
CONTAMINATION = {  # columns of the table of contamination -> formula
    "Side": "the side of the data that is compared",
    "Prompts": "number of different prompts in the data",
    "Similar": "number of prompts in the data similar to one tested on",
    "Repeated": "number of prompts in the data that repeat one tested on",
    "Prompts tested on": "number of different prompts tested on",
    "Tested on, similar (%)": "100 x share of the prompts tested on that have a similar one in the data",
    "Answers": "number of different answers in the data's pairs",
    "Equal answers": "number of these that are answers in pairs tested on too",
}
PAIRS = {  # rows of the table of pairs -> formula
    "All speeches": "number of speeches",
    "with a pair": "number of speeches with at least one pair",
    "All candidates": "number of every two scored responses to a speech; of the test side 1 a speech, its best and its worst",
    "left out: gap too small, or equal texts": "number of candidates less the number of pairs",
    "Kept as pairs": "number of preference pairs",
    "Mean": "mean of the differences of mean scores",
    "Median": "median of the differences of mean scores",
    "Chosen, mean words": "mean number of words of the chosen responses",
    "Rejected, mean words": "mean number of words of the rejected responses",
    "Chosen, mean characters": "mean number of characters of the chosen responses",
    "Rejected, mean characters": "mean number of characters of the rejected responses",
    "Chosen response is the longer one (%)": "100 x share of pairs whose chosen response has more words",
    "Rejected response is the safer one (%)": "100 x share of pairs whose rejected response has the higher safety score",
}
CONSISTENCY = {  # groups of the table of the judge asked again -> formula
    "The sample": "number of speeches, or of scores, rated both times",
    data_tables.MEASURES["equal"][0]: "100 x share of scores that are the same both times",
    data_tables.MEASURES["difference"][0]: "mean of |first score - second score|",
    data_tables.MEASURES["kappa"][0]: "1 - sum of (i - j)^2 observed(i, j) / sum of (i - j)^2 expected(i, j) over scores i, j",
    data_tables.MEASURES["earlier_minus_later"][0]: "mean of a response's score nearer to the head minus that farther from it",
    "Pairs of the first rating (%)": "pairs of the first rating: their number, and 100 x the share of what became of them in the second",
}


def under_dataset(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Counts of speeches, dropped rows, scores and pairs."""
    if cell.group == "Speeches by source":
        source = named(cell.name, run.flow.sources, settings)
        return "number of speeches of this source", run.counted(cell.path, "speech", lambda row: row["source"] == source)
    if cell.group == "Rows left out, by reason":
        return "number of rows left out for this reason", run.counted(cell.path, "dropped_row", lambda row: row["reason"] == cell.name)
    if cell.group == "Responses left out, by reason":
        if cell.name == UNANSWERED:
            return "number of requests to the pool without a usable answer", run.counted(cell.path, "failure", lambda row: True)
        return "number of responses without an overall score", run.counted(cell.path, "unscored", lambda row: row["reason"] == cell.name)
    formula, kind, splits = DATASET[cell.group, cell.name]
    return formula, run.counted(cell.path, kind, lambda row: splits is None or row["split"] in splits)


def under_topics(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Speeches of a topic."""
    if cell.group == TOPIC_FROM:
        field, values = "topic_from", {name for name, title in TOPICS_FROM.items() if title == cell.name}
    else:
        group = next(entry for entry in run.flow.study.taxonomy["coarse"].values() if entry["title"] == cell.group)
        field, values = "topic", set(group["fine"]) if cell.name == "All of these" else {cell.name}
    split, what = cell.column.lower(), "with a topic from there" if field == "topic_from" else "on the topic"
    formula = f"100 x speeches {what} / all speeches" if cell.column == "Share (%)" else f"number of speeches {what}"
    return formula, run.counted(cell.path, "speech", lambda row: row[field] in values and split in (row["split"], "all", "share (%)"))


def under_pool(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Scores and pairs of a model."""
    model = named(cell.name, [name for group in settings.pool for name in group.models], settings)
    return behind_models(cell, run, [model])


def under_model_groups(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Scores and pairs of a group of models."""
    by_size = {size.title: size.models for size in settings.pool}
    models = [model for group in by_size.values() for model in group]
    named_groups = by_size | pool.by_language(settings.languages, models)
    if cell.group == "Findings":
        formula = "difference of the rates of both groups" if "minus" in cell.name else "eta squared of the models' rates by size class"
        return formula, of_models(cell, run, models, f"{cell.base.split()[0].lower()} pair", "score") if cell.value != MISSING else []
    if cell.base == "Number":
        return "number of models in the config's pool", []
    return behind_models(cell, run, named_groups[cell.name])


def behind_models(cell: Cell, run: RecordLineage, models: list[str]) -> tuple[str, list[Node]]:
    """Scores of some models' responses, pairs in which they stand, or both, as the column has it."""
    if cell.base in ("Responses", "Mean score"):
        formula = "number of scored responses" if cell.base == "Responses" else "mean of the responses' overall scores"
        return formula, of_models(cell, run, models, "score")
    side = cell.base.split()[0].lower()
    pair = f"{side} pair"
    if "per response" in cell.base:
        return f"pairs in which the model's response is the {side} one / its scored responses", of_models(cell, run, models, pair, "score")
    if "(%)" in cell.base:
        formula = f"100 x pairs in which these models' response is the {side} one / places of their responses in candidate pairs"
        return formula, of_models(cell, run, models, pair, "score")
    return f"number of pairs in which these models' response is the {side} one", of_models(cell, run, models, pair)


def of_models(cell: Cell, run: RecordLineage, models: list[str], *kinds: str) -> list[Node]:
    """The scores of some models' responses ("score"), or pairs in which they stand ("chosen pair", "rejected pair")."""
    nodes = []
    for side, kind in ((kind.split()[0], kind.split()[-1]) for kind in kinds):
        key = "model" if kind == "score" else f"{side}_model"
        nodes += run.counted(cell.path, kind, lambda row, key=key: row[key] in models)
    return nodes


def under_pairs(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Speeches, scores and pairs of a side of the split."""
    splits = data_tables.SIDES[cell.base]
    on_side = {row["speech_id"] for path in run.inputs(cell.path, "speech") for _, row in run.rows(path) if row["split"] in splits}
    pairs = run.counted(cell.path, "pair", lambda row: row["split"] in splits)
    if cell.group == "Client speeches":
        speeches = run.counted(cell.path, "speech", lambda row: row["split"] in splits)
        return PAIRS.get(cell.name, "number of speeches without a pair, for this reason"), [*speeches, *pairs]
    if cell.group == "Candidate pairs" and cell.name != "Kept as pairs":
        return PAIRS[cell.name], [*run.counted(cell.path, "score", lambda row: row["speech_id"] in on_side), *pairs]
    return PAIRS.get(cell.name, "number of pairs with a gap in these bounds"), pairs


def under_contamination(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Examples of near duplicates, by the ids of their prompts."""
    path = run.inputs(cell.path, "contamination")[0]
    found = next(
        found
        for found in read_result(Path(path), "contamination")["comparisons"]
        if (f"Tested on: {settings.title(found['tested'])}", settings.title(found["data"]), found["split"])
        == (cell.group, cell.name, cell.row["Side"])
    )
    shown = run.few(found["examples"])
    examples = [Node(f"{one['data']} is like {one['tested']}, similarity {one['similarity']:.3f}", path) for one in shown]
    return CONTAMINATION[cell.base], [
        Node("report of near duplicates", path, under=examples, more=len(found["examples"]) - len(shown)),
        *(Node("what was compared", item["path"]) for item in run.record(path)["identity"]["inputs"]),
    ]


def under_judge_positions(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Ratings by the place of a response."""
    if not run.flow.judge_assessment():
        return UNRATED, []
    of_principle = on_principle(cell.name, settings)
    if not cell.base.startswith("Place"):
        formula = "mean score" if cell.base == "Mean" else "Friedman's test: chance of mean ranks of the places as unequal as these"
        return formula, judged(run, assessment(run), of_principle)
    place = int(cell.base.split()[1])
    formula = "mean over speeches of the score at this place minus the mean score of the speech"
    return formula, judged(run, assessment(run), lambda row: row["position"] == place and of_principle(row))


def under_judge_consistency(cell: Cell, run: RecordLineage, settings: TableSettings) -> tuple[str, list[Node]]:
    """Ratings of a sample that was rated twice."""
    if not run.flow.judge_assessment():
        return UNRATED, []
    order = next(order for order, title in data_tables.ORDERS.items() if title == cell.base)
    path, stored, again = assessment(run)
    if order not in {result["order"] for result in stored["again"]}:
        return "no sample was rated again in this order", []
    (file,) = [file for file in run.inputs(path, "rating") if Path(file).stem == order]
    sample, of_principle = {row["response_id"] for _, row in lines(file)}, on_principle(cell.name, settings)
    under = judged(run, (path, stored, again), lambda row: row["response_id"] in sample and of_principle(row), order)
    return CONSISTENCY[cell.group], under


def on_principle(title: str, settings: TableSettings) -> Callable[[dict], bool]:
    """Return whether a rating is on the principle of this title; every rating is where the title is none of a principle."""
    name = next((name for name, shown in settings.ratings.principles if shown == title), None)
    return lambda row: name in (None, row["principle"])


def judged(run: RecordLineage, assessed: tuple[str, dict, dict], keep: Callable[[dict], bool], *again_in: str) -> list[Node]:
    """The assessment of the judge, computed again, with the ratings behind it: the first, and those in some order."""
    path, stored, again = assessed
    node = Node(f"assessment of {stored['judge']}; again from the ratings", path, agrees=stored == again)
    for file in [file for file in run.inputs(path, "rating") if Path(file).stem in ("ratings", *again_in)]:
        kept = [line for line, row in lines(file) if keep(row)]
        shown = set(run.few(kept))
        answers = run.inputs(file, "rating_answer")
        under = [run.rating(file, line, row, answers) for line, row in lines(file) if line in shown]
        node.under.append(Node(f"{len(kept)} ratings count", file, under=under, more=len(kept) - len(under)))
    return [node]


def assessment(run: RecordLineage) -> tuple[str, dict, dict]:
    """The judge's assessment: its file, what it says, and what follows from the ratings now."""
    (path,) = run.flow.judge_assessment()
    settings = run.record(path)["identity"]["settings"]
    files = run.inputs(path, "rating")
    ratings = {Path(file).stem: consistency.as_ratings((row for _, row in lines(file)), settings["principles"]) for file in files}
    first = ratings["ratings"]
    least = least_total_gap(settings["min_gap"], len(settings["principles"]))
    common = (settings["principles"], least, settings["bootstrap"], settings["seed"])
    stored = read_result(Path(path), "judge")
    again = {
        "judge": next(row["judge"] for file in files for _, row in lines(file)),
        "positions": consistency.position_effects(first, common[0], *common[2:]),
        "again": [
            {"order": result["order"], **consistency.self_consistency(first, ratings[result["order"]], *common)}
            for result in stored["again"]
        ],
    }
    return path, stored, again
