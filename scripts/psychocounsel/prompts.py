"""Prompt templates: Jinja text whose comments (the source of the wording) reach no model."""

from functools import cache

import jinja2

SPEECH_LABEL = "Client Speech:"  # stands before the speech in the responding prompt (Box 7)


@cache
def _template(text: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(text)


def render(template: str, **variables: object) -> str:
    """Fill a prompt template; an unknown variable raises jinja2.UndefinedError."""
    return _template(template).render(**variables).strip()


def client_speech(prompt: list[dict]) -> str:
    """Return the client's words from a pair's prompt: what follows the label of Box 7; the whole last turn where there is none."""
    last = prompt[-1]["content"]
    _, label, speech = last.partition(SPEECH_LABEL)
    return speech.strip() if label else last
