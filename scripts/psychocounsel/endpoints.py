"""Endpoints: where models are asked and how fast. Facts of a site and an account, part of no result's identity."""

import os
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from psychocounsel.errors import UserError, nearest

CODE_VERSION = 1  # counts in code fingerprints instead of this module's text


class BatchLimits(BaseModel):
    """What a Batch API takes; the defaults are OpenAI's, but for the queue, which differs by account."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    enqueued_tokens: int | None = None
    poll_s: float = 60
    wait: bool = True


class Endpoint(BaseModel):
    """One entry of endpoints.yaml (config/schemas/endpoints.schema.json describes the fields)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["openai", "batch", "serve", "local"]
    base_url: str | None = None
    api_key_env: str | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrency: int = Field(1, ge=1)
    timeout_s: float | None = Field(None, gt=0)
    max_retries: int = Field(0, ge=0)
    server: Literal["vllm", "transformers"] | None = None
    server_args: list[str] = []
    start_timeout_s: float | None = None
    batch: BatchLimits = BatchLimits()

    @model_validator(mode="after")
    def complete(self) -> "Endpoint":
        """Raise ValueError where the kind needs what is not there; without an address the openai package would use its own."""
        needed = {"serve": ("server", "start_timeout_s"), "local": ()}.get(self.kind, ("base_url",))
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"the kind {self.kind} needs {' and '.join(missing)}")
        return self

    @property
    def remote(self) -> bool:
        """Whether it is another's, reached at an address; one by one or by the Batch API, the same request gets the same answer."""
        return is_remote(self.kind)

    def api_key(self) -> str:
        """Return the key from the environment; raise UserError that names the variable where it is missing."""
        if self.api_key_env is None:
            return "none"  # the client wants some text
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError(f"the environment variable {self.api_key_env} is not set: it must hold the key for {self.base_url}")
        return key


def is_remote(kind: str) -> bool:
    """Whether endpoints of a kind are another's, where requests may cost money."""
    return kind in ("openai", "batch")


def is_snapshot(served_model: str, model: str) -> bool:
    """Whether an endpoint's name of what answered is that of a model, or of a dated snapshot of it; gpt-4o-mini is none of gpt-4o."""
    return re.fullmatch(rf"{re.escape(model)}(-\d+)*", served_model) is not None


def read_endpoint(path: Path, name: str | None) -> Endpoint:
    """Return one endpoint of a file; raise UserError where it is missing or wrong."""
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (FileNotFoundError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable file of endpoints ({error})") from None
    if name not in entries:
        raise UserError(f"{path}: no endpoint {name!r}.{nearest(name, list(entries))} It has {', '.join(entries)}.")
    try:
        return Endpoint.model_validate(entries[name])
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            field, words = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
            faults.append(f"{field}: {words}" if field else words)
        raise UserError(f"{path}: {name}: {'; '.join(faults)}") from None
