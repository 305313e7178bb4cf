"""trl's trainers over pairs that stand in one line each: what chosen and rejected share is computed once, and little is padded.

A line holds the shared start, then the end of the chosen, then that of the rejected conversation. Each end sees the start and
itself, at the places that it has in its own conversation, so that losses and gradients are those of two separate sequences.
Source: Wang and Hegde, Accelerating Direct Preference Optimization with Prefix Sharing (arXiv 2410.20305). Import it inside main().
"""

import gc
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import torch
import trl.trainer.utils
from accelerate.utils import gather_object
from torch.nn.functional import logsigmoid
from transformers import PretrainedConfig, PreTrainedModel
from trl import DPOTrainer, RewardTrainer
from trl.trainer.utils import add_fused_lm_head

from psychocounsel.errors import UserError
from psychocounsel.recipes import micro_batches
from psychocounsel.records import write_whole
from psychocounsel.stage import log

START, CHOSEN, REJECTED, PADDING = range(4)  # the part of a line to which a token belongs
# Models whose layers attend by the mask and the places that they are given, and by nothing else.
SHARING_MODELS = ("llama", "mistral", "qwen2", "qwen3")

# Score the tokens of the answers alone on a CPU, too: trl scores every place there, for devices that compile anew for each shape.
trl.trainer.utils._use_triton = lambda device: True


def shares_start(config: PretrainedConfig, max_length: int) -> bool:
    """Say whether this kind of model can read a pair in one line; of the others chosen and rejected stand in lines of their own."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and window < max_length and (layers is None or "sliding_attention" in layers)
    return config.model_type in SHARING_MODELS and not slides


# --- lines and batches


def parts(row: dict) -> tuple[list[int], list[int], list[int]]:
    """Return (shared start, end of chosen, end of rejected) of a pair, as token ids; neither end is empty.

    A policy's answers begin with the last token of the prompt, at which their first token is predicted.
    """
    if "prompt_ids" in row:
        last = row["prompt_ids"][-1:]
        return row["prompt_ids"][:-1], last + row["chosen_ids"], last + row["rejected_ids"]
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    shared = min(len(os.path.commonprefix([chosen, rejected])), len(chosen) - 1, len(rejected) - 1)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def line_lengths(row: dict, shared: bool) -> list[int]:
    """Return the lengths in tokens of the lines of a pair: one, or chosen and rejected by themselves."""
    start, chosen, rejected = map(len, parts(row))
    return [start + chosen + rejected] if shared else [start + chosen, start + rejected]


def lines(row: dict, shared: bool) -> list[tuple[list[int], list[int], list[int]]]:
    """Return the lines of a pair, each (token ids, places, parts)."""
    start, chosen, rejected = parts(row)
    ends = [(CHOSEN, chosen), (REJECTED, rejected)]
    made = []
    for group in [ends] if shared else [[end] for end in ends]:
        ids, places, sides = list(start), list(range(len(start))), [START] * len(start)
        for side, end in group:
            ids += end
            places += range(len(start), len(start) + len(end))
            sides += [side] * len(end)
        made.append((ids, places, sides))
    return made


class PairCollator:
    """Pads the lines of pairs to the longest of them: {input_ids, position_ids, sides} are (lines, longest), {pair} is (pairs)."""

    def __init__(self, pad_id: int, shared: bool) -> None:
        self.pad_id, self.shared = pad_id, shared

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the batch of some pairs."""
        made = [line for row in rows for line in lines(row, self.shared)]
        padded = ((0, self.pad_id), (1, 0), (2, PADDING))
        ids, places, sides = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(line[field]) for line in made], batch_first=True, padding_value=value)
            for field, value in padded
        )
        return {"input_ids": ids, "position_ids": places, "sides": sides, "pair": torch.tensor([row["pair"] for row in rows])}


def model_inputs(batch: dict[str, torch.Tensor], shared: bool) -> dict[str, torch.Tensor]:
    """Return what a model reads of a batch; the mask is (lines, 1, from, to) where ends share a start, else that of the padding."""
    ids, sides = batch["input_ids"], batch["sides"]
    if not shared:
        return {"input_ids": ids, "attention_mask": (sides != PADDING).long()}
    seen = (sides[:, None, :] == START) | (sides[:, None, :] == sides[:, :, None])
    return {"input_ids": ids, "attention_mask": seen.tril()[:, None], "position_ids": batch["position_ids"]}


def by_side(values: torch.Tensor, sides: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of the values (lines, longest) over the ends of chosen and of rejected, (pairs) each."""
    return tuple(values.masked_fill(sides != side, 0).sum(-1).view(pairs, -1).sum(-1) for side in (CHOSEN, REJECTED))


def ahead(sides: torch.Tensor) -> torch.Tensor:
    """Return the part to which the next token of each line belongs, padding behind the last; (lines, longest) as it came."""
    return torch.nn.functional.pad(sides[:, 1:], (0, 1), value=PADDING)


# --- reward models


def reward_everywhere(self: PreTrainedModel, input_ids: torch.Tensor, labels: None = None, **inputs: object) -> torch.Tensor:
    """Return a classifier's output at every token, (lines, longest); its own forward keeps that of the last token alone."""
    hidden = self.base_model(input_ids, use_cache=False, **inputs).last_hidden_state
    return self.score(hidden)[..., 0]


class RewardModelTrainer(RewardTrainer):
    """Bradley-Terry by trl over the rows of rewards.reward_rows, with their place in the data as `pair`."""

    def __init__(self, *, shared: bool, model: PreTrainedModel, processing_class, **options: object) -> None:
        self.shared = shared
        collator = PairCollator(processing_class.pad_token_id, shared)
        super().__init__(model=model, processing_class=processing_class, data_collator=collator, **options)
        model.forward = reward_everywhere.__get__(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean of -log sigmoid(reward of chosen - reward of rejected) over a batch's pairs."""
        sides = inputs["sides"]
        rewards = model(**model_inputs(inputs, self.shared)).float()
        chosen, rejected = by_side(rewards.masked_fill(ahead(sides) == sides, 0), sides, len(inputs["pair"]))  # at the last token
        add_metrics(self, {"mean_reward": (chosen + rejected) / 2, "accuracy": chosen > rejected, "margin": chosen - rejected})
        loss = -logsigmoid(chosen - rejected).mean()
        return (loss, {"rewards": (chosen, rejected)}) if return_outputs else loss


# --- policies


class PolicyTrainer(DPOTrainer):
    """DPO by trl over the rows of rewards.policy_rows, with their place in the data as `pair`; the reference is read beforehand."""

    def __init__(self, *, rows: list[dict], shared: bool, processing_class, **options: object) -> None:
        self.rows, self.shared = rows, shared
        collator = PairCollator(processing_class.pad_token_id, shared)
        super().__init__(processing_class=processing_class, data_collator=collator, **options)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_fused_lm_head(model, outputs=("log_probs",))  # trl's own also measures entropy and more at every token

    def _prepare_dataset(self, dataset, *_: object):
        """Return the rows as they are: they are tokens already."""
        return dataset

    def log_probs(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p(chosen | prompt) and log p(rejected | prompt) in nats, (pairs) each."""
        sides = batch["sides"]
        answered = (ahead(sides) == sides) & ((sides == CHOSEN) | (sides == REJECTED))
        labels = batch["input_ids"].roll(-1, dims=1).masked_fill(~answered, -100)
        read = model(**model_inputs(batch, self.shared), shift_labels=labels, fused_lm_head=True, use_cache=False)
        return by_side(read.log_probs, sides, len(batch["pair"]))

    def read_reference(self, store: Path, stopped: Callable[[], bool]) -> bool:
        """Read the reference's log-probabilities of all pairs once and give its memory back; say whether all were read.

        `store` keeps what was read for a later start; `stopped` says before each batch, to all processes alike, whether to leave.
        """
        values = orjson.loads(store.read_bytes()) if store.is_file() else [None] * len(self.rows)
        if None in values:
            values = self._reference_values(values, stopped)
            if not all(math.isfinite(value) for pair in values if pair for value in pair):
                raise UserError("the reference model gives log-probabilities that are no finite numbers: its weights are broken")
            if self.is_world_process_zero():
                write_whole(store, orjson.dumps(values))
        if None in values:
            return False
        self.reference = torch.tensor(values, device=self.args.device)
        if self.ref_model is not None:
            empty(self.ref_model)
        self.ref_model = None
        self.accelerator.free_memory()
        free_memory()
        return True

    def _reference_values(self, known: list[list[float] | None], stopped: Callable[[], bool]) -> list[list[float] | None]:
        """Return (chosen, rejected) of each pair, read in batches of like length by all processes together, and None where stopped.

        Batches that are known are not read again; the others hold the same pairs as they would have held without a stop.
        """
        rows = self.rows
        order = sorted(range(len(rows)), key=lambda place: -sum(line_lengths(rows[place], self.shared)))
        batches = [batch for batch in micro_batches(order, self.args.per_device_train_batch_size) if known[batch[0]] is None]
        count, mine = self.args.world_size, []
        for number in range(0, len(batches), count):
            if stopped():
                break
            places = batches[min(number + self.args.process_index, len(batches) - 1)]  # every process reads as often as the others
            batch = self._prepare_inputs(self.data_collator([rows[place] for place in places]))
            with torch.no_grad(), self.compute_loss_context_manager(), self._as_reference() as model:
                chosen, rejected = self.log_probs(model, batch)
            mine += zip(places, chosen.tolist(), rejected.tolist(), strict=True)
            if (number // count) % 100 == 99:
                log.info("reference: %d of %d batches", number + count, len(batches))
        found = {place: [chosen, rejected] for place, chosen, rejected in gather_object(mine)}
        return [found.get(place, before) for place, before in enumerate(known)]

    @contextmanager
    def _as_reference(self) -> Iterator[PreTrainedModel]:
        """Yield the reference, which is the trained model without its adapter where there is none of its own."""
        if self.ref_model is None:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                yield self.model
        else:
            yield self.ref_model

    def _compute_loss(self, model, inputs, return_outputs):
        """Return the mean of -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)) over a batch's pairs."""
        chosen, rejected = self.log_probs(model, inputs)
        reference = self.reference[inputs["pair"]]
        rewards = self.beta * (chosen - reference[:, 0]), self.beta * (rejected - reference[:, 1])
        margin = rewards[0] - rewards[1]
        metrics = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": margin > 0,
            "rewards/margins": margin,
        }
        add_metrics(self, metrics | {"logps/chosen": chosen, "logps/rejected": rejected})
        loss = -logsigmoid(margin).mean()
        return (loss, {"log_probs": (chosen, rejected)}) if return_outputs else loss


def empty(model: torch.nn.Module) -> None:
    """Give back the memory of a model's weights, though DeepSpeed goes on naming the model: its caches are never cleared."""
    for parameter in model.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):  # the latter is a process's share by ZeRO-3
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def free_memory() -> None:
    """Give back the memory of models that are no longer named: circles of references hold them, and ZeRO-3's list of modules."""
    if parameter_offload := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        parameter_offload.FWD_MODULE_STACK.clear()
    gc.collect()
    torch.cuda.empty_cache()


def add_metrics(trainer: RewardTrainer | DPOTrainer, by_pair: dict[str, torch.Tensor]) -> None:
    """Hand the means over a batch's pairs, of all processes, to trl's log of the step."""
    everywhere = trainer.accelerator.gather(torch.stack([values.detach().float() for values in by_pair.values()], dim=1))
    for name, mean in zip(by_pair, everywhere.mean(0).tolist(), strict=True):
        trainer._metrics["train"][name].append(mean)
