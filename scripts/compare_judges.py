"""Tell how far two judges agree who compared the same answers: percent, Cohen's kappa, and the win rates under each.

A verdict is what a speech counts for a policy: in protocol "paper" a win or not, in the coin's order; in protocol "robust" a win, a
loss, or a disagreement of the two orders. By setting, for each policy and for all together, over the speeches that both
judges judged in both orders, with 95 % bootstrap intervals over speeches.
"""

from pydantic import Field

from psychocounsel import winrates
from psychocounsel.agreement import agreement
from psychocounsel.errors import UserError
from psychocounsel.records import validator
from psychocounsel.stage import Settings, command_line, stage


class JudgesSettings(Settings):
    """How the agreement is bounded."""

    bootstrap: int = Field(2000, description="bootstrap resamples", ge=1)
    seed: int = Field(description="seed of the coin of protocol paper and of the bootstrap")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, JudgesSettings)
    parser.add_argument("--judgements", required=True, nargs="+", help="the first judge's judgements, a file a policy and setting")
    parser.add_argument("--second", required=True, nargs="+", help="the second judge's, of the same policies and settings")
    parser.add_argument("--out", required=True, help="agreement, as JSON")
    with stage(parser) as run:
        first, asked = winrates.read_by_one_judge({file: run.read(file, "judgement") for file in run.args.judgements}, "--judgements")
        second, asked_again = winrates.read_by_one_judge({file: run.read(file, "judgement") for file in run.args.second}, "--second")
        if first.keys() != second.keys():
            raise UserError("--judgements and --second: not of the same policies and settings")
        if asked[1:] != asked_again[1:] or asked[0] == asked_again[0]:
            raise UserError(f"expected two judges asked by one protocol about one opponent, found {asked} and {asked_again}")
        both = {key: first[key].keys() & second[key].keys() for key in first}
        for key, judged in both.items():
            if not judged:
                raise UserError(f"--second: no answer of {key[1]!r} in setting {key[0]!r} was judged in both orders by both judges")
        compared, total = sum(map(len, both.values())), sum(map(len, first.values()))
        run.account("comparisons", total, compared, {"not judged in both orders by the second judge": total - compared})

        def found(keys: list[tuple[str, str]]) -> dict:
            """The agreement on some policies in one setting, by protocol."""
            return {
                protocol: agreement(shared_verdicts([(scores(first[key]), scores(second[key])) for key in keys]), *draws)
                for protocol, scores in winrates.protocols(run.settings.seed).items()
            }

        draws = (run.settings.bootstrap, run.settings.seed)
        rows = []
        for setting in sorted({setting for setting, _ in first}):
            keys = sorted(key for key in first if key[0] == setting)
            rows += [{"policy": key[1], "setting": setting, "protocols": found([key])} for key in keys]
            rows.append({"policy": None, "setting": setting, "protocols": found(keys)})
        facts = {"judges": [asked[0], asked_again[0]], "opponent": asked[1], "protocol": asked[2]}
        run.write_json(run.args.out, validator("agreement")({**facts, "agreement": rows}))


def shared_verdicts(scores: list[tuple[dict[str, float], dict[str, float]]]) -> list[tuple[str, float, float]]:
    """Return (speech, points under the first judge, under the second) of the speeches that both judged, policy by policy."""
    return [(speech, one[speech], other[speech]) for one, other in scores for speech in sorted(one.keys() & other.keys())]


if __name__ == "__main__":
    main()
