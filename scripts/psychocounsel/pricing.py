"""What requests cost by list price (`price` in models.yaml), and how many tokens those will take that are still to be sent.

Prices are no part of any result's identity: programs are told the registry's files beside their settings (--prices).
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from psychocounsel.config import load_registry
from psychocounsel.endpoints import is_remote, is_snapshot

CODE_VERSION = 1  # no result depends on what it cost

CHARACTERS_PER_TOKEN = 4  # of English text, before an endpoint's own counts are known


def read_price(files: list[Path | str], model: str) -> dict | None:
    """Return a model's list price, in dollars a million tokens: input, cached_input, output; None where it has none."""
    return registry(tuple(map(Path, files))).get(model, {}).get("price") if files else None


@cache
def registry(files: tuple[Path, ...]) -> dict:
    """Return the models of a registry's files."""
    return load_registry(list(files), "models")


def cost(price: dict | None, tokens: dict) -> float | None:
    """Return what tokens cost in dollars, those of batches at their share of the price."""
    if price is None:
        return None
    dollars = list_price(price, tokens)
    if "batch" in tokens:
        dollars -= (1 - price.get("batch", 1)) * list_price(price, tokens["batch"])
    return round(dollars, 6)


def expected_cost(price: dict | None, tokens: dict, endpoint: str) -> float | None:
    """Return what tokens to come will cost in dollars, asked through an endpoint of this kind."""
    return cost(price, tokens | {"batch": tokens} if endpoint == "batch" else tokens)


def list_price(price: dict, tokens: dict) -> float:
    """Return what tokens cost in dollars without a discount; of those read, the cached ones have their own price, where there is one."""
    cached = tokens["cached_tokens"]
    cached_price = price["input"] if price["cached_input"] is None else price["cached_input"]
    dollars = (tokens["prompt_tokens"] - cached) * price["input"] + cached * cached_price + tokens["completion_tokens"] * price["output"]
    return dollars / 1_000_000


def usages(answers: Iterable[dict], model: str, endpoint: str) -> list[dict]:
    """Return the usage of a journal's answers; of a remote endpoint only that of the model with this id: another's answers differ."""
    remote = is_remote(endpoint)  # our own servers name a model by its place
    of_model = (answer for answer in answers if not remote or is_snapshot(answer["served_model"] or model, model))
    return [answer["usage"] for answer in of_model if answer["usage"]]


def expected_tokens(characters: list[int], seen: list[dict], per_character: float | None, longest_answer: int) -> dict:
    """Return the tokens that requests of so many characters will take.

    `seen` holds the usage of earlier answers: their mean answer and their share of cached tokens are expected again. Without any, each
    answer counts as the longest that the model may give, and nothing as cached: an upper bound.
    """
    read = sum(usage["prompt_tokens"] or 0 for usage in seen)
    answer = sum(usage["completion_tokens"] or 0 for usage in seen) / len(seen) if seen else longest_answer
    prompt = round(sum(characters) * (per_character or 1 / CHARACTERS_PER_TOKEN))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": round(len(characters) * answer),
        "cached_tokens": round(prompt * sum(usage["cached_tokens"] or 0 for usage in seen) / read) if read else 0,
    }
