"""What a single record of a run was computed from: pairs, scores, ratings, answers, speeches, down to raw answers and raw rows."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import orjson

import parse_ratings
from psychocounsel import adapters, preferences
from psychocounsel.errors import UserError
from psychocounsel.explanation import Node
from psychocounsel.personal_data import mask
from psychocounsel.run_files import RunFiles, raw_lines
from psychocounsel.texts import normalise
from psychocounsel.workflow import Workflow

FEW = 3  # records shown of many


class RecordLineage(RunFiles):
    """The records of a run as nodes, each with what it came from under it."""

    def __init__(self, flow: Workflow, everything: bool) -> None:
        super().__init__(flow)
        self.most = None if everything else FEW
        self.raws: dict[str, tuple[dict[int, int], set[tuple[int, str]]]] = {}  # raw file -> line of each row; (row, text) of its texts

    def few(self, things: list) -> list:
        """Return as many of them as are shown."""
        return things[: self.most]

    def counted(self, table: str, kind: str, keep: Callable[[dict], bool]) -> list[Node]:
        """The records of one kind that count for a figure of a table, by file."""
        nodes = []
        for path in self.inputs(table, kind):
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
            for path in self.inputs(file, "unique_speech"):
                for raw in self.raw_of(path, row):
                    node.under.append(self.raw_row(raw, row, partial(self.published_texts, raw, path, row["source"])))
            return node
        sources = [path for path in self.inputs(file, "source_row") if Path(path).stem == row["source"]]
        cells = self.find(sources, "source_row", row["source_row"])  # several where a row of the source has several texts
        clean = [normalise(cell[2]["text"]) for cell in cells]
        same = [cell for cell, text in zip(cells, clean, strict=True) if row["text"] in (text, mask(text)[0])]
        node.agrees = bool(same)
        for path, number, found in same or cells:
            raws = [self.raw_row(raw, found, partial(self.source_texts, raw, path)) for raw in self.inputs(path, "raw")]
            node.under.append(Node(f"as {row['source']} has it", path, number, text=found["text"], under=raws))
        return node

    def raw_of(self, path: str, speech: dict) -> list[str]:
        """The raw file of the speech's source: it lies in the folder that bears the source's name."""
        return [raw for raw in self.inputs(path, "raw") if Path(raw).parent.name == speech["source"]]

    def raw_row(self, raw: str, record: dict, texts: Callable[[], set[tuple[int, str]]]) -> Node:
        """The row of a raw file that a record was read from; the file's texts are read at its first row."""
        if raw not in self.raws:
            self.raws[raw] = dict(enumerate(raw_lines(Path(raw)), start=1)), texts()
        line_of, found = self.raws[raw]
        row = record["source_row"]
        return Node(f"row {row} of the raw file", raw, line_of.get(row), agrees=(row, record["text"]) in found)

    def source_texts(self, raw: str, path: str) -> set[tuple[int, str]]:
        """Return (row, text) of the speeches in a raw file, read as the job that made `path` read it."""
        settings = self.record(path)["identity"]["settings"]
        columns = adapters.Columns.model_validate(settings["columns"]) if settings["columns"] else None
        speeches = adapters.read_speeches(Path(raw), settings["adapter"], columns)
        return {(speech.row, speech.text) for speech in speeches if isinstance(speech.text, str)}

    def published_texts(self, raw: str, path: str, name: str) -> set[tuple[int, str]]:
        """Return (row, text) of the speeches in a source's raw file of pairs, read as the job that made `path` read it."""
        settings = self.record(path)["identity"]["settings"]
        source = next(source for source in settings["sources"] if source["source"] == name)
        rows = preferences.renamed_rows(Path(raw), source["adapter"], source["columns"])
        speeches = enumerate((published_text(row, source["adapter"]) for row in rows), start=1)
        keep = settings["personal_data"] == "keep"
        return {(row, text if keep else mask(text)[0]) for row, text in speeches if text}


def published_text(row: dict, adapter: str) -> str | None:
    """Return the client speech of a row of published pairs, or None where it makes no pair."""
    try:
        return preferences.ADAPTERS[adapter].read(row).client_speech()
    except preferences.NoPair:
        return None


def parsed(parse: Callable, answer: dict, *more: object) -> object:
    """Return what a program reads out of a raw answer, or None where it reads nothing."""
    try:
        return parse(answer, *more)
    except ValueError:
        return None
