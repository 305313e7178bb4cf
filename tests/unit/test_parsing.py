"""The strict parsers: what fits is read, everything else is a ValueError that quotes nothing of the text."""

import json

import jsonschema
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel.parsing import (
    better_schema,
    parse_better,
    parse_ratings,
    parse_ratings_together,
    parse_topic,
    ratings_schema,
    ratings_together_schema,
    topic_schema,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
RATINGS = st.lists(st.tuples(st.integers(1, 5), TEXT), min_size=1, max_size=5)


def as_object(ratings: list[tuple[int, str]]) -> dict:
    answer = {}
    for i, (score, rationale) in enumerate(ratings, start=1):
        answer |= {f"response_{i}_rating": score, f"rationale_{i}": rationale}
    return answer


def fenced(text: str) -> str:
    return f"```json\n{text}\n```"


@given(
    ratings=RATINGS,
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    wrap=st.sampled_from([str, fenced]),
    space=st.text(" \n\t\r"),
)
def test_ratings_round_trip(ratings, ascii_only, indent, wrap, space):
    raw = space + wrap(json.dumps(as_object(ratings), ensure_ascii=ascii_only, indent=indent)) + space
    assert parse_ratings(raw, len(ratings)) == ratings


@given(ratings=RATINGS, order=st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(ratings, order):
    items = list(as_object(ratings).items())
    order.shuffle(items)
    assert parse_ratings(json.dumps(dict(items)), len(ratings)) == ratings


@given(ratings=RATINGS, data=st.data())
def test_a_mutated_text_fails_or_says_what_another_reader_reads(ratings, data):
    raw = json.dumps(as_object(ratings), ensure_ascii=False)
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 3)))
    mutated = (
        raw[:start]
        + data.draw(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('{}[]",:0123456789.e-\\'), max_size=3))
        + raw[end:]
    )
    try:
        found = parse_ratings(mutated, len(ratings))
    except ValueError:
        return
    assert as_object(found) == orjson.loads(mutated.strip())  # an independent, strict JSON reader
    assert all(type(score) is int and 1 <= score <= 5 for score, _ in found)


@given(ratings=RATINGS, data=st.data())
def test_a_wrong_value_is_refused(ratings, data):
    answer = as_object(ratings)
    key = data.draw(st.sampled_from(sorted(answer)))
    wrong_scores = st.sampled_from([0, 6, -1, 4.5, 4.0, "4", True, False, None, [4], {"score": 4}, 10**30, float("nan"), float("inf")])
    wrong_rationales = st.sampled_from([None, 4, True, ["because"], {"text": "because"}, float("nan")])
    answer[key] = data.draw(wrong_scores if key.endswith("rating") else wrong_rationales)
    with pytest.raises(ValueError, match=r"^(response_\d+_rating|rationale_\d+|NaN|Infinity)"):
        parse_ratings(json.dumps(answer), len(ratings))


@given(ratings=RATINGS, data=st.data())
def test_missing_extra_and_duplicate_keys_are_refused(ratings, data):
    answer = as_object(ratings)
    key = data.draw(st.sampled_from(sorted(answer)))
    without = {k: v for k, v in answer.items() if k != key}
    with pytest.raises(ValueError, match=f"missing: {key}"):
        parse_ratings(json.dumps(without), len(ratings))
    with pytest.raises(ValueError, match="1 unexpected key"):
        parse_ratings(json.dumps(answer | {"overall": 4}), len(ratings))
    twice = json.dumps(answer)[:-1] + f", {json.dumps(key)}: {json.dumps(answer[key])}}}"
    with pytest.raises(ValueError, match="twice"):
        parse_ratings(twice, len(ratings))


@given(ratings=RATINGS, n=st.integers(1, 6))
def test_the_number_of_ratings_must_fit(ratings, n):
    raw = json.dumps(as_object(ratings))
    if n == len(ratings):
        assert parse_ratings(raw, n) == ratings
    else:
        with pytest.raises(ValueError, match="missing|unexpected"):
            parse_ratings(raw, n)


TOGETHER = st.integers(1, 4).flatmap(
    lambda n: st.fixed_dictionaries(dict.fromkeys(("empathy", "safety"), RATINGS.map(lambda r: (r * n)[:n])))
)


@given(ratings=TOGETHER, order=st.randoms(use_true_random=False))
def test_ratings_on_all_principles_round_trip(ratings, order):
    n, items = len(ratings["empathy"]), [(principle, as_object(found)) for principle, found in ratings.items()]
    order.shuffle(items)
    assert parse_ratings_together(json.dumps(dict(items)), n, ["empathy", "safety"]) == ratings
    jsonschema.validate(dict(items), ratings_together_schema(n, ["empathy", "safety"]))


@given(ratings=TOGETHER, data=st.data())
def test_a_fault_in_one_principle_refuses_the_whole_answer_and_names_it(ratings, data):
    n, answer = len(ratings["empathy"]), {principle: as_object(found) for principle, found in ratings.items()}
    for wrong in (data.draw(st.sampled_from([None, 4, [], "text", True])), answer["safety"] | {"more": 1}, {}):
        with pytest.raises(ValueError, match="^safety: "):
            parse_ratings_together(json.dumps(answer | {"safety": wrong}), n, ["empathy", "safety"])
    answer["safety"]["response_1_rating"] = data.draw(st.sampled_from([0, 6, 4.5, "4", True, None]))
    with pytest.raises(ValueError, match="^safety: response_1_rating"):
        parse_ratings_together(json.dumps(answer), n, ["empathy", "safety"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(answer, ratings_together_schema(n, ["empathy", "safety"]))


@given(ratings=TOGETHER)
def test_principles_are_exactly_those_asked_for(ratings):
    n, answer = len(ratings["empathy"]), {principle: as_object(found) for principle, found in ratings.items()}
    for principles, reason in ((["empathy"], "1 unexpected key"), (["empathy", "safety", "clarity"], "missing: clarity")):
        with pytest.raises(ValueError, match=reason):
            parse_ratings_together(json.dumps(answer), n, principles)
    twice = json.dumps(answer)[:-1] + f', "safety": {json.dumps(answer["safety"])}}}'
    with pytest.raises(ValueError, match="twice"):
        parse_ratings_together(twice, n, ["empathy", "safety"])


GOOD = '{"better": 1, "rationale": "secret words"}'


@pytest.mark.parametrize(
    "raw",
    [
        "",
        " \n",
        "null",
        "1",
        '"secret"',
        "[]",
        f"[{GOOD}]",
        f"Sure! {GOOD}",
        f"{GOOD} secret",
        f"{GOOD}{GOOD}",
        f"```{GOOD}```",
        f"```python\n{GOOD}\n```",
        f"```json\n{GOOD}",
        f"{GOOD}\n```",
        f"secret\n```json\n{GOOD}\n```",
        f"{fenced(GOOD)}\nsecret",
        fenced(fenced(GOOD)),
        f"\ufeff{GOOD}",
        f"\u00a0{GOOD}",
        GOOD[:-1],
        "{'better': 1}",
        '{"better": 1,}',
        '{"better": 1} // secret',
        '{"better": 3}',
        '{"better": "1"}',
        '{"better": 1.0}',
        '{"better": true}',
        '{"better": null}',
        '{"better": "tie"}',
        '{"Better": 1}',
        '{"better": 1, "better": 1}',
        '{"better": 1, "rationale": null}',
        '{"better": 1, "rationale": "\\ud800"}',
        '{"better": 1, "rationale": "line\nbreak"}',
        '{"better": 1, "secret": 2}',
        '{"better": NaN}',
        '{"better": 1e0}',
        '{"better": ' + "1" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_what_is_no_verdict_is_refused_without_quoting_it(raw):
    with pytest.raises(ValueError, match=".") as error:
        parse_better(raw)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "expected"), [('{"better": 2}', (2, "")), (GOOD, (1, "secret words")), (fenced(GOOD), (1, "secret words"))]
)
def test_verdicts(raw, expected):
    assert parse_better(raw) == expected


def test_topics_must_be_spelled_as_offered():
    assert parse_topic('{"topic": "anxiety"}', ["anxiety", "stress"]) == "anxiety"
    for raw in ('{"topic": "Anxiety"}', '{"topic": "grief"}', '{"topic": 1}', '{"topic": ["anxiety"]}', "anxiety"):
        with pytest.raises(ValueError, match="topic|JSON"):
            parse_topic(raw, ["anxiety", "stress"])


@given(ratings=RATINGS)
def test_schemas_allow_what_parses_and_are_closed(ratings):
    answer, n = as_object(ratings), len(ratings)
    jsonschema.validate(answer, ratings_schema(n))
    for wrong in (answer | {"more": 1}, answer | {"response_1_rating": 6}, {}, as_object([*ratings, (1, "")])):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, ratings_schema(n))


def test_schemas_of_choices():
    jsonschema.validate({"topic": "a"}, topic_schema(["a", "b"]))
    jsonschema.validate({"better": 2}, better_schema(with_rationale=False))
    assert list(better_schema(with_rationale=True)["properties"]) == ["rationale", "better"]  # the reason comes before the verdict
    for wrong, schema in (({"topic": "c"}, topic_schema(["a"])), ({"better": 3}, better_schema(with_rationale=False))):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    "raw", ["x" * 10**6, "[" * 10**6, '{"a":' * 10**5, "`" * 10**6, '{"better": 1, "rationale": "' + "x" * 10**6, " " * 10**6]
)
def test_a_huge_answer_is_refused(raw):
    with pytest.raises(ValueError, match="JSON|empty"):
        parse_better(raw)
