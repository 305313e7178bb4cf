"""Comparisons of a policy's answer with its opponent's: what each is called, where it stands in a file, what a file of them holds."""

from collections import Counter

from psychocounsel.errors import UserError

SETTING_TITLES = {"free": "Without a length constraint", "length": "With a length constraint"}
KIND = ("policy", "setting", "opponent", "judge", "protocol")  # what all judgements of a file share


def comparison_name(speech_id: str, policy_first: bool, principle: str | None) -> str:
    """Return what a comparison is called in messages and among the failures; a principle where it is about one alone."""
    order = "policy first" if policy_first else "opponent first"
    return "/".join(filter(None, (speech_id, order, principle)))


def comparison_place(row: dict) -> tuple[str, bool, str]:
    """Return where a judge's answer, or a judgement, stands in its file: by speech, the policy's answer first, by principle."""
    return row["speech_id"], not row["policy_first"], row.get("principle") or ""


def kind_of(judgements: list[dict], file: str) -> dict[str, str]:
    """Return what the judgements of a file share; raise UserError where there are none, two kinds, or two of one speech and order."""
    if not judgements:
        raise UserError(f"{file}: no judgements")
    kinds = sorted({tuple(row[key] for key in KIND) for row in judgements})
    if len(kinds) > 1:
        raise UserError(f"{file}: expected one {', '.join(KIND[:-1])} and {KIND[-1]} alone, found {' and '.join(map(str, kinds[:2]))}")
    place, number = Counter((row["speech_id"], row["policy_first"], None) for row in judgements).most_common(1)[0]
    if number > 1:
        raise UserError(f"{file}: {comparison_name(*place)} was judged {number} times; one judgement is expected")
    return dict(zip(KIND, kinds[0], strict=True))
