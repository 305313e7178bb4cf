"""Speed of training reward models and policies, beside trl's own defaults on the same model and pairs.

Each training runs in a process of its own: trl's RewardTrainer and DPOTrainer as they are (8 pairs at once, random order), then ours.
Both take the same global batch, number format and choice of gradient checkpointing (on a GPU bf16 and checkpointing, trl's defaults; on
a CPU fp32 and none). Loading and saving are left out, reading DPO's reference is not. On a GPU the first step, which compiles kernels,
is not timed.

- tokens/s: tokens of both conversations of each pair, prompt and answer, without padding: the same for both, however they are read.
- padding: share of padding in the places of all batches that the model reads.
- seconds: by the clock; CPU seconds of all threads tell more on a machine that does other things, too.
- memory: highest resident memory of the process, model and libraries included; on a GPU the highest allocated there.
- MFU: model FLOPs of the tokens that were really read, by second, over the device's peak (by its name, or --peak-tflops). A token costs
  2 FLOPs for each weight of the layers' matrices, and 4 x heads x head size for each token that it sees in each layer; a scored token
  2 x hidden size x vocabulary. Backward costs twice as much; DPO's reference once more forward. What checkpointing computes again does not
  count (as in PaLM, arXiv 2204.02311, appendix B). A CPU has no peak to compare with.

Pairs are real questions with two answers of real models (source counselling-bench in PSYCHOCOUNSEL_SOURCES), or files of pair records.

    snakemake work/models/SmolLM2-135M-Instruct.Q4_1/manifest.json --profile profiles/local --configfile config/demo.yaml
    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --padding --max-length 2048
    python benchmarks/training_speed.py --shape 3b --pairs 512 --batch-size 128 --at-once 4      # on a GPU: random weights
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, "scripts")

from psychocounsel.models import ModelSpec
from psychocounsel.pairs import pair_record
from psychocounsel.prompts import render
from psychocounsel.recipes import PolicyRecipe, tokens_and_padding, training_order
from psychocounsel.records import check_manifest, content_hash, read_records

WEIGHTS = "work/models/SmolLM2-135M-Instruct.Q4_1/manifest.json"
SPEC = ModelSpec(name="benchmark", id="none/benchmark", instruction="You are a professional psychotherapist.")
# Of Llama 3.2, by their configurations on the Hub.
COMMON = {
    "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True
}  # fmt: skip
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}
TRL_AT_ONCE = 8  # trl's default
PADDED = ((64, 2), (64, 4), (128, 4), (64, 8))  # pairs a step, and pairs at once, whose padding is printed


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=WEIGHTS, help=f"manifest.json of the model and its tokenizer (default {WEIGHTS})")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a model of this shape with random weights instead; the tokenizer stays")
    parser.add_argument("--layers", type=int, help="only the first so many layers of the model")
    parser.add_argument("--data", nargs="+", type=Path, help="files of pair records (default: counselling-bench)")
    parser.add_argument("--pairs", type=int, default=16, help="pairs to train on (default 16)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs a step (default 16; a multiple of 8)")
    parser.add_argument("--at-once", type=int, default=2, help="pairs that our program holds at once (default 2)")
    parser.add_argument("--max-length", type=int, default=400, help="tokens; pairs with a longer conversation are left out (default 400)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="gradient checkpointing (default: on a GPU)")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in bf16, where its name is not known")
    parser.add_argument("--kinds", nargs="+", choices=("rm", "dpo"), default=["rm", "dpo"], help="reward model, policy (default both)")
    parser.add_argument("--padding", action="store_true", help="train nothing: print the padding of all pairs by orders and layouts")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.padding:
        print_padding(args)
        return
    if args.only:
        print(json.dumps(measure(args)))
        return
    print(f"{'training':<10} {'tokens/s':>9} {'speed':>11} {'padding':>8} {'memory':>9} {'MFU':>7} {'seconds':>8} {'CPU seconds':>12}")
    for kind in args.kinds:
        rival = report(f"{kind} trl", run_alone(f"{kind} trl"), None)
        report(f"{kind} ours", run_alone(f"{kind} ours"), rival)


def run_alone(what: str) -> dict:
    """Run one training in a process of its own; return what it measured."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", what], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{what}: the training ended with {done.returncode}; where memory ran out, lower --max-length or --layers")
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, found: dict, rival: dict | None) -> dict:
    """Print a line of the table; return what was found."""
    speed = found["tokens"] / found["seconds"]
    ratio = f"{speed * rival['seconds'] / rival['tokens']:.2f} x trl" if rival else "1"
    mfu = f"{100 * found['mfu']:.1f} %" if found["mfu"] else "-"
    padding, memory = 100 * found["padding"] / found["places"], f"{found['bytes'] / 1e9:.1f} GB"
    seconds = f"{found['seconds']:>8.1f} {found['cpu_seconds']:>12.1f}"
    print(f"{name:<10} {speed:>9.1f} {ratio:>11} {padding:>6.1f} % {memory:>9} {mfu:>7} {seconds}", flush=True)
    return found


# --- data


def real_pairs(folder: Path) -> list[dict]:
    """Return counselling-bench as pairs: each question with every two of its answers; which is chosen is drawn, as it changes no speed."""
    questions = {row["question_id"]: row["turns"][0] for row in map(json.loads, (folder / "question.jsonl").open(encoding="utf-8"))}
    answers: dict[int, list[dict]] = defaultdict(list)
    for path in sorted((folder / "model_answer").glob("*.jsonl")):
        for row in map(json.loads, path.open(encoding="utf-8")):
            text = row["choices"][0]["turns"][0]
            answers[row["question_id"]].append({"id": content_hash(row["question_id"], row["model_id"], digits=16), "text": text})
    template, draw, pairs = Path("config/prompts/respond.jinja").read_text(), random.Random(1), []
    for number, question in questions.items():
        prompt = [{"role": "user", "content": render(template, client_speech=question)}]
        for two in combinations(answers[number], 2):
            chosen, rejected = ({**answer, "model": None, "scores": None} for answer in draw.sample(two, 2))
            pairs.append(pair_record(content_hash(number, digits=16), "train", prompt, chosen, rejected, None))
    return pairs


def chosen_pairs(args: argparse.Namespace, tokenizer) -> list[dict]:
    """Return the pairs to train on: a seeded draw of those that fit whole, so that both programs see the same tokens (--padding: all)."""
    from psychocounsel.rewards import reward_rows

    if args.data:
        pairs = [pair for path in args.data for pair in read_records(path, "pair")]
    elif folder := os.environ.get("PSYCHOCOUNSEL_SOURCES"):
        pairs = real_pairs(Path(folder) / "counselling-bench")
    else:
        sys.exit("set PSYCHOCOUNSEL_SOURCES to a source cache with counselling-bench, or name files of pairs by --data")
    random.Random(2).shuffle(pairs)
    if args.padding:
        return pairs
    rows, _ = reward_rows(tokenizer, SPEC, pairs, sys.maxsize)
    fitting = [p for p, row in zip(pairs, rows, strict=True) if max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= args.max_length]
    if len(fitting) < args.pairs:
        sys.exit(f"{len(fitting)} of {len(pairs)} pairs fit {args.max_length} tokens, --pairs asks for {args.pairs}")
    return fitting[: args.pairs]


def print_padding(args: argparse.Namespace) -> None:
    """Print which share of the places is padding in one pass of DPO over all pairs, and how many places there are beside trl's."""
    from psychocounsel import rewards, trainers

    tokenizer = rewards.load_tokenizer(SPEC, check_manifest(args.weights))
    rows, _ = rewards.policy_rows(tokenizer, SPEC, chosen_pairs(args, tokenizer), args.max_length)
    names = [row["pair_id"] for row in rows]
    two, one = ([trainers.line_lengths(row, shared) for row in rows] for shared in (False, True))
    tokens, padding = tokens_and_padding(two, list(range(len(rows))), TRL_AT_ONCE)
    trl = tokens + padding
    print(f"{len(rows)} pairs of {tokens / len(rows):.0f} tokens, prompt counted twice; at most {args.max_length} a conversation")
    print(f"{'layout':<62} {'padding':>8} {'places':>12}")
    print(f"{f'trl: two lines a pair, random order, {TRL_AT_ONCE} pairs at once':<62} {100 * padding / trl:>6.1f} %  1")
    for what, lengths in (("two lines a pair", two), ("one line a pair", one)):
        for batch_size, at_once in PADDED:
            steps = len(rows) // batch_size
            order = training_order(names, [max(pair) for pair in lengths], steps, batch_size, seed=1)
            tokens, padding = tokens_and_padding(lengths, order, at_once)
            name = f"{what}, by length within {batch_size} pairs, {at_once} at once"
            places = (tokens + padding) / len(order) / (trl / len(rows))
            print(f"{name:<62} {100 * padding / (tokens + padding):>6.1f} %  {places:.2f} x trl")


# --- one training


def measure(args: argparse.Namespace) -> dict:
    """Train once, in this process; return {tokens, places, padding, seconds, cpu_seconds, bytes, mfu} of the timed steps."""
    import torch

    from psychocounsel import rewards

    kind, who = args.only.split()
    gpu = torch.cuda.is_available()
    folder = check_manifest(args.weights)
    tokenizer = rewards.load_tokenizer(SPEC, folder)
    pairs = chosen_pairs(args, tokenizer)
    with tempfile.TemporaryDirectory() as out:
        common = {
            "output_dir": out, "max_steps": args.pairs // args.batch_size, "bf16": gpu, "use_cpu": not gpu,
            "dataloader_pin_memory": gpu, "gradient_checkpointing": gpu if args.checkpointing is None else args.checkpointing,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        trainer = (trl_trainer if who == "trl" else our_trainer)(args, kind, tokenizer, pairs, common)
        meter = Meter(trainer, policy=kind == "dpo", warm_up=int(gpu))
        if who == "ours" and kind == "dpo":
            meter.time_reference(Path(out) / "reference.json", len(pairs))
        trainer.train()
        return meter.found(args.peak_tflops)


def models(args: argparse.Namespace, kind: str) -> list:
    """Return the model to train, and for a policy its reference, of equal weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    folder = check_manifest(args.weights)
    of_kind, head = (AutoModelForCausalLM, {}) if kind == "dpo" else (AutoModelForSequenceClassification, {"num_labels": 1})
    made = []
    for _ in range(2 if kind == "dpo" else 1):
        torch.manual_seed(1)
        if args.shape:
            config = LlamaConfig(**COMMON, **SHAPES[args.shape], **head)
            made.append(of_kind.from_config(config, dtype=torch.float32))
        else:
            config = AutoConfig.from_pretrained(folder, **head)
            config.num_hidden_layers = args.layers or config.num_hidden_layers
            made.append(of_kind.from_pretrained(folder, config=config, dtype=torch.float32))
    return made


def trl_trainer(args: argparse.Namespace, kind: str, tokenizer, pairs: list[dict], common: dict):
    """Return trl's trainer with its defaults over the conversations."""
    import datasets
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    common |= {"gradient_accumulation_steps": args.batch_size // TRL_AT_ONCE, "max_length": args.max_length}
    system = [{"role": "system", "content": SPEC.instruction}]
    rows = [{"prompt": system + pair["prompt"], "chosen": pair["chosen"], "rejected": pair["rejected"]} for pair in pairs]
    parts = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    if kind == "rm":
        return RewardTrainer(model=models(args, kind)[0], args=RewardConfig(**common), **parts)
    model, frozen = models(args, kind)
    return DPOTrainer(model=model, ref_model=frozen, args=DPOConfig(**common), **parts)


def our_trainer(args: argparse.Namespace, kind: str, tokenizer, pairs: list[dict], common: dict):
    """Return the trainer of our programs (train_reward_model.py, train_policy.py) over the same pairs."""
    from trl import DPOConfig, RewardConfig

    from psychocounsel import rewards, trainers, training

    recipe = PolicyRecipe(
        epochs=None, max_steps=common["max_steps"], batch_size=args.batch_size, per_device_batch_size=args.at_once, learning_rate=1e-6,
        schedule="linear", warmup_ratio=0.0, weight_decay=0.0, max_length=args.max_length, precision="bf16" if common["bf16"] else "fp32",
        gradient_checkpointing=common["gradient_checkpointing"], deepspeed=None, lora=None, save_steps=1000,
        beta=0.1,
    )  # fmt: skip
    settings = SimpleNamespace(recipe=recipe, seed=1)
    run = SimpleNamespace(settings=settings, args=SimpleNamespace(resume_dir=common["output_dir"]), note=lambda **_: None)
    options = training.arguments(run, common["max_steps"]) | {"save_strategy": "no"}
    to_rows = rewards.policy_rows if kind == "dpo" else rewards.reward_rows
    rows, _ = to_rows(tokenizer, SPEC, pairs, args.max_length)
    model, *frozen = models(args, kind)
    shared = trainers.shares_start(model.config, args.max_length)
    lengths = [max(trainers.line_lengths(row, shared)) for row in rows]
    order = training_order([row["pair_id"] for row in rows], lengths, common["max_steps"], args.batch_size, seed=1)
    used, dataset = training.in_order(rows, order)
    parts = {"shared": shared, "model": model, "train_dataset": dataset, "processing_class": tokenizer}
    if kind == "rm":
        return trainers.RewardModelTrainer(args=RewardConfig(**options, max_length=None), **parts)
    return trainers.PolicyTrainer(rows=used, ref_model=frozen[0], args=DPOConfig(**options, max_length=args.max_length, beta=0.1), **parts)


class Meter:
    """Counts what a trainer reads and times its steps, all but the first `warm_up`."""

    def __init__(self, trainer, policy: bool, warm_up: int) -> None:
        from transformers import TrainerCallback

        meter, self.trainer, self.policy = self, trainer, policy
        self.reference = self.cpu_reference = 0.0
        self.timed_steps = trainer.args.max_steps - warm_up
        self.reset()
        compute = trainer.compute_loss

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: object, **__: object) -> None:
                meter.reset()

            def on_step_end(self, args, state, control, **_: object) -> None:
                if state.global_step == warm_up:
                    meter.reset()
                if state.global_step == state.max_steps:
                    meter.seconds, meter.cpu_seconds = meter.now() - meter.start, time.process_time() - meter.cpu_start

        def counted(model, inputs, *rest: object, **more: object):
            meter.count(inputs)
            return compute(model, inputs, *rest, **more)

        trainer.add_callback(Clock())
        trainer.compute_loss = counted

    def reset(self) -> None:
        """Start anew."""
        self.tokens = self.places = self.padding = self.seen = self.scored = 0
        self.start, self.cpu_start = self.now(), time.process_time()

    def now(self) -> float:
        """Return the clock, once the device has done what it was told."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def time_reference(self, store: Path, pairs: int) -> None:
        """Let our trainer read its reference, and add the timed steps' share of it."""
        clock, cpu_clock = self.now(), time.process_time()
        self.trainer.read_reference(store, stopped=lambda: False)
        timed_pairs = self.timed_steps * self.trainer.args.train_batch_size * self.trainer.args.gradient_accumulation_steps
        self.reference, self.cpu_reference = (
            seconds * timed_pairs / pairs for seconds in (self.now() - clock, time.process_time() - cpu_clock)
        )

    def count(self, inputs: dict) -> None:
        """Count a batch, in our layout (sides of the places) or in trl's (attention mask)."""
        if "sides" in inputs:
            from psychocounsel.trainers import CHOSEN, PADDING, START, ahead  # not beside trl's trainer: it changes where trl scores

            sides, places = inputs["sides"], inputs["position_ids"]
            real = sides != PADDING
            lines_a_pair = len(sides) // len(inputs["pair"])
            self.tokens += int(real.sum()) + (int((sides == START).sum()) if lines_a_pair == 1 else 0)
            self.seen += int((places + 1)[real].sum())
            self.scored += int(((ahead(sides) == sides) & real & (sides >= CHOSEN)).sum()) if self.policy else 0
        else:
            real = inputs["attention_mask"] == 1
            self.tokens += int(real.sum())
            self.seen += int(real.cumsum(-1)[real].sum())
            self.scored += int(inputs["completion_mask"].sum()) if self.policy else 0
        self.places += real.numel()
        self.padding += real.numel() - int(real.sum())

    def found(self, peak_tflops: float | None) -> dict:
        """Return what was measured; `mfu` is a share, None on a CPU."""
        import torch
        from trl.trainer.utils import get_peak_flops

        seconds, mfu = self.seconds + self.reference, None
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
            peak = peak_tflops * 1e12 if peak_tflops else get_peak_flops(torch.cuda.get_device_name(), "bfloat16")
            mfu = self.model_flops() / seconds / peak if peak else None
        counts = {"tokens": self.tokens, "places": self.places, "padding": self.padding}
        return counts | {"seconds": seconds, "cpu_seconds": self.cpu_seconds + self.cpu_reference, "bytes": memory, "mfu": mfu}

    def model_flops(self) -> float:
        """Return the FLOPs that the tokens which were read need (see above)."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        config = model.config
        weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        forward = 2 * weights * (self.places - self.padding)
        forward += 4 * config.num_hidden_layers * config.num_attention_heads * head_size * self.seen
        forward += 2 * config.hidden_size * config.vocab_size * self.scored
        return forward * (4 if self.policy else 3)


if __name__ == "__main__":
    main()
