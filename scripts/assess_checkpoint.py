"""Assess one checkpoint of a policy's training for over-optimisation: reward, distance from the base, length, repetition.

Of each answer to the monitored speeches: its reward and that of the opponent's answer, by the policy's reward model; tokens and
words; whether it was cut off at max_tokens; the share of repeated 4-grams; and in nats, over its tokens,

- log_ratio: log p(answer) under the policy minus under the base. Its mean estimates the KL divergence of the policy from the base
  (Schulman's k1, http://joschu.net/blog/kl-approx.html): unbiased, noisy, at times negative.
- kl: the sum over its places of the exact KL divergence between what both models would say next, given the answer so far. The same
  mean with less variance, never negative (the Rao-Blackwellised estimator of Amini et al. 2025, arXiv 2504.10637).

Both estimate KL(policy || base) where answers are sampled at temperature 1 with top_p 1. At the sampling that models are evaluated
with (models.yaml) they tell how far the policy is from the base on the answers that its users would see. The step counts
from the base, through all rounds of training; the base itself is checkpoint 0, from which every training starts.

    python scripts/assess_checkpoint.py --speeches speeches.jsonl --answers checkpoint-2.jsonl --opponent opponent.jsonl \\
        --checkpoints iteration-1/checkpoints.json iteration-2/checkpoints.json --weights iteration-2/checkpoints/1/manifest.json \\
        --base base/manifest.json --reward-weights reward/manifest.json --metrics reward/metrics.json --out checkpoint-2.assessment.json \\
        --settings '{"policy": "dpo-iter", "checkpoint": 2, "model": {...}, "reward_model": {...}, "prompt": "…", …}'
"""

from pathlib import Path

import orjson
from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec
from psychocounsel.monitor import repetition, summarise
from psychocounsel.prompts import render
from psychocounsel.records import file_sha256, read_result, validator
from psychocounsel.stage import Settings, Stage, add_reuse_argument, command_line, log, stage


class AssessmentSettings(Settings):
    """Which checkpoint, and how it is read."""

    policy: str = Field(description="name of the policy")
    checkpoint: int = Field(description="number of the checkpoint over all rounds of its training, from 1; 0 for the base", ge=0)
    name: str = Field(description="name under which the checkpoint answered")
    model: ModelSpec = Field(description="chat model that the policy was trained from, an entry of models.yaml")
    reward_model: ModelSpec = Field(description="chat model that the reward model was trained from, under the reward model's name")
    prompt: str = Field(description="template of the responding prompt, with {{ client_speech }}")
    max_length: int = Field(description="most tokens of a conversation for the reward model; longer ones lose their start", ge=1)
    batch_size: int = Field(description="conversations read at once", ge=1)
    bootstrap: int = Field(2000, description="bootstrap resamples", ge=1)
    seed: int = Field(description="seed of the bootstrap")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, AssessmentSettings)
    parser.add_argument("--speeches", required=True, type=Path, help="speech records that were answered")
    parser.add_argument("--answers", required=True, type=Path, help="the checkpoint's answers, one a speech")
    parser.add_argument("--opponent", required=True, type=Path, help="the opponent's answers")
    parser.add_argument("--checkpoints", nargs="*", default=[], type=Path, help="lists of checkpoints of the rounds, up to this one's")
    parser.add_argument("--weights", type=Path, help="manifest of the checkpoint; not of checkpoint 0, which is the base")
    parser.add_argument("--base", type=Path, help="manifest of the base's local weights (default: the model's own, from the Hub)")
    parser.add_argument("--reward-weights", required=True, type=Path, help="manifest of the reward model")
    parser.add_argument("--metrics", required=True, type=Path, help="metrics of the reward model on the test pairs")
    parser.add_argument("--out", required=True, type=Path, help="assessment, as JSON")
    add_reuse_argument(parser)
    with stage(parser) as run:
        args, settings = run.args, run.settings
        if bool(args.weights) != bool(settings.checkpoint):
            raise UserError("--weights: name the model of a checkpoint from 1; checkpoint 0 is the base, which --base names")
        models = [args.weights, args.base, args.reward_weights]
        if run.adopts([args.speeches, args.answers, args.opponent, *args.checkpoints, *models, args.metrics], [args.out]):
            return
        speeches = {speech["speech_id"]: speech for speech in run.read(args.speeches, "speech")}
        answers = by_speech(run.read(args.answers, "response"), args.answers)
        opponent = by_speech(run.read(args.opponent, "response"), args.opponent)
        if foreign := sorted(answers.keys() - speeches.keys()):
            raise UserError(f"{args.answers}: the speech {foreign[0]} is not in {args.speeches}: the files do not belong together")
        both = sorted(answers.keys() & opponent.keys())
        dropped = {"no answer of the checkpoint": len(speeches) - len(answers), "no answer of the opponent": len(answers) - len(both)}
        run.account("speeches", len(speeches), len(both), dropped)
        if not both:
            raise UserError(f"{args.answers}: no speech was answered by both the checkpoint and the opponent: there is nothing to assess")
        prompts = {
            speech: [{"role": "user", "content": render(settings.prompt, client_speech=speeches[speech]["text"])}] for speech in both
        }
        rewards = read_rewards(run, prompts, [answers, opponent])
        divergences = read_divergences(run, prompts, answers)
        assessed = [
            {
                "speech_id": speech,
                "response_id": answers[speech]["response_id"],
                "reward": rewards[speech, answers[speech]["text"]],
                "opponent_reward": rewards[speech, opponent[speech]["text"]],
                **divergences[speech],
                "words": len(answers[speech]["text"].split()),
                "truncated": answers[speech]["finish_reason"] == "length",
                "repetition": repetition(answers[speech]["text"]),
            }
            for speech in both
        ]
        lists = [orjson.loads(run.uses(path).read_bytes()) for path in args.checkpoints]
        result = {
            "policy": settings.policy,
            "checkpoint": settings.checkpoint,
            "name": settings.name,
            "step": step_of(lists, settings.checkpoint, file_sha256(args.weights)) if args.weights else 0,
            "reward_model": settings.reward_model.name,
            "reward_model_at_chance": read_result(run.uses(args.metrics), "metrics")["at_chance"],
            "n": len(both),
            "measures": summarise(assessed, settings.bootstrap, settings.seed),
            "answers": assessed,
        }
        reward, kl = (result["measures"][name]["value"] for name in ("reward", "kl"))
        log.info("%s, step %d: mean reward %.3f, %.3f nats from the base", settings.name, result["step"], reward, kl)
        run.write_json(args.out, validator("assessment")(result))


def by_speech(responses: list[dict], file: Path) -> dict[str, dict]:
    """Return answers by their speech; raise UserError where a speech has several."""
    found = {row["speech_id"]: row for row in responses}
    if len(found) < len(responses):
        raise UserError(f"{file}: some speech has several answers; one is expected")
    return found


def step_of(lists: list[list[dict]], number: int, manifest_sha256: str) -> int:
    """Return the optimizer step of a checkpoint, counted from the base; raise UserError where its model is not the one listed."""
    place, steps = number, 0
    for entries in lists:
        if place <= len(entries):
            entry = entries[place - 1]
            if entry["manifest_sha256"] != manifest_sha256:
                raise UserError(f"--weights: not the model that --checkpoints lists as checkpoint {number}; name the model of its folder")
            return steps + entry["step"]
        place, steps = place - len(entries), steps + entries[-1]["step"]
    raise UserError(f"--checkpoints: {number - place} checkpoints are listed, so there is no checkpoint {number}")


def read_rewards(run: Stage, prompts: dict[str, list[dict]], sides: list[dict[str, dict]]) -> dict[tuple[str, str], float]:
    """Return the reward of each (speech id, answer)."""
    from psychocounsel.rewards import text_rewards

    texts = {(speech, side[speech]["text"]) for side in sides for speech in prompts}
    settings, weights = run.settings, run.model(run.args.reward_weights)
    found, cut = text_rewards(settings.reward_model, weights, prompts, texts, settings.max_length, settings.batch_size)
    run.note(cut_conversations=cut)
    return found


def read_divergences(run: Stage, prompts: dict[str, list[dict]], answers: dict[str, dict]) -> dict[str, dict]:
    """Return {"tokens", "log_ratio", "kl"} of the answer to each speech."""
    from psychocounsel.rewards import divergences, generated_ids, load_language_model, load_tokenizer

    spec = run.settings.model
    base = run.model(run.args.base) if run.args.base else None
    folder = run.model(run.args.weights) if run.args.weights else base
    tokenizer = load_tokenizer(spec, folder)
    read = [
        generated_ids(tokenizer, spec, prompt, answers[speech]["text"], finished=answers[speech]["finish_reason"] != "length")
        for speech, prompt in prompts.items()
    ]
    reference = load_language_model(spec, base)
    policy = load_language_model(spec, folder) if run.args.weights else reference
    found = divergences(policy, reference, read, tokenizer.pad_token_id, run.settings.batch_size)
    return {
        speech: {"tokens": len(answer), "log_ratio": log_ratio, "kl": kl}
        for speech, (_, answer), (log_ratio, kl) in zip(prompts, read, found, strict=True)
    }


if __name__ == "__main__":
    main()
