"""Strict parsers of what judges write: one JSON object, alone or in one ```json fence, with exactly the expected keys.

Anything else is a ValueError with a reason that does not quote the text. Nothing is guessed or repaired: a malformed answer
is asked again (chat.py), and a parser bug never costs an API call, since raw texts are kept apart from their parse.
"""

import json
from collections.abc import Iterable

FENCE = ("```json", "```")
JSON_SPACE = " \t\r\n"


def parse_ratings(raw: str, n: int) -> list[tuple[int, str]]:
    """Return (score, rationale) of responses 1 to n (paper, Box 7: response_1_rating, rationale_1, …)."""
    return ratings_in(read_json(raw), n)


def parse_ratings_together(raw: str, n: int, principles: list[str]) -> dict[str, list[tuple[int, str]]]:
    """Return principle -> (score, rationale) of responses 1 to n, from one answer on all principles (protocol "together")."""
    answer, found = with_keys(read_json(raw), principles), {}
    for principle in principles:
        try:
            found[principle] = ratings_in(answer[principle], n)
        except ValueError as error:
            raise ValueError(f"{principle}: {error}") from None
    return found


def ratings_in(answer: object, n: int) -> list[tuple[int, str]]:
    """Return (score, rationale) of responses 1 to n from an object with Box 7's keys."""
    answer = with_keys(answer, [key for i in range(1, n + 1) for key in (f"response_{i}_rating", f"rationale_{i}")])
    return [(whole_number(answer, f"response_{i}_rating", 1, 5), text(answer, f"rationale_{i}")) for i in range(1, n + 1)]


def parse_better(raw: str) -> tuple[int, str]:
    """Return which of two responses is the better (1 or 2) and why; the rationale may be missing, then it is empty."""
    answer = with_keys(read_json(raw), ["better"], optional=["rationale"])
    return whole_number(answer, "better", 1, 2), text(answer, "rationale") if "rationale" in answer else ""


def parse_topic(raw: str, allowed: Iterable[str]) -> str:
    """Return the chosen topic, spelled as in `allowed`."""
    topic = text(with_keys(read_json(raw), ["topic"]), "topic")
    if topic not in set(allowed):
        raise ValueError("topic is none of the topics that were offered")
    return topic


def read_json(raw: str) -> object:
    """Read the one JSON value of an answer; no object in it names a key twice."""
    body = raw.strip(JSON_SPACE)
    if body.startswith(FENCE[0]) and body.endswith(FENCE[1]):
        body = body[len(FENCE[0]) : -len(FENCE[1])]
    if not body:
        raise ValueError("the answer is empty")
    try:
        return json.loads(body, object_pairs_hook=without_duplicates, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("not one JSON object: nested too deeply") from None


def with_keys(answer: object, required: list[str], optional: Iterable[str] = ()) -> dict:
    """Return an object that has exactly these keys; raise ValueError for anything else."""
    if not isinstance(answer, dict):
        raise ValueError(f"not a JSON object but a {type(answer).__name__}")
    if missing := [key for key in required if key not in answer]:
        raise ValueError(f"missing: {', '.join(missing)}")
    if extra := len(answer.keys() - {*required, *optional}):
        raise ValueError(f"{extra} unexpected key{'s' if extra > 1 else ''}")
    return answer


def whole_number(answer: dict, key: str, low: int, high: int) -> int:
    """Return an integer within bounds; 4.0, "4" and true are none."""
    value = answer[key]
    if type(value) is not int:
        raise ValueError(f"{key} is no integer but a {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{key} is not within {low} to {high}")
    return value


def text(answer: dict, key: str) -> str:
    """Return a string that can be written as UTF-8."""
    value = answer[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is no string but a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half of a surrogate pair") from None
    return value


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """Build an object; JSON readers keep the last of two equal keys in silence, this one refuses."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def refuse_constant(name: str) -> None:
    """Refuse NaN and the infinities, which Python reads but JSON does not know."""
    raise ValueError(f"{name} is not JSON")


def ratings_schema(n: int) -> dict:
    """Return the JSON Schema of a rating of n responses, for structured output."""
    score = {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    string = {"type": "string"}
    return closed_object({k: v for i in range(1, n + 1) for k, v in ((f"response_{i}_rating", score), (f"rationale_{i}", string))})


def ratings_together_schema(n: int, principles: Iterable[str]) -> dict:
    """Return the JSON Schema of a rating of n responses on all principles at once."""
    return closed_object({principle: ratings_schema(n) for principle in principles})


def better_schema(with_rationale: bool) -> dict:
    """Return the JSON Schema of a comparison of two responses; the judge gives its reason first, the ranker none."""
    rationale = {"rationale": {"type": "string"}} if with_rationale else {}
    return closed_object(rationale | {"better": {"type": "integer", "enum": [1, 2]}})


def topic_schema(allowed: Iterable[str]) -> dict:
    """Return the JSON Schema of a choice of topic."""
    return closed_object({"topic": {"type": "string", "enum": list(allowed)}})


def closed_object(properties: dict) -> dict:
    """Return the schema of an object with exactly these keys: what strict structured output asks for."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
