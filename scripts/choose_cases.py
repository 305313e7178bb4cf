"""Choose case studies by rule, not by hand, and write them as a table: CSV, Markdown, LaTeX and HTML (paper, Tables 4 and 7).

A case shows a client's speech, a policy's answer, the opponent's, and the judge's reasons. In each setting, without and with a
length constraint: of the speeches on which the policy won in both orders, whose source's licence allows to quote them, on no
crisis topic and without a word of crisis, the one of (lower) median length, equal lengths in the order of their ids; and by
the same rule one on which it lost.
"""

import re
from pathlib import Path

from pydantic import Field

from psychocounsel.comparisons import SETTING_TITLES, kind_of
from psychocounsel.errors import UserError
from psychocounsel.stage import Settings, command_line, log, stage
from psychocounsel.tables import FORMATS, Missing, Row, Table
from psychocounsel.winrates import verdicts_by_speech

VERDICTS = {"win": "won", "loss": "lost"}
# A second guard, since topics are labels that a judge may get wrong: such a speech is never quoted, whatever its topic.
CRISIS_WORDS = re.compile(
    r"suicid|(kill|cut|hurt|hang|shoot|burn)(s|ed|ing|ting)? (my|your|him|her|them)sel|(shot|hung) (my|him|her|them)sel|self[- ]?harm"
    r"|end(s|ed|ing)? (my|it|his|her|their) (life|lives|all)|(tak|took)\w* (my|his|her|their) own li(fe|ves)|better off (dead|without me)"
    r"|(want|wish)(s|es|ed|ing)? (to die|to be dead|(i|he|she) (was|were) dead)"
    r"|(not|n['’]t|no longer) want(ing)? to (live|be alive|wake up)"
    r"|overdos|\babus|\brap(e|ing|ist)|molest|assault|anorexi|bulimi|purg(e|ing)|starv",
    re.IGNORECASE,
)


class CaseSettings(Settings):
    """Whose answers are shown, and what may be quoted."""

    policy: str = Field(description="title of the policy")
    opponent: str = Field(description="title of the opponent")
    judge: str = Field(description="title of the judge")
    quotable: list[str] = Field(description="names of the sources whose licence allows to quote them")
    crisis_topics: list[str] = Field(description="topics, coarse or fine, that are never quoted")
    titles: dict[str, str] = Field({}, description="name of a source -> its title")
    note: str | None = Field(None, description="a sentence under the table")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, CaseSettings)
    parser.add_argument("--speeches", required=True, help="speeches")
    parser.add_argument("--judgements", required=True, nargs="+", help="the policy's judgements, a file a setting")
    parser.add_argument("--answers", required=True, nargs="+", help="the policy's answers, in the same order")
    parser.add_argument("--opponent", required=True, help="the opponent's answers")
    parser.add_argument("--out-dir", required=True, help="folder for case_studies.csv, .md, .tex and .html")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        if len(args.judgements) != len(args.answers):
            raise UserError(
                f"--judgements has {len(args.judgements)} files and --answers {len(args.answers)}; one of each a setting is needed"
            )
        speeches = {row["speech_id"]: row for row in run.read(args.speeches, "speech")}
        opponent = {row["speech_id"]: row["text"] for row in run.read(args.opponent, "response")}
        groups = {}
        judged = quoted = 0
        for judgement_file, answer_file in zip(args.judgements, args.answers, strict=True):
            judgements = run.read(judgement_file, "judgement")
            answers = {row["speech_id"]: row["text"] for row in run.read(answer_file, "response")}
            verdicts = verdicts_by_speech(judgements)
            allowed = [speeches[speech] for speech in verdicts if speech in speeches and quotable(speeches[speech], settings)]
            judged, quoted = judged + len(verdicts), quoted + len(allowed)
            for verdict in VERDICTS:
                speech = median_speech([s for s in allowed if list(verdicts[s["speech_id"]].values()) == [verdict] * 2])
                title = f"{SETTING_TITLES[kind_of(judgements, judgement_file)['setting']]}, {VERDICTS[verdict]}"
                groups[title] = case(speech, answers, opponent, judgements, settings) if speech else no_case(verdict)
        run.account("judged speeches", judged, quoted, {"must not be quoted": judged - quoted})
        log.info("case studies: %d of %d judged speeches may be quoted", quoted, judged)
        table = case_table(groups, settings)
        for ending, render in FORMATS.items():
            run.write_text(Path(args.out_dir) / f"{table.name}.{ending}", render(table))


def quotable(speech: dict, settings: CaseSettings) -> bool:
    """Whether a speech may be shown: its source's licence allows it, and neither topic nor words are of a crisis."""
    on_crisis = {speech["topic"], speech["coarse_topic"]} & set(settings.crisis_topics)
    return speech["source"] in settings.quotable and not on_crisis and not CRISIS_WORDS.search(speech["text"])


def median_speech(speeches: list[dict]) -> dict | None:
    """The speech of (lower) median length, equal lengths in the order of their ids; None of none."""
    ranked = sorted(speeches, key=lambda speech: (len(speech["text"]), speech["speech_id"]))
    return ranked[(len(ranked) - 1) // 2] if ranked else None


def case(speech: dict, answers: dict[str, str], opponent: dict[str, str], judgements: list[dict], settings: CaseSettings) -> list[Row]:
    """Return the rows of one case."""
    name = speech["speech_id"]
    orders = {row["policy_first"]: row["rationale"] for row in judgements if row["speech_id"] == name}
    source = settings.titles.get(speech["source"], speech["source"])
    reasons = [f"{who} first: {orders[first]}" for first, who in ((True, settings.policy), (False, settings.opponent))]
    return [
        Row(["Client speech", speech["text"]], [f"{name}, on {speech['topic']}, from {source}."]),
        Row([settings.policy, answers[name].strip()]),
        Row([settings.opponent, opponent[name].strip()]),
        Row(["The judge", "\n\n".join(reasons)]),
    ]


def no_case(verdict: str) -> list[Row]:
    """Return the row that says that there is none."""
    return [Row(["Client speech", Missing(f"No speech that was {VERDICTS[verdict]} in both orders may be quoted.")])]


def case_table(groups: dict[str, list[Row]], settings: CaseSettings) -> Table:
    """Return the cases as a table, with the rule under it."""
    notes = [
        f"Chosen by rule: of the comparisons that {settings.policy} won (or lost) in both orders, whose speech its source's licence allows"
        " to quote and which is not about a crisis, the one whose speech has the median length.",
        f"Compared by {settings.judge}. The texts are for review by professionals, not for clients.",
        *([settings.note] if settings.note else []),
    ]
    title = f"Case studies: {settings.policy} and {settings.opponent} (Tables 4 and 7)"
    return Table("case_studies", title, ["Part", "Text"], list(groups.items()), notes)


if __name__ == "__main__":
    main()
