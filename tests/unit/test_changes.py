"""What changed, in words: every difference is named, nothing else is, and by the names that people know."""

from hypothesis import given
from hypothesis import strategies as st

from psychocounsel.changes import changed_code, changed_settings
from psychocounsel.records import canonical_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "name", "seed", "models", "b"]), inner, max_size=3),
)
SETTINGS = st.dictionaries(st.sampled_from(["model", "principles", "seed", "name"]), VALUES, max_size=4)

PRINCIPLES = [{"id": "clarity", "name": "Clarity", "definition": "d"}, {"id": "safety", "name": "Safety", "definition": "e"}]
MODEL = {"name": "llama-3.1-8b-instruct", "id": "meta-llama/x", "sampling": {"temperature": 0.7, "top_p": 0.95}}


@given(SETTINGS, SETTINGS)
def test_there_are_words_exactly_where_settings_differ(old, new):
    assert bool(changed_settings(old, new)) == (canonical_json(old) != canonical_json(new))


def test_words_name_what_people_know():
    old = {"model": MODEL, "principles": PRINCIPLES, "pool": ["a", "b"], "recipe": {"beta": 0.1}, "prompt": "p" * 200, "seed": 1}
    edits = {
        "model": ({**MODEL, "sampling": {**MODEL["sampling"], "temperature": 0.9}}, "temperature of llama-3.1-8b-instruct: 0.7 -> 0.9"),
        "principles": ([{**PRINCIPLES[0], "definition": "other"}, PRINCIPLES[1]], "principle 'clarity' changed: definition"),
        "pool": (["b", "c"], "pool: c added; pool: a removed"),
        "recipe": ({"beta": 0.2}, "beta of recipe: 0.1 -> 0.2"),
        "prompt": ("q" * 200, "prompt changed"),
        "seed": (2, "seed: 1 -> 2"),
    }
    for key, (value, words) in edits.items():
        assert "; ".join(changed_settings(old, old | {key: value})) == words
    assert changed_settings(old, old | {"model": {**MODEL, "name": "other", "id": "o/o"}}) == ["model: llama-3.1-8b-instruct -> other"]
    assert changed_settings(old, old | {"pool": ["b", "a"]}) == ["pool: another order or number"]
    assert changed_settings(old, old | {"principles": PRINCIPLES[:1]}) == ["principle 'safety' removed"]
    assert changed_settings({}, {"limit": 3}) == ["limit: not set -> 3"]


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 1)), st.dictionaries(st.sampled_from("abc"), st.integers(0, 1)))
def test_code_is_told_by_its_files(old, new):
    words = " ".join(changed_code(old, new)).replace(",", " ").split()
    assert {file for file in "abc" if file in words} == {f for f in "abc" if old.get(f) != new.get(f)}
