"""Read the verdicts for the policy out of a judge's raw comparisons, strictly: nothing is guessed or repaired.

One judgement per speech and order. Where the judge was asked about one principle at a time (protocol one_by_one), a judgement
is what most of its verdicts say, and a tie where they are divided evenly, which an odd number of principles cannot be; it
needs a verdict on every principle. An answer that does not parse, and one whose comparison lacks another, goes to the side file
with the reason. It can be run again without asking the judge.
"""

from collections import Counter
from itertools import groupby

from pydantic import Field

from psychocounsel.comparisons import comparison_name, comparison_place
from psychocounsel.errors import UserError, nearest
from psychocounsel.parsing import parse_better
from psychocounsel.stage import Settings, command_line, stage

LACKS_ANOTHER = "another principle of this comparison has no usable verdict"


class ParseSettings(Settings):
    """Which principles there are."""

    principles: list[str] = Field(description="ids of the principles")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ParseSettings)
    parser.add_argument("--answers", required=True, help="the judge's raw answers")
    parser.add_argument("--out", required=True, help="judgements, one a speech and order")
    parser.add_argument("--failed", required=True, help="answers without a judgement, with the reason")
    with stage(parser) as run:
        answers = sorted(run.read(run.args.answers, "judgement_answer"), key=comparison_place)
        check_answers(answers, run.settings.principles, run.args.answers)
        judgements, failures = [], []
        for _, group in groupby(answers, key=lambda row: (row["speech_id"], row["policy_first"])):
            comparison = list(group)
            verdicts, broken = read_verdicts(comparison)
            failures += [failure_row(answer, str(error)) for answer, error in broken]
            if complete(comparison[0], verdicts, run.settings.principles):
                judgements.append(judgement(comparison[0], verdicts))
            else:
                failures += [failure_row(answer, LACKS_ANOTHER) for answer in comparison if answer["principle"] in verdicts]
        reasons = Counter(LACKS_ANOTHER if failure["reason"] == LACKS_ANOTHER else "does not parse" for failure in failures)
        run.account("answers", len(answers), len(answers) - len(failures), reasons)
        run.write(run.args.out, judgements, "judgement", sort_by=comparison_place)
        run.write(run.args.failed, failures, "failure", sort_by="request_id")


def check_answers(answers: list[dict], principles: list[str], file: str) -> None:
    """Raise UserError for two protocols in one file, an unknown principle, or two answers on the same."""
    if len(protocols := {answer["protocol"] for answer in answers}) > 1:
        raise UserError(f"{file}: answers of the protocols {' and '.join(sorted(protocols))}; verdicts of the two must not be mixed")
    if unknown := {answer["principle"] for answer in answers} - {None, *principles}:
        raise UserError(f"{file}: unknown principle {min(unknown)!r}.{nearest(min(unknown), principles)}")
    name, number = Counter(map(name_of, answers)).most_common(1)[0] if answers else ("", 0)
    if number > 1:
        raise UserError(f"{file}: {name} was judged {number} times; one answer is expected")


def name_of(answer: dict) -> str:
    """Return what an answer's comparison is called."""
    return comparison_name(answer["speech_id"], answer["policy_first"], answer["principle"])


def read_verdicts(comparison: list[dict]) -> tuple[dict, list[tuple[dict, ValueError]]]:
    """Return the verdicts for the policy and the judge's reasons, (win or loss, reason) by principle (None: all), and what is broken."""
    verdicts, broken = {}, []
    for answer in comparison:
        try:
            better, rationale = parse_better(answer["raw"])
        except ValueError as error:
            broken.append((answer, error))
        else:
            verdicts[answer["principle"]] = ("win" if (better == 1) == answer["policy_first"] else "loss", rationale)
    return verdicts, broken


def complete(answer: dict, verdicts: dict, principles: list[str]) -> bool:
    """Whether a comparison has all the verdicts that it needs: the one, or one a principle."""
    return verdicts.keys() == ({None} if answer["protocol"] == "together" else set(principles))


def judgement(answer: dict, verdicts: dict) -> dict:
    """Return the judgement of a comparison from its verdicts (the judge is offered no tie); `answer` is any of its answers."""
    points = Counter(verdict for verdict, _ in verdicts.values())
    one_by_one = answer["protocol"] == "one_by_one"
    facts = {key: answer[key] for key in ("speech_id", "policy", "opponent", "setting", "protocol", "judge", "policy_first")}
    return {
        **facts,
        "verdict": "tie" if points["win"] == points["loss"] else "win" if points["win"] > points["loss"] else "loss",
        "principles": {principle: verdict for principle, (verdict, _) in verdicts.items()} if one_by_one else None,
        "rationale": "\n".join(f"{name}: {reason}" if one_by_one else reason for name, (_, reason) in verdicts.items()),
    }


def failure_row(answer: dict, reason: str) -> dict:
    """Return the record of an answer without a judgement."""
    return {"request_id": name_of(answer), "request_key": answer["request_key"], "reason": reason, "raw": [answer["raw"]]}


if __name__ == "__main__":
    main()
