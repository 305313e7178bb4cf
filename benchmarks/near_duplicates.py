"""How near duplicates are found among many texts: time, memory and recall by their number, beside datasketch in the same run.

Texts are made by a seeded generator: 100 to 1,000 characters of words drawn by Zipf's law; one in five is an earlier text with a
share of its words replaced, so that it is known what is to be found. Each row of the table is a process of its own. Memory is the peak of
the process and its workers together, the texts among it. datasketch does the same job with the same bands and the same exact check. It is
left out where it would take too long. Run it from the project's root:

    python benchmarks/near_duplicates.py                                # 10,000 to 1,000,000 texts, datasketch up to 30,000
    python benchmarks/near_duplicates.py --sizes 1000 3000 --rival-up-to 1000
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

sys.path.insert(0, "scripts")

from psychocounsel.near_duplicates import NearDuplicates, bands, find_near_duplicates, jaccard, keep_first, shingles

SETTINGS = {"drop_above": 0.85, "cluster_above": 0.6, "shingle_chars": 8, "permutations": 128}  # those of config/config.yaml
SEED, VOCABULARY, EDITED = 20250227, 30_000, 0.2
HEAD = f"{'texts':>9} {'by':<11} {'seconds':>8} {'texts/s':>8} {'peak MB':>8} {'found':>8}  of planted pairs: "


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000], help="numbers of texts")
    parser.add_argument(
        "--rival-up-to", type=int, default=30_000, help="greatest number of texts that datasketch is given (default 30,000)"
    )
    parser.add_argument("--one", nargs=2, metavar=("BY", "SIZE"), help=argparse.SUPPRESS)  # a row, in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one[0], int(args.one[1]))))
        return
    print(f"{HEAD}dropped above {SETTINGS['drop_above']}, joined above {SETTINGS['cluster_above']}", flush=True)
    for size in args.sizes:
        rows = {by: row(by, size) for by in ["ours"] + ["datasketch"] * (size <= args.rival_up_to)}
        for by, r in rows.items():
            ratio = f"  {r['seconds'] / rows['ours']['seconds']:.1f} x the time of ours" if by != "ours" else ""
            print(f"{size:>9,} {by:<11} {r['seconds']:>8.1f} {size / r['seconds']:>8,.0f} {r['megabytes']:>8,.0f} {r['found']:>8,}"
                  f"  {share(r['dropped'])}, {share(r['joined'])}{ratio}", flush=True)  # fmt: skip


def row(by: str, size: int) -> dict:
    """Measure one row in a process of its own."""
    command = [sys.executable, __file__, "--one", by, str(size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measured(by: str, size: int) -> dict:
    """Return the seconds and megabytes that a search takes, and how many of the planted pairs it finds."""
    texts, planted = make_texts(size)
    clock = time.perf_counter()
    found = {"ours": find_near_duplicates, "datasketch": find_with_datasketch}[by](texts, **SETTINGS, seed=SEED)
    seconds = time.perf_counter() - clock
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilobytes += 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # two workers; the greatest is told
    return {"seconds": seconds, "megabytes": kilobytes / 1000, "found": len(found.twin)} | recall(texts, planted, found)


def make_texts(size: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Return texts, and the pairs (edited text, the one that it was made from)."""
    rng = np.random.default_rng(SEED)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, length)) for length in rng.integers(2, 10, VOCABULARY)])
    rank = 1 / np.arange(1, VOCABULARY + 1)
    cumulative = np.cumsum(rank / rank.sum())

    def draw(count: int) -> np.ndarray:
        return words[np.searchsorted(cumulative, rng.random(count))]

    texts: list[str] = []
    planted = []
    for number in range(size):
        if number and rng.random() < EDITED:
            source = int(rng.integers(number))
            chosen = np.array(texts[source].split(" "))
            edits = max(1, int(len(chosen) * rng.uniform(0, 0.2)))
            chosen = chosen.astype(object)
            chosen[rng.choice(len(chosen), edits, replace=False)] = draw(edits)
            texts.append(" ".join(chosen))
            planted.append((number, source))
        else:
            wanted = int(rng.integers(100, 1001))
            texts.append(" ".join(draw(wanted // 4))[:wanted].strip())
    return texts, planted


def recall(texts: list[str], planted: list[tuple[int, int]], found: NearDuplicates) -> dict[str, tuple[int, int]]:
    """Return how many of the planted pairs of either kind were found: dropped, or kept in one cluster. Others have no known answer."""
    counts = {"dropped": [0, 0], "joined": [0, 0]}
    for edited, source in planted[:20_000]:
        if source in found.twin:
            continue  # the edited text was compared with what the source repeats
        similarity = jaccard(shingles(texts[edited], SETTINGS["shingle_chars"]), shingles(texts[source], SETTINGS["shingle_chars"]))
        if similarity > SETTINGS["drop_above"]:
            counts["dropped"][0] += edited in found.twin
            counts["dropped"][1] += 1
        elif similarity > SETTINGS["cluster_above"]:
            counts["joined"][0] += edited in found.twin or found.cluster[edited] == found.cluster[source]
            counts["joined"][1] += 1
    return {name: tuple(pair) for name, pair in counts.items()}


def share(pair: list[int]) -> str:
    """Return a count of a total, and the share."""
    return f"{pair[0]:,} of {pair[1]:,} ({pair[0] / max(1, pair[1]):.2%})"


def find_with_datasketch(
    texts: list[str], *, drop_above: float, cluster_above: float, shingle_chars: int, permutations: int, seed: int
) -> NearDuplicates:
    """Do what find_near_duplicates does, with datasketch's sketches and index."""
    index = DatasketchIndex(texts, cluster_above, shingle_chars, permutations, seed)
    return keep_first(texts, index, drop_above, cluster_above, shingle_chars)


class DatasketchIndex:
    """An LSH index as keep_first wants it."""

    def __init__(self, texts: list[str], threshold: float, shingle_chars: int, permutations: int, seed: int) -> None:
        from datasketch import MinHash, MinHashLSH

        tokens = ([shingle.encode() for shingle in shingles(text, shingle_chars)] for text in texts)
        self.sketches = MinHash.bulk(tokens, num_perm=permutations, seed=seed)
        count = bands(threshold, permutations)
        self.lsh = MinHashLSH(num_perm=permutations, params=(count, permutations // count))

    def add(self, i: int) -> None:
        """Let text i be proposed from now on."""
        self.lsh.insert(i, self.sketches[i])

    def proposed(self, i: int) -> list[int]:
        """Return the texts that share a band with text i."""
        return sorted(self.lsh.query(self.sketches[i]))


if __name__ == "__main__":
    main()
