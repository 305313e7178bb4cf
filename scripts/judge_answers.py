"""Have a judge compare a policy's answers with the opponent's by the seven principles (paper, section 4.2).

One request per test speech and order of the two answers, with all principles in it (protocol together); or one per speech,
order and principle (protocol one_by_one), of which the seven of one comparison follow each other and share everything but
the principle, which comes last, so that a server's prefix cache serves them. A tie is not offered, as in the paper.
A test speech that one of the two did not answer is left out and counted. Answers are kept as they came; parse_judgements.py
reads them.
"""

import itertools
from typing import Literal

from pydantic import Field

from psychocounsel.asking import AskSettings, Principle, add_request_arguments, ask
from psychocounsel.chat import ChatAnswer, ChatRequest, Lazy
from psychocounsel.comparisons import comparison_name, comparison_place
from psychocounsel.errors import UserError
from psychocounsel.models import chat_messages
from psychocounsel.parsing import better_schema, parse_better
from psychocounsel.prompts import render
from psychocounsel.stage import command_line, stage


class JudgeSettings(AskSettings):
    """The judge, how it is asked, and the two sides that it compares."""

    principles: list[Principle] = Field(description="id, name, definition and aspects of each principle")
    protocol: Literal["together", "one_by_one"] = Field(description="together: one call on all principles; one_by_one: a call a principle")
    policy: str = Field(description="name of the policy")
    opponent: str = Field(description="name of the opponent")
    setting: Literal["free", "length"] = Field(description="free, or length for answers under a length constraint")
    seed: int = Field(description="seed of the judge's sampling")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, JudgeSettings)
    parser.add_argument("--speeches", required=True, help="speeches; those of the test split are judged")
    parser.add_argument("--answers", required=True, help="the policy's answers")
    parser.add_argument("--opponent", required=True, help="the opponent's answers")
    parser.add_argument("--out", required=True, help="the judge's raw answers, two a speech")
    add_request_arguments(parser)
    with stage(parser) as run:
        settings = run.settings
        speeches = {s["speech_id"]: s["text"] for s in run.read(run.args.speeches, "speech") if s["split"] == "test"}
        policy = answers_by_speech(run.read(run.args.answers, "response"), settings.policy, run.args.answers)
        opponent = answers_by_speech(run.read(run.args.opponent, "response"), settings.opponent, run.args.opponent)
        both = sorted(speeches.keys() & policy.keys() & opponent.keys())
        unanswered = len(speeches.keys() - policy.keys())
        lost = {"no answer of the policy": unanswered, "no answer of the opponent": len(speeches) - unanswered - len(both)}
        run.account("speeches", len(speeches), len(both), lost)

        asked = {None: None} if settings.protocol == "together" else {principle.id: principle for principle in settings.principles}
        places = {comparison_name(*place): place for place in itertools.product(both, (True, False), asked)}

        def request(name: str) -> ChatRequest:
            speech_id, policy_first, principle = places[name]
            texts = [policy[speech_id], opponent[speech_id]]
            return judging_request(name, speeches[speech_id], texts if policy_first else texts[::-1], asked[principle], settings)

        answers, _ = ask(run, Lazy(places, request), lambda request, raw: parse_better(raw), better_schema(with_rationale=True))
        rows = [judgement_answer(answer, *places[answer.id], settings) for answer in answers]
        run.write(run.args.out, rows, "judgement_answer", sort_by=comparison_place)


def judgement_answer(answer: ChatAnswer, speech_id: str, policy_first: bool, principle: str | None, settings: JudgeSettings) -> dict:
    """Return the record of an answer."""
    return {
        "speech_id": speech_id,
        "policy": settings.policy,
        "opponent": settings.opponent,
        "setting": settings.setting,
        "protocol": settings.protocol,
        "principle": principle,
        "judge": settings.model.name,
        "policy_first": policy_first,
        "raw": answer.text,
        "usage": answer.usage,
        "request_key": answer.request_key,
    }


def answers_by_speech(responses: list[dict], model: str, file: str) -> dict[str, str]:
    """Return speech id -> answer; raise UserError for an answer of another model, or a second one to a speech."""
    found: dict[str, str] = {}
    for response in responses:
        if response["model"] != model:
            raise UserError(f"{file}: response {response['response_id']} is by {response['model']!r}; expected answers of {model!r} alone")
        if response["speech_id"] in found:
            raise UserError(f"{file}: speech {response['speech_id']} has two answers; one is expected")
        found[response["speech_id"]] = response["text"]
    return found


def judging_request(name: str, speech: str, texts: list[str], principle: Principle | None, settings: JudgeSettings) -> ChatRequest:
    """Return the request that compares two answers in the order given, on one principle or on all."""
    prompt = render(settings.prompt, client_speech=speech, responses=texts, principle=principle, principles=settings.principles)
    task = {"kind": "judge", "speech": speech, "responses": texts, "principle": principle.id if principle else None}
    group = name.removesuffix(f"/{principle.id}") if principle else None
    return ChatRequest(id=name, messages=chat_messages(settings.model, prompt), task=task, seed=settings.seed, group=group)


if __name__ == "__main__":
    main()
