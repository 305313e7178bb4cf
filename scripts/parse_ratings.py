"""Read the scores and rationales out of a judge's raw answers (paper, Box 7), strictly: nothing is guessed or repaired.

One rating per response and principle, whether the judge was asked about one principle a call or about all at once, and the
place at which the judge saw the response. An answer that does not parse goes to the side file with the reason. It can be run
again without asking the judge.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from operator import itemgetter

from pydantic import Field

from psychocounsel.errors import UserError, nearest
from psychocounsel.parsing import parse_ratings, parse_ratings_together
from psychocounsel.stage import Settings, command_line, stage


class ParseSettings(Settings):
    """Which principles there are."""

    principles: list[str] = Field(description="ids of the principles")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ParseSettings)
    parser.add_argument("--answers", required=True, help="the judge's raw answers")
    parser.add_argument("--out", required=True, help="ratings, one a response and principle")
    parser.add_argument("--failed", required=True, help="answers that do not parse, with the reason")
    with stage(parser) as run:
        read: list[dict] = []  # of each answer, what it is about: the texts are too many to keep
        failures: list[dict] = []

        def ratings() -> Iterator[dict]:
            for _, answers in groupby(run.each(run.args.answers, "rating_answer"), key=itemgetter("speech_id")):
                rows: list[dict] = []
                for answer in answers:
                    read.append({name: answer[name] for name in ("speech_id", "principle", "protocol")})
                    try:
                        rows += rating_rows(answer, run.settings.principles)
                    except ValueError as error:
                        failures.append(failure_row(f"{answer['speech_id']}/{answer['principle'] or answer['protocol']}", answer, error))
                yield from sorted(rows, key=itemgetter("response_id", "principle"))

        run.write(run.args.out, ratings(), "rating")
        check_answers(read, run.settings.principles, run.args.answers)
        run.account("answers", len(read), len(read) - len(failures), {"does not parse": len(failures)})
        run.write(run.args.failed, failures, "failure", sort_by="request_id")


def check_answers(answers: list[dict], principles: list[str], file: str) -> None:
    """Raise UserError for an unknown principle, two answers on one speech and principle, two protocols, or speeches out of order."""
    if len(protocols := {answer["protocol"] for answer in answers}) > 1:
        raise UserError(f"{file}: answers of the protocols {' and '.join(sorted(protocols))}; scores of the two must not be mixed")
    counts = Counter((answer["speech_id"], answer["principle"]) for answer in answers)
    for (speech_id, principle), count in counts.items():
        if principle not in [*principles, None]:
            raise UserError(f"{file}: speech {speech_id}: unknown principle {principle!r}.{nearest(principle, principles)}")
        if count > 1:
            on = repr(principle) if principle else "all principles"
            raise UserError(f"{file}: speech {speech_id} was rated {count} times on {on}; one answer is expected")
    if any(earlier["speech_id"] > later["speech_id"] for earlier, later in pairwise(answers)):
        raise UserError(f"{file}: its answers are not sorted by speech_id, as rate_responses.py writes them")


def rating_rows(answer: dict, principles: list[str]) -> list[dict]:
    """Return the ratings of one answer, given back to the responses by the order in which the judge saw them; ValueError if none."""
    n = len(answer["order"])
    if answer["protocol"] == "one_by_one":
        parsed = {answer["principle"]: parse_ratings(answer["raw"], n)}
    else:
        parsed = parse_ratings_together(answer["raw"], n, principles)
    shared = {key: answer[key] for key in ("speech_id", "judge")}
    return [
        {**shared, "response_id": response_id, "principle": principle, "position": position, "score": score, "rationale": rationale}
        for principle, ratings in parsed.items()
        for position, (response_id, (score, rationale)) in enumerate(zip(answer["order"], ratings, strict=True), start=1)
    ]


def failure_row(request_id: str, answer: dict, error: ValueError) -> dict:
    """Return the record of an answer that does not parse."""
    return {"request_id": request_id, "request_key": answer["request_key"], "reason": str(error), "raw": [answer["raw"]]}


if __name__ == "__main__":
    main()
