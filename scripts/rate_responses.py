"""Have a judge rate the responses to each client speech on the seven principles (paper, sections 3.2 and 3.3, Box 7).

One request per speech and principle, with all responses to the speech in it (protocol one_by_one, the paper's); or one per
speech on all principles at once (protocol together). The order of the responses is a seeded shuffle of its own for each
speech, the same for all principles, and is recorded. The requests of one speech follow each other and share everything but
the principle, which comes last, so that a server's prefix cache serves them.
A speech with fewer than two responses is left out and counted. Answers are kept as they came; parse_ratings.py reads them.

To learn how far the judge agrees with itself, a sample of the speeches is rated again (assess_judge.py): `repeat` asks the
same requests once more, `reversed` shows each speech's responses in the reverse order.
"""

import itertools
from collections import defaultdict
from typing import Literal

from pydantic import Field

from psychocounsel.asking import AskSettings, Principle, add_request_arguments, ask
from psychocounsel.chat import ChatAnswer, ChatRequest, Lazy
from psychocounsel.errors import UserError
from psychocounsel.models import chat_messages
from psychocounsel.parsing import parse_ratings, parse_ratings_together, ratings_schema, ratings_together_schema
from psychocounsel.prompts import render
from psychocounsel.sampling import hash_order
from psychocounsel.stage import command_line, stage

TOGETHER = "together"  # stands where a principle stands: all of them in one call


class RateSettings(AskSettings):
    """The judge, its principles, how it is asked, and the seed of the order."""

    principles: list[Principle] = Field(description="id, name, definition and aspects of each principle")
    protocol: Literal["one_by_one", "together"] = Field(
        description="one_by_one: a call a principle, as the paper; together: one call for all"
    )
    seed: int = Field(description="seed of the order of responses, of the sample and of the judge's sampling")
    sample: int | None = Field(None, description="rate so many speeches alone, drawn by seed (null: all)", ge=1)
    reversed: bool = Field(False, description="show the responses in the reverse of their shuffled order")
    repeat: int = Field(0, description="0 for the first asking; another number asks anew what was asked before", ge=0)

    @property
    def principle_ids(self) -> list[str]:
        """The ids of the principles, sorted."""
        return sorted(principle.id for principle in self.principles)


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
        orders = shown_orders(responses, run.settings)
        few = sum(len(responses.get(speech_id, ())) < 2 for speech_id in speeches)
        dropped = {"fewer than two responses": few, "not in the sample": len(speeches) - few - len(orders)}
        run.account("speeches", len(speeches), len(orders), dropped)

        asked = run.settings.principle_ids if run.settings.protocol == "one_by_one" else [TOGETHER]
        places = list(itertools.product(orders, asked))  # in the order of the output, which is written as it is read

        def request(place: tuple[str, str]) -> ChatRequest:
            speech_id, asked = place
            texts = [responses[speech_id][response_id] for response_id in orders[speech_id]]
            return rating_request(speech_id, speeches[speech_id], texts, asked, run.settings)

        answers, _ = ask(run, Lazy(places, request), check=check_ratings)
        rows = (rating_answer(answer, orders, run.settings) for answer in answers)
        run.write(run.args.out, rows, "rating_answer")


def rating_answer(answer: ChatAnswer, orders: dict[str, list[str]], settings: RateSettings) -> dict:
    """Return the record of an answer."""
    speech_id, _, asked = answer.id.partition("/")
    return {
        "speech_id": speech_id,
        "protocol": settings.protocol,
        "principle": None if asked == TOGETHER else asked,
        "judge": settings.model.name,
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


def shown_orders(responses: dict[str, dict[str, str]], settings: RateSettings) -> dict[str, list[str]]:
    """Return the order in which the judge sees the responses, by speech; of speeches with two or more, all or the sample."""
    rated = sorted(speech_id for speech_id, texts in responses.items() if len(texts) >= 2)
    if settings.sample is not None:
        rated = sorted(hash_order(rated, settings.seed, "rated again")[: settings.sample])
    step = -1 if settings.reversed else 1
    return {speech_id: shown_order(responses[speech_id], speech_id, settings.seed)[::step] for speech_id in rated}


def shown_order(response_ids: dict[str, str], speech_id: str, seed: int) -> list[str]:
    """Return the shuffled order of the responses to a speech: by hash, whatever the order of files and rows."""
    return hash_order(response_ids, seed, "rating order", speech_id)


def rating_request(speech_id: str, speech: str, texts: list[str], asked: str, settings: RateSettings) -> ChatRequest:
    """Return the request that rates the responses to one speech on one principle, or on all of them."""
    task = {"speech": speech, "responses": texts}
    if asked == TOGETHER:
        prompt = render(settings.prompt, client_speech=speech, responses=texts, principles=settings.principles)
        task |= {"kind": "rate together", "principles": settings.principle_ids}
        schema = ratings_together_schema(len(texts), [principle.id for principle in settings.principles])  # in the order of the prompt
    else:
        principle = next(principle for principle in settings.principles if principle.id == asked)
        prompt = render(settings.prompt, client_speech=speech, responses=texts, principle=principle)
        task |= {"kind": "rate", "principle": asked}
        schema = ratings_schema(len(texts))
    return ChatRequest(
        id=f"{speech_id}/{asked}",
        messages=chat_messages(settings.model, prompt),
        task=task,
        repeat=settings.repeat,
        seed=settings.seed,
        response_schema=schema,
        group=speech_id,
    )


def check_ratings(request: ChatRequest, raw: str) -> None:
    """Raise ValueError where an answer does not hold the ratings that were asked for."""
    n = len(request.task["responses"])
    if request.task["kind"] == "rate":
        parse_ratings(raw, n)
    else:
        parse_ratings_together(raw, n, request.task["principles"])


if __name__ == "__main__":
    main()
