"""The checkpoints of a policy's rounds as lists name them (checkpoints.json), their scores on the dev pairs, and the best of them."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from psychocounsel.errors import UserError
from psychocounsel.stage import Stage


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a training."""

    round: int  # its place among the rounds that were read, from 0
    number: int  # within its round, from 1
    manifest: Path
    sha256: str  # of the manifest
    score: dict = field(default_factory=dict)  # {"accuracy", "mean_margin"} on the dev pairs


def add_round_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of programs that read the rounds of a training with their scores."""
    parser.add_argument("--checkpoints", required=True, nargs="+", type=Path, help="lists of checkpoints, the first round's first")
    parser.add_argument("--round-scores", required=True, nargs="+", type=Path, help="scores of the same rounds on the dev pairs")


def read_checkpoints(run: Stage, path: Path, place: int = 0) -> list[Checkpoint]:
    """Return the checkpoints that a round's list names; their folders lie beside it."""
    entries = orjson.loads(run.uses(path).read_bytes())
    folder = path.with_suffix("")
    return [
        Checkpoint(place, entry["checkpoint"], folder / str(entry["checkpoint"]) / "manifest.json", entry["manifest_sha256"])
        for entry in entries
    ]


def read_rounds(run: Stage) -> list[Checkpoint]:
    """Return the checkpoints of all rounds with their scores; raise UserError where these are of other checkpoints."""
    lists, scores = run.args.checkpoints, run.args.round_scores
    if len(lists) != len(scores):
        raise UserError(f"{len(lists)} lists of checkpoints, but scores of {len(scores)} rounds: name those of the same rounds")
    found = []
    for place, (path, score_file) in enumerate(zip(lists, scores, strict=True)):
        checkpoints, scored = read_checkpoints(run, path, place), orjson.loads(run.uses(score_file).read_bytes())
        if [checkpoint.sha256 for checkpoint in checkpoints] != [score["manifest_sha256"] for score in scored]:
            raise UserError(f"{score_file}: not the scores of the checkpoints in {path}; score these again")
        for one, score in zip(checkpoints, scored, strict=True):
            measures = {key: value for key, value in score.items() if key != "manifest_sha256"}
            found.append(Checkpoint(one.round, one.number, one.manifest, one.sha256, measures))
    return found


def best(checkpoints: list[Checkpoint]) -> Checkpoint:
    """Return the checkpoint with the highest accuracy on the dev pairs; among equals the earliest."""
    return max(checkpoints, key=lambda checkpoint: checkpoint.score["accuracy"])
