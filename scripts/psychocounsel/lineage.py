"""From a table's cell down to what it was computed from: results, judgements or predictions, pairs, answers, speeches, raw rows.

The way down is that of the provenance records: a file's inputs are those that its record names. On the way the cell is computed
again, from the table's inputs by the table's own program and from single records where there are such.
"""

import csv
import gzip
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import orjson

import evaluate_rewards
import make_tables
import parse_judgements
import parse_ratings
from psychocounsel import adapters, consistency, data_tables, pool, preferences, winrates
from psychocounsel.config import load_registry, locate
from psychocounsel.errors import UserError, nearest_or_all
from psychocounsel.pairs import least_total_gap
from psychocounsel.personal_data import mask
from psychocounsel.provenance import read_record, record_path
from psychocounsel.records import iter_json_lines
from psychocounsel.stage import parse_settings
from psychocounsel.tables import MISSING, read_result, to_csv
from psychocounsel.texts import normalise
from psychocounsel.workflow import Workflow

FEW = 3  # records shown of many
KINDS = [  # files of a run -> what stands in them; the first that fits
    ("01_sources/*.dropped.jsonl", "dropped_row"),
    ("01_sources/*.jsonl", "source_row"),
    ("02_speeches/dropped.jsonl", "dropped_row"),
    ("02_speeches/unique.jsonl", "unique_speech"),
    ("*speeches.jsonl", "speech"),
    ("03_responses/assignments/*", "assignment"),
    ("03_responses/*.failed.jsonl", "failure"),
    ("03_responses/*.jsonl", "response"),
    ("04_ratings/answers.jsonl", "rating_answer"),
    ("04_ratings/again/*.answers.jsonl", "rating_answer"),
    ("04_ratings/ratings.jsonl", "rating"),
    ("04_ratings/again/*.jsonl", "rating"),
    ("04_ratings/judge.json", "judge"),
    ("04_ratings/scores.dropped.jsonl", "unscored"),
    ("04_ratings/scores.jsonl", "score"),
    ("05_pairs/contamination.json", "contamination"),
    ("05_pairs/*.jsonl", "pair"),
    ("06_reward_models/*predictions.jsonl", "prediction"),
    ("06_reward_models/*rankings.jsonl", "ranking_answer"),
    ("06_reward_models/*/metrics.json", "metrics"),
    ("06_reward_models/*/benchmark.json", "metrics"),
    ("08_answers/*.jsonl", "response"),
    ("09_judgements/*.answers.jsonl", "judgement_answer"),
    ("09_judgements/*.jsonl", "judgement"),
    ("09_judgements/*.win_rates.json", "win_rates"),
]
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
METRICS = {  # columns of the tables of reward models -> metric, and how it is computed
    "Acc. (%)": (
        "accuracy",
        "100 x share of pairs whose chosen answer has the higher reward; for a ranker, right in one order counts half",
    ),
    "AUC": ("auc", "chance that a pair with the chosen answer first has a higher P(first better) than one with it second"),
    "ECE": ("ece", "sum over equal-width bins of P(first better): share of pairs in the bin x |share of chosen-first - mean P|"),
    "Brier": ("brier", "mean of (1 - sigmoid(reward of chosen - reward of rejected))^2 over the pairs"),
    "NLL": ("nll", "mean of -log sigmoid(reward of chosen - reward of rejected) over the pairs"),
    "Temperature": ("temperature", "the T > 0 for which the margins divided by T have the least NLL"),
    "Pairs": ("n", "number of pairs with a usable verdict"),
}
RESULTS = ("judge", "metrics", "win_rates", "contamination")  # kinds of JSON results that tables are made of
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
PROTOCOLS = {
    "one order": ("paper", "100 x share of speeches won in the one order that a seeded coin picks"),
    "both orders": ("robust", "100 x mean over speeches of 1 (won in both orders), 0 (lost in both), 0.5 (they disagree)"),
}
LENGTHS = {
    "Win rate (%)": PROTOCOLS["both orders"][1],
    "At equal length (%)": "100 x sigmoid(a) of the fit log-odds(win) = a + b tanh(d / sd(d)), d their difference in characters",
    "Words": "mean number of words of the policy's answers",
    "Opponent's words": "mean number of words of the opponent's answers",
    "Off target (%)": "100 x mean of |words - asked words| / asked words over the policy's answers",
    "Within 10 % (%)": "100 x share of the policy's answers within 10 % of the words that were asked for",
    "Orders agree (%)": "100 x share of speeches judged alike in both orders",
    "First wins (%)": "100 x share of the judge's verdicts that prefer the answer shown first",
}


@dataclass
class Node:
    """A file, or one record in it, that something was computed from."""

    what: str
    file: str | None = None
    line: int | None = None
    request_key: str | None = None
    text: str | None = None  # words of clients and models
    agrees: bool | None = None  # whether computing it again from what is under it gives the same
    under: list["Node"] = field(default_factory=list)
    more: int = 0  # nodes that are not shown


@dataclass
class Explanation:
    """Where a cell comes from."""

    table: str
    line: int
    row: str
    column: str
    value: str
    formula: str
    recomputed: str
    agrees: bool
    under: list[Node]

    @property
    def sound(self) -> bool:
        """Whether the cell and everything under it that was computed again agree."""
        waiting, agreed = list(self.under), self.agrees
        while waiting:
            node = waiting.pop()
            agreed = agreed and node.agrees is not False
            waiting += node.under
        return agreed

    def as_json(self, show_text: bool) -> dict:
        """All of it for scripts; texts only where they are asked for."""
        return trimmed({"sound": self.sound} | asdict(self), show_text)


def trimmed(value: object, show_text: bool) -> object:
    """Return nested dicts without empty fields and, unless they are asked for, without texts."""
    if isinstance(value, list):
        return [trimmed(item, show_text) for item in value]
    if isinstance(value, dict):
        empty = {key for key, item in value.items() if item is None or item == [] or (key, item) == ("more", 0)}
        hidden = empty if show_text else empty | {"text"}
        return {key: trimmed(item, show_text) for key, item in value.items() if key not in hidden}
    return value


class Cell:
    """A cell of a table's CSV file, found by what a user calls its row and column."""

    def __init__(self, flow: Workflow, table: str, row: str, column: str) -> None:
        self.path = table if table.endswith(".csv") else flow.results(f"10_tables/{table}.csv")
        self.table = Path(self.path).stem
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                self.grid = list(csv.reader(file))
        except FileNotFoundError:
            tables = sorted(path.stem for path in Path(flow.results("10_tables")).glob("*.csv"))
            hint = nearest_or_all(table, tables) if tables else " Has the run been made?"
            raise UserError(f"{self.path}: no such table.{hint}") from None
        if self.table == "costs":
            raise UserError(f"{self.path}: its figures are sums of `run.facts.api` in the provenance records (*.prov.json) of the jobs")
        self.header = self.grid[0]
        if column not in self.header[1:-1]:
            raise UserError(f"--column {column!r}: {self.path} has no such column.{nearest_or_all(column, self.header[1:-1])}")
        self.column, self.x = column, self.header.index(column)
        self.y = self._find(row)
        self.base = column.removesuffix(" low").removesuffix(" high")
        self.row = dict(zip(self.header, self.grid[self.y], strict=True))
        self.group, self.name, self.value = self.row["group"], self.grid[self.y][1], self.grid[self.y][self.x]

    @property
    def labels(self) -> list[str]:
        """What names each row: its group, first column, and where its figures come from."""
        columns = [index for index, name in enumerate(self.header) if index < 2 or name in ("Training data", "Source")]
        return [" | ".join(row[index] for index in columns if row[index]) for row in self.grid[1:]]

    def _find(self, wanted: str) -> int:
        """Return the place of the row that a number, or words of its label, name."""
        if wanted.isdecimal() and 1 <= int(wanted) <= len(self.labels):
            return int(wanted)
        parts = [label.casefold().split(" | ") for label in self.labels]
        found = set(range(1, len(parts) + 1))
        for word in (word.strip().casefold() for word in wanted.split("|")):
            exact = {y for y, label in enumerate(parts, 1) if word in label}  # "micro-dpo" is not "micro-dpo-iter"
            found &= exact or {y for y, label in enumerate(parts, 1) if any(word in part for part in label)}
        if len(found) == 1:
            return found.pop()
        rows = "\n".join(f"  {y:>3}  {label}" for y, label in enumerate(self.labels, 1) if y in (found or range(len(self.grid))))
        which = "fits several rows; take a number, or several parts of the label with | between them" if found else "fits no row"
        raise UserError(f"--row {wanted!r} {which}:\n{rows}")


class Lineage:
    """What a run's tables were computed from; reads files as they are asked for."""

    def __init__(self, flow: Workflow, everything: bool) -> None:
        self.flow, self.most = flow, None if everything else FEW
        self.files: dict[str, list[tuple[int, dict]]] = {}
        self.indexes: dict[tuple[str, str], dict[str, list[tuple[int, int]]]] = {}  # (file, field) -> value -> line, byte of its start
        self.above: dict[tuple[str, str], list[str]] = {}  # (file, kind) -> its inputs of this kind
        self.raws: dict[str, tuple[dict[int, int], set]] = {}  # raw file -> line of each row, texts by row

    def explain(self, table: str, row: str, column: str) -> Explanation:
        """Explain one cell."""
        cell = Cell(self.flow, table, row, column)
        again = self.rebuilt(cell)
        if cell.x == 1 or column in ("Source", "Base", "Training data"):
            formula, under = "a name", []
        elif column.startswith("Paper") or cell.row.get("Source") == "paper":
            formula, under = "the figure that the paper reports", [self.paper(cell)]
        else:
            formula, under = getattr(self, f"under_{cell.table}")(cell)
        if column != cell.base:
            formula = f"{column.removeprefix(cell.base).strip()} end of the 95 % bootstrap interval over speeches of: {formula}"
        return Explanation(
            cell.path, cell.y + 1, cell.labels[cell.y - 1], column, cell.value, formula, again, again == cell.value, under
        )  # line: the header is line 1 and no cell holds a line end

    # Reading

    def kind(self, path: str) -> str | None:
        """Return what stands in a file of the run."""
        if path.startswith(self.flow.work("sources/")):
            return "raw"
        inside = path.removeprefix(self.flow.results(""))
        return next((kind for pattern, kind in KINDS if inside != path and fnmatch(inside, pattern)), None)

    def record(self, path: str) -> dict:
        """Return a file's provenance record."""
        try:
            return read_record(record_path(Path(path)))
        except FileNotFoundError:
            raise UserError(f"{path}: its provenance record is not there; `audit.py verify` tells what else is wrong") from None

    def inputs(self, path: str, kind: str) -> list[str]:
        """Return the inputs of one kind of a file or, where it has none, of its inputs, and so on upwards."""
        if (path, kind) in self.above:
            return self.above[path, kind]
        level, seen, found = [path], set(), []
        while level and not found:
            above = dict.fromkeys(item["path"] for file in level for item in self.record(file)["identity"]["inputs"])
            found = [file for file in above if self.kind(file) == kind]
            seen.update(level)
            level = [file for file in above if file not in seen and self.kind(file) not in (None, "raw")]
        self.above[path, kind] = found
        return found

    def rows(self, path: str) -> list[tuple[int, dict]]:
        """Return (line, record) of a file of records that is read whole, and kept."""
        if path not in self.files:
            self.files[path] = list(lines(path))
        return self.files[path]

    def find(self, paths: list[str], key: str, value: str) -> list[tuple[str, int, dict]]:
        """Return (file, line, record) wherever a field has a value; the files' other records are not kept in memory."""
        found = []
        for path in paths:
            if (path, key) not in self.indexes:
                self.indexes[path, key] = self.index(path, key)
            for line, start in self.indexes[path, key].get(str(value), []):
                with open(path, "rb") as file:
                    file.seek(start)
                    found.append((path, line, orjson.loads(file.readline())))
        return found

    def index(self, path: str, key: str) -> dict[str, list[tuple[int, int]]]:
        """Return value of a field -> the lines that have it, each with the byte at which it begins."""
        found = defaultdict(list)
        starts = line_starts(path)
        for line, row in lines(path):
            found[str(row[key])].append((line, starts[line - 1]))
        return found

    @cached_property
    def journals(self) -> dict[str, list[tuple[str, int, int]]]:
        """Where answered requests stand in the journals, by their keys: file, line, and byte at which the line begins."""
        found = defaultdict(list)
        for path in sorted(Path(self.flow.work("journal")).rglob("*.jsonl")):
            with open(path, "rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    if line.startswith(b'{"key":"') and b'"answer":null' not in line[:100]:
                        found[line[8:72].decode("ascii", "replace")].append((path.as_posix(), number, start))
                    start += len(line)
        return found

    def few(self, things: list) -> list:
        """Return as many of them as are shown."""
        return things[: self.most]

    # The cell, computed again by the program that made the table

    def rebuilt(self, cell: Cell) -> str:
        """Return what the cell is when the table is made again from its inputs."""
        identity = self.record(cell.path)["identity"]
        by_kind = defaultdict(list)
        for item in identity["inputs"]:
            by_kind[self.kind(item["path"])].append(item["path"])
        kinds = ("speech", "dropped_row", "failure", "unscored", "score", "pair")
        records = ([row for path in by_kind[kind] for _, row in self.rows(path)] for kind in kinds)
        results = ([read_result(Path(path), kind) for path in by_kind[kind]] for kind in RESULTS)
        files = self.flow.config["files"]
        registries = load_registry([Path(files["taxonomy"])], "taxonomy")["coarse"], load_registry([Path(files["paper"])], "paper")
        self.settings = parse_settings(make_tables.TableSettings, identity["settings"])
        tables = make_tables.all_tables(*records, *results, *registries, self.settings)
        grid = list(csv.reader(io.StringIO(to_csv(next(table for table in tables if table.name == cell.table)))))
        return grid[cell.y][cell.x] if cell.y < len(grid) and grid[0] == cell.header else "another table"

    def paper(self, cell: Cell) -> Node:
        """The registry of the paper's figures."""
        file = self.flow.config["files"]["paper"]
        if cell.table == "topics":
            return Node("the paper's counts of topics", self.flow.config["files"]["taxonomy"])
        place = locate((cell.table, cell.name), [Path(file)])
        return Node("figures that the paper reports", file, int(place.rpartition(":")[2]) if ":" in place else None)

    def named(self, title: str, names: list[str]) -> str:
        """Return the name behind a title in the tables."""
        return next((name for name in names if self.settings.title(name) == title), title)

    # What is under a cell, by table: (formula in words, nodes)

    def under_dataset(self, cell: Cell) -> tuple[str, list[Node]]:
        """Counts of speeches, dropped rows, scores and pairs."""
        if cell.group == "Speeches by source":
            source = self.named(cell.name, self.flow.sources)
            return "number of speeches of this source", self.counted(cell, "speech", lambda row: row["source"] == source)
        if cell.group == "Rows left out, by reason":
            return "number of rows left out for this reason", self.counted(cell, "dropped_row", lambda row: row["reason"] == cell.name)
        if cell.group == "Responses left out, by reason":
            if cell.name == make_tables.UNANSWERED:
                return "number of requests to the pool without a usable answer", self.counted(cell, "failure", lambda row: True)
            return "number of responses without an overall score", self.counted(cell, "unscored", lambda row: row["reason"] == cell.name)
        formula, kind, splits = DATASET[cell.group, cell.name]
        return formula, self.counted(cell, kind, lambda row: splits is None or row["split"] in splits)

    def under_topics(self, cell: Cell) -> tuple[str, list[Node]]:
        """Speeches of a topic."""
        if cell.group == make_tables.TOPIC_FROM:
            field, values = "topic_from", {name for name, title in make_tables.TOPICS_FROM.items() if title == cell.name}
        else:
            coarse = load_registry([Path(self.flow.config["files"]["taxonomy"])], "taxonomy")["coarse"].values()
            group = next(entry for entry in coarse if entry["title"] == cell.group)
            field, values = "topic", set(group["fine"]) if cell.name == "All of these" else {cell.name}
        split, what = cell.column.lower(), "with a topic from there" if field == "topic_from" else "on the topic"
        formula = f"100 x speeches {what} / all speeches" if cell.column == "Share (%)" else f"number of speeches {what}"
        return formula, self.counted(cell, "speech", lambda row: row[field] in values and split in (row["split"], "all", "share (%)"))

    def under_pool(self, cell: Cell) -> tuple[str, list[Node]]:
        """Scores and pairs of a model."""
        model = self.named(cell.name, [name for group in self.settings.pool for name in group.models])
        if cell.column == "Responses":
            return "number of scored responses", self.of_models(cell, [model], "score")
        if cell.column == "Mean score":
            return "mean of the responses' overall scores", self.of_models(cell, [model], "score")
        side = cell.column.split()[0].lower()
        if "per response" in cell.column:
            formula = f"pairs in which the model's response is the {side} one / its scored responses"
            return formula, self.of_models(cell, [model], f"{side} pair", "score")
        return side_formula(cell.base, side), self.of_models(cell, [model], f"{side} pair", *["score"] * ("(%)" in cell.base))

    def under_model_groups(self, cell: Cell) -> tuple[str, list[Node]]:
        """Scores and pairs of a group of models."""
        by_size = {size.title: size.models for size in self.settings.pool}
        models = [model for group in by_size.values() for model in group]
        named = by_size | pool.by_language(self.settings.languages, models)
        if cell.group == "Findings":
            formula = "difference of the rates of both groups" if "minus" in cell.name else "eta squared of the models' rates by size class"
            return formula, self.of_models(cell, models, f"{cell.base.split()[0].lower()} pair", "score") if cell.value != MISSING else []
        if cell.base == "Number":
            return "number of models in the config's pool", []
        if cell.base in ("Responses", "Mean score"):
            formula = "number of scored responses" if cell.base == "Responses" else "mean of the responses' overall scores"
            return formula, self.of_models(cell, named[cell.name], "score")
        side = cell.base.split()[0].lower()
        return side_formula(cell.base, side), self.of_models(cell, named[cell.name], f"{side} pair", *["score"] * ("(%)" in cell.base))

    def of_models(self, cell: Cell, models: list[str], *kinds: str) -> list[Node]:
        """The scores of some models' responses ("score"), or pairs in which they stand ("chosen pair", "rejected pair")."""
        nodes = []
        for side, kind in ((kind.split()[0], kind.split()[-1]) for kind in kinds):
            key = "model" if kind == "score" else f"{side}_model"
            nodes += self.counted(cell, kind, lambda row, key=key: row[key] in models)
        return nodes

    def under_pairs(self, cell: Cell) -> tuple[str, list[Node]]:
        """Speeches, scores and pairs of a side of the split."""
        splits = data_tables.SIDES[cell.base]
        on_side = {row["speech_id"] for path in self.inputs(cell.path, "speech") for _, row in self.rows(path) if row["split"] in splits}
        pairs = self.counted(cell, "pair", lambda row: row["split"] in splits)
        if cell.group == "Client speeches":
            speeches = self.counted(cell, "speech", lambda row: row["split"] in splits)
            return PAIRS.get(cell.name, "number of speeches without a pair, for this reason"), [*speeches, *pairs]
        if cell.group == "Candidate pairs" and cell.name != "Kept as pairs":
            return PAIRS[cell.name], [*self.counted(cell, "score", lambda row: row["speech_id"] in on_side), *pairs]
        return PAIRS.get(cell.name, "number of pairs with a gap in these bounds"), pairs

    def under_contamination(self, cell: Cell) -> tuple[str, list[Node]]:
        """Examples of near duplicates, by the ids of their prompts."""
        path = self.inputs(cell.path, "contamination")[0]
        found = next(
            found
            for found in read_result(Path(path), "contamination")["comparisons"]
            if (f"Tested on: {self.settings.title(found['tested'])}", self.settings.title(found["data"]), found["split"])
            == (cell.group, cell.name, cell.row["Side"])
        )
        shown = self.few(found["examples"])
        examples = [Node(f"{one['data']} is like {one['tested']}, similarity {one['similarity']:.3f}", path) for one in shown]
        return CONTAMINATION[cell.base], [
            Node("report of near duplicates", path, under=examples, more=len(found["examples"]) - len(shown)),
            *(Node("what was compared", item["path"]) for item in self.record(path)["identity"]["inputs"]),
        ]

    def under_reward_models(self, cell: Cell) -> tuple[str, list[Node]]:
        """Metrics on the test pairs."""
        metric, formula = METRICS[cell.base]
        name = self.named(cell.name, [name for group in self.settings.reward_models for name in group.models])
        return formula, self.metrics(cell, name, metric, benchmark=False)

    def under_reward_ablation(self, cell: Cell) -> tuple[str, list[Node]]:
        """Metrics on the test pairs, or the score on the general benchmark."""
        rows = self.settings.ablation
        name = next(entry.model for entry in rows if (entry.base, entry.data) == (cell.row["Base"], cell.row["Training data"]))
        if cell.base == "RewardBench (%)":
            formula = "100 x mean of the section scores, each a weighted mean over the pairs of its subsets"
            return formula, self.metrics(cell, name, "sections", benchmark=True)
        metric, formula = METRICS[cell.base]
        return formula, self.metrics(cell, name, metric, benchmark=False)

    def under_win_rates(self, cell: Cell) -> tuple[str, list[Node]]:
        """Judgements of a policy's answers against the opponent's."""
        titles = {entry["title"]: name for name, entry in self.flow.study.taxonomy["coarse"].items()}
        topics = {make_tables.SHORT_TOPICS.get(name, title): name for title, name in titles.items()}
        topic = topics.get(cell.base)
        if cell.row["Source"] == "this run":
            on_topic = self.counted(cell, "speech", lambda row: row["split"] == "test" and topic in (None, row["coarse_topic"]))
            return "number of test speeches", on_topic
        protocol, formula = PROTOCOLS[cell.row["Source"]]
        if cell.base == "Speeches":
            formula = "number of test speeches that were judged in both orders"
        return formula, self.win_rate(cell, protocol, topic)

    def under_lengths(self, cell: Cell) -> tuple[str, list[Node]]:
        """Answers and judgements behind the win rates."""
        return LENGTHS[cell.base], self.win_rate(cell, "robust", None)

    def counted(self, cell: Cell, kind: str, keep) -> list[Node]:
        """The records that count, by file."""
        nodes = []
        for path in self.inputs(cell.path, kind):
            rows = self.rows(path)
            kept = [(line, row) for line, row in rows if keep(row)]
            node = Node(f"{len(kept)} of {len(rows)} {kind.replace('_', ' ')} records count", path)
            node.under = [self.record_node(kind, path, line, row) for line, row in self.few(kept)]
            node.more = len(kept) - len(node.under)
            nodes.append(node)
        return nodes

    def record_node(self, kind: str, path: str, line: int, row: dict) -> Node:
        """A record that was counted, with what it came from."""
        if kind == "speech":
            return self.speech(path, row["speech_id"])
        if kind == "pair":
            return self.pair(path, line, row)
        if kind == "score":
            score = self.score(path, line, row)
            score.under += [self.speech(speech_file, row["speech_id"]) for speech_file in self.inputs(path, "speech")]
            return score
        if kind == "failure":
            return Node(f"request {row['request_id']}: {row['reason']}", path, line, row["request_key"])
        if kind == "unscored":
            return Node(f"response {row['response_id']} of {row['model']}: {row['reason']}", path, line)
        return Node(f"{row['source']}, row {row['source_row']}: {row['reason']}", path, line)

    # The judge of the responses

    @cached_property
    def assessment(self) -> tuple[str, dict, dict]:
        """The judge's assessment: its file, what it says, and what follows from the ratings now."""
        path = self.flow.results("04_ratings/judge.json")
        settings = self.record(path)["identity"]["settings"]
        files = self.inputs(path, "rating")
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

    def judged(self, keep: Callable[[dict], bool], *again_in: str) -> list[Node]:
        """The assessment of the judge, computed again, with the ratings behind it: the first, and those in some order."""
        path, stored, again = self.assessment
        node = Node(f"assessment of {stored['judge']}; again from the ratings", path, agrees=stored == again)
        for file in [file for file in self.inputs(path, "rating") if Path(file).stem in ("ratings", *again_in)]:
            kept = [line for line, row in lines(file) if keep(row)]
            shown = set(self.few(kept))
            answers = self.inputs(file, "rating_answer")
            under = [self.rating(file, line, row, answers) for line, row in lines(file) if line in shown]
            node.under.append(Node(f"{len(kept)} ratings count", file, under=under, more=len(kept) - len(under)))
        return [node]

    def under_judge_positions(self, cell: Cell) -> tuple[str, list[Node]]:
        """Ratings by the place of a response."""
        if not cell.base.startswith("Place"):
            formula = "mean score" if cell.base == "Mean" else "Friedman's test: chance of mean ranks of the places as unequal as these"
            return formula, self.judged(self.on_principle(cell.name))
        place, on_principle = int(cell.base.split()[1]), self.on_principle(cell.name)
        formula = "mean over speeches of the score at this place minus the mean score of the speech"
        return formula, self.judged(lambda row: row["position"] == place and on_principle(row))

    def under_judge_consistency(self, cell: Cell) -> tuple[str, list[Node]]:
        """Ratings of a sample that was rated twice."""
        order = next(order for order, title in data_tables.ORDERS.items() if title == cell.base)
        if order not in {result["order"] for result in self.assessment[1]["again"]}:
            return "no sample was rated again in this order", []
        (file,) = [path for path in self.inputs(self.assessment[0], "rating") if Path(path).stem == order]
        sample, on_principle = {row["response_id"] for _, row in lines(file)}, self.on_principle(cell.name)
        return CONSISTENCY[cell.group], self.judged(lambda row: row["response_id"] in sample and on_principle(row), order)

    def on_principle(self, title: str) -> Callable[[dict], bool]:
        """Return whether a rating is on the principle of this title; every rating is where the title is none of a principle."""
        name = next((name for name, shown in self.settings.ratings.principles if shown == title), None)
        return lambda row: name in (None, row["principle"])

    # Reward models

    def metrics(self, cell: Cell, name: str, metric: str, benchmark: bool) -> list[Node]:
        """A model's metrics, computed again from its verdicts on the pairs."""
        for path in self.inputs(cell.path, "metrics"):
            result = read_result(Path(path), "metrics")
            if result["name"] == name and bool(result["sections"]) == benchmark:
                break
        else:
            return []
        settings = parse_settings(evaluate_rewards.EvaluationSettings, self.record(path)["identity"]["settings"])
        (pair_file,) = self.inputs(path, "pair")
        pairs = {row["pair_id"]: (line, row) for line, row in self.rows(pair_file)}
        ranker = result["kind"] == "ranker"
        (verdict_file,) = self.inputs(path, "ranking_answer" if ranker else "prediction")
        rows = self.rows(verdict_file)
        by_id = {pair_id: row for pair_id, (_, row) in pairs.items()}
        grouped = evaluate_rewards.by_pair((row for _, row in rows), by_id, verdict_file, per_pair=1 + ranker)
        if ranker:
            verdicts, _ = evaluate_rewards.both_orders(grouped)
            again = evaluate_rewards.ranker_metrics(list(verdicts.values()), settings)
            right = {pair_id: all(row["right"]) for pair_id, row in verdicts.items()}
        else:
            verdicts = {pair_id: row for pair_id, (row,) in grouped.items()}
            again = evaluate_rewards.reward_model_metrics(list(verdicts.values()), settings)
            right = {pair_id: row["reward_chosen"] > row["reward_rejected"] for pair_id, row in verdicts.items()}
        again |= {
            "n": len(verdicts),
            "sections": evaluate_rewards.benchmark(right, by_id, settings.sections) if settings.sections else None,
        }
        agrees, label = again[metric] == result[metric], "mean of the sections" if metric == "sections" else metric
        node = Node(f"{label} of {name}: {value_of(result[metric])}; again from {len(rows)} verdicts: {value_of(again[metric])}", path)
        node.agrees = agrees
        for pair_id in self.few(list(verdicts)):
            line, pair = pairs[pair_id]
            verdict = Node(f"pair {pair_id}: {'right' if right[pair_id] else 'not right'}{' in both orders' * (ranker and right[pair_id])}")
            for file, number, row in self.find([verdict_file], "pair_id", pair_id):
                verdict.under.append(self.ranking(file, number, row) if ranker else prediction(file, number, row))
            verdict.under.append(self.pair(pair_file, line, pair))
            node.under.append(verdict)
        node.more = len(verdicts) - len(node.under)
        return [node]

    def ranking(self, file: str, line: int, row: dict) -> Node:
        """A ranker's raw answer on a pair in one order."""
        order = "first" if row["chosen_first"] else "second"
        node = Node(f"answer of {row['ranker']}, the chosen answer shown {order}", file, line, row["request_key"], row["raw"])
        node.under = self.journal(row["request_key"], row["raw"])
        return node

    # Win rates

    def win_rate(self, cell: Cell, protocol: str, topic: str | None) -> list[Node]:
        """A policy's win rate, computed again from the judgements."""
        policy = self.named(cell.name, self.settings.policies)
        setting = next(name for name, (heading, _) in make_tables.SETTINGS.items() if heading == cell.group)
        for path in self.inputs(cell.path, "win_rates"):
            result = read_result(Path(path), "win_rates")
            if (result["policy"], result["setting"]) == (policy, setting):
                break
        else:
            return []
        settings = self.record(path)["identity"]["settings"]
        (judgement_file,), (speech_file,) = self.inputs(path, "judgement"), self.inputs(path, "speech")
        topic_of = {row["speech_id"]: row["coarse_topic"] for _, row in self.rows(speech_file)}
        verdicts = winrates.verdicts_by_speech(row for _, row in self.rows(judgement_file))
        judged = {speech: orders for speech, orders in sorted(verdicts.items()) if len(orders) == 2}
        scores = winrates.paper_scores(judged, settings["seed"]) if protocol == "paper" else winrates.robust_scores(judged)
        again = winrates.win_rates(scores, topic_of, settings["bootstrap"], settings["seed"])
        counting = [speech for speech in judged if topic in (None, topic_of[speech])]

        def rate(rates: dict) -> dict | None:
            return rates["topics"].get(topic) if topic else rates["overall"]

        stored, new = rate(result["protocols"][protocol]), rate(again)
        if stored is None:
            return [Node("no test speech on this topic was judged", path)]
        what = f"win rate of {policy}: {stored['win_rate']:.5f}; again from {2 * len(counting)} judgements of {len(counting)} speeches"
        node = Node(f"{what}: {new['win_rate']:.5f}" if new else what, path, agrees=stored == new)
        for speech in self.few(counting):
            taken = winrates.coin(settings["seed"], speech) if protocol == "paper" else None
            node.under.append(self.comparison(path, judgement_file, speech_file, speech, scores[speech], taken))
        node.more = len(counting) - len(node.under)
        return [node]

    def comparison(self, path: str, judgement_file: str, speech_file: str, speech: str, score: float, taken: bool | None) -> Node:
        """One speech: the judgements in both orders with the judge's answers, both answers, the speech."""
        node = Node(f"speech {speech} scores {score:g}")
        raw_files = self.inputs(judgement_file, "judgement_answer")
        raw = {row["policy_first"]: (file, line, row) for file, line, row in self.find(raw_files, "speech_id", speech)}
        for file, line, row in self.find([judgement_file], "speech_id", speech):
            first = row["policy_first"]
            unused = "" if taken in (None, first) else " (not the coin's order)"
            judgement = Node(
                f"{row['verdict']}, the policy shown {'first' if first else 'second'}{unused}", file, line, text=row["rationale"]
            )
            if first in raw:
                raw_file, raw_line, answer = raw[first]
                judged = Node(f"raw answer of {answer['judge']}", raw_file, raw_line, answer["request_key"], answer["raw"])
                judged.under = self.journal(answer["request_key"], answer["raw"])
                judgement.agrees = (parsed(parse_judgements.judgement, answer) or {}).get("verdict") == row["verdict"]
                judgement.under.append(judged)
            node.under.append(judgement)
        for file, line, row in self.find(self.inputs(path, "response"), "speech_id", speech):
            node.under.append(self.response(file, line, row))
        node.under.append(self.speech(speech_file, speech))
        return node

    # Records that all tables stand on

    def pair(self, file: str, line: int, row: dict) -> Node:
        """A pair, with its two responses' scores."""
        models = f"{row['chosen_model'] or 'chosen'} over {row['rejected_model'] or 'rejected'}"
        gap = "" if row["gap"] is None else f", gap {row['gap']:.2f}"
        node = Node(f"pair {row['pair_id']}: {models}{gap}", file, line)
        score_files = self.inputs(file, "score")
        for side in ("chosen", "rejected"):
            for place in self.find(score_files, "response_id", row[f"{side}_id"]):
                score = self.score(*place)
                score.what = f"{side}: {score.what}"
                node.under.append(score)
        node.under += [self.speech(speech_file, row["speech_id"]) for speech_file in self.inputs(file, "speech")]
        if not node.under:  # a published pair: its file is the source
            node.under = [Node("raw file of published pairs", raw) for raw in self.inputs(file, "raw")]
        return node

    def score(self, file: str, line: int, row: dict) -> Node:
        """A response's score with the ratings that it is the mean of, the response and the speech."""
        rating_files = self.inputs(file, "rating")
        if not rating_files:  # published with the pairs at which the run starts
            mean = sum(row["scores"].values()) / len(row["scores"])
            of = f"{len(row['scores'])} published ratings"
            what = f"response {row['response_id']} of {row['model']}, mean score {row['overall']:.2f} of {of}"
            raws = [Node("raw file of published pairs", raw) for raw in self.inputs(file, "raw")]
            return Node(what, file, line, agrees=mean == row["overall"], under=raws)
        ratings = self.find(rating_files, "response_id", row["response_id"])
        mean = sum(rating["score"] for *_, rating in ratings) / len(ratings) if ratings else None
        what = f"response {row['response_id']} of {row['model']}, mean score {row['overall']:.2f} of {len(ratings)} ratings"
        node = Node(what, file, line, agrees=mean == row["overall"])
        answer_files = self.inputs(file, "rating_answer")
        node.under += [self.rating(*place, answer_files) for place in ratings]
        for place in self.find(self.inputs(file, "response"), "response_id", row["response_id"]):
            node.under.append(self.response(*place))
        return node

    def rating(self, file: str, line: int, row: dict, answer_files: list[str]) -> Node:
        """A response's score on one principle, with the judge's raw answer."""
        node = Node(f"{row['principle']}: {row['score']}", file, line, text=row["rationale"])
        principles = [principle["id"] for principle in self.flow.study.principles]
        for raw_file, raw_line, raw in self.find(answer_files, "speech_id", row["speech_id"]):
            if raw["principle"] in (None, row["principle"]):
                judge = Node(f"raw answer of {raw['judge']}", raw_file, raw_line, raw["request_key"], raw["raw"])
                judge.under = self.journal(raw["request_key"], raw["raw"])
                node.agrees = row in (parsed(parse_ratings.rating_rows, raw, principles) or [])
                node.under.append(judge)
        return node

    def response(self, file: str, line: int, row: dict) -> Node:
        """A model's answer."""
        came = self.journal(row["request_key"], row["text"])
        return Node(f"answer of {row['model']}", file, line, row["request_key"], row["text"], under=came)

    def journal(self, key: str, text: str) -> list[Node]:
        """Where an answer stands as it came; nothing for a judge that is computed here, or where the journal is gone.

        Two jobs may have asked the same, e.g. a pool's model and the opponent: then the journal that has this text counts.
        """
        nodes = []
        for path, line, start in self.journals.get(key, []):
            with open(path, "rb") as file:
                file.seek(start)
                came = orjson.loads(file.readline())["answer"]["text"]
            nodes.append(Node("as it came, in the journal", path, line, agrees=came == text))
        return [node for node in nodes if node.agrees][:1] or nodes[:1]

    def speech(self, file: str, speech_id: str) -> Node:
        """A client's speech, the source's row that it is, and the row of the raw file."""
        places = self.find([file], "speech_id", speech_id)
        if not places:
            raise UserError(f"{file}: no speech {speech_id}; `audit.py verify` tells what is wrong")
        _, line, row = places[0]
        node = Node(f"client speech {speech_id}", file, line, text=row["text"])
        if not self.inputs(file, "source_row"):
            node.under = [
                self.published_row(raw, path, row) for path in self.inputs(file, "unique_speech") for raw in self.raw_of(path, row)
            ]
            return node
        sources = [path for path in self.inputs(file, "source_row") if Path(path).stem == row["source"]]
        cells = self.find(sources, "source_row", row["source_row"])  # several where a row of the source has several texts
        clean = [normalise(cell[2]["text"]) for cell in cells]
        same = [cell for cell, text in zip(cells, clean, strict=True) if row["text"] in (text, mask(text)[0])]
        node.agrees = bool(same)
        for path, number, found in same or cells:
            raws = [self.raw_row(raw, path, found) for raw in self.inputs(path, "raw")]
            node.under.append(Node(f"as {row['source']} has it", path, number, text=found["text"], under=raws))
        return node

    def raw_of(self, path: str, speech: dict) -> list[str]:
        """The raw file of the speech's source: it lies in the folder that bears the source's name."""
        return [raw for raw in self.inputs(path, "raw") if Path(raw).parent.name == speech["source"]]

    def published_row(self, raw: str, path: str, speech: dict) -> Node:
        """The row of a raw file of pairs in which a speech stands first."""
        if raw not in self.raws:
            settings = self.record(path)["identity"]["settings"]
            source = next(source for source in settings["sources"] if source["source"] == speech["source"])
            rows = preferences.renamed_rows(Path(raw), source["adapter"], source["columns"])
            speeches = enumerate((self.published_text(row, source["adapter"]) for row in rows), start=1)
            keep = settings["personal_data"] == "keep"
            texts = {(row, text if keep else mask(text)[0]) for row, text in speeches if text}
            self.raws[raw] = dict(enumerate(raw_lines(Path(raw)), start=1)), texts
        lines, texts = self.raws[raw]
        row = speech["source_row"]
        return Node(f"row {row} of the raw file", raw, lines.get(row), agrees=(row, speech["text"]) in texts)

    @staticmethod
    def published_text(row: dict, adapter: str) -> str | None:
        """The client speech of a row of published pairs, or None where it makes no pair."""
        try:
            return preferences.ADAPTERS[adapter].read(row).client_speech()
        except preferences.NoPair:
            return None

    def raw_row(self, raw: str, path: str, found: dict) -> Node:
        """The row of a raw file that a source's record was read from."""
        if raw not in self.raws:
            settings = self.record(path)["identity"]["settings"]
            columns = adapters.Columns.model_validate(settings["columns"]) if settings["columns"] else None
            texts = {
                (speech.row, speech.text)
                for speech in adapters.read_speeches(Path(raw), settings["adapter"], columns)
                if isinstance(speech.text, str)
            }
            self.raws[raw] = dict(enumerate(raw_lines(Path(raw)), start=1)), texts
        lines, texts = self.raws[raw]
        row = found["source_row"]
        return Node(f"row {row} of the raw file", raw, lines.get(row), agrees=(row, found["text"]) in texts)


def lines(path: str) -> Iterator[tuple[int, dict]]:
    """Yield (line, record) of a file of records."""
    try:
        yield from iter_json_lines(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though a record names it; `audit.py verify` tells what else is wrong") from None


def line_starts(path: str) -> list[int]:
    """Return the byte at which each line of a file begins, and its size; nothing of a file that is not there."""
    if not Path(path).is_file():
        return []
    with open(path, "rb") as file:
        return list(accumulate(map(len, file), initial=0))


def parsed(parse: Callable, answer: dict, *more: object) -> object:
    """Return what a program reads out of a raw answer, or None where it reads nothing."""
    try:
        return parse(answer, *more)
    except ValueError:
        return None


def side_formula(column: str, side: str) -> str:
    """Return how a column of chosen or rejected responses comes about."""
    if "(%)" in column:
        return f"100 x pairs in which these models' response is the {side} one / places of their responses in candidate pairs"
    return f"number of pairs in which these models' response is the {side} one"


def prediction(file: str, line: int, row: dict) -> Node:
    """A reward model's rewards of a pair."""
    return Node(f"rewards: chosen {row['reward_chosen']:.4f}, rejected {row['reward_rejected']:.4f}", file, line)


def value_of(metric: object) -> str:
    """Return a metric as text."""
    value = metric.get("value", metric.get("overall")) if isinstance(metric, dict) else metric
    return "n/a" if value is None else f"{value:.5f}" if isinstance(value, float) else str(value)


def raw_lines(path: Path) -> Iterator[int]:
    """Yield the line on which each data row of a raw CSV or JSON Lines file begins; nothing for other formats."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    if raw.startswith(b"PAR1"):
        return
    text = adapters.decode(path, raw)
    if text.lstrip().startswith("{"):
        yield from (number for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    elif not text.lstrip().startswith("["):
        reader, start = csv.reader(io.StringIO(text, newline=""), strict=True), 1
        header = True
        for row in reader:
            if row and not header:
                yield start
            header = header and not row
            start = reader.line_num + 1


# For people


def told(explanation: Explanation, show_text: bool) -> str:
    """Return an explanation as a tree of text."""
    lines = [
        f"{explanation.table}:{explanation.line}  {explanation.row}",
        f"{explanation.column} = {explanation.value}",
        f"  formula: {explanation.formula}",
        f"  made again from the table's inputs: {explanation.recomputed}: {'agrees' if explanation.agrees else 'DOES NOT AGREE'}",
        "  ✓ marks what follows from what stands under it",
        "",
    ]
    for node in explanation.under:
        lines += branch(node, "", show_text)
    if explanation.value == MISSING and not explanation.under:
        lines.append("no value, so nothing is under it; the table's last column says why")
    if not explanation.sound:
        lines += [
            "",
            "Something does not agree: `audit.py verify` tells which file was altered; a journal has no record and is not verified.",
        ]
    return "\n".join(lines).rstrip()


def branch(node: Node, indent: str, show_text: bool, folded: bool = False) -> Iterator[str]:
    """Yield the lines of a node and of what is under it; of records cut off after a few, all but the first are folded."""
    place = f"  {node.file}{f':{node.line}' if node.line else ''}" if node.file else ""
    verdict = {None: "", True: " ✓", False: " ✗ DOES NOT AGREE"}[node.agrees]
    key = f"  request {node.request_key[:12]}" if node.request_key else ""
    yield f"{indent}{node.what}{verdict}{place}{key}{' …' if folded and node.under else ''}"
    if show_text and node.text:
        yield from (f"{indent}    | {printable(line)}" for line in node.text.split("\n"))
    for number, under in enumerate(() if folded else node.under):
        yield from branch(under, indent + "  ", show_text, folded=bool(number and node.more))
    if node.more and not folded:
        yield f"{indent}  … and {node.more} more; --all shows all in full"


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal: what a model writes may hold control characters."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
