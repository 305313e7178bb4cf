"""Endpoints: where models are asked and how fast. Facts of a site and an account, part of no result's identity."""

import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

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
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int = 1
    timeout_s: float | None = None
    max_retries: int = 0
    server: Literal["vllm", "transformers"] | None = None
    server_args: list[str] = []
    start_timeout_s: float | None = None
    batch: BatchLimits = BatchLimits()

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
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False))
        raise UserError(f"{path}: {name}: {faults}") from None
