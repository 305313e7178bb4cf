"""Assess the judge of the responses: does it follow the place at which it sees a response, and does it agree with itself?

Places need no request of their own: the order of the responses is a seeded shuffle, so that an effect of the place shows as a
difference of mean scores. Self-consistency needs ratings of a sample that was asked again (rate_responses.py, settings sample,
repeat and reversed), in the same order or in the reverse one.
"""

from collections.abc import Iterable, Iterator

from pydantic import Field

from psychocounsel.consistency import Ratings, as_ratings, position_effects, self_consistency
from psychocounsel.errors import UserError
from psychocounsel.pairs import least_total_gap
from psychocounsel.records import validator
from psychocounsel.stage import Settings, Stage, command_line, stage

ORDERS = ("same", "reversed")


class AssessSettings(Settings):
    """What is rated, which two responses make a pair, and how the results are bounded."""

    principles: list[str] = Field(description="ids of the principles")
    min_gap: float = Field(description="least difference of the overall scores of a pair", gt=0)
    bootstrap: int = Field(2000, description="bootstrap resamples, clustered by speech", ge=1)
    seed: int = Field(description="seed of the bootstrap")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, AssessSettings)
    parser.add_argument("--ratings", required=True, help="ratings of all responses")
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        metavar="ORDER=FILE",
        help="ratings of the sample that was asked again: same=… or reversed=…",
    )
    parser.add_argument("--out", required=True, help="the assessment, as JSON")
    with stage(parser) as run:
        settings: AssessSettings = run.settings
        judge, ratings = read_ratings(run, run.args.ratings)
        result = {
            "judge": judge,
            "positions": position_effects(ratings, settings.principles, settings.bootstrap, settings.seed),
            "again": [asked_again(run, word, judge, ratings) for word in run.args.again],
        }
        run.write_json(run.args.out, validator("judge")(result))


def read_ratings(run: Stage, file: str) -> tuple[str, Ratings]:
    """Return the judge and its ratings; raise UserError where there are none, or some of another judge or on another principle."""
    judges: set[str] = set()

    def rows() -> Iterator[dict]:
        for row in run.each(file, "rating"):
            if row["principle"] not in run.settings.principles:
                raise UserError(f"{file}: unknown principle {row['principle']!r}; the settings have {', '.join(run.settings.principles)}")
            judges.add(row["judge"])
            yield row

    ratings = as_ratings(rows(), run.settings.principles)
    if len(judges) != 1:
        raise UserError(f"{file}: expected ratings of one judge, found {sorted(judges) or 'none'}")
    return judges.pop(), ratings


def asked_again(run: Stage, word: str, judge: str, first: Ratings) -> dict:
    """Return how far the ratings of a sample agree with the first ones; raise UserError where they are not of the same responses."""
    order, _, file = word.partition("=")
    if order not in ORDERS or not file:
        raise UserError(f"--again {word}: expected {' or '.join(f'{order}=FILE' for order in ORDERS)}")
    other, second = read_ratings(run, file)
    if other != judge:
        raise UserError(f"{file}: ratings of {other!r}, but {run.args.ratings} holds those of {judge!r}")
    lost = set(second.responses) - set(first.responses)
    run.account(
        f"responses rated again, {order}", len(second.responses), len(second.responses) - len(lost), {"not rated before": len(lost)}
    )
    check_places(order, first, second, file)
    settings = run.settings
    least = least_total_gap(settings.min_gap, len(settings.principles))
    return {"order": order, **self_consistency(first, second, settings.principles, least, settings.bootstrap, settings.seed)}


def check_places(order: str, first: Ratings, second: Ratings, file: str) -> None:
    """Raise UserError where responses do not stand at the places that the order says."""
    shared: Iterable[str] = sorted(set(first.responses) & set(second.responses))
    before, after = first.of(shared), second.of(shared)
    if order == "same" and (before.place != after.place).any():
        raise UserError(f"{file}: responses stand at other places than in the first rating; is this the reversed order?")
    if order == "reversed" and len(before.place) and (before.place == after.place).all():
        raise UserError(f"{file}: every response stands at the place of the first rating; is this the same order?")


if __name__ == "__main__":
    main()
