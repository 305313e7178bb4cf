"""Compute a policy's win rates against the opponent in one setting (paper, section 4.2, Table 3).

Two protocols side by side: "paper" takes one order of each comparison by a seeded coin and counts wins, "robust" takes
both orders and counts a disagreement or a tie half. Both overall and by coarse topic, with n and 95 % bootstrap intervals
over speeches; beside them the length-controlled win rate, the judge's order effects, how well a length constraint was kept,
and the win rate on each principle where the judge was asked about one at a time.
A test speech counts where both orders were judged; the others are counted as dropped.
"""

from collections import Counter

from pydantic import Field

from psychocounsel import winrates
from psychocounsel.comparisons import kind_of
from psychocounsel.errors import UserError
from psychocounsel.records import validator
from psychocounsel.stage import Settings, command_line, stage


class WinRateSettings(Settings):
    """Whose win rates, and how they are bounded."""

    policy: str = Field(description="name of the policy")
    setting: str = Field(description="free, or length for answers under a length constraint")
    bootstrap: int = Field(2000, description="bootstrap resamples", ge=1)
    seed: int = Field(description="seed of the coin and of the bootstrap")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, WinRateSettings)
    parser.add_argument("--speeches", required=True, help="speeches; those of the test split count")
    parser.add_argument("--judgements", required=True, help="parsed comparisons, two orders a speech")
    parser.add_argument("--answers", required=True, help="the policy's answers")
    parser.add_argument("--opponent", required=True, help="the opponent's answers")
    parser.add_argument("--out", required=True, help="win rates, as JSON")
    with stage(parser) as run:
        settings = run.settings
        topic_of = {
            speech["speech_id"]: speech["coarse_topic"] for speech in run.read(run.args.speeches, "speech") if speech["split"] == "test"
        }
        judgements = run.read(run.args.judgements, "judgement")
        kind = kind_of(judgements, run.args.judgements)
        if (kind["policy"], kind["setting"]) != (settings.policy, settings.setting):
            found = f"{kind['policy']!r} in setting {kind['setting']!r}"
            raise UserError(
                f"{run.args.judgements}: judgements of {found}; expected those of {settings.policy!r} in setting {settings.setting!r}"
            )
        verdicts = winrates.verdicts_by_speech(judgements)
        if foreign := sorted(verdicts.keys() - topic_of.keys()):
            raise UserError(f"{run.args.judgements}: speech {foreign[0]} is no test speech of {run.args.speeches}")
        judged = winrates.judged_twice(verdicts)
        if not judged:
            raise UserError(f"{run.args.judgements}: no speech was judged in both orders, so there is nothing to count")
        dropped = {"not judged": len(topic_of) - len(verdicts), "judged in one order only": len(verdicts) - len(judged)}
        run.account("speeches", rows_in=len(topic_of), rows_out=len(judged), dropped=dropped)
        answers = by_speech(run.read(run.args.answers, "response"), judged, run.args.answers)
        opponent = by_speech(run.read(run.args.opponent, "response"), judged, run.args.opponent)
        characters = {speech: (len(answers[speech]["text"]), len(opponent[speech]["text"])) for speech in judged}
        scores = {protocol: score(judged) for protocol, score in winrates.protocols(settings.seed).items()}
        result = {
            **kind,
            "protocols": {
                protocol: winrates.win_rates(points, topic_of, settings.bootstrap, settings.seed) for protocol, points in scores.items()
            },
            "principles": winrates.principle_rates(judgements, judged, topic_of, settings.bootstrap, settings.seed),
            "orders": winrates.order_effects(judged),
            "length_controlled": winrates.length_controlled(scores["robust"], characters, settings.bootstrap, settings.seed),
            "lengths": winrates.answer_lengths(answers, opponent),
        }
        run.write_json(run.args.out, validator("win_rates")(result))


def by_speech(responses: list[dict], judged: dict, file: str) -> dict[str, dict]:
    """Return the answer of each judged speech; raise UserError where one is missing or there are several."""
    counts = Counter(row["speech_id"] for row in responses)
    for speech in judged:
        if counts[speech] != 1:
            raise UserError(f"{file}: speech {speech} was judged but has {counts[speech]} answers here; one is expected")
    return {row["speech_id"]: row for row in responses if row["speech_id"] in judged}


if __name__ == "__main__":
    main()
