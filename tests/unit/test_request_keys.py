"""The key of a request: everything that determines its answer, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st
from unit.test_chat import key_of, model, requests

from psychocounsel.chat import ChatRequest
from psychocounsel.models import ModelSpec
from psychocounsel.records import write_manifest


def test_everything_that_determines_an_answer_changes_the_key():
    request, spec = requests(1, seed=1)[0], model(structured_output="json_schema", serve={})
    keys = [
        key_of(spec, request),
        key_of(spec, request, kind="serve"),
        key_of(model(structured_output="json_schema", serve={"dtype": "float32"}), request, kind="serve"),
        key_of(model(id="org/other"), request),
        key_of(model(revision="abc"), request),
        key_of(model(sampling={"max_tokens": 9}), request),
        key_of(model(sampling={"max_tokens": 8, "temperature": 0.0}), request),
        key_of(model(chat_template_kwargs={"a": 1}), request),
        key_of(spec, request, schema={"type": "object"}),
        key_of(spec, ChatRequest("r0", request.messages, seed=2)),
        key_of(spec, ChatRequest("r0", request.messages, seed=1, repeat=1)),
        key_of(spec, ChatRequest("r0", [{"role": "system", "content": "x"}, *request.messages], seed=1)),
    ]
    assert len(set(keys)) == len(keys)


def test_keys_are_those_of_earlier_versions():
    """Whoever has paid for answers under these keys must find them again: a change here voids every journal."""
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I feel ÷ sad."}]
    judge = {"name": "judge", "id": "gpt-4o-2024-08-06", "instruction": "x", "sampling": {"temperature": 0.0, "max_tokens": 1024}}
    judge = ModelSpec(endpoint="openai", structured_output="json_schema", **judge)
    asked = ChatRequest("a", messages, seed=7, group="no part of it")
    assert key_of(judge, asked, schema={"type": "object"}) == "79f81d1a8a1b08da794fe466a9e1290ba4b5f582ec22f175edd715f86a53e4f9"
    served = {"id": "meta-llama/Llama-3.1-8B-Instruct", "revision": "abc", "serve": {"dtype": "bfloat16", "max_model_len": 8192}}
    served |= {"sampling": {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}, "chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    again = ChatRequest("a", messages, seed=7, repeat=1)
    by_default = key_of(model(**served | {"serve": {}}), again, kind="serve")
    assert by_default == "fc17d0aa91200cf681d80c3835427a208f807fd3a2b6e222a27e2fb174435f96"
    assert key_of(model(**served), again, kind="serve") == "b5dda117856f8543c7c5c5e6e06c9c7a85592f2bae3097fd88bca46591ba0eec"


def test_names_and_addresses_do_not_change_the_key(tmp_path):
    request = requests(1)[0]
    assert key_of(model(name="other", endpoint="elsewhere", instruction="shown in the messages"), request) == key_of(model(), request)
    assert key_of(model(), ChatRequest("another id", request.messages, task={"kind": "rate"})) == key_of(model(), request)
    assert key_of(model(serve={"chat_template": "{{ messages }}"}), request, "serve") != key_of(model(serve={}), request, "serve")


def test_local_weights_stand_for_themselves(tmp_path):
    request, manifests = requests(1)[0], []
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(content)
        manifests.append(write_manifest(tmp_path / name))
    same, also, other = (key_of(model(), request, "serve", manifest) for manifest in manifests)
    assert same == also != other
    assert key_of(model(id="renamed", revision="x"), request, "serve", manifests[0]) == same


@given(st.text(), st.integers(0, 3), st.one_of(st.none(), st.integers(0, 2**28)))
def test_the_key_is_a_function_of_its_parts(text, repeat, seed):
    asked = [ChatRequest(name, [{"role": "user", "content": text}], repeat=repeat, seed=seed) for name in "ab"]
    assert key_of(model(), asked[0]) == key_of(model(), asked[1])
