"""Training that survives a cluster: one way through trl for reward models and policies. Import it inside main().

A training keeps what a later start can take up in its resume folder: checkpoints, finished models and the log. They count
only for the same settings, inputs and code. A checkpoint counts once its marker is written, the last of its files.
"""

import fcntl
import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub.constants
import orjson
import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from psychocounsel import rewards
from psychocounsel.errors import UserError
from psychocounsel.fingerprint import code_fingerprint
from psychocounsel.models import ModelSpec
from psychocounsel.recipes import Recipe, accumulation, deepspeed_files, tokens_and_padding
from psychocounsel.records import check_manifest, content_hash, write_manifest, write_whole
from psychocounsel.stage import Stage, log
from psychocounsel.trainers import PolicyTrainer

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # between trl and transformers, whose versions are pinned
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # trl would report the kind of model and machine

COME_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: start me again
MARKER = "complete.json"  # of a checkpoint: the size of each of its files
DISK_FULL = ("No space left on device", "Disk quota exceeded", "inline_container.cc")  # the last where torch cannot write, and says no more
EXPLODED = 100.0  # nats; a pair decided by a coin costs 0.69


class Work:
    """The resume folder of one training: what is in it of the same identity is taken up, what is of another is removed."""

    def __init__(self, folder: Path, identity: str, models: int) -> None:
        self.folder, self.identity = folder, identity
        self.models = [folder / f"model-{k}" for k in range(1, models + 1)]
        self.log, self.name, self.reference = folder / "log.json", folder / "identity.txt", folder / "reference.json"

    def prepare(self) -> None:
        """Lock the folder and make it ready; remove what another identity left there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self._is_mine():
            return
        for leftover in [*self.folder.glob("checkpoint-*"), *self.folder.glob("model-*")]:
            log.info("%s: of a training with other settings, inputs or code; removed", leftover)
            shutil.rmtree(leftover)
        self.log.unlink(missing_ok=True)
        self.reference.unlink(missing_ok=True)
        write_whole(self.name, self.identity.encode())

    def _lock(self) -> None:
        """Let nobody else train here until finish() or the end of this process; of several processes the first holds the lock."""
        if os.environ.get("RANK", "0") != "0":
            return
        self.lock = open(self.folder / "lock", "ab")  # noqa: SIM115 (held open)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise UserError(f"{self.folder}: another process trains here; wait for it or stop it first") from None

    def _is_mine(self) -> bool:
        return self.name.is_file() and self.name.read_text() == self.identity

    def finished(self) -> bool:
        """Say whether this very training has been finished here before; what a kill left of its checkpoints then goes, too."""
        done = self._is_mine() and self.log.is_file() and all(map(_whole_model, self.models))
        if done:
            self._remove_checkpoints()
        return done

    def newest_checkpoint(self, steps_of_models: list[int]) -> Path | None:
        """Return the newest whole checkpoint to go on from; a torn one is removed and the one before it counts."""
        for folder in sorted(self.folder.glob("checkpoint-*"), key=_step, reverse=True):
            before = [model for model, step in zip(self.models, steps_of_models, strict=True) if step <= _step(folder)]
            if _whole_checkpoint(folder) and all(map(_whole_model, before)):
                log.info("going on from %s", folder)
                return folder
            log.warning("%s is torn; going back to the one before", folder)
            shutil.rmtree(folder)
        return None

    def entries(self) -> list[dict]:
        """Return the log of the finished training, one entry a step."""
        return orjson.loads(self.log.read_bytes())

    def finish(self, entries: list[dict]) -> None:
        """Keep the log, which says that the training is finished, drop the checkpoints and release the lock."""
        write_whole(self.log, orjson.dumps(entries))
        self._remove_checkpoints()
        self.lock.close()

    def _remove_checkpoints(self) -> None:
        self.reference.unlink(missing_ok=True)
        for folder in self.folder.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != MARKER}


def _whole_checkpoint(folder: Path) -> bool:
    try:
        return orjson.loads((folder / MARKER).read_bytes()) == _sizes(folder)
    except (FileNotFoundError, orjson.JSONDecodeError):
        return False


def _whole_model(folder: Path) -> bool:
    try:
        return bool(check_manifest(folder / "manifest.json"))
    except (UserError, orjson.JSONDecodeError):
        return False


def identity(run: Stage) -> str:
    """Return what stands for a training: its code, its settings, and the bytes of its inputs, by the argument that names them."""
    given = {name: value if isinstance(value, list) else [value] for name, value in vars(run.args).items()}
    by_argument = {name: [run.inputs[str(path)]["sha256"] for path in paths if str(path) in run.inputs] for name, paths in given.items()}
    others = sorted(item["sha256"] for item in run.inputs.values())  # such as DeepSpeed's, which the recipe names
    return content_hash(code_fingerprint(run.program), run.settings.model_dump(mode="json"), by_argument, others)


def devices() -> int:
    """Return the number of processes that train together; raise UserError where they and the GPUs that torch sees do not go together."""
    seen, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if os.environ.get("CUDA_VISIBLE_DEVICES", "-1") not in ("", "-1") and not seen:
        raise UserError(
            f"this job has GPUs (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}), but torch {torch.__version__} sees none: "
            "install a torch for them (pytorch.org, Get started) and look at nvidia-smi; to train on the CPU, unset the variable"
        )
    if 0 < seen < here:
        raise UserError(f"{here} processes on this node, but torch sees {seen} GPUs: ask for as many (gpu in set-resources of the profile)")
    if seen > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{seen} GPUs but one process: let Snakemake start one for each (--set-resources train_policy:gpu={seen}), start the program "
            "by `torchrun --standalone --nproc-per-node gpu -- scripts/…`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def arguments(run: Stage, steps: int) -> dict:
    """Return the trl arguments that reward models and policies share; every default that surprises is set."""
    recipe, count = run.settings.recipe, devices()
    run.note(devices=count, steps=steps)
    deepspeed = next(map(str, deepspeed_files(recipe)), None) if count > 1 else None
    if deepspeed and not torch.cuda.is_available():
        join_on_cpus()
    return {
        "output_dir": str(run.args.resume_dir),
        "max_steps": steps,
        "per_device_train_batch_size": recipe.per_device_batch_size,
        "gradient_accumulation_steps": accumulation(recipe, count),
        "train_sampling_strategy": "sequential",  # the rows come in training_order
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        "warmup_steps": int(recipe.warmup_ratio * steps),  # rounded down, or a training of one step would learn nothing
        "weight_decay": recipe.weight_decay,
        "bf16": recipe.precision == "bf16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "disable_dropout": not (recipe.lora and recipe.lora.dropout),
        "deepspeed": deepspeed,
        "ddp_find_unused_parameters": False,  # there are none; looking for them costs time at every step
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": 2,  # the newest may be torn by the kill that makes it needed
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide what Watch looks for
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.settings.seed,
    }


def join_on_cpus() -> None:
    """Join DeepSpeed's processes by gloo before a model is loaded, as accelerate does on GPUs alone."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an operator for inference, which takes a minute to compile
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def in_order(rows: list[dict], order: list[int]) -> tuple[list[dict], datasets.Dataset]:
    """Return the pairs that training reaches, each with its place among them as `pair`, and the data set in training order."""
    reached = {place: number for number, place in enumerate(sorted(set(order)))}
    used = [rows[place] | {"pair": number} for place, number in reached.items()]
    return used, datasets.Dataset.from_list(used).select([reached[place] for place in order])


def note_padding(run: Stage, lengths: list[list[int]], order: list[int]) -> None:
    """Note how many tokens the training reads, and which share of its places is padding; `lengths` as in tokens_and_padding."""
    tokens, padding = tokens_and_padding(lengths, order, run.settings.recipe.per_device_batch_size)
    share = padding / (tokens + padding)
    run.note(tokens_read=tokens, padding_share=round(share, 4))
    log.info("%d pairs, %d tokens; %.1f %% of the places that the model reads are padding", len(order), tokens, 100 * share)


def start_dtype(recipe: Recipe) -> torch.dtype:
    """Return the number format in which a training's start is loaded.

    In float32: bf16 is for the arithmetic, weights in it would lose small steps. But in bf16 where they stay as they are, under an
    adapter, and where DeepSpeed keeps float32 weights of its own (restore_float32).
    """
    elsewhere = recipe.lora or (recipe.deepspeed and devices() > 1)
    return torch.bfloat16 if elsewhere and recipe.precision == "bf16" else torch.float32


def start_model(kind: type, spec: ModelSpec, weights: Path | None, seed: int, dtype: torch.dtype = torch.float32, **options: object):
    """Load a model to train; `seed` draws a new head."""
    torch.manual_seed(seed)
    return rewards.load_model(kind, spec, weights, dtype=dtype, **options)


def adapter(recipe: Recipe, head: str | None = None) -> LoraConfig | None:
    """Return what trl is told of the recipe's LoRA adapter; a reward model's `head` is trained whole beside it."""
    if recipe.lora is None:
        return None
    lora, task = recipe.lora, "SEQ_CLS" if head else "CAUSAL_LM"
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target, task_type=task,
        modules_to_save=[head] if head else None,
    )  # fmt: skip


def train(
    trainer: Trainer, work: Work, steps_of_models: list[int], base: Callable[[], PreTrainedModel], first_loss: float | None = None
) -> None:
    """Train to the end, from the newest checkpoint if there is one, and leave the models of the given steps in `work`.

    SIGTERM (a scheduler's warning) saves a checkpoint, or what was read of the reference, and ends the program with code 75. `base`
    loads the start in float32 again, for an adapter to be merged into. `first_loss` is what theory says of the first step's loss,
    checked within the number format's tolerance.
    """
    at_once = trainer.args.per_device_train_batch_size * trainer.args.world_size
    pairs = trainer.args.max_steps * trainer.args.gradient_accumulation_steps * at_once
    assert len(trainer.train_dataset) == pairs, f"trl holds {len(trainer.train_dataset)} pairs, the steps need {pairs}"
    watch = Watch(trainer, dict(zip(steps_of_models, work.models, strict=True)), base, first_loss)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    with trainer.args.main_process_first(local=False, desc="choosing a checkpoint"):
        work.prepare()
        checkpoint = work.newest_checkpoint(steps_of_models)
    if checkpoint:
        check_processes(checkpoint, trainer.args.world_size if trainer.is_deepspeed_enabled else 0)
    before = signal.signal(signal.SIGTERM, watch.note_signal)
    try:
        if not isinstance(trainer, PolicyTrainer) or trainer.read_reference(work.reference, watch.any_signalled):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if any(sign in str(error) for sign in DISK_FULL):
            raise UserError(
                f"{work.folder}: a checkpoint could not be written: the disk is full or your quota used up. Make room (docs/disk.md) and "
                f"start the program again; it goes on from the last whole checkpoint ({str(error).splitlines()[0]})"
            ) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if trainer.state.global_step < trainer.args.max_steps:
        trainer.accelerator.wait_for_everyone()  # a launcher ends the others when one has left
        log.warning("SIGTERM: saved at step %d of %d; start the program again to go on", trainer.state.global_step, trainer.args.max_steps)
        sys.exit(COME_AGAIN)
    if trainer.is_world_process_zero():
        work.finish([log_entry(entry) for entry in trainer.state.log_history if "loss" in entry])
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
    unset_hf_deepspeed_config()  # or models loaded from here on would be spread by ZeRO-3 over processes that have ended


def check_processes(checkpoint: Path, processes: int) -> None:
    """Raise UserError where DeepSpeed has spread a checkpoint over another number of processes than go on; 0 are those without it.

    transformers would go on without the optimizer's state, and DeepSpeed stop with an error of its own.
    """
    spread = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if spread != processes:
        before, now = (f"by DeepSpeed in {count} processes" if count else "without DeepSpeed" for count in (spread, processes))
        raise UserError(
            f"{checkpoint} was saved {before}, and cannot go on {now}: give the training as many GPUs as before, "
            f"or remove {checkpoint.parent} to start anew"
        )


def log_entry(entry: dict) -> dict:
    """Return a step of trl's log without what misleads there.

    Its epoch is our whole training, its count of tokens starts anew on resuming, and its extreme rewards are means of each
    padded batch's extremes, so that they change with per_device_batch_size. The names are sorted, as a resumed log's are.
    """
    left_out = ("step", "epoch", "num_tokens", "min_reward", "max_reward")
    return {"step": entry["step"], **{name: value for name, value in sorted(entry.items()) if name not in left_out}}


def first_process_only() -> None:
    """End every process of a distributed training but the first: outputs are written once."""
    if os.environ.get("RANK", "0") != "0":
        sys.exit(0)


class Watch(TrainerCallback):
    """Stands by a training: saves its models, marks whole checkpoints, stops at nonsense and at SIGTERM."""

    def __init__(self, trainer: Trainer, models: dict[int, Path], base: Callable[[], PreTrainedModel], first_loss: float | None) -> None:
        self.trainer, self.models, self.base, self.first_loss = trainer, models, base, first_loss
        self.signalled = False

    def note_signal(self, *_: object) -> None:
        """Remember SIGTERM until the step is done."""
        self.signalled = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start DeepSpeed from the float32 weights that the start has; a checkpoint brings its own."""
        if self.trainer.is_deepspeed_enabled and args.bf16 and state.global_step == 0:
            restore_float32(self.trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Save a model that is due; after the last step no checkpoint is needed, after SIGTERM one is."""
        if state.global_step in self.models:
            save_model(self.trainer, self.models[state.global_step], self.base)
        if state.global_step >= state.max_steps:
            control.should_save = False
        elif self.any_signalled():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Mark a checkpoint as whole, once every process has written its part."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _sync_files(folder)
            (folder / MARKER).write_bytes(orjson.dumps(_sizes(folder)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: object) -> None:
        """Say how training goes, and stop it where it has gone wrong."""
        if "loss" not in logs:
            return
        loss, norm, step = float(logs["loss"]), float(logs["grad_norm"]), state.global_step
        accuracy = float(logs.get("accuracy", logs.get("rewards/accuracies", math.nan)))
        if state.is_world_process_zero:
            log.info("step %d of %d: loss %.4f, accuracy %.3f, gradient norm %.3g", step, state.max_steps, loss, accuracy, norm)
        dead = norm == 0.0 and loss > 0.01  # still wrong and no longer learning: the weights have saturated
        if not (math.isfinite(loss) and math.isfinite(norm)) or abs(loss) > EXPLODED or dead:
            remedy = "lower learning_rate in the recipe or raise warmup_ratio"
            if step == 1:  # of weights that nothing has changed yet
                remedy = "the model that it starts from is broken, or the recipe's precision too narrow for it"
            raise UserError(f"training has come apart at step {step} of {state.max_steps}: loss {loss}, gradient norm {norm}; {remedy}")
        tolerance = 2e-2 if args.bf16 else 1e-3
        if step == 1 and self.first_loss is not None and abs(loss - self.first_loss) > tolerance:
            raise AssertionError(
                f"the first loss is {loss}, not {self.first_loss:.4f}: policy and reference do not give equal log-probabilities"
            )

    def any_signalled(self) -> bool:
        """Say whether any process got SIGTERM: they must all stop after the same step."""
        if self.trainer.args.world_size == 1:
            return self.signalled
        flag = torch.tensor([float(self.signalled)], device=self.trainer.args.device)
        return bool(self.trainer.accelerator.reduce(flag, "sum").item())


def save_model(trainer: Trainer, folder: Path, base: Callable[[], PreTrainedModel]) -> None:
    """Save the whole model in float32 as it is now, with its tokenizer; its manifest, written last, says that it is whole."""
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if is_peft_model(trainer.model):
        save_merged(trainer, folder, base)
    elif trainer.is_deepspeed_enabled:
        save_gathered(trainer, folder)
    else:
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of paths; the settings stand in the provenance record
        _sync_files(folder)
        write_manifest(folder)


def save_merged(trainer: Trainer, folder: Path, base: Callable[[], PreTrainedModel]) -> None:
    """Merge the adapter into its base, read again in float32, so that everything downstream finds a model like any other."""
    if not trainer.is_world_process_zero():
        return
    part = folder.with_name(f"{folder.name}.adapter")
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(part)
    PeftModel.from_pretrained(base(), part).merge_and_unload().save_pretrained(folder)
    shutil.rmtree(part)


def save_gathered(trainer: Trainer, folder: Path) -> None:
    """Save the float32 weights that DeepSpeed keeps spread over the processes; its own saving writes the bf16 ones, where they train.

    A small learning rate moves most weights by less than bf16 can tell: the next iteration of DPO would start at its base again.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    model, weights = trainer.accelerator.unwrap_model(trainer.model), {}
    for name, parameter in model.named_parameters():
        whole = safe_get_full_fp32_param(parameter)  # every process takes part
        if trainer.is_world_process_zero():
            weights[name] = whole.detach().float().cpu()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder, state_dict=weights)
        model.config.dtype = torch.float32  # it was taken from the weights that train
        model.config.save_pretrained(folder)


def restore_float32(trainer: Trainer) -> None:
    """Give DeepSpeed the start's weights in float32: its own copies of them are made from bf16 ones.

    Without that a round of iterative DPO would lose what the round before has changed by less than bf16 can tell. A model of the
    Hub, published in bf16, has lost nothing.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = dict(model.named_parameters())
    for file in sorted(Path(model.name_or_path).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in sorted(parameters.keys() & weights.keys()):  # every process takes part
                safe_set_full_fp32_param(parameters[name], weights.get_tensor(name).float().to(trainer.args.device))


def _sync_files(folder: Path) -> None:
    """Force files to the disk before a marker says that they are there."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
