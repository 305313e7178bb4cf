"""Have one model answer client speeches (paper, section 3.3: the pool; section 4.2: the policies and their opponent).

The speeches are those that the model was assigned, those of one split, or all. A model answers through its endpoint, from
local weights (--weights), or from a file of answers that were recorded elsewhere (--recorded, joined by the speech's key
in its source). With --length-of each speech is asked a second time, with a prompt that asks for as many words as another
model's answer to it has (the paper's comparison at equal length).

An empty answer is asked again and then a failure; an answer cut off at max_tokens is kept, marked by its finish_reason.

    python scripts/generate_responses.py --speeches speeches.jsonl --split test --settings '{"model": {...}, "prompt": "…", "seed": 1}' \\
        --endpoints config/endpoints.yaml --journal work/demo/gpt-4o.jsonl --out answers.jsonl --failed answers.failed.jsonl
"""

from collections.abc import Collection

from pydantic import Field

from psychocounsel.asking import add_endpoint_arguments, money, write_failures
from psychocounsel.chat import ChatAnswer, ChatFailure, ChatRequest, Lazy, complete
from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec, Part, chat_messages
from psychocounsel.prompts import render
from psychocounsel.records import content_hash
from psychocounsel.stage import Settings, Stage, command_line, log, stage

FREE, LENGTH = "free", "length"  # the two settings of the evaluation


class Recorded(Part):
    """How recorded answers are read."""

    adapter: str
    columns: dict = {}


class GenerateSettings(Settings):
    """Who answers, and what it is asked."""

    model: ModelSpec = Field(description="the model that answers: an entry of models.yaml")
    prompt: str = Field(description="text of the prompt template (Jinja) with client_speech")
    length_prompt: str | None = Field(None, description="the same with words, the length to keep to; for --length-of")
    samples: int = Field(1, description="answers to each speech, each with a seed of its own", ge=1)
    seed: int = Field(description="seed that every request's seed is made from")
    attempts: int = Field(3, description="an empty answer is asked again up to so many times in all", ge=1)
    max_failed_share: float = Field(0.01, description="the program fails if a greater share of requests has no answer", ge=0, le=1)
    recorded: Recorded | None = Field(None, description="adapter and columns of --recorded")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, GenerateSettings)
    parser.add_argument("--speeches", required=True, help="client speeches")
    parser.add_argument("--assignment", help="answer only the speeches that this file assigns to the model")
    parser.add_argument("--split", choices=["train", "dev", "test"], help="answer only the speeches of one split")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", help="manifest.json of local weights of the model; without it the model is found by its id")
    source.add_argument("--recorded", help="file of recorded answers: nothing is asked")
    parser.add_argument("--length-of", help="responses whose word counts the answers under the length constraint are to have")
    parser.add_argument("--out", required=True, help="the answers")
    parser.add_argument("--out-length", help="the answers under the length constraint; with --length-of")
    parser.add_argument("--failed", required=True, help="requests without an answer, with the reason")
    add_endpoint_arguments(parser)
    with stage(parser) as run:
        check_arguments(run)
        speeches = chosen_speeches(run)
        words = {FREE: dict.fromkeys(speeches)}  # setting -> speech id -> number of words to ask for
        if run.args.length_of:
            words[LENGTH] = word_counts(run, speeches)

        samples = range(run.settings.samples)
        places = {f"{s}/{setting}/{n}": (s, setting, n) for setting in words for s in words[setting] for n in samples}
        requests = Lazy(places, lambda request_id: speech_request(run.settings, speeches, words, request_id, *places[request_id]))
        recorded = run.args.recorded and not run.args.plan  # the plan of recorded answers is that of their endpoint: nothing is asked
        answers, failures = recorded_answers(run, speeches, requests) if recorded else asked_answers(run, requests)
        run.account("answers", len(requests), len(answers), {"no answer": len(failures)})
        cut_off = sum(answer.finish_reason == "length" for answer in answers)
        run.note(cut_off=cut_off)
        log.info("%d answers were cut off at max_tokens", cut_off)

        for setting, path in ((FREE, run.args.out), (LENGTH, run.args.out_length)):
            if path:  # the answers come in the order of the speeches, which is that of the file
                placed = ((answer, *places[answer.id]) for answer in answers)
                rows = (
                    response(run.settings.model.name, answer, speech_id, sample, words[setting][speech_id])
                    for answer, speech_id, of, sample in placed
                    if of == setting
                )
                run.write(path, rows, "response")
        write_failures(run, failures)


def check_arguments(run: Stage) -> None:
    """Raise UserError where arguments and settings that belong together do not stand together."""
    if bool(run.args.length_of) != bool(run.args.out_length) or bool(run.args.length_of) > bool(run.settings.length_prompt):
        raise UserError("an answer under a length constraint needs all of --length-of, --out-length and the setting length_prompt")
    if bool(run.args.recorded) != bool(run.settings.recorded):
        raise UserError("recorded answers need both: --recorded with the file, and the setting recorded with its adapter")
    if run.args.recorded and (run.args.length_of or run.settings.samples > 1):
        raise UserError("recorded answers are one a speech, without a length constraint: leave --length-of and samples out")


def chosen_speeches(run: Stage) -> dict[str, dict]:
    """Return the speeches to answer by id: those assigned to the model, of the split, or all."""
    speeches = {speech["speech_id"]: speech for speech in run.read(run.args.speeches, "speech")}
    chosen = speeches
    if run.args.assignment:
        assigned = [row["speech_id"] for row in run.read(run.args.assignment, "assignment") if row["model"] == run.settings.model.name]
        if unknown := set(assigned) - set(speeches):
            raise UserError(f"{run.args.assignment}: {len(unknown)} speeches are not in {run.args.speeches}, e.g. {min(unknown)}")
        chosen = {speech_id: speeches[speech_id] for speech_id in assigned}
    return {speech_id: speech for speech_id, speech in sorted(chosen.items()) if run.args.split in (None, speech["split"])}


def word_counts(run: Stage, speeches: dict[str, dict]) -> dict[str, int]:
    """Return the number of words of the other model's answer to each speech; a speech that it left unanswered is left out and counted."""
    rows = run.read(run.args.length_of, "response")
    words = {row["speech_id"]: len(row["text"].split()) for row in rows}
    if len(words) < len(rows):
        raise UserError(f"{run.args.length_of}: more than one answer to a speech; a length is taken from one")
    found = {speech_id: words[speech_id] for speech_id in speeches if speech_id in words}
    run.account("speeches with a length", len(speeches), len(found), {"no answer to take the length from": len(speeches) - len(found)})
    return found


def speech_request(
    settings: GenerateSettings, speeches: dict, words: dict, request_id: str, speech_id: str, setting: str, sample: int
) -> ChatRequest:
    """Return the request for one answer; the same speech and sample have the same seed in both settings."""
    text = speeches[speech_id]["text"]
    if setting == LENGTH:
        prompt = render(settings.length_prompt, client_speech=text, words=words[LENGTH][speech_id])
    else:
        prompt = render(settings.prompt, client_speech=text)
    seed = int(content_hash(settings.seed, speech_id, sample, digits=7), 16)  # below 2**28: every server takes it
    return ChatRequest(id=request_id, messages=chat_messages(settings.model, prompt), seed=seed)


def asked_answers(run: Stage, requests: Collection[ChatRequest]) -> tuple[Collection[ChatAnswer], Collection[ChatFailure]]:
    """Ask the model, in one go for both settings: a model that is served starts once."""
    if run.args.weights and not run.args.plan:
        run.knows(run.args.weights)  # answers that the journal holds need no model
    answers, failures, totals = complete(
        run.settings.model,
        requests,
        endpoints=run.args.endpoints,
        journal=run.args.journal,
        weights=run.args.weights,
        gpus=run.args.gpus,
        check=require_text,
        attempts=run.settings.attempts,
        max_failed_share=run.settings.max_failed_share,
        **money(run.args),
    )
    run.note(api=totals)
    return answers, failures


def require_text(request: ChatRequest, text: str) -> None:
    """Raise ValueError for an empty answer."""
    if not text.strip():
        raise ValueError("an empty answer")


def recorded_answers(
    run: Stage, speeches: dict[str, dict], requests: Collection[ChatRequest]
) -> tuple[list[ChatAnswer], list[ChatFailure]]:
    """Take the answers from a file, joined by the key of the speech in its source."""
    from psychocounsel.adapters import read_answers

    texts = read_answers(run.settings.recorded.adapter, run.uses(run.args.recorded), run.settings.recorded.columns)
    answers, failures = [], []
    for request in requests:
        text = texts.get(speeches[request.id.partition("/")[0]]["source_key"], "")
        key = content_hash({"recorded": run.settings.model.id, "messages": request.messages, "text": text})
        if text.strip():
            answers.append(ChatAnswer(request.id, key, text, finish_reason=None, usage=None, served_model=None))
        else:
            failures.append(ChatFailure(request.id, key, "no recorded answer", []))
    if len(failures) > run.settings.max_failed_share * len(requests):
        raise UserError(
            f"{run.args.recorded}: no answer to {len(failures)} of {len(requests)} speeches, more than max_failed_share ="
            f" {run.settings.max_failed_share:g} allows; the file's keys must be those of the speeches' source (source_key)"
        )
    return answers, failures


def response(model: str, answer: ChatAnswer, speech_id: str, sample: int, target_words: int | None) -> dict:
    """Return the record of one answer."""
    return {
        "response_id": content_hash(speech_id, model, answer.request_key, digits=16),
        "speech_id": speech_id,
        "model": model,
        "sample": sample,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "request_key": answer.request_key,
        "served_model": answer.served_model,
        "target_words": target_words,
    }


if __name__ == "__main__":
    main()
