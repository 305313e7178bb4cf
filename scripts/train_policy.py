"""Train a policy on preference pairs by DPO (paper, section 4.2), and keep checkpoints evenly spaced over its steps.

Used for offline pairs and for each iteration of iterative DPO alike: --weights is the model to start from, --reference the one
to stay close to (the start, unless it is given). A training that was killed goes on by itself from --resume-dir; SIGTERM saves
and ends with code 75. On several GPUs put `torchrun --nproc-per-node gpu --` in place of `python`; the recipe's batch size is the
global one, whatever their number.

    python scripts/train_policy.py --pairs train.jsonl --weights base/manifest.json --resume-dir work/dpo --checkpoints dpo/checkpoints \\
        --out dpo/checkpoints.json --log dpo/training.json --settings '{"model": {...}, "recipe": {...}, "checkpoints": 8, "seed": 1}'
"""

import math
from functools import partial
from pathlib import Path

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.model_folders import link_model
from psychocounsel.models import ModelSpec
from psychocounsel.recipes import PolicyRecipe, check_pairs, checkpoint_steps, deepspeed_files, optimizer_steps, training_order
from psychocounsel.records import file_sha256
from psychocounsel.stage import Settings, add_reuse_argument, command_line, stage


class PolicySettings(Settings):
    """How a policy is trained."""

    model: ModelSpec = Field(description="chat model that is trained, an entry of models.yaml")
    recipe: PolicyRecipe = Field(description="how to train, a file of config/train")
    checkpoints: int = Field(description="models to keep, evenly spaced over the steps, the last one at the end", ge=1)
    seed: int = Field(description="seed of the order of the pairs")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, PolicySettings)
    parser.add_argument("--pairs", required=True, nargs="+", type=Path, help="pair records to train on")
    parser.add_argument("--weights", type=Path, help="manifest of local weights to start from (default: the model's own, from the Hub)")
    parser.add_argument("--reference", type=Path, help="manifest of the reference model (default: the start)")
    parser.add_argument("--resume-dir", required=True, type=Path, help="folder for what a later start can take up")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the checkpoints: 1/manifest.json, 2/manifest.json, …")
    parser.add_argument("--out", required=True, type=Path, help="JSON: the checkpoints with their steps and the sha256 of their manifests")
    parser.add_argument("--log", required=True, type=Path, help="JSON: loss, rewards/accuracies, rewards/margins, … by step")
    add_reuse_argument(parser)
    with stage(parser) as run:
        args = run.args
        manifests = [args.checkpoints / str(number) / "manifest.json" for number in range(1, run.settings.checkpoints + 1)]
        inputs = [*args.pairs, args.weights, args.reference, *deepspeed_files(run.settings.recipe)]
        if run.adopts(inputs, [args.out, args.log, *manifests]):
            return
        from transformers import AutoModelForCausalLM
        from trl import DPOConfig

        from psychocounsel import rewards, trainers, training

        spec, recipe, seed = run.settings.model, run.settings.recipe, run.settings.seed
        pairs = [pair for path in run.args.pairs for pair in run.read(path, "pair")]
        check_pairs(pairs)
        weights = run.model(run.args.weights) if run.args.weights else None
        reference = run.model(run.args.reference) if run.args.reference else weights
        tokenizer = rewards.load_tokenizer(spec, weights)
        rows, cut = rewards.policy_rows(tokenizer, spec, pairs, recipe.max_length)
        if not rows:
            raise UserError(f"every prompt fills the recipe's max_length of {recipe.max_length} tokens; raise it")
        steps = optimizer_steps(recipe, len(rows))
        kept_after = checkpoint_steps(steps, run.settings.checkpoints)
        shared = trainers.shares_start(rewards.load_config(spec, weights), recipe.max_length)
        lengths = [trainers.line_lengths(row, shared) for row in rows]
        order = training_order([row["pair_id"] for row in rows], [max(pair) for pair in lengths], steps, recipe.batch_size, seed)
        dropped = {"prompt fills max_length": len(pairs) - len(rows), "not reached in max_steps": len(rows) - len(set(order))}
        run.account("pairs", len(pairs), len(set(order)), dropped)
        run.note(cut_pairs=cut, checkpoint_steps=kept_after)
        training.note_padding(run, lengths, order)

        options = training.arguments(run, steps)
        work = training.Work(run.args.resume_dir, training.identity(run), models=run.settings.checkpoints)
        if not work.finished():
            config = DPOConfig(**options, max_length=recipe.max_length, beta=recipe.beta, loss_type=["sigmoid"])
            load, dtype = partial(training.start_model, AutoModelForCausalLM, spec, seed=seed), training.start_dtype(recipe)
            start, tied = partial(load, weights), same_model(weights, reference)
            model = start(dtype=dtype)
            # Where they are the same model, an adapter that is switched off leaves the reference.
            frozen = None if recipe.lora and tied else load(reference, dtype=dtype)
            used, dataset = training.in_order(rows, order)
            trainer = trainers.PolicyTrainer(
                rows=used, shared=shared, model=model, ref_model=frozen, args=config, train_dataset=dataset,
                processing_class=tokenizer, peft_config=training.adapter(recipe),
            )  # fmt: skip
            del frozen  # the trainer reads it once and lets it go
            # A policy that is still its own reference tells no answer from another: -log sigmoid(0).
            training.train(trainer, work, kept_after, start, first_loss=math.log(2) if tied else None)
        training.first_process_only()
        listed = []
        for number, (manifest, folder, step) in enumerate(zip(manifests, work.models, kept_after, strict=True), start=1):
            link_model(folder, run.output_model(manifest))
            listed.append({"checkpoint": number, "step": step, "manifest_sha256": file_sha256(folder / "manifest.json")})
        run.write_json(run.args.out, listed)
        run.write_json(run.args.log, work.entries())


def same_model(one: Path | None, other: Path | None) -> bool:
    """Say whether two folders hold the same model; None stands for the one from the Hub."""
    if one is None or other is None:
        return one is other
    return (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


if __name__ == "__main__":
    main()
