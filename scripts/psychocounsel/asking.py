"""What the programs that ask a judge share: settings, arguments, and one call that accounts for every request."""

import argparse
from collections.abc import Callable, Collection

from pydantic import Field

from psychocounsel.chat import ChatAnswer, ChatFailure, ChatRequest, complete
from psychocounsel.models import ModelSpec, Part
from psychocounsel.stage import Settings, Stage


class AskSettings(Settings):
    """Settings of every program that asks a judge or a ranker."""

    model: ModelSpec = Field(description="the model that is asked: an entry of models.yaml")
    prompt: str = Field(description="text of the prompt template (Jinja)")
    attempts: int = Field(3, description="an unusable answer is asked again up to so many times in all", ge=1)
    max_failed_share: float = Field(
        0.01, description="the program fails if a greater share of requests stays without a usable answer", ge=0, le=1
    )


class Principle(Part):
    """A principle as a judge is told it."""

    id: str
    name: str
    definition: str
    aspects: list[str]


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every program that asks a model."""
    parser.add_argument("--weights", help="manifest.json of local weights of the model; without it the model is found by its id")
    parser.add_argument("--failed", required=True, help="requests without a usable answer, with the reason")
    add_endpoint_arguments(parser)


def add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every program that asks a model knows of the way to it, and of money."""
    parser.add_argument("--endpoints", required=True, help="file of addresses and rate limits (config/endpoints.yaml)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs over which vLLM spreads a model that it serves (default 1)")
    parser.add_argument("--journal", required=True, help="file that keeps every answer at once: after a crash nothing is asked twice")
    parser.add_argument("--prices", nargs="+", default=[], metavar="FILE", help="registry of models with list prices (config/models.yaml)")
    parser.add_argument(
        "--ledger", metavar="FILE", help="what all jobs of the run have spent, and what is in flight (work/<run>/spending.json)"
    )
    parser.add_argument("--budget", type=float, metavar="DOLLARS", help="nothing is sent that could take the ledger's sum past it")
    parser.add_argument("--plan", action="store_true", help="ask and write nothing: print requests left after the journal, tokens and cost")


def money(args: argparse.Namespace) -> dict:
    """Return what `chat.complete` is told of money."""
    return {"prices": args.prices, "ledger": args.ledger, "budget": args.budget, "plan": args.plan}


def ask(
    run: Stage, requests: Collection[ChatRequest], check: Callable[[ChatRequest, str], object], response_schema: dict | None = None
) -> tuple[Collection[ChatAnswer], Collection[ChatFailure]]:
    """Ask the model of the settings; account for requests and tokens, write the failures; return answers and failures in order."""
    settings, args = run.settings, run.args
    if args.weights and not args.plan:
        run.model(args.weights)
    answers, failures, totals = complete(
        settings.model,
        requests,
        endpoints=args.endpoints,
        journal=args.journal,
        weights=args.weights,
        gpus=args.gpus,
        response_schema=response_schema,
        check=check,
        attempts=settings.attempts,
        max_failed_share=settings.max_failed_share,
        **money(args),
    )
    run.note(api=totals)
    run.account("requests", rows_in=len(requests), rows_out=len(answers), dropped={"no usable answer": len(failures)})
    write_failures(run, failures)
    return answers, failures


def write_failures(run: Stage, failures: Collection[ChatFailure]) -> None:
    """Write the requests without a usable answer."""
    rows = [{"request_id": f.id, "request_key": f.request_key, "reason": f.reason, "raw": f.raw} for f in failures]
    run.write(run.args.failed, rows, "failure", sort_by="request_id")
