"""Remove the weights of a policy's checkpoints that no later stage needs (docs/disk.md).

Given all rounds of a training up to one whose checkpoints have been read by all who read them: the next round, the dev scores, the
judged answers, the assessments. What stays is the best of them on the dev pairs, which may become the policy, and with keep_last the
newest, from which a further round would go on. Of the others the manifest stays, with the sha256 of every file, and beside it the mark
manifest.json.removed; so what was made from them can still be verified, and stages that would read them for nothing new adopt what they
made before. The files go wherever the same model lies: in the results, in the trainings' resume folders, in the cache of outputs. But
those in the cache stay where another run that shares it has the model, too: they take no room of their own there, and it may adopt them.

    python scripts/remove_checkpoints.py --checkpoints dpo/iteration-1/checkpoints.json --round-scores dpo/iteration-1/dev_scores.json \\
        --resume-dirs work/dpo.1 --cache work/cache --out dpo/iteration-1/removed.json
"""

import shutil
from collections import Counter
from pathlib import Path

import orjson
from pydantic import Field

from psychocounsel.checkpoints import Checkpoint, add_round_arguments, best, read_rounds
from psychocounsel.errors import UserError
from psychocounsel.model_folders import model_files, remove_files
from psychocounsel.records import file_sha256
from psychocounsel.stage import Settings, Stage, command_line, log, stage


class RemovalSettings(Settings):
    """What stays besides the best."""

    keep_last: bool = Field(False, description="whether the last checkpoint of the last round stays: a further round would start from it")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, RemovalSettings)
    add_round_arguments(parser)
    parser.add_argument("--resume-dirs", required=True, nargs="+", type=Path, help="resume folders of the same rounds' trainings")
    parser.add_argument("--cache", required=True, type=Path, help="folder in which finished outputs are kept (--reuse of the training)")
    parser.add_argument("--out", required=True, type=Path, help="JSON: the checkpoints that stay, and those that are removed")
    with stage(parser) as run:
        checkpoints = read_rounds(run)
        if len(run.args.resume_dirs) != len(run.args.checkpoints):
            raise UserError("--resume-dirs: one for each list of checkpoints is expected")
        kept = [best(checkpoints), *(checkpoints[-1:] if run.settings.keep_last else [])]
        going = [checkpoint for checkpoint in checkpoints if checkpoint.sha256 not in {one.sha256 for one in kept}]
        removed = [{**told(checkpoint), "bytes": remove(run, checkpoint)} for checkpoint in going]
        run.account("checkpoints", len(checkpoints), len(checkpoints) - len(removed), {"no longer needed": len(removed)})
        log.info("%d of %d checkpoints removed, %.1f GB", len(removed), len(checkpoints), sum(entry["bytes"] for entry in removed) / 1e9)
        stay = [told(checkpoint) for checkpoint in checkpoints if checkpoint not in going]
        run.write_json(run.args.out, {"kept": stay, "removed": removed})


def told(checkpoint: Checkpoint) -> dict:
    """Return what tells a checkpoint."""
    return {"checkpoint": checkpoint.manifest.as_posix(), "manifest_sha256": checkpoint.sha256}


def remove(run: Stage, checkpoint: Checkpoint) -> int:
    """Remove a checkpoint's files wherever they lie; return the bytes that its manifest counts. To do it again changes nothing."""
    if not checkpoint.manifest.is_file() or file_sha256(checkpoint.manifest) != checkpoint.sha256:
        raise UserError(f"{checkpoint.manifest}: not there, or not the one in its list of checkpoints; train the round again")
    size = sum(facts["bytes"] for facts in orjson.loads(checkpoint.manifest.read_bytes())["files"].values())
    remove_files(checkpoint.manifest)
    shutil.rmtree(run.args.resume_dirs[checkpoint.round] / f"model-{checkpoint.number}", ignore_errors=True)
    kept = [manifest.parent for manifest in run.args.cache.glob("*/*/manifest.json") if file_sha256(manifest) == checkpoint.sha256]
    if not linked_elsewhere(kept):
        for folder in kept:
            remove_files(folder / "manifest.json")
    return size


def linked_elsewhere(models: list[Path]) -> bool:
    """Say whether a file of these models, but for their manifests, has a hard link outside: in another run's results or trainings."""
    files = [path.stat() for folder in models for path in model_files(folder)]
    here = Counter(file.st_ino for file in files)
    return any(file.st_nlink > here[file.st_ino] for file in files)


if __name__ == "__main__":
    main()
