"""The command lines of vLLM against what the version in envs/serve.yaml says of itself (vllm_facts.json, by tests/vllm_facts.py)."""

import argparse
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel.config import load_study, read_config
from psychocounsel.endpoints import Endpoint, read_endpoint
from psychocounsel.models import ModelSpec, Sampling, Serve, chat_messages
from psychocounsel.serving import server_command
from psychocounsel.slices import Slices
from psychocounsel.workflow import Workflow

FACTS = json.loads(Path(__file__).with_name("vllm_facts.json").read_text())
STUDY = load_study(read_config([Path("config/config.yaml")]), [Path("config/config.yaml")])
SERVED = sorted(name for name, model in STUDY.models.items() if model["kind"] == "chat" and model["endpoint"] == "vllm")
OPEN_POOL = [name for name in STUDY.config["responses"]["pool"] if STUDY.models[name]["endpoint"] == "vllm"]
DTYPES = ["bfloat16", "float16", "float32"]  # all that models.schema.json allows

# config.json's architecture of each model. Those of Baichuan2, Orion, MiniCPM3 and Jamba stand with the models' names in vLLM's own
# tests (tests/models/registry.py of its source package); the others are what transformers calls the family.
ARCHITECTURES = {
    "baichuan-inc/Baichuan2": "BaichuanForCausalLM",
    "OrionStarAI/Orion-14B-Chat": "OrionForCausalLM",
    "openbmb/MiniCPM3-4B": "MiniCPM3ForCausalLM",
    "ai21labs/AI21-Jamba-1.5-Mini": "JambaForCausalLM",
    "allenai/OLMo-7B-0724-Instruct-hf": "OlmoForCausalLM",
    "google/gemma-2": "Gemma2ForCausalLM",
    "microsoft/Phi-3.5-mini-instruct": "Phi3ForCausalLM",
    "mistralai/": "MistralForCausalLM",
    "Qwen/Qwen2.5": "Qwen2ForCausalLM",
    "meta-llama/": "LlamaForCausalLM",
    "deepseek-ai/deepseek-llm": "LlamaForCausalLM",
    "Psychotherapy-LLM/PsychoCounsel-Llama3": "LlamaForCausalLM",
}


def parsed(command: list[str]) -> argparse.Namespace:
    """Parse a command line of `vllm serve` by the facts; SystemExit for an option or a value that this version does not know."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model")
    for option, fact in FACTS["options"].items():
        plain = {"int": int, "float": float}.get(fact["kind"], str)
        if fact["kind"] == "flag":
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        elif fact["kind"] == "switch":
            parser.add_argument(option, action="store_true")
        elif fact["kind"] == "list":
            parser.add_argument(option, nargs="+")
        else:
            parser.add_argument(option, type=plain, choices=fact.get("choices"))
    assert command[:2] == ["vllm", "serve"]
    return parser.parse_args(command[2:])


def spec_of(name: str) -> ModelSpec:
    """A model as the programs get it."""
    return ModelSpec.model_validate(json.loads(json.dumps(Slices(Workflow(STUDY)).spec(name))))


def test_the_facts_are_of_the_version_that_is_installed():
    environment = yaml.safe_load(Path("envs/serve.yaml").read_text())["dependencies"][-1]["pip"]
    assert f"vllm=={FACTS['version']}" in environment, "run tests/vllm_facts.py for the version of envs/serve.yaml"
    named = re.findall(r"vllm==([\d.]+)", Path("docs/cluster.md").read_text())
    assert set(named) == {FACTS["version"]}


def test_the_facts_know_what_is_wrong():
    """The parser of the facts does refuse."""
    good = ["vllm", "serve", "m", "--dtype", "float16", "--port", "1", "--trust-remote-code"]
    assert parsed(good).dtype == "float16"
    for bad in (["--dtype", "float8"], ["--port", "x"], ["--chat-templates", "t"], ["--max-model"], ["--no-port"]):
        with pytest.raises(SystemExit):
            parsed([*good, *bad])


SOURCE = {
    "PKG-INFO": "Name: vllm\nVersion: 9.9.9\n",
    "vllm/config/model.py": """
Kinds = Literal["a", "b"]
class ModelConfig:
    dtype: Kinds | torch.dtype = "a"
    name: str | list[str] | None = None
    eager: bool = False
    length: int | None = Field(default=None)
    mode: str | Kinds = "a"
    extra: dict[str, int] | None = None
""",
    "vllm/engine/arg_utils.py": """
class EngineArgs:
    @staticmethod
    def add_cli_args(parser):
        model_kwargs = get_kwargs(ModelConfig)
        group.add_argument("--dtype", **model_kwargs["dtype"])
        group.add_argument("--name", "-n", **{**model_kwargs["name"], "default": None})
        group.add_argument("--eager", **model_kwargs["eager"])
        group.add_argument("--length", **model_kwargs["length"])
        group.add_argument("--mode", **model_kwargs["mode"])
        group.add_argument("--extra", **model_kwargs["extra"])
        group.add_argument("--rank", type=int)
class AsyncEngineArgs(EngineArgs):
    pass
""",
    "vllm/entrypoints/openai/cli_args.py": """
class BaseFrontendArgs:
    chat_template: str | None = None
class FrontendArgs(BaseFrontendArgs):
    port: int = 8000
    share: float = 0.5
def make_arg_parser(parser):
    parser.add_argument("tag", type=str)
    parser.add_argument("--headless", action="store_true")
""",
    "vllm/model_executor/models/registry.py": """
_TEXT_GENERATION_MODELS = {"BForCausalLM": ("b", "B")}
_TRANSFORMERS_SUPPORTED_MODELS = {"AForCausalLM": ("t", "T")}
_PREVIOUSLY_SUPPORTED_MODELS = {"OldForCausalLM": "0.1"}
""",
}


def test_the_facts_are_read_from_the_source(tmp_path):
    archive = tmp_path / "vllm-9.9.9.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in SOURCE.items():
            (tmp_path / "file").write_text(text)
            tar.add(tmp_path / "file", f"vllm-9.9.9/{name}")
    command = [sys.executable, "tests/vllm_facts.py", str(archive)]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert facts["version"] == "9.9.9"
    assert facts["architectures"] == ["AForCausalLM", "BForCausalLM"]
    assert {name: fact["kind"] for name, fact in facts["options"].items()} == {
        "--dtype": "choice", "--name": "list", "--eager": "flag", "--length": "int", "--mode": "str", "--extra": "other", "--rank": "int",
        "--chat-template": "str", "--port": "int", "--share": "float", "--headless": "switch",
    }  # fmt: skip
    assert facts["options"]["--dtype"]["choices"] == ["a", "b"]


def test_the_pool_has_sixteen_open_models():
    assert len(OPEN_POOL) == 16
    assert set(OPEN_POOL) < set(SERVED), "rankers and policies beside them"


@pytest.mark.parametrize("name", SERVED)
def test_every_model_is_served_by_a_known_command(name):
    entry, spec, endpoint = STUDY.models[name], spec_of(name), read_endpoint(Path("config/endpoints.yaml"), "vllm")
    template = Path("t.jinja") if spec.serve.chat_template else None
    command = server_command(spec, endpoint, None, Workflow(STUDY).gpus(name), 8000, template)
    found = parsed(command)
    assert found.model == entry["id"]
    assert found.served_model_name == [name]
    assert found.tensor_parallel_size == entry["serve"]["tensor_parallel"]
    assert (found.dtype, found.max_model_len) == (entry["serve"]["dtype"], entry["serve"]["max_model_len"])
    assert bool(found.trust_remote_code) == entry["serve"]["trust_remote_code"]
    assert (found.revision, found.tokenizer_revision) == (entry["revision"], entry["revision"])
    assert bool(found.chat_template) == ("chat_template" in entry["serve"])
    assert (found.host, found.port, found.generation_config) == ("127.0.0.1", 8000, "vllm")


@pytest.mark.parametrize("name", SERVED)
def test_every_model_is_of_an_architecture_that_is_served(name):
    model_id = STUDY.models[name]["id"]
    (architecture,) = {architecture for start, architecture in ARCHITECTURES.items() if model_id.startswith(start)}
    assert architecture in FACTS["architectures"]


@pytest.mark.parametrize("name", SERVED)
def test_an_answer_and_its_prompt_fit_into_the_context(name):
    """A speech of 1,000 characters (250 tokens) under the prompt of a hundred, and the longest answer."""
    entry = STUDY.models[name]
    assert 350 + entry["sampling"]["max_tokens"] <= entry["serve"]["max_model_len"]


@given(
    serve=st.builds(
        Serve,
        dtype=st.sampled_from(DTYPES),
        max_model_len=st.none() | st.integers(1, 1_000_000),
        trust_remote_code=st.booleans(),
        chat_template=st.none() | st.just("{{ messages }}"),
    ),
    revision=st.none() | st.from_regex(r"[0-9a-f]{40}", fullmatch=True),
    folder=st.none() | st.sampled_from([Path("/weights/my model"), Path("results/x")]),
    gpus=st.integers(1, 64),
    port=st.integers(1, 65535),
    more=st.sampled_from([[], ["--gpu-memory-utilization", "0.8", "--max-num-seqs", "64"], ["--no-enable-prefix-caching"]]),
)
def test_every_setting_makes_a_known_command(serve, revision, folder, gpus, port, more):
    spec = ModelSpec(name="my-model", id="org/model", revision=revision, serve=serve, sampling=Sampling(max_tokens=1))
    endpoint = Endpoint(kind="serve", server="vllm", start_timeout_s=1, server_args=more)
    template = Path("logs/t.jinja") if serve.chat_template else None
    found = parsed(server_command(spec, endpoint, folder, gpus, port, template))
    pinned = None if folder else revision
    assert found.model == (str(folder) if folder else "org/model")
    assert (found.revision, found.tokenizer_revision) == (pinned, pinned)
    assert found.code_revision == (pinned if serve.trust_remote_code else None), "code of the revision that was pinned, or none"
    assert (found.dtype, found.max_model_len, bool(found.trust_remote_code)) == (serve.dtype, serve.max_model_len, serve.trust_remote_code)
    assert (found.tensor_parallel_size, found.port, found.chat_template) == (gpus, port, str(template) if template else None)


def test_the_schema_allows_the_dtypes_that_vllm_knows():
    schema = json.loads(Path("config/schemas/models.schema.json").read_text())
    allowed = schema["additionalProperties"]["properties"]["serve"]["properties"]["dtype"]["enum"]
    assert allowed == DTYPES
    assert set(allowed) <= set(FACTS["options"]["--dtype"]["choices"])


# Chat templates -----------------------------------------------------------------------------------------------------------------------

# As their sources show them, cut to what one conversation of text needs (see models.yaml for where each was seen).
TEMPLATES = {
    "orion-14b-chat": "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ 'Human: ' + message['content'] + '\\n\\nAssistant: ' + eos_token }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    "gemma-2-9b-it": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "minicpm3-4b": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "baichuan2-7b-chat": None,  # ours
}


def rendered(template: str, messages: list[dict]) -> str:
    """The prompt that transformers makes of messages, by the code that servers use."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), bos_token="<s>", eos_token="</s>"
    )
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_instruction_reaches_the_prompt_of_a_model_without_a_system_role(name):
    spec = spec_of(name).model_copy(update={"instruction": "Be kind."})
    prompt = rendered(TEMPLATES[name] or spec.serve.chat_template, chat_messages(spec, "I feel sad."))
    assert prompt.index("Be kind.") < prompt.index("I feel sad.")


def test_a_system_message_would_be_lost_or_refused_where_models_yaml_says_so():
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I feel sad."}]
    assert "Be kind." not in rendered(TEMPLATES["orion-14b-chat"], system)
    with pytest.raises(Exception, match="System role not supported"):
        rendered(TEMPLATES["gemma-2-9b-it"], system)


@pytest.mark.parametrize("name", SERVED)
def test_every_model_gets_an_instruction_once_in_the_place_that_it_knows(name):
    spec = spec_of(name).model_copy(update={"instruction": "Be kind."})
    *system, user = chat_messages(spec, "I feel sad.")
    assert [m["role"] for m in system] == (["system"] if spec.system_role else [])
    assert user["content"] == ("I feel sad." if spec.system_role else "Be kind.\n\nI feel sad.")
    assert chat_messages(spec_of(name), "I feel sad.") == [{"role": "user", "content": "I feel sad."}], "the paper's models have none"


def test_the_template_of_baichuan_is_the_form_of_its_code():
    spec = spec_of("baichuan2-13b-chat")
    assert "{#" not in spec.serve.chat_template, "its comments count for nothing"
    turns = [("system", "S"), ("user", " one\n"), ("assistant", "two"), ("user", "three")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert rendered(spec.serve.chat_template, messages) == "S<reserved_106> one\n<reserved_107>two<reserved_106>three<reserved_107>"
    assert rendered(spec.serve.chat_template, messages[1:2]) == "<reserved_106> one\n<reserved_107>"
    for odd in ([*messages, {"role": "tool", "content": "x"}], [messages[1], messages[0]]):
        with pytest.raises(Exception, match="no place in the template for a message of role"):
            rendered(spec.serve.chat_template, odd)
