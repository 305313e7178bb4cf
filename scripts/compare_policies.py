"""Compare policies with each other by their win rates against the same opponent on the same test speeches (paper, section 4.2).

Of two policies the difference of their win rates, overall and by coarse topic, in both protocols (compute_win_rates.py), with
intervals of a bootstrap that is paired by speech: what makes a speech easy for both drops out, so that a difference can be
told where the two policies' own intervals overlap. A speech counts where both policies were judged in both orders.
"""

from itertools import product

from pydantic import Field

from psychocounsel import winrates
from psychocounsel.errors import UserError
from psychocounsel.records import validator
from psychocounsel.stage import Settings, command_line, stage


class CompareSettings(Settings):
    """Which policies are compared."""

    contrasts: list[tuple[str, str]] = Field(description="[[policy, other], …]: the other's win rate is subtracted from the policy's")
    bootstrap: int = Field(2000, description="bootstrap resamples", ge=1)
    seed: int = Field(description="seed of the coin of protocol paper and of the bootstrap")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, CompareSettings)
    parser.add_argument("--speeches", required=True, help="speeches, with their coarse topics")
    parser.add_argument("--judgements", required=True, nargs="+", help="judgements by one judge, a file a policy and setting")
    parser.add_argument("--out", required=True, help="differences, as JSON")
    with stage(parser) as run:
        settings = run.settings
        topic_of = {speech["speech_id"]: speech["coarse_topic"] for speech in run.read(run.args.speeches, "speech")}
        files = {file: run.read(file, "judgement") for file in run.args.judgements}
        verdicts, (judge, opponent, protocol) = winrates.read_by_one_judge(files, "--judgements")
        if missing := {name for pair in settings.contrasts for name in pair} - {policy for _, policy in verdicts}:
            raise UserError(f"--settings: contrasts: no judgements of {min(missing)!r} are given")
        found, of_either, of_both = [], 0, 0
        for setting, (policy, other) in product(sorted({setting for setting, _ in verdicts}), settings.contrasts):
            first, second = (verdicts.get((setting, name), {}) for name in (policy, other))
            of_either, of_both = of_either + len(first.keys() | second.keys()), of_both + len(first.keys() & second.keys())
            if first.keys() & second.keys():
                differences = {
                    protocol: winrates.win_rate_differences(scores(first), scores(second), topic_of, settings.bootstrap, settings.seed)
                    for protocol, scores in winrates.protocols(settings.seed).items()
                }
                found.append({"policy": policy, "other": other, "setting": setting, "protocols": differences})
        run.account("speeches of two policies", of_either, of_both, {"judged for one of the two alone": of_either - of_both})
        facts = {"opponent": opponent, "judge": judge, "protocol": protocol}
        run.write_json(run.args.out, validator("differences")({**facts, "differences": found}))


if __name__ == "__main__":
    main()
