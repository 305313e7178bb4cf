"""The 42 fine topics (paper, Table 5): which of them a source's label stands for, and the record of a speech's topic."""

from collections import Counter

from psychocounsel.errors import UserError, nearest
from psychocounsel.models import Part
from psychocounsel.stage import log

FALLBACK = "others"
LISTED, LISTED_CHARS = 20, 30  # of unknown labels in a log


class FineTopic(Part):
    """A fine topic."""

    keywords: list[str] = []  # what the rubric looks for


class CoarseTopic(Part):
    """A coarse topic with its fine topics."""

    title: str
    fine: dict[str, FineTopic]


def coarse_topics(taxonomy: dict[str, CoarseTopic]) -> dict[str, str]:
    """Return fine topic -> coarse topic."""
    return {fine: coarse for coarse, entry in taxonomy.items() for fine in entry.fine}


def labelled_topics(speeches: list[dict], topics: list[str], aliases: dict[str, str]) -> dict[str, str]:
    """Return speech id -> topic of the speeches whose source's label is a topic's own name or an alias, whatever its case."""
    topic_of = topics_by_label(topics, aliases)
    return {s["speech_id"]: topic_of[folded(s["topic_label"])] for s in speeches if folded(s["topic_label"]) in topic_of}


def unknown_labels(unlabelled: list[dict]) -> dict[str, int]:
    """Return how many speeches have each label that is no topic and has no alias, with a warning that names the most frequent."""
    unknown = Counter(speech["topic_label"] for speech in unlabelled if speech["topic_label"])
    if unknown:
        # Cut: where `columns` names the wrong one, these are no labels but a client's words.
        listed = ", ".join(f"{label[:LISTED_CHARS]!r} of {count}" for label, count in unknown.most_common(LISTED))
        more = f" and {len(unknown) - LISTED} labels more" if len(unknown) > LISTED else ""
        log.warning(
            "speeches with a label that is no topic and has no alias, which get another topic: %d (%s%s); see `aliases` in taxonomy.yaml",
            unknown.total(), listed, more,
        )  # fmt: skip
    return dict(unknown)


def topics_by_label(topics: list[str], aliases: dict[str, str]) -> dict[str, str]:
    """Return folded label -> fine topic; raise UserError for an alias of no topic, and where the fallback is no topic."""
    for label, topic in [*aliases.items(), ("a failed judge", FALLBACK)]:
        if topic not in topics:
            raise UserError(f"taxonomy: {label!r} stands for {topic!r}, which is no fine topic.{nearest(topic, topics)}")
    return {folded(label): topic for label, topic in [*aliases.items(), *zip(topics, topics, strict=True)]}


def folded(label: str | None) -> str | None:
    """Return a label without its case and outer white space."""
    return label.strip().casefold() if label else None


def topic_row(
    speech_id: str, topic: str, coarse_of: dict, topic_from: str, judge: str | None = None, raw: str | None = None, key: str | None = None
) -> dict:
    """Return the topic record of a speech."""
    facts = {"speech_id": speech_id, "topic": topic, "coarse_topic": coarse_of[topic], "topic_from": topic_from}
    return {**facts, "judge": judge, "raw": raw, "request_key": key}
