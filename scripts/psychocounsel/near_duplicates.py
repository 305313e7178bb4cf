"""Near duplicates among short texts: MinHash proposes pairs, the exact Jaccard similarity of their shingles decides.

Made for a million texts: shingles are hashed with numpy, a chunk of texts at a time and one process a core; rensa makes the
sketches; a sort of each band finds the texts that share it, and Python touches these alone.
"""

import multiprocessing
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import Field, model_validator
from rensa import RMinHash

from psychocounsel.stage import Settings

RECALL = 0.98  # least chance that a pair at the lower threshold is proposed; it rises steeply above the threshold
DEVIATIONS = 4  # a proposed pair whose sketches agree in less than the threshold by so many standard deviations is not compared
CHUNK = 4096  # texts that are sketched at a time: some 20 MB of hashes
PARALLEL = 8 * CHUNK  # so many texts are worth a process a core
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio, as in Fibonacci hashing: odd, so nothing is lost
SHIFT = np.uint64(29)
PLAIN = str.maketrans(
    "\u2018\u2019\u201b\u00b4\u201c\u201d\u201e\u00ab\u00bb\u2010\u2011\u2012\u2013\u2014\u2212", "''''" + 5 * '"' + 6 * "-"
)


class NearDuplicateSettings(Settings):
    """When two speeches are too similar (Jaccard similarity of their character shingles)."""

    drop_above: float = Field(description="Jaccard similarity above which a speech is dropped", gt=0, le=1)
    cluster_above: float = Field(description="similarity above which speeches are kept in one cluster", gt=0, le=1)
    shingle_chars: int = Field(description="characters of a shingle", ge=1)
    permutations: int = Field(description="length of a MinHash sketch", ge=16)

    @model_validator(mode="after")
    def in_order(self) -> "NearDuplicateSettings":
        """Refuse thresholds in the wrong order."""
        if self.cluster_above > self.drop_above:
            raise ValueError("cluster_above is greater than drop_above")
        return self


@dataclass(frozen=True)
class NearDuplicates:
    """What was found among texts, by their index."""

    twin: dict[int, tuple[int, float]]  # dropped text -> the kept text that it repeats, and their similarity
    cluster: dict[int, int]  # kept text -> the first text of its cluster


def find_near_duplicates(
    texts: list[str], *, drop_above: float, cluster_above: float, shingle_chars: int, permutations: int, seed: int
) -> NearDuplicates:
    """Go through texts in order; drop one that is too similar to a kept one, else join it to the clusters of those that it resembles.

    Similarity above `drop_above`: dropped. Above `cluster_above`: kept, in one cluster (connected components). A dropped text
    is compared with kept texts alone, so whatever is dropped has its twin among the kept. The work grows with the number of
    pairs that are proposed, not with the number of all pairs.
    """
    index = Index(sketch(texts, shingle_chars, permutations, seed), cluster_above)
    return keep_first(texts, index, drop_above, cluster_above, shingle_chars)


def keep_first(texts: list[str], index: "Index", drop_above: float, cluster_above: float, shingle_chars: int) -> NearDuplicates:
    """Do as find_near_duplicates says, with what an empty index of the texts proposes."""
    twin: dict[int, tuple[int, float]] = {}
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, text in enumerate(texts):
        similar = similarities(text, {j: texts[j] for j in index.proposed(i)}, shingle_chars)
        closest = max(similar, key=similar.__getitem__, default=None)  # the earliest of equally close ones
        if closest is not None and similar[closest] > drop_above:
            twin[i] = closest, similar[closest]
            continue
        parent[i] = i
        for j, similarity in similar.items():
            if similarity > cluster_above:
                first, second = sorted((root(i), root(j)))
                parent[second] = first
        index.add(i)
    return NearDuplicates(twin, {i: root(i) for i in parent})


def matches_between(
    texts: list[str], others: list[str], *, above: float, shingle_chars: int, permutations: int, seed: int
) -> list[tuple[int, int, float]]:
    """Return (index in `texts`, index in `others`, similarity) of every two whose similarity is above `above`, as far as proposed."""
    index = Index(sketch([*texts, *others], shingle_chars, permutations, seed), above)
    for i in range(len(texts)):
        index.add(i)
    found = []
    for j, other in enumerate(others):
        similar = similarities(other, {i: texts[i] for i in index.proposed(len(texts) + j)}, shingle_chars)
        found += [(i, j, similarity) for i, similarity in similar.items() if similarity > above]
    return found


class Index:
    """Which of the texts added so far may resemble another: an LSH index over sketches that are all known beforehand."""

    def __init__(self, sketches: np.ndarray, threshold: float) -> None:
        permutations = sketches.shape[1]
        self.sketches = sketches
        self.first, self.buckets = shared_buckets(sketches, bands(threshold, permutations))
        self.members: dict[int, list[int]] = defaultdict(list)  # bucket -> texts added
        self.least = permutations * threshold - DEVIATIONS * (permutations * threshold * (1 - threshold)) ** 0.5

    def add(self, i: int) -> None:
        """Let text i be proposed from now on."""
        for bucket in self._buckets(i):
            self.members[bucket].append(i)

    def proposed(self, i: int) -> list[int]:
        """Return the texts, in order, that share a bucket with text i and may be as similar as the threshold by their sketches."""
        found = sorted({j for bucket in self._buckets(i) for j in self.members.get(bucket, ())})
        if not found:
            return []
        agreeing = (self.sketches[found] == self.sketches[i]).sum(axis=1)
        return [j for j, count in zip(found, agreeing.tolist(), strict=True) if count >= self.least]

    def _buckets(self, i: int) -> list[int]:
        return self.buckets[self.first[i] : self.first[i + 1]].tolist()


def shared_buckets(sketches: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut sketches [texts, permutations] into `count` bands; return the buckets of two texts or more, text by text.

    Text i is in buckets[first[i]:first[i + 1]]; two texts are in one bucket if they agree in a whole band.
    """
    texts, buckets, known = [], [], 0
    for band in np.split(sketches, count, axis=1):
        keys = combined(band.T)
        order = np.argsort(keys)
        bucket = np.zeros(len(order), np.int64)
        np.cumsum(np.diff(keys[order]) != 0, out=bucket[1:])
        shared = np.bincount(bucket)[bucket] > 1 if len(bucket) else bucket.astype(bool)
        texts.append(order[shared].astype(np.uint32))
        buckets.append(known + bucket[shared])
        known += len(order)
    text, every = np.concatenate(texts), np.concatenate(buckets)
    order = np.argsort(text, kind="stable")
    return np.searchsorted(text[order], np.arange(len(sketches) + 1)), every[order]


def sketch(texts: list[str], shingle_chars: int, permutations: int, seed: int) -> np.ndarray:
    """Return the MinHash sketches of texts, uint32 [texts, permutations]."""
    chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    make = partial(sketch_chunk, shingle_chars=shingle_chars, permutations=permutations, seed=seed)
    sketches = np.empty((len(texts), permutations), np.uint32)
    for number, rows in enumerate(over_cores(make, chunks) if len(texts) >= PARALLEL else map(make, chunks)):
        sketches[number * CHUNK : number * CHUNK + len(rows)] = rows
    return sketches


def over_cores(function: partial, chunks: list[list[str]]) -> Iterator[np.ndarray]:
    """Yield function(chunk) for each chunk in order, computed by a process a core; none inherits this one's texts and threads."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, chunks)


def sketch_chunk(texts: list[str], shingle_chars: int, permutations: int, seed: int) -> np.ndarray:
    """Return the sketches of some texts. A shingle that stands twice in a text counts once in its minimum by itself."""
    hashes, ends = shingle_hashes(texts, shingle_chars)
    offsets = np.concatenate([np.zeros(1, np.uint64), ends.astype(np.uint64)])
    return np.array(RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, permutations, seed).to_rows(), np.uint32)


def shingle_hashes(texts: list[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the 64-bit hashes of all shingles of texts, one text after another, and where each text's end."""
    padded = [folded(text).ljust(size, "\0") for text in texts]  # so that a text that is too short has one shingle: itself
    chars = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.array([len(text) for text in padded])
    windows = len(chars) - size + 1
    hashes = combined(chars[i : i + windows] for i in range(size))
    inside = np.ones(windows, bool)
    for end in range(1, size):  # windows that reach into the next text
        inside[np.cumsum(lengths)[:-1] - end] = False
    return hashes[inside], np.cumsum(lengths - size + 1)


def combined(columns) -> np.ndarray:
    """Return a 64-bit hash of each row, given its columns: each step is one to one, so that rows meet by chance alone."""
    hashes = None
    for column in columns:
        hashes = column.astype(np.uint64) if hashes is None else hashes ^ column
        hashes *= FACTOR
        hashes ^= hashes >> SHIFT
    return hashes


def similarities(text: str, others: dict[int, str], shingle_chars: int) -> dict[int, float]:
    """Return the exact similarity of a text with each of the others."""
    mine = shingles(text, shingle_chars) if others else set()
    return {j: jaccard(mine, shingles(other, shingle_chars)) for j, other in others.items()}


def shingles(text: str, size: int) -> set[str]:
    """Return all runs of `size` characters of a folded text; a shorter text is its own shingle."""
    text = folded(text)
    return {text[i : i + size] for i in range(max(1, len(text) - size + 1))}


def folded(text: str) -> str:
    """Return a text as it is compared: upper and lower case are one, and so are plain and typographic quotes, dashes, ellipses, widths."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text.translate(PLAIN)).casefold()


def jaccard(a: set[str], b: set[str]) -> float:
    """Return |a ∩ b| / |a ∪ b|."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def bands(threshold: float, permutations: int) -> int:
    """Return the number of LSH bands: as few as propose a pair at the threshold with at least the chance RECALL.

    With b bands of r rows, a pair of similarity s is proposed with the chance 1 - (1 - s^r)^b.
    """
    for count in range(1, permutations + 1):
        if permutations % count == 0 and 1 - (1 - threshold ** (permutations // count)) ** count >= RECALL:
            return count
    return permutations
