"""Made-up raw files of the paper's seven sources (section 3.1), for benchmarks: true formats, columns and numbers of rows, nobody's words.

Texts are chains of words, each most often one that follows the last one in the demo's speeches: nonsense that shares as many shingles as
counsel-chat's questions do. Planted among them, as in the real files: exact duplicates, near duplicates, relatives (similar enough to
share a cluster), too short and too long ones. The numbers of rows are the real ones of sources.yaml; how many of each source survive was
chosen so that all together are 26,483.
"""

import csv
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PAPER_SPEECHES = 26_483  # section 3.1
LEAST, MOST, MEAN_LOG, SPREAD_LOG = 110, 960, 5.77, 0.46  # characters: mean about 366, as the paper's speeches
KINDS = ("exact", "near", "short", "long")  # of rows that do not survive
CHAINED = 0.9  # share of words that follow the last one in a real text; two texts then have a similarity of about 0.01, seldom above 0.05


@dataclass(frozen=True)
class Source:
    """A source at the paper's size: its cells that may hold a speech, and how many survive the selection."""

    cells: int
    kept: int
    write: Callable[[Path, list[str], random.Random], None]


class Chain:
    """What follows each word in the demo's speeches."""

    def __init__(self) -> None:
        rows = map(json.loads, Path("resources/demo/speeches.jsonl").read_text(encoding="utf-8").splitlines())
        self.words: list[str] = []
        self.after: dict[str, list[str]] = defaultdict(list)
        for text in (row["text"] for row in rows if row["text"]):
            words = text.split()
            self.words += words
            for word, following in pairwise(words):
                self.after[word].append(following)

    def text(self, rng: random.Random, chars: int) -> str:
        """Return a made-up text that ends with the word in which it reaches a length."""
        word, words, length = "", [], -1
        while length < chars:
            word = rng.choice(self.after.get(word, self.words) if rng.random() < CHAINED else self.words)
            words.append(word)
            length += len(word) + 1
        return " ".join(words)


CHAIN = Chain()


def speech(rng: random.Random) -> str:
    """Return a made-up client speech of a length that the selection keeps."""
    return CHAIN.text(rng, min(MOST, max(LEAST, int(rng.lognormvariate(MEAN_LOG, SPREAD_LOG)))))


def relative(text: str, rng: random.Random) -> str:
    """Return another speech that begins as one does: similarity about 0.75, between the two thresholds of the config."""
    return f"{text[: int(0.85 * len(text))]} {CHAIN.text(rng, int(0.12 * len(text)))}"


def near_duplicate(text: str, rng: random.Random) -> str:
    """Return a speech with its last word exchanged: similarity above 0.9 where it is long enough."""
    return f"{text.rpartition(' ')[0]} {rng.choice(CHAIN.words)}!"


def cells(source: str, count: int, kept: int, earlier: list[str], rng: random.Random) -> list[str]:
    """Return the cells of one source in their order; `earlier` holds kept speeches of the sources before, and takes those of this one."""
    fresh = [speech(rng) for _ in range(kept)]
    for index in range(1, kept):
        if rng.random() < 0.03 and len(fresh[index - 1]) > 300:
            fresh[index] = relative(fresh[index - 1], rng)
    long = [text for text in fresh if len(text) > 350]
    copies = earlier or fresh if source == "amod-counsel" else fresh
    found = list(fresh)
    repeating = source in ("counsel-chat", "amod-counsel")  # several answers a question; the same questions again
    while len(found) < count:
        kind = "exact" if repeating and rng.random() < 0.9 else rng.choice(KINDS)
        if kind == "near" and long:
            found.append(near_duplicate(rng.choice(long), rng))
        elif kind == "short":
            found.append(CHAIN.text(rng, 30))
        elif kind == "long":
            found.append(CHAIN.text(rng, 1200))
        else:
            found.append(rng.choice(copies))
    earlier += fresh
    rest = found[kept:]
    rng.shuffle(rest)
    return fresh + rest  # what is repeated comes first, so that the number of survivors is exact


def counsel_chat(path: Path, texts: list[str], rng: random.Random) -> None:
    """Write counsel-chat's CSV: a row an answer, with the topic of the question."""
    topics, ids = ["depression", "anxiety", "relationships", "family-conflict", "trauma"], {text: k for k, text in enumerate(texts)}
    names = ["questionID", "questionTitle", "questionText", "questionLink", "topic", "therapistInfo", "therapistURL", "answerText"]
    facts = [(ids[text], "title", text, "", topics[ids[text] % 5], "", "") for text in texts]
    rows = ([*row, CHAIN.text(rng, 1100), 1, 100, "train"] for row in facts)
    write_csv(path, [*names, "upvotes", "views", "split"], rows)


def therapistqa(path: Path, texts: list[str], rng: random.Random) -> None:
    """Write TherapistQA's CSV."""
    names = ["Id_Number", "Patient Question", "Distorted part", "Dominant Distortion", "Secondary Distortion (Optional)"]
    write_csv(path, names, ([number, text, "", "No Distortion", ""] for number, text in enumerate(texts)))


def instructions(path: Path, texts: list[str], rng: random.Random) -> None:
    """Write the CSV of MentalChat16K and phi2Mental."""
    write_csv(path, ["instruction", "input", "output"], (["Answer as a counsellor.", text, CHAIN.text(rng, 1100)] for text in texts))


def psych8k(path: Path, texts: list[str], rng: random.Random) -> None:
    """Write Psych8k's JSON list."""
    path.write_text(
        json.dumps([{"instruction": "Answer as a counsellor.", "input": text, "output": CHAIN.text(rng, 1100)} for text in texts])
    )


def amod(path: Path, texts: list[str], rng: random.Random) -> None:
    """Write amod-counsel's JSON Lines."""
    path.write_text("".join(json.dumps({"Context": text, "Response": CHAIN.text(rng, 1100)}) + "\n" for text in texts))


def mentalagora(path: Path, texts: list[str], rng: random.Random) -> None:
    """Write MentalAgora's Parquet: a row a user, three posts each."""
    import pyarrow
    import pyarrow.parquet

    texts = texts + [""] * (-len(texts) % 3)
    pyarrow.parquet.write_table(pyarrow.table({f"post{k + 1}": texts[k::3] for k in range(3)}), path)


def write_csv(path: Path, names: list[str], rows: Iterator[list]) -> None:
    """Write a CSV file with a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)


SOURCES = {  # in the order of the paper's config
    "counsel-chat": Source(2_129, 710, counsel_chat),
    "mentalagora": Source(312, 283, mentalagora),
    "therapistqa": Source(2_530, 2_400, therapistqa),
    "psych8k": Source(8_187, 7_100, psych8k),
    "amod-counsel": Source(3_512, 290, amod),
    "mentalchat16k": Source(9_775, 8_600, instructions),
    "mentalchat16k-interview": Source(6_338, 5_400, instructions),
    "phi2mental": Source(2_000, 1_700, instructions),
}
assert sum(source.kept for source in SOURCES.values()) == PAPER_SPEECHES


def write_sources(folder: Path, files: dict[str, str], speeches: int, seed: int = 1) -> int:
    """Write the raw file of each source below a folder, at its name in `files`, so that `speeches` survive; return the number of cells."""
    earlier: list[str] = []
    total = 0
    for name, source in SOURCES.items():
        rng = random.Random(f"{seed} {name}")
        last = name == list(SOURCES)[-1]
        kept = speeches - len(earlier) if last else min(speeches - len(earlier), source.kept * speeches // PAPER_SPEECHES)
        texts = cells(name, max(kept + 1, source.cells * speeches // PAPER_SPEECHES), kept, earlier, rng)
        path = folder / files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        source.write(path, texts, rng)
        total += len(texts)
    return total
