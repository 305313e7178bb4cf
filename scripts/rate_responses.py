"""Have a judge rate the responses to each client speech on the seven principles (paper, sections 3.2 and 3.3, Box 7).

One request per speech and principle, with all responses to the speech in it. The order of the responses is a seeded shuffle
of its own for each speech, the same for all principles, and is recorded. The requests of one speech follow each other and
share everything but the principle, which comes last, so that a server's prefix cache serves them.
A speech with fewer than two responses is left out and counted. Answers are kept as they came; parse_ratings.py reads them.
"""

import itertools
from collections import defaultdict

from pydantic import Field

from psychocounsel.asking import AskSettings, Principle, add_request_arguments, ask
from psychocounsel.chat import ChatAnswer, ChatRequest, Lazy
from psychocounsel.errors import UserError
from psychocounsel.models import chat_messages
from psychocounsel.parsing import parse_ratings, ratings_schema
from psychocounsel.prompts import render
from psychocounsel.sampling import hash_order
from psychocounsel.stage import command_line, stage


class RateSettings(AskSettings):
    """The judge, its principles and the seed of the order."""

    principles: list[Principle] = Field(description="id, name, definition and aspects of each principle")
    seed: int = Field(description="seed of the order of responses and of the judge's sampling")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, RateSettings)
    parser.add_argument("--speeches", required=True, help="client speeches")
    parser.add_argument("--responses", required=True, nargs="+", help="files of responses, one a model")
    parser.add_argument("--out", required=True, help="the judge's raw answers, one a speech and principle")
    add_request_arguments(parser)
    with stage(parser) as run:
        speeches = {speech["speech_id"]: speech["text"] for speech in run.read(run.args.speeches, "speech")}
        responses = responses_by_speech(run, speeches)
        orders = {
            speech_id: shown_order(texts, speech_id, run.settings.seed) for speech_id, texts in sorted(responses.items()) if len(texts) >= 2
        }
        run.account("speeches", len(speeches), len(orders), {"fewer than two responses": len(speeches) - len(orders)})

        principles = {principle.id: principle for principle in run.settings.principles}
        places = list(itertools.product(orders, sorted(principles)))  # in the order of the output, which is written as it is read

        def request(place: tuple[str, str]) -> ChatRequest:
            speech_id, principle = place
            texts = [responses[speech_id][response_id] for response_id in orders[speech_id]]
            return rating_request(speech_id, speeches[speech_id], texts, principles[principle], run.settings)

        answers, _ = ask(run, Lazy(places, request), check=lambda request, raw: parse_ratings(raw, len(request.task["responses"])))
        rows = (rating_answer(answer, orders, run.settings.model.name) for answer in answers)
        run.write(run.args.out, rows, "rating_answer")


def rating_answer(answer: ChatAnswer, orders: dict[str, list[str]], judge: str) -> dict:
    """Return the record of an answer."""
    speech_id, _, principle = answer.id.partition("/")
    return {
        "speech_id": speech_id,
        "principle": principle,
        "judge": judge,
        "order": orders[speech_id],
        "raw": answer.text,
        "usage": answer.usage,
        "request_key": answer.request_key,
        "served_model": answer.served_model,
    }


def responses_by_speech(run, speeches: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return speech id -> response id -> text; raise UserError for a response to a speech that is not there, or that stands twice."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for file in run.args.responses:
        for response in run.read(file, "response"):
            speech_id, response_id = response["speech_id"], response["response_id"]
            if speech_id not in speeches:
                raise UserError(f"{file}: response {response_id} answers speech {speech_id}, which is not in {run.args.speeches}")
            if response_id in found[speech_id]:
                raise UserError(f"{file}: response {response_id} stands twice; give each file once")
            found[speech_id][response_id] = response["text"]
    return found


def shown_order(response_ids: dict[str, str], speech_id: str, seed: int) -> list[str]:
    """Return the order in which the judge sees the responses to a speech: by hash, whatever the order of files and rows."""
    return hash_order(response_ids, seed, "rating order", speech_id)


def rating_request(speech_id: str, speech: str, texts: list[str], principle: Principle, settings: RateSettings) -> ChatRequest:
    """Return the request that rates the responses to one speech on one principle."""
    prompt = render(settings.prompt, client_speech=speech, responses=texts, principle=principle)
    task = {"kind": "rate", "speech": speech, "responses": texts, "principle": principle.id}
    return ChatRequest(
        id=f"{speech_id}/{principle.id}",
        messages=chat_messages(settings.model, prompt),
        task=task,
        seed=settings.seed,
        response_schema=ratings_schema(len(texts)),
        group=speech_id,
    )


if __name__ == "__main__":
    main()
