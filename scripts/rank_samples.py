"""Make one iteration's preference pairs: the best against the worst of a policy's answers by the reward model (paper, section 4.2).

Each speech has several sampled answers; an empty one is a failure of sampling, not an answer. A speech without two answers, or
whose answers are all alike or all get the same reward, makes no pair and is counted with its reason.

A reward model that is not shown to rank better than chance (--metrics) stops the program with --stop-at-chance, else it is told.

    python scripts/rank_samples.py --speeches speeches.jsonl --samples samples.jsonl --reward-weights reward/manifest.json \\
        --pairs pairs.jsonl --rewards rewards.jsonl --dropped dropped.jsonl --settings '{"model": {...}, "prompt": "…", …}'
"""

from collections import defaultdict
from pathlib import Path

from pydantic import Field

from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec
from psychocounsel.pairs import pair_record
from psychocounsel.prompts import render
from psychocounsel.records import read_result
from psychocounsel.stage import Settings, add_reuse_argument, command_line, dropped_by_reason, log, stage


class RankSettings(Settings):
    """How samples are ranked."""

    model: ModelSpec = Field(description="chat model that the reward model was trained from, an entry of models.yaml")
    prompt: str = Field(description="template of the responding prompt, with {{ client_speech }}")
    policy: str = Field(description="name of the policy that gave the answers")
    max_length: int = Field(description="most tokens of a conversation; longer ones lose their start", ge=1)
    batch_size: int = Field(description="conversations read at once", ge=1)


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, RankSettings)
    parser.add_argument("--speeches", required=True, type=Path, help="speech records of this iteration")
    parser.add_argument("--samples", required=True, type=Path, help="response records, several a speech")
    parser.add_argument("--reward-weights", required=True, type=Path, help="manifest of the reward model")
    parser.add_argument("--metrics", type=Path, help="metrics of the reward model on the test pairs: no pair depends on them")
    parser.add_argument("--stop-at-chance", action="store_true", help="stop where the reward model ranks at chance by --metrics")
    parser.add_argument("--pairs", required=True, type=Path, help="pair records")
    parser.add_argument("--rewards", required=True, type=Path, help="reward records of all samples")
    parser.add_argument("--dropped", required=True, type=Path, help="speeches without a pair, with the reason")
    add_reuse_argument(parser)
    with stage(parser) as run:
        args = run.args
        if args.metrics:
            check_ranking(run.uses(args.metrics), args.stop_at_chance)
        if run.adopts([args.speeches, args.samples, args.reward_weights], [args.pairs, args.rewards, args.dropped]):
            return
        speeches = run.read(run.args.speeches, "speech")
        samples = run.read(run.args.samples, "response")
        unknown = {sample["speech_id"] for sample in samples} - {speech["speech_id"] for speech in speeches}
        if unknown:
            raise UserError(
                f"--samples: {len(unknown)} speeches, {min(unknown)} among them, are not in --speeches: the files are not of one iteration"
            )
        prompts = {
            speech["speech_id"]: [{"role": "user", "content": render(run.settings.prompt, client_speech=speech["text"])}]
            for speech in speeches
        }
        reward_of = score_samples(run, samples, prompts)
        samples_of: dict[str, list[dict]] = defaultdict(list)
        for sample in samples:
            samples_of[sample["speech_id"]].append(sample)

        pairs, dropped = [], []
        for speech in speeches:
            mine = samples_of[speech["speech_id"]]
            reason = no_pair(mine, reward_of)
            if reason:
                dropped.append(
                    {"source": speech["source"], "source_row": speech["source_row"], "reason": reason, "detail": speech["speech_id"]}
                )
            else:
                pairs.append(best_against_worst(speech["speech_id"], prompts[speech["speech_id"]], mine, reward_of, run.settings.policy))
        run.account("speeches", len(speeches), len(pairs), dropped_by_reason(dropped))
        run.write(run.args.pairs, pairs, "pair", sort_by="pair_id")
        rewards = [{"response_id": s["response_id"], "speech_id": s["speech_id"], "reward": reward_of[s["response_id"]]} for s in samples]
        run.write(run.args.rewards, rewards, "reward", sort_by="response_id")
        run.write(run.args.dropped, dropped, "dropped_row", sort_by="detail")


def check_ranking(metrics: Path, stop: bool) -> None:
    """Warn of a reward model that ranks at chance, or raise UserError."""
    result = read_result(metrics, "metrics")
    if not result["at_chance"]:
        return
    accuracy = result["accuracy"]
    finding = (
        f"the reward model {result['name']} is not shown to rank better than chance: accuracy {accuracy['value']:.3f}, 95 % interval"
        f" [{accuracy['low']:.3f}, {accuracy['high']:.3f}] on {result['n']:,} test pairs ({metrics})"
    )
    if not stop:
        log.warning("%s; policies are trained on its rewards nevertheless (reward_evaluation.stop_at_chance: false)", finding)
        return
    raise UserError(
        f"{finding}. No policy is trained on its rewards. See in {metrics.with_name('training.json')} whether its loss fell below"
        " ln 2 = 0.693 (else change its recipe), and whether there are enough pairs in 05_pairs, test pairs too: few leave a wide interval."
        " To go on all the same, set reward_evaluation.stop_at_chance to false; the tables will flag what was trained on it."
    )


def score_samples(run, samples: list[dict], prompts: dict[str, list[dict]]) -> dict[str, float]:
    """Return the reward of each sample by its response id; the same answer to the same speech is read once."""
    from psychocounsel.rewards import text_rewards

    settings, weights = run.settings, run.model(run.args.reward_weights)
    texts = {(sample["speech_id"], sample["text"]) for sample in samples}
    found, cut = text_rewards(settings.model, weights, prompts, texts, settings.max_length, settings.batch_size)
    run.note(cut_conversations=cut)
    return {sample["response_id"]: found[sample["speech_id"], sample["text"]] for sample in samples}


def no_pair(samples: list[dict], reward_of: dict[str, float]) -> str | None:
    """Say why a speech's samples make no pair, or None where they make one."""
    if len(samples) < 2:
        return "one answer alone" if samples else "no answer: all were empty or failed"
    if len({sample["text"] for sample in samples}) < 2:
        return "all answers equal"
    if len({reward_of[sample["response_id"]] for sample in samples}) < 2:
        return "all rewards equal"
    return None


def best_against_worst(speech_id: str, prompt: list[dict], samples: list[dict], reward_of: dict[str, float], policy: str) -> dict:
    """Return the pair of the highest and the lowest reward; among equals the smallest response id stands."""
    best = min(samples, key=lambda s: (-reward_of[s["response_id"]], s["response_id"]))
    worst = min(samples, key=lambda s: (reward_of[s["response_id"]], s["response_id"]))
    chosen, rejected = ({"id": s["response_id"], "text": s["text"], "model": policy, "scores": None} for s in (best, worst))
    return pair_record(speech_id, "train", prompt, chosen, rejected, gap=reward_of[best["response_id"]] - reward_of[worst["response_id"]])


if __name__ == "__main__":
    main()
