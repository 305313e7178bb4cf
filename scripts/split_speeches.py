"""Split the speeches into train, dev and test (paper, section 3.3), clusters of near duplicates undivided.

Clusters are taken in a seeded hash order until the test side has exactly test_speeches speeches, then dev its share of the
rest. So near duplicates never stand on two sides, and a speech more or less moves few others. Sides that come with the data (a
run that starts at published pairs) stay as they are; where they know no dev side, it is drawn from train in the same way.
"""

from collections import Counter
from pathlib import Path

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.sampling import take_clusters
from psychocounsel.stage import Settings, command_line, log, stage


class SplitSettings(Settings):
    """Sizes of the sides."""

    test_speeches: int = Field(description="exact number of test speeches", ge=1)
    dev_fraction: float = Field(description="share of the other speeches that is set aside for selection", ge=0, lt=1)
    seed: int = Field(description="seed of the order")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, SplitSettings)
    parser.add_argument("--speeches", required=True, type=Path, help="unique_speech records")
    parser.add_argument("--topics", required=True, type=Path, help="topic records of these speeches")
    parser.add_argument("--out", required=True, type=Path, help="speech records")
    with stage(parser) as run:
        settings: SplitSettings = run.settings
        speeches = run.read(run.args.speeches, "unique_speech")
        topics = {topic["speech_id"]: topic for topic in run.read(run.args.topics, "topic")}
        labelled = [speech for speech in speeches if speech["speech_id"] in topics]
        given = {speech["speech_id"]: side for speech in labelled if (side := speech.get("side"))}
        side = split_sides({speech["speech_id"]: speech["cluster_id"] for speech in labelled}, settings, given)
        split = [as_split(speech, topics[speech["speech_id"]], side[speech["speech_id"]]) for speech in labelled]
        run.account("speeches", len(speeches), len(split), {"no topic": len(speeches) - len(labelled)})
        log.info("split: %s", dict(sorted(Counter(side.values()).items())))
        run.write(run.args.out, split, "speech", sort_by="speech_id")


def split_sides(cluster_of: dict[str, str], settings: SplitSettings, given: dict[str, str] | None = None) -> dict[str, str]:
    """Return the side of each speech from its cluster; `given` holds the sides of all where the data gives them."""
    if given and "dev" in given.values():
        return given
    if given:
        on_test = {speech for speech, side in given.items() if side == "test"}
    else:
        test = take_exactly(Counter(cluster_of.values()), settings.test_speeches, settings.seed, "test")
        on_test = {speech for speech, cluster in cluster_of.items() if cluster in test}
    rest = Counter(cluster for speech, cluster in cluster_of.items() if speech not in on_test)
    others = rest.total()
    dev_speeches = max(1, round(settings.dev_fraction * others)) if settings.dev_fraction else 0
    if others <= dev_speeches:
        raise UserError(
            f"{len(cluster_of)} speeches are too few: test has {len(on_test)}, dev would take {dev_speeches}, none is left to train on"
        )
    dev = take_exactly(rest, dev_speeches, settings.seed, "dev")
    return {speech: "test" if speech in on_test else "dev" if cluster in dev else "train" for speech, cluster in cluster_of.items()}


def take_exactly(sizes: dict[str, int], wanted: int, seed: int, side: str) -> set[str]:
    """Take clusters that hold exactly `wanted` speeches, or raise UserError."""
    taken = take_clusters(sizes, wanted, seed, side)
    reached = sum(sizes[cluster] for cluster in taken)
    if reached != wanted:
        raise UserError(
            f"the {side} side should have {wanted} speeches, but {sum(sizes.values())} speeches in {len(sizes)} clusters of near duplicates"
            f" give {reached}: ask for fewer (split.{'test_speeches' if side == 'test' else 'dev_fraction'}) or change the seed"
        )
    return taken


def as_split(speech: dict, topic: dict, side: str) -> dict:
    """Return the speech record: topic and side added, the source's own label and side left behind."""
    kept = {key: value for key, value in speech.items() if key not in ("topic_label", "side")}
    return {**kept, **{key: topic[key] for key in ("topic", "coarse_topic", "topic_from")}, "split": side}


if __name__ == "__main__":
    main()
