"""Have a judge compare a policy's answers with the opponent's by the seven principles (paper, section 4.2).

One request per test speech and order of the two answers, with all principles in it; a tie is not offered, as in the paper.
A test speech that one of the two did not answer is left out and counted. Answers are kept as they came; parse_judgements.py
reads them.
"""

from typing import Literal

from pydantic import Field

from psychocounsel.asking import AskSettings, Principle, add_request_arguments, ask
from psychocounsel.chat import ChatAnswer, ChatRequest, Lazy
from psychocounsel.errors import UserError
from psychocounsel.models import chat_messages
from psychocounsel.parsing import better_schema, parse_better
from psychocounsel.prompts import render
from psychocounsel.stage import command_line, stage


class JudgeSettings(AskSettings):
    """The judge, and the two sides that it compares."""

    principles: list[Principle] = Field(description="id, name, definition and aspects of each principle")
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

        places = {f"{s}/{order}": (s, order == "policy first") for s in both for order in ("policy first", "opponent first")}

        def request(request_id: str) -> ChatRequest:
            speech_id, policy_first = places[request_id]
            texts = [policy[speech_id], opponent[speech_id]]
            return judging_request(request_id, speeches[speech_id], texts if policy_first else texts[::-1], settings)

        answers, _ = ask(run, Lazy(places, request), lambda request, raw: parse_better(raw), better_schema(with_rationale=True))
        rows = [judgement_answer(answer, *places[answer.id], settings) for answer in answers]
        run.write(run.args.out, rows, "judgement_answer", sort_by=lambda row: (row["speech_id"], not row["policy_first"]))


def judgement_answer(answer: ChatAnswer, speech_id: str, policy_first: bool, settings: JudgeSettings) -> dict:
    """Return the record of an answer."""
    return {
        "speech_id": speech_id,
        "policy": settings.policy,
        "opponent": settings.opponent,
        "setting": settings.setting,
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


def judging_request(request_id: str, speech: str, texts: list[str], settings: JudgeSettings) -> ChatRequest:
    """Return the request that compares two answers in the order given."""
    prompt = render(settings.prompt, client_speech=speech, responses=texts, principles=settings.principles)
    task = {"kind": "judge", "speech": speech, "responses": texts}
    return ChatRequest(id=request_id, messages=chat_messages(settings.model, prompt), task=task, seed=settings.seed)


if __name__ == "__main__":
    main()
