"""Train a Bradley-Terry reward model from a chat model on preference pairs (paper, section 4.1).

The chat model's vocabulary head gives way to a head with one output, the reward, read at the end of the conversation.
A training that was killed goes on by itself from --resume-dir; SIGTERM saves and ends with code 75. On several GPUs put
`torchrun --nproc-per-node gpu --` in place of `python`; the recipe's batch size is the global one, whatever their number.

    python scripts/train_reward_model.py --pairs train.jsonl --dev dev.jsonl --weights base/manifest.json --resume-dir work/reward \\
        --out reward/manifest.json --log reward.log.json --settings '{"model": {...}, "recipe": {...}, "seed": 1}'
"""

from functools import partial
from pathlib import Path

from pydantic import Field

from psychocounsel.model_folders import link_model
from psychocounsel.models import ModelSpec
from psychocounsel.recipes import Recipe, check_pairs, deepspeed_files, optimizer_steps, training_order
from psychocounsel.stage import Settings, add_reuse_argument, command_line, log, stage


class RewardModelSettings(Settings):
    """How a reward model is trained."""

    model: ModelSpec = Field(description="chat model to start from, an entry of models.yaml")
    recipe: Recipe = Field(description="how to train, a file of config/train")
    seed: int = Field(description="seed of the new head and of the order of the pairs")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, RewardModelSettings)
    parser.add_argument("--pairs", required=True, nargs="+", type=Path, help="pair records to train on")
    parser.add_argument("--dev", required=True, nargs="+", type=Path, help="pair records for the accuracy at the end")
    parser.add_argument("--weights", type=Path, help="manifest of local weights to start from (default: the model's own, from the Hub)")
    parser.add_argument("--resume-dir", required=True, type=Path, help="folder for what a later start can take up")
    parser.add_argument("--out", required=True, type=Path, help="manifest of the reward model")
    parser.add_argument(
        "--log", required=True, type=Path, help="JSON: loss, accuracy and gradient norm by step; the last entry is the dev accuracy"
    )
    add_reuse_argument(parser)
    with stage(parser) as run:
        inputs = [*run.args.pairs, None, *run.args.dev, run.args.weights, *deepspeed_files(run.settings.recipe)]
        if run.adopts(inputs, [run.args.out, run.args.log]):
            return
        from transformers import AutoModelForSequenceClassification
        from trl import RewardConfig

        from psychocounsel import rewards, trainers, training

        spec, recipe, seed = run.settings.model, run.settings.recipe, run.settings.seed
        pairs = [pair for path in run.args.pairs for pair in run.read(path, "pair")]
        check_pairs(pairs)
        dev = [pair for path in run.args.dev for pair in run.read(path, "pair")]
        weights = run.model(run.args.weights) if run.args.weights else None
        tokenizer = rewards.load_tokenizer(spec, weights)
        rows, cut = rewards.reward_rows(tokenizer, spec, pairs, recipe.max_length)
        steps = optimizer_steps(recipe, len(rows))
        shared = trainers.shares_start(rewards.load_config(spec, weights), recipe.max_length)
        lengths = [trainers.line_lengths(row, shared) for row in rows]
        order = training_order([row["pair_id"] for row in rows], [max(pair) for pair in lengths], steps, recipe.batch_size, seed)
        run.account("pairs", len(pairs), len(set(order)), {"not reached in max_steps": len(rows) - len(set(order))})
        run.note(cut_conversations=cut)
        training.note_padding(run, lengths, order)

        options = training.arguments(run, steps)
        work = training.Work(run.args.resume_dir, training.identity(run), models=1)
        if not work.finished():
            config = RewardConfig(**options, max_length=None)  # the rows are cut to length; trl would leave out the long ones
            start = partial(training.start_model, AutoModelForSequenceClassification, spec, weights, seed, num_labels=1)
            model = start(dtype=training.start_dtype(recipe))
            if recipe.lora:
                model.score.float()  # it learns, as the adapter does
            _, dataset = training.in_order(rows, order)
            trainer = trainers.RewardModelTrainer(
                shared=shared, model=model, args=config, train_dataset=dataset, processing_class=tokenizer,
                peft_config=training.adapter(recipe, head="score"),
            )  # fmt: skip
            training.train(trainer, work, [steps], start)
            del model, trainer
            trainers.free_memory()  # the saved model is read next
        training.first_process_only()
        link_model(work.models[0], run.output_model(run.args.out))
        run.write_json(run.args.log, [*work.entries(), dev_entry(work.models[0], spec, recipe, dev)])


def dev_entry(model_folder: Path, spec: ModelSpec, recipe: Recipe, dev: list[dict]) -> dict:
    """Return the share of dev pairs that the saved model ranks right, and their mean margin; null where there is no dev pair."""
    from psychocounsel import rewards

    if not dev:
        return {"dev_pairs": 0, "dev_accuracy": None, "dev_margin": None}
    tokenizer = rewards.load_tokenizer(spec, model_folder)
    model = rewards.load_reward_model(spec, model_folder, tokenizer.pad_token_id)
    rows, _ = rewards.reward_rows(tokenizer, spec, dev, recipe.max_length)
    margins = [c - r for c, r in rewards.pair_rewards(model, spec, rows, tokenizer.pad_token_id, recipe.per_device_batch_size)]
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    log.info("dev: %d pairs, accuracy %.3f", len(dev), accuracy)
    return {"dev_pairs": len(dev), "dev_accuracy": accuracy, "dev_margin": sum(margins) / len(margins)}


if __name__ == "__main__":
    main()
