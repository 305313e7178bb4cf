"""Published preference data: one adapter a source, from a row of its file to a preference.

helpsteer2, hh_rlhf, llmbar, rewardbench, pairs_psychocounsel (the authors' published data set, and every release of this pipeline)
and chosen_rejected (your own: columns prompt, chosen, rejected; texts, or lists of messages whose last one is the answer).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from psychocounsel.adapters import label, read_table, require_columns, text_fault
from psychocounsel.errors import UserError, nearest
from psychocounsel.texts import normalise


@dataclass
class Preference:
    """One row as an adapter reads it. `prompt`: messages; the answers: texts, once they are checked."""

    prompt: list[dict]
    chosen: object
    rejected: object
    chosen_model: str | None = None
    rejected_model: str | None = None
    chosen_scores: dict[str, int] | None = None
    rejected_scores: dict[str, int] | None = None
    subset: str | None = None
    split: str | None = None
    speech: str | None = None  # the normalised client speech, where the prompt is made from one
    topic: str | None = None
    key: str | None = None  # the source's own id of the speech
    chosen_id: str | None = None  # ids that a release of ours carries
    rejected_id: str | None = None

    def check(self) -> None:
        """Raise NoPair where a message or answer is no text, or the answers do not differ."""
        for text in (*(message["content"] for message in self.prompt), self.chosen, self.rejected):
            if fault := text_fault(text):
                raise NoPair(*fault)
        if self.chosen.strip() == self.rejected.strip():
            raise NoPair("equal answers")

    @property
    def gap(self) -> float | None:
        """The difference of the mean scores, where there are scores."""
        if not self.chosen_scores or not self.rejected_scores:
            return None
        return (sum(self.chosen_scores.values()) - sum(self.rejected_scores.values())) / len(self.chosen_scores)

    def client_speech(self) -> str:
        """Return the normalised client speech of a checked row: its only user message; raise NoPair where there are more turns."""
        turns = [message for message in self.prompt if message["role"] != "system"]
        if [message["role"] for message in turns] != ["user"]:
            raise NoPair("more than one turn")
        if speech := self.speech or normalise(turns[0]["content"]):
            return speech
        raise NoPair("empty")


class NoPair(Exception):
    """Why a row makes no pair, in a word or two."""


def renamed_rows(path: Path, adapter: str, columns: dict[str, str] | None) -> list[dict]:
    """Read a table and give its columns the names that the adapter knows."""
    if adapter not in ADAPTERS:
        hint = nearest(adapter, list(ADAPTERS))
        raise UserError(f"adapter: no adapter of preferences {adapter!r}.{hint} Known: {', '.join(ADAPTERS)}.")
    names = columns or {}
    rows = read_table(path)
    require_columns(path, rows, [names.get(column, column) for column in ADAPTERS[adapter].columns] + list(names.values()))
    return [row | {ours: row.get(theirs) for ours, theirs in names.items()} for row in rows]


def user(text: object) -> list[dict]:
    """Return a prompt of one user message."""
    return [{"role": "user", "content": text}]


def whole(cell: object) -> object:
    """Return the whole number that a cell holds as a text (CSV) or as a float (a column with gaps); any other cell as it is."""
    if isinstance(cell, str) and re.fullmatch(r"-?\d+(\.0)?", cell):
        return int(float(cell))
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


def own_side(cell: object) -> str | None:
    """Return the side that a file gives a pair, None where it gives none; raise NoPair for another word."""
    side = label(cell)
    if side in ("val", "validation"):
        return "dev"
    if side not in (None, "train", "dev", "test"):
        raise NoPair("unknown split", side)
    return side


def helpsteer2(row: dict) -> Preference:
    """HelpSteer2's preference subset: strength -3 (response_1 is much better) to 3 (response_2 is)."""
    strength = whole(row["preference_strength"])
    if not isinstance(strength, int) or not -3 <= strength <= 3:
        raise NoPair("no preference_strength of -3 to 3", type(strength).__name__)
    if strength == 0:
        raise NoPair("tie")
    if fault := text_fault(row["prompt"]):
        raise NoPair(*fault)
    answers = (row["response_1"], row["response_2"])
    first, *turns = re.split(r"\n?<extra_id_1>(User|Assistant)\n", row["prompt"])  # a conversation's later turns are marked so
    prompt = user(first) + [{"role": role.lower(), "content": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]
    return Preference(prompt, *(answers if strength < 0 else answers[::-1]), split=own_side(row["split"]))


def hh_rlhf(row: dict) -> Preference:
    """HH-RLHF: two conversations "\\n\\nHuman: … \\n\\nAssistant: …" that differ in the last answer."""
    chosen, rejected = hh_messages(row["chosen"]), hh_messages(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise NoPair("different prompts")
    return Preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def hh_messages(conversation: object) -> list[dict]:
    """Split a conversation of HH-RLHF into messages; raise NoPair where turns do not alternate up to an answer."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", str(conversation))
    roles = turns[::2]
    if before.strip() or not roles or roles != ["Human", "Assistant"] * (len(roles) // 2):
        raise NoPair("turns do not alternate")
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[role], "content": text.strip()} for role, text in zip(roles, turns[1::2], strict=True)]


def llmbar(row: dict) -> Preference:
    """LLMBar: `label` says which of output_1 and output_2 is better."""
    better = whole(row["label"])
    if better not in (1, 2):
        raise NoPair("no label of 1 or 2", str(better))
    answers = (row["output_1"], row["output_2"])
    return Preference(user(row["input"]), *(answers if better == 1 else answers[::-1]), split="test")


def rewardbench(row: dict) -> Preference:
    """RewardBench: the subset is kept, by which its sections are scored."""
    return Preference(
        user(row["prompt"]), row["chosen"], row["rejected"], label(row["chosen_model"]), label(row["rejected_model"]),
        subset=label(row["subset"]), split="test",
    )  # fmt: skip


PRINCIPLES = ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")  # as the published columns name them


def pairs_psychocounsel(row: dict) -> Preference:
    """PsychoCounsel-Preference as its authors published it: a client speech, two answers, their models and seven ratings each.

    A release of this pipeline has these columns and more, of which topic and the responses' ids are kept.
    """
    if fault := text_fault(row["question"]):
        raise NoPair(*fault)
    speech = normalise(row["question"])
    if not speech:
        raise NoPair("empty")
    scores = {role: {name: whole(row[f"{role}_{name}_rating"]) for name in PRINCIPLES} for role in ("chosen", "rejected")}
    for rating in (*scores["chosen"].values(), *scores["rejected"].values()):
        if rating not in (1, 2, 3, 4, 5):
            raise NoPair("no rating of 1 to 5", str(rating))
    return Preference(
        user(speech), row["chosen"], row["rejected"], label(row["chosen_model"]), label(row["rejected_model"]),
        scores["chosen"], scores["rejected"], speech=speech, topic=label(row.get("topic")), key=label(row.get("ID")),
        chosen_id=known_id(row.get("chosen_id")), rejected_id=known_id(row.get("rejected_id")),
    )  # fmt: skip


def known_id(cell: object) -> str | None:
    """Return an id of ours; None for anything else."""
    return cell if isinstance(cell, str) and re.fullmatch("[0-9a-f]{16}", cell) else None


def chosen_rejected(row: dict) -> Preference:
    """Any table with chosen and rejected, and prompt where these do not hold the conversation.

    Models, subset, split, topic and key are taken where there are such columns.
    """
    if row.get("prompt") is not None:
        prompt = messages(row["prompt"]) if isinstance(row["prompt"], list) else user(row["prompt"])
    elif isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        prompt = messages(row["chosen"])[:-1]
        if prompt != messages(row["rejected"])[:-1]:
            raise NoPair("different prompts")
    else:
        prompt = []
    if not prompt:
        raise NoPair("no prompt")
    return Preference(
        prompt, last_text(row["chosen"]), last_text(row["rejected"]), label(row.get("chosen_model")), label(row.get("rejected_model")),
        subset=label(row.get("subset")), split=own_side(row.get("split")), topic=label(row.get("topic")), key=label(row.get("key")),
    )  # fmt: skip


def messages(value: list) -> list[dict]:
    """Return a list of messages without other fields than role and content; raise NoPair where it is none."""
    roles = ("system", "user", "assistant")
    if not value or not all(isinstance(message, dict) and message.get("role") in roles and "content" in message for message in value):
        raise NoPair("not a list of messages")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def last_text(answer: object) -> object:
    """Return an answer's text, be it a text or a list of messages whose last one is the answer."""
    return messages(answer)[-1]["content"] if isinstance(answer, list) else answer


@dataclass(frozen=True)
class PreferenceAdapter:
    """How to read a row, and the columns that it needs."""

    read: Callable[[dict], Preference]
    columns: tuple[str, ...]


ADAPTERS = {
    "helpsteer2": PreferenceAdapter(helpsteer2, ("split", "prompt", "response_1", "response_2", "preference_strength")),
    "hh_rlhf": PreferenceAdapter(hh_rlhf, ("chosen", "rejected")),
    "llmbar": PreferenceAdapter(llmbar, ("input", "output_1", "output_2", "label")),
    "rewardbench": PreferenceAdapter(rewardbench, ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset")),
    "pairs_psychocounsel": PreferenceAdapter(
        pairs_psychocounsel,
        (
            "question",
            "chosen",
            "rejected",
            "chosen_model",
            "rejected_model",
            *(f"{r}_{p}_rating" for r in ("chosen", "rejected") for p in PRINCIPLES),
        ),
    ),
    "chosen_rejected": PreferenceAdapter(chosen_rejected, ("chosen", "rejected")),
}
