"""What verify tells of settings, code and lists of files; the tampering itself is tried on a finished run (tests/workflow)."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel.verification import brief, changed_modules, differences, downstream, listed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
)


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        ({"seed": 1}, {"seed": 2}, ["seed: 1, now 2"]),
        ({"seed": 1}, {"seed": 1.0}, ["seed: 1, now 1.0"]),
        ({"p": [{"id": "a"}, {"id": "b"}]}, {"p": [{"id": "a"}, {"id": "c"}]}, ['p[1].id: "b", now "c"']),
        ({"p": ["a"]}, {"p": ["a", "b"]}, ['p: ["a"], now ["a","b"]']),
        ({"p": list("abcd")}, {"p": list("abcde")}, ["p: 4 entries, now 5 entries"]),
        ({"a": {"b": 1}}, {"a": {}}, ["a.b: 1, now gone"]),
        ({}, {"a": None}, ["a: not there, now null"]),
        ({"a": None}, {"a": False}, ["a: null, now false"]),
    ],
)
def test_a_changed_setting_is_told_by_its_key_with_both_values(then, now, told):
    assert list(differences(then, now)) == told


@given(VALUES, VALUES)
def test_settings_differ_exactly_where_their_json_does(one, other):
    def text(value: object) -> bytes:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)

    assert bool(list(differences({"x": one}, {"x": other}))) == (text(one) != text(other))


@given(VALUES)
def test_a_value_is_told_on_one_short_line(value):
    text = brief({"value": value, "long": "word \n" * 50})
    assert len(text) <= 40
    assert "\n" not in text


def test_modules_that_changed_came_and_went_are_named():
    assert changed_modules({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}) == ["b", "c", "d"]


def test_what_was_made_from_a_file_is_found_over_many_steps():
    readers = {"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": {"e"}, "x": {"a"}}
    assert downstream("a", readers) == {"b", "c", "d", "e"}
    assert downstream("a.prov.json", readers) == {"b", "c", "d", "e"}
    assert downstream("e", readers) == set()


def test_a_long_list_is_cut_and_counted():
    assert listed("abc") == "a, b, c"
    assert listed("abcde") == "a, b, c and 2 more"
