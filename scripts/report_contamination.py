"""Report near duplicates between what is tested on and what is trained on.

Our test speeches are compared with our train and dev speeches, with the prompts of all other preference data that a reward model is
trained on, and with those of the general benchmark; the benchmark's prompts with everything that is trained on. Also counted:
answers of training pairs that are also answers of the pairs tested on. The measure is that of selecting speeches (Jaccard
similarity of character shingles, proposed by MinHash). Near duplicates of a test speech among our own train and dev speeches
are an error, unless the sides of the split came with given pairs. Examples are named by their ids, never quoted. Example:

    python scripts/report_contamination.py --speeches speeches.jsonl --pairs train.jsonl dev.jsonl test.jsonl \\
        --data helpsteer2=helpsteer2/train.jsonl helpsteer2=helpsteer2/dev.jsonl --benchmark rewardbench=rewardbench/test.jsonl \\
        --out contamination.json --settings own_split=true seed=1 'near_duplicates={"drop_above": 0.85, …}'
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.near_duplicates import RECALL, NearDuplicateSettings, matches_between
from psychocounsel.records import validator
from psychocounsel.stage import Settings, Stage, command_line, log, stage
from psychocounsel.texts import normalise, speech_id

OURS = "psychocounsel"  # the run's own speeches and pairs, as configs name them
EXAMPLES = 20  # pairs of ids that are listed for each comparison, the most similar ones


class ContaminationSettings(Settings):
    """What counts as a near duplicate, and whether our sides must be clean."""

    near_duplicates: NearDuplicateSettings = Field(description="drop_above, cluster_above, shingle_chars, permutations")
    own_split: bool = Field(description="whether the run divided its speeches itself: then a near duplicate on two sides is an error")
    seed: int = Field(description="seed of the sketches: that of selecting speeches", ge=0)


@dataclass
class Data:
    """Prompts and answers of one set of data. Equal texts count once."""

    name: str
    split: str
    prompts: dict[str, str] = field(default_factory=dict)  # normalised text of a client or user -> id of the first prompt with it
    answers: set[str] = field(default_factory=set)  # ids of normalised texts

    def add_pairs(self, pairs: Iterable[dict], with_prompts: bool) -> None:
        """Add the answers of pairs and, where the prompts are not known as speeches, each of their user messages."""
        for pair in pairs:
            self.answers |= {speech_id(normalise(pair[side][-1]["content"])) for side in ("chosen", "rejected")}
            for message in pair["prompt"] if with_prompts else ():
                if message["role"] == "user":
                    self.prompts.setdefault(normalise(message["content"]), pair["speech_id"])


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ContaminationSettings)
    parser.add_argument("--speeches", required=True, help="speeches of the run with their side of the split")
    parser.add_argument("--pairs", required=True, nargs="+", help="pairs of this run: train, dev and test")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FILE", help="other pairs that a reward model is trained on, or dev")
    parser.add_argument("--benchmark", nargs="*", default=[], metavar="NAME=FILE", help="pairs of the general benchmark")
    parser.add_argument("--out", required=True, help="the report, in JSON")
    with stage(parser) as run:
        settings: ContaminationSettings = run.settings
        own = own_data(run)
        data, benchmarks = other_data(run, run.args.data, "train and dev"), other_data(run, run.args.benchmark, "test")
        trained_on = [own["train"], own["dev"], *data]
        compared = [(own["test"], other) for other in [*trained_on, *benchmarks]]
        compared += [(benchmark, other) for benchmark in benchmarks for other in trained_on]
        comparisons = [comparison(tested, other, settings) for tested, other in compared]
        if settings.own_split:
            check_own_sides(comparisons)
        run.account("comparisons", len(compared), len(comparisons))
        measure = settings.near_duplicates.model_dump() | {"recall": RECALL}
        run.write_json(run.args.out, validator("contamination")({"near_duplicates": measure, "comparisons": comparisons}))


def own_data(run: Stage) -> dict[str, Data]:
    """Return the run's own speeches and the answers of its pairs, by side."""
    sides = {side: Data(OURS, side) for side in ("train", "dev", "test")}
    for speech in run.read(run.args.speeches, "speech"):
        sides[speech["split"]].prompts[speech["text"]] = speech["speech_id"]
    for file in run.args.pairs:
        for pair in run.read(file, "pair"):
            sides[pair["split"]].add_pairs([pair], with_prompts=False)
    return sides


def other_data(run: Stage, words: list[str], split: str) -> list[Data]:
    """Return the data sets that NAME=FILE words name; the files of one name are one data set."""
    found: dict[str, Data] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals:
            raise UserError(f"{word!r}: expected NAME=FILE")
        found.setdefault(name, Data(name, split)).add_pairs(run.read(file, "pair"), with_prompts=True)
    return list(found.values())


def comparison(tested: Data, other: Data, settings: ContaminationSettings) -> dict:
    """Return how many prompts and answers of `other` are near duplicates of those of `tested`, or the same."""
    near = settings.near_duplicates
    of_tested, of_other = list(tested.prompts), list(other.prompts)
    found = matches_between(
        of_tested,
        of_other,
        above=near.cluster_above,
        shingle_chars=near.shingle_chars,
        permutations=near.permutations,
        seed=settings.seed,
    )
    matches = [(similarity, tested.prompts[of_tested[i]], other.prompts[of_other[j]]) for i, j, similarity in found]
    closest: dict[str, dict[str, float]] = {"tested": defaultdict(float), "other": defaultdict(float)}
    for similarity, mine, theirs in matches:
        for side, prompt in (("tested", mine), ("other", theirs)):
            closest[side][prompt] = max(closest[side][prompt], similarity)
    listed = sorted(matches, key=lambda match: (-match[0], *match[1:]))[:EXAMPLES]
    return {
        "tested": tested.name,
        "data": other.name,
        "split": other.split,
        "tested_prompts": len(set(tested.prompts.values())),
        "tested_similar": len(closest["tested"]),
        "prompts": len(set(other.prompts.values())),
        "similar": len(closest["other"]),
        "repeated": sum(similarity > near.drop_above for similarity in closest["other"].values()),
        "answers": len(other.answers),
        "equal_answers": len(other.answers & tested.answers),
        "examples": [{"tested": mine, "data": theirs, "similarity": round(value, 4)} for value, mine, theirs in listed],
    }


def check_own_sides(comparisons: list[dict]) -> None:
    """Raise UserError where a near duplicate of a test speech is among our own train or dev speeches."""
    for found in comparisons:
        if found["tested"] == found["data"] == OURS and found["similar"]:
            first = found["examples"][0]
            raise UserError(
                f"{found['similar']} {found['split']} speeches are near duplicates of test speeches, e.g. {first['data']} of"
                f" {first['tested']} (similarity {first['similarity']:.3f}). They share a cluster_id, and a cluster stands on one side:"
                " these speeches were not divided by split_speeches.py, or selected by another seed or measure; make them again"
            )
    log.info("no near duplicate of a test speech among the train and dev speeches")


if __name__ == "__main__":
    main()
