"""Give each response its overall score: the mean of its scores on the seven principles (paper, section 3.3).

The sum is kept as a whole number beside the mean, so that gaps between responses can be compared exactly. A response without
a score on every principle has no overall score and makes no pair; it goes to the side file with what it lacks.
"""

from collections import defaultdict
from collections.abc import Iterable

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.stage import Settings, command_line, dropped_by_reason, stage


class ScoreSettings(Settings):
    """Which principles a complete score has."""

    principles: list[str] = Field(description="ids of the principles, each of which counts equally")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ScoreSettings)
    parser.add_argument("--ratings", required=True, help="ratings, one a response and principle")
    parser.add_argument("--responses", required=True, nargs="+", help="files of responses, one a model")
    parser.add_argument("--out", required=True, help="scores, one a response")
    parser.add_argument("--dropped", required=True, help="responses without a score on every principle")
    with stage(parser) as run:
        ratings = scores_by_response(run.each(run.args.ratings, "rating"), run.settings.principles, run.args.ratings)
        names = ("response_id", "speech_id", "model")
        responses = [{name: row[name] for name in names} for file in run.args.responses for row in run.each(file, "response")]
        if stray := ratings.keys() - {response["response_id"] for response in responses}:
            raise UserError(f"{run.args.ratings}: response {min(stray)} is in none of the files of responses")
        scores, unscored = [], []
        for response in responses:
            given = ratings.get(response["response_id"], {})
            if missing := [p for p in run.settings.principles if p not in given]:
                unscored.append({**response, "reason": "some principles not rated" if given else "not rated", "missing": missing})
            else:
                scores.append({**response, **overall_score({p: given[p] for p in run.settings.principles})})
        run.account("responses", len(responses), len(scores), dropped_by_reason(unscored))
        run.write(run.args.out, scores, "score", sort_by="response_id")
        run.write(run.args.dropped, unscored, "unscored", sort_by="response_id")


def scores_by_response(ratings: Iterable[dict], principles: list[str], file: str) -> dict[str, dict[str, int]]:
    """Return response id -> principle -> score; raise UserError for a principle that is unknown or rated twice."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for rating in ratings:
        response_id, principle = rating["response_id"], rating["principle"]
        if principle not in principles:
            raise UserError(f"{file}: response {response_id}: unknown principle {principle!r}; known: {', '.join(principles)}")
        if principle in found[response_id]:
            raise UserError(f"{file}: response {response_id} has two ratings on {principle!r}; one is expected")
        found[response_id][principle] = rating["score"]
    return found


def overall_score(scores: dict[str, int]) -> dict:
    """Return the scores with their sum, by which gaps are compared, and their mean, the paper's overall score."""
    total = sum(scores.values())
    return {"scores": scores, "total": total, "overall": total / len(scores)}


if __name__ == "__main__":
    main()
