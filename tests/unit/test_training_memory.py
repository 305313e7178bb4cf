"""The memory that docs/training.md tells of: its numbers of weights are real models', its sums agree with others', and it is up to date."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from training_memory import KINDS, SHAPES, Load, Shape, activations, fits, parts, peak, report, states  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {"Llama-3.2-3B": 3_212_749_824, "Llama-3.1-8B": 8_030_261_248}  # safetensors' count on the models' pages
FOUR_GPUS = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())["set-resources"]


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(**vars(shape), num_labels=1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_adapters_are_counted_as_in_the_model(name, kind):
    shape = SHAPES[name]
    with torch.device("meta"):
        if kind == "DPO":
            model, task = AutoModelForCausalLM.from_config(config_of(shape)), "CAUSAL_LM"
            assert shape.parameters(kind) == PUBLISHED[name]
        else:
            model, task = AutoModelForSequenceClassification.from_config(config_of(shape)), "SEQ_CLS"
        assert shape.parameters(kind) == sum(weight.numel() for weight in model.parameters())
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type=task))
    assert shape.adapter(16) == sum(weight.numel() for name, weight in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("gpus", [1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_estimates_as_much(kind, gpus):
    """Of ZeRO-3 its estimate leaves out the gradients in bf16."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    for shape in SHAPES.values():
        count = shape.parameters(kind)
        _, second = estimate_zero2_model_states_mem_needs(count, gpus, cpu_offload=False)
        _, third, _ = estimate_zero3_model_states_mem_needs(count, 0, gpus, cpu_offload=False, cpu_offload_params=False)
        assert sum(states(shape, kind, "ZeRO-2", gpus, 16).values()) == pytest.approx(second)
        assert sum(states(shape, kind, "ZeRO-3", gpus, 16).values()) == pytest.approx(third + 2 * count / gpus)


def test_a_blocks_activations_are_counted_at_least_as_they_are_kept():
    """Against what autograd keeps of a real block in bf16, for each token."""
    shape = Shape(64, 256, 896, 2, 8, 2, 32, False)
    tokens = 256

    def kept(blocks: int) -> int:
        model = LlamaModel(config_of(Shape(**vars(shape) | {"num_hidden_layers": blocks}))).to(torch.bfloat16)
        own, sizes, alive = {weight.data_ptr() for weight in model.parameters()}, {}, []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                alive.append(tensor)  # or its place would be given to another
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        assert output.last_hidden_state.requires_grad
        return sum(sizes.values())

    load = Load(pairs=1, max_length=tokens // 2)
    no_blocks = Shape(**vars(shape) | {"num_hidden_layers": 0})
    one_block = (activations(no_blocks, "ZeRO-2", load) - 3 * tokens**2) / 2  # without the mask, and gradients on their way
    assert 1.0 <= one_block / (kept(3) - kept(2)) < 1.5


def test_docs_hold_what_the_program_prints():
    assert report(Load(), 80) in (ROOT / "docs/training.md").read_text(), "run python benchmarks/training_memory.py and put it in"


@pytest.mark.parametrize("recipe", ["reward_model", "dpo", "dpo_iteration", "dpo_one_epoch"])
def test_recipes_fit_the_gpus_that_the_profile_asks_for(recipe):
    kind, rule = ("reward model", "train_reward_model") if recipe == "reward_model" else ("DPO", "train_policy")
    settings = yaml.safe_load((ROOT / f"config/train/{recipe}.yaml").read_text())
    load = Load(settings["per_device_batch_size"], settings["max_length"])
    way = {"zero2.json": "ZeRO-2", "zero3.json": "ZeRO-3"}[settings["deepspeed"]]
    for shape in SHAPES.values():
        assert fits(peak(shape, kind, way, FOUR_GPUS[rule]["gpu"], load), 80)


def test_more_gpus_take_less_each_and_more_pairs_take_more():
    for shape in SHAPES.values():
        assert peak(shape, "DPO", "ZeRO-3", 8, Load()) < peak(shape, "DPO", "ZeRO-3", 4, Load())
        small, large = (parts(shape, "DPO", "ZeRO-2", 4, Load(pairs=pairs)) for pairs in (2, 4))
        assert {name for name in large if large[name] > small[name]} == {"activations"}


def test_the_program_takes_other_gpus():
    command = [sys.executable, "benchmarks/training_memory.py", "--pairs", "1", "--max-length", "512", "--rank", "8", "--gib", "24"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "1 pairs of 512 tokens" in printed
    assert "**" in printed
