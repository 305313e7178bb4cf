"""Models that judge answers: from messages to token ids, and from token ids to rewards and log-probabilities.

The one way from a pair to tokens, used by training, scoring and selection alike. Imports torch: import it inside main().
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from psychocounsel.errors import UserError
from psychocounsel.models import ModelSpec, chat_messages
from psychocounsel.prompts import client_speech
from psychocounsel.stage import log

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# Tokens that vocabularies reserve and no text contains, for tokenizers that name no padding token (Llama 3).
SPARE_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "[PAD]")

# OpenRLHF names a reward model's head by its --value_head_prefix: value_head at first, later score, as transformers does.
HEADS = {r"^value_head\.": "score."}


# --- messages and tokens


def conversation(spec: ModelSpec, prompt: list[dict]) -> list[dict]:
    """Return a pair's prompt as `spec` is asked it: with its instruction, unless the data brings a system message of its own."""
    if prompt[0]["role"] != "system":
        return chat_messages(spec, prompt[0]["content"]) + prompt[1:]
    own = spec.model_copy(update={"instruction": prompt[0]["content"]})
    return chat_messages(own, prompt[1]["content"]) + prompt[2:]


def chat_ids(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, messages: list[dict], **options: object) -> list[int]:
    """Return the token ids of messages in the model's chat template, with its pinned arguments (such as the date)."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **spec.chat_template_kwargs, **options)["input_ids"]


def answer_ids(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, prompt: list[dict], answer: list[dict]) -> list[int]:
    """Return the token ids of a whole conversation, as a reward model reads it: up to the end of the answer's turn.

    A model whose reward_reads is `speech` gets the client's words alone, without the responding prompt around them. For one that
    is read at its eos_token the conversation ends there, as in OpenRLHF's training: white space of the template after it goes.
    """
    if spec.reward_reads == "speech":
        prompt = [*prompt[:-1], prompt[-1] | {"content": client_speech(prompt)}]
    ids = chat_ids(tokenizer, spec, conversation(spec, prompt) + answer)
    if spec.reward_from != "eos_token":
        return ids
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else 0
    return [*ids, tokenizer.eos_token_id] if tokenizer.decode(ids[end:]).strip() else ids[:end]


def reward_rows(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, pairs: list[dict], max_length: int) -> tuple[list[dict], int]:
    """Return pairs as a reward model reads them, {pair_id, chosen_ids, rejected_ids}, and how many conversations were cut."""
    sides = ("chosen", "rejected")
    sequences, cut = fit_end([answer_ids(tokenizer, spec, pair["prompt"], pair[side]) for pair in pairs for side in sides], max_length)
    chosen_and_rejected = zip(sequences[::2], sequences[1::2], strict=True)
    return [
        {"pair_id": p["pair_id"], "chosen_ids": c, "rejected_ids": r} for p, (c, r) in zip(pairs, chosen_and_rejected, strict=True)
    ], cut


def fit_end(sequences: list[list[int]], max_length: int) -> tuple[list[list[int]], int]:
    """Cut conversations that are too long at their start, since the reward is read at the end; return how many were cut too."""
    cut = sum(len(ids) > max_length for ids in sequences)
    if cut:
        log.warning("%d of %d conversations are longer than %d tokens: their starts are cut off", cut, len(sequences), max_length)
    return [ids[-max_length:] for ids in sequences], cut


def policy_rows(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, pairs: list[dict], max_length: int) -> tuple[list[dict], int]:
    """Return pairs as a policy reads them, {pair_id, prompt_ids, chosen_ids, rejected_ids}, and how many pairs have a cut answer.

    Answers are cut at their ends, as the policy learns them from their starts; a pair whose prompt leaves no room is left out.
    """
    rows, cut = [], 0
    for pair in pairs:
        conversations = [answer_ids(tokenizer, spec, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        opened = chat_ids(tokenizer, spec, conversation(spec, pair["prompt"]), add_generation_prompt=True)
        prompt = min(len(os.path.commonprefix([opened, ids])) for ids in conversations)  # tokens that chosen and rejected share
        if prompt < max_length:
            chosen, rejected = (ids[prompt:max_length] for ids in conversations)
            rows.append(
                {"pair_id": pair["pair_id"], "prompt_ids": conversations[0][:prompt], "chosen_ids": chosen, "rejected_ids": rejected}
            )
            cut += max(map(len, conversations)) > max_length
    if cut:
        log.warning("%d of %d pairs are longer than %d tokens: the ends of their answers are cut off", cut, len(pairs), max_length)
    return rows, cut


def generated_ids(
    tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, prompt: list[dict], text: str, *, finished: bool
) -> tuple[list[int], list[int]]:
    """Return (prompt ids, answer ids) of an answer as a policy generated it.

    The answer ends with the token that ended its turn, or, where it was not `finished`, with its last word; what the template
    adds after a turn was not generated.
    """
    whole = answer_ids(tokenizer, spec, prompt, [{"role": "assistant", "content": text}])
    opened = chat_ids(tokenizer, spec, conversation(spec, prompt), add_generation_prompt=True)
    start = len(os.path.commonprefix([opened, whole]))
    answer, special = whole[start:], set(tokenizer.all_special_ids)
    end = max((place for place, token in enumerate(answer) if token in special), default=len(answer))
    return whole[:start], answer[: end + finished]


def pad_batch(sequences: list[list[int]], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask), both (sequences, longest), padded on one side."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask


# --- loading


def load_tokenizer(spec: ModelSpec, weights: Path | None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and make sure that it has a padding token, one that ends no turn where the vocabulary has one."""
    tokenizer = loaded(AutoTokenizer, spec, weights)
    if spec.serve and spec.serve.chat_template:
        tokenizer.chat_template = spec.serve.chat_template
    if tokenizer.chat_template is None:
        raise UserError(f"{spec.name}: the tokenizer of {weights or spec.id} has no chat template; a chat model is needed")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = next((token for token in SPARE_TOKENS if token in tokenizer.get_vocab()), tokenizer.eos_token)
    return tokenizer


def load_language_model(spec: ModelSpec, weights: Path | None) -> PreTrainedModel:
    """Load a causal model for reading log-probabilities."""
    return load_model(AutoModelForCausalLM, spec, weights, **for_reading()).eval()


def load_reward_model(spec: ModelSpec, weights: Path | None, pad_id: int) -> PreTrainedModel:
    """Load a reward model for scoring: a sequence classifier with one output, or a causal model that speaks its reward.

    Reward models of OpenRLHF are classifiers too, whose config does not say that they have one output. Raises UserError where the
    weights lack a head or bring one with more outputs: transformers would draw a new head at random.
    """
    if spec.reward_from == "first_token_logit":
        return load_language_model(spec, weights)
    options = {"num_labels": 1, "key_mapping": HEADS, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, facts = load_model(AutoModelForSequenceClassification, spec, weights, **options, **for_reading())
    for key, fault in (("missing_keys", "lack {}"), ("mismatched_keys", "have more than one output: {}")):
        if names := sorted(name if isinstance(name, str) else name[0] for name in facts[key]):
            raise UserError(f"{spec.name}: {weights or spec.id} is no reward model: its weights {fault.format(', '.join(names))}")
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = pad_id
    if hasattr(model, "score") and model.score.weight.device.type != "meta":  # one that is kept off the GPUs comes as it is
        read_in_float32(model.score)
    return model.eval()


def read_in_float32(head: torch.nn.Linear) -> None:
    """Let a head give its output in float32 whatever the arithmetic before it: rewards in bf16 lie up to 1 % apart, so that similar
    answers would tie."""
    plain = head.float().forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return plain(hidden.float())

    head.forward = forward


def for_reading() -> dict:
    """How a model is loaded that is only read: as its weights are, over all GPUs there are; in float32 on a CPU, where bf16 is slow."""
    return {"dtype": "auto", "device_map": "auto"} if torch.cuda.is_available() else {"dtype": torch.float32}


def load_config(spec: ModelSpec, weights: Path | None) -> PretrainedConfig:
    """Load the configuration of a model, of its text model where it has several."""
    return loaded(AutoConfig, spec, weights).get_text_config()


def load_model(kind: type, spec: ModelSpec, weights: Path | None, **options: object):
    """Load a model with the attention that it needs: the default one leaves out the capped logits of Gemma 2."""
    capped = getattr(load_config(spec, weights), "attn_logit_softcapping", None)
    return loaded(kind, spec, weights, **({"attn_implementation": "eager"} if capped else {}), **options)


def loaded(kind: type, spec: ModelSpec, weights: Path | None, **options: object):
    """Load a config, tokenizer or model from a local folder, or from the Hub at the pinned revision."""
    trusted = bool(spec.serve and spec.serve.trust_remote_code)
    try:
        if weights:
            return kind.from_pretrained(weights, local_files_only=True, **options)
        return kind.from_pretrained(spec.id, revision=spec.revision, trust_remote_code=trusted, **options)
    except OSError as error:
        raise UserError(f"{spec.name}: cannot load {weights or spec.id}: {str(error).splitlines()[0]}") from None


# --- reading


def rewards(model: PreTrainedModel, spec: ModelSpec, sequences: list[list[int]], pad_id: int, batch_size: int) -> list[float]:
    """Return the reward of each conversation, given as token ids.

    A classifier's reward is its output at the last token that is not its padding token, as in its training (transformers: where
    what ends a turn pads too, the token before). OpenRLHF reads its own at the end, whatever token pads (eos_token). A model that
    speaks its reward gives it as the logit of token 0 at the place after the conversation (model card of
    nvidia/Llama-3.1-Nemotron-70B-Reward-HF: one token is generated after the messages, without the head of a further turn, and
    `scores[0][0][0]` is the reward).
    """

    def read(chunk: list[list[int]]) -> list[float]:
        if spec.reward_from == "first_token_logit":
            ids, mask = pad_batch(chunk, pad_id, "left")
            logits = model(
                ids.to(model.device), attention_mask=mask.to(model.device), position_ids=_positions(mask).to(model.device), logits_to_keep=1
            )
            return logits.logits[:, -1, 0].float().tolist()
        if spec.reward_from == "eos_token":
            ids, mask = pad_batch(chunk, pad_id, "right")
            hidden = model.base_model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).last_hidden_state
            return model.score(hidden[torch.arange(len(chunk)), mask.sum(-1) - 1])[:, 0].float().tolist()
        ids, mask = pad_batch(chunk, model.config.get_text_config().pad_token_id, "right")
        return model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits[:, 0].float().tolist()

    found = by_length(sequences, batch_size, read, length=len, what="rewards")
    if not all(map(torch.isfinite, torch.tensor(found))):
        raise UserError(f"{spec.name}: some rewards are not finite numbers; the model is broken, or its number format too narrow")
    return found


def text_rewards(
    spec: ModelSpec, weights: Path, prompts: dict[str, list[dict]], texts: set[tuple[str, str]], max_length: int, batch_size: int
) -> tuple[dict[tuple[str, str], float], int]:
    """Return the reward of each answer, given as (key of its prompt, text), and how many conversations were cut."""
    tokenizer = load_tokenizer(spec, weights)
    model = load_reward_model(spec, weights, tokenizer.pad_token_id)
    ordered = sorted(texts)
    sequences = [answer_ids(tokenizer, spec, prompts[key], [{"role": "assistant", "content": text}]) for key, text in ordered]
    sequences, cut = fit_end(sequences, max_length)
    return dict(zip(ordered, rewards(model, spec, sequences, tokenizer.pad_token_id, batch_size), strict=True)), cut


def pair_rewards(model: PreTrainedModel, spec: ModelSpec, rows: list[dict], pad_id: int, batch_size: int) -> list[tuple[float, float]]:
    """Return (reward of chosen, reward of rejected) for each of the `reward_rows`."""
    found = rewards(model, spec, [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")], pad_id, batch_size)
    return list(zip(found[::2], found[1::2], strict=True))


def answer_log_probs(model: PreTrainedModel, answers: list[tuple[list[int], list[int]]], pad_id: int, batch_size: int) -> list[float]:
    """Return log p(answer | prompt) in nats for each (prompt ids, answer ids), summed over the answer's tokens."""

    def read(chunk: list[tuple[list[int], list[int]]]) -> list[float]:
        ids, logits = _answer_logits(model, chunk, pad_id)
        longest = logits.shape[1]
        answer_mask = torch.arange(longest) >= torch.tensor([[longest - len(answer)] for _, answer in chunk])
        targets = ids[:, -longest:, None].to(logits.device)
        token_log_probs = logits.float().log_softmax(-1).gather(-1, targets)[..., 0]
        return (token_log_probs * answer_mask.to(logits.device)).sum(-1).tolist()

    return by_length(answers, batch_size, read, length=lambda pair: len(pair[0]) + len(pair[1]), what="log-probabilities")


def pair_log_ratios(model: PreTrainedModel, rows: list[dict], pad_id: int, batch_size: int) -> list[float]:
    """Return log p(chosen | prompt) - log p(rejected | prompt) in nats for each of the `policy_rows`."""
    answers = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    found = answer_log_probs(model, answers, pad_id, batch_size)
    return [chosen - rejected for chosen, rejected in zip(found[::2], found[1::2], strict=True)]


def divergences(
    policy: PreTrainedModel, base: PreTrainedModel, answers: list[tuple[list[int], list[int]]], pad_id: int, batch_size: int
) -> list[tuple[float, float]]:
    """Return, in nats for each (prompt ids, answer ids): log p(answer) under the policy minus under the base, and the sum over the
    answer's tokens of the KL divergence between what both models would say in their place."""

    def read(chunk: list[tuple[list[int], list[int]]]) -> list[tuple[float, float]]:
        (_, ours), (_, theirs) = (_answer_logits(model, chunk, pad_id) for model in (policy, base))
        found = []
        for (_, answer), row, other in zip(chunk, ours, theirs, strict=True):  # one by one: a whole vocabulary in float32 is large
            log_p, log_q = (logits[len(logits) - len(answer) :].to(row.device).float().log_softmax(-1) for logits in (row, other))
            ratio = log_p - log_q
            said = ratio.gather(-1, torch.tensor(answer, dtype=torch.long, device=row.device)[:, None])
            found.append((said.sum().item(), (log_p.exp() * ratio).sum().item()))
        return found

    return by_length(answers, batch_size, read, length=lambda pair: len(pair[0]) + len(pair[1]), what="divergences")


def _answer_logits(model: PreTrainedModel, chunk: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, (answers, longest conversation), and logits, (answers, longest answer, vocabulary), at the places before the tokens
    of the answers; both are padded on the left, so that the answers' ends align."""
    ids, mask = pad_batch([prompt + answer for prompt, answer in chunk], pad_id, "left")
    logits = model(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=_positions(mask).to(model.device),
        use_cache=False,
        logits_to_keep=max(len(answer) for _, answer in chunk) + 1,
    ).logits
    return ids, logits[:, :-1]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Return each token's place in its own sequence, however it is padded."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def by_length(items: list, batch_size: int, read: Callable[[list], list], length: Callable, what: str) -> list:
    """Read items in batches of like length, the longest first, so that little is padded; return the values in the given order."""
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    values: list = [None] * len(items)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for place, value in zip(places, read([items[i] for i in places]), strict=True):
                values[place] = value
        if (start // batch_size) % 100 == 99:
            log.info("%s: %d of %d", what, start + len(places), len(order))
    return values
