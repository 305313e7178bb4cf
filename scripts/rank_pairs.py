"""Have a language model tell the better answer of each preference pair (paper, section 4.1, Box 7: LLM-as-ranker).

Each pair is asked in both orders, so that the model's preference for a place can be told from its preference for an answer.
Answers are kept as they came; evaluate_rewards.py reads them.
"""

from psychocounsel.asking import AskSettings, add_request_arguments, ask
from psychocounsel.chat import ChatAnswer, ChatRequest, Lazy
from psychocounsel.models import chat_messages
from psychocounsel.parsing import better_schema, parse_better
from psychocounsel.prompts import client_speech, render
from psychocounsel.stage import command_line, stage


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, AskSettings)
    parser.add_argument("--pairs", required=True, help="preference pairs")
    parser.add_argument("--out", required=True, help="the model's raw answers, two a pair")
    add_request_arguments(parser)
    with stage(parser) as run:
        pairs = run.read(run.args.pairs, "pair")
        places = {
            f"{pair['pair_id']}/{order}": (pair, order == "chosen first") for pair in pairs for order in ("chosen first", "rejected first")
        }
        requests = Lazy(places, lambda request_id: ranking_request(request_id, *places[request_id], run.settings))
        answers, _ = ask(run, requests, lambda request, raw: parse_better(raw), better_schema(with_rationale=False))
        rows = [ranking_answer(answer, *places[answer.id], run.settings.model.name) for answer in answers]
        run.write(run.args.out, rows, "ranking_answer", sort_by=lambda row: (row["pair_id"], not row["chosen_first"]))


def ranking_answer(answer: ChatAnswer, pair: dict, chosen_first: bool, ranker: str) -> dict:
    """Return the record of an answer."""
    return {
        "pair_id": pair["pair_id"],
        "speech_id": pair["speech_id"],
        "ranker": ranker,
        "chosen_first": chosen_first,
        "raw": answer.text,
        "usage": answer.usage,
        "request_key": answer.request_key,
    }


def ranking_request(request_id: str, pair: dict, chosen_first: bool, settings: AskSettings) -> ChatRequest:
    """Return the request that ranks a pair in one order."""
    speech = client_speech(pair["prompt"])
    chosen, rejected = pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]
    texts = [chosen, rejected] if chosen_first else [rejected, chosen]
    prompt = render(settings.prompt, client_speech=speech, responses=texts)
    task = {"kind": "rank", "speech": speech, "responses": texts}
    return ChatRequest(id=request_id, messages=chat_messages(settings.model, prompt), task=task)


if __name__ == "__main__":
    main()
