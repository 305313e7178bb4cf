"""Topics, ratings, their parse and the scores: the programs against real files, with the offline judge and with scripted judges."""

import importlib
import itertools
import json
import random
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel import rubric
from psychocounsel.chat import ChatAnswer, ChatFailure
from psychocounsel.journal import add_tokens
from psychocounsel.records import content_hash, dump_records, read_records

ROOT = Path(__file__).resolve().parents[2]
ENDPOINTS = str(ROOT / "config" / "endpoints.yaml")
RUBRIC = {"name": "rubric", "id": "rubric", "endpoint": "rubric"}
PRINCIPLES = [
    {"id": name, "name": name.title(), "definition": f"Definition of {name}.", "aspects": [f"Aspect of {name}."]} for name in rubric.RUBRIC
]
TOGETHER = {"protocol": "together", "prompt": (ROOT / "config" / "prompts" / "rate_together.jinja").read_text(encoding="utf-8")}
PROMPT = (ROOT / "config" / "prompts" / "rate.jinja").read_text(encoding="utf-8")
TOPIC_PROMPT = (ROOT / "config" / "prompts" / "topic.jinja").read_text(encoding="utf-8")
TEXTS = [
    "It sounds like you're anxious about your boss. What worries you most?",
    "You should quit.",
    "Just relax, you'll be fine.",
    "You've shown courage, and it's okay to go at your own pace.",
]


def sid(n: int) -> str:
    return f"{n:016x}"


def speech(n: int, split: str = "train") -> dict:
    text = f"My boss yells at me and I feel anxious, number {n}."
    facts = {"source": "demo", "source_row": n, "source_key": None, "cluster_id": sid(n)}
    return facts | {"speech_id": sid(n), "text": text, "topic": "stress", "coarse_topic": "core", "topic_from": "source", "split": split}


def response(n: int, model: str, text: str) -> dict:
    facts = {"sample": 0, "finish_reason": "stop", "usage": None, "served_model": None, "target_words": None}
    ids = {"response_id": content_hash(n, model, digits=16), "speech_id": sid(n), "request_key": content_hash(n, model)}
    return facts | ids | {"model": model, "text": text}


def run(monkeypatch, program: str, settings: dict, **files) -> None:
    """Run a program in this process, as its command line would."""
    words = [f"{program}.py", "--settings", json.dumps(settings)]
    for name, value in files.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(ROOT)
    importlib.import_module(program).main()


@pytest.fixture
def files(tmp_path):
    """Three speeches: answered by four models, by two, and by one."""
    dump_records(tmp_path / "speeches.jsonl", [speech(n) for n in (1, 2, 3)], "speech")
    answered = {"a": [1, 2, 3], "b": [1, 2], "c": [1], "d": [1]}
    for (model, numbers), text in zip(answered.items(), TEXTS, strict=True):
        dump_records(tmp_path / f"{model}.jsonl", [response(n, model, text) for n in numbers], "response")
    return tmp_path


def rate(monkeypatch, folder: Path, models: str = "abcd", seed: int = 1, **changes) -> list[dict]:
    settings = {"model": RUBRIC, "prompt": PROMPT, "principles": PRINCIPLES, "protocol": "one_by_one", "seed": seed, **changes}
    responses = [folder / f"{model}.jsonl" for model in models]
    asked = {"journal": folder / f"journal.{seed}", "endpoints": ENDPOINTS, "failed": folder / "failed.jsonl"}
    run(
        monkeypatch,
        "rate_responses",
        settings,
        speeches=folder / "speeches.jsonl",
        responses=responses,
        out=folder / "answers.jsonl",
        **asked,
    )
    return read_records(folder / "answers.jsonl", "rating_answer")


def parse_and_score(monkeypatch, folder: Path) -> list[dict]:
    names = {"principles": list(rubric.RUBRIC)}
    run(
        monkeypatch,
        "parse_ratings",
        names,
        answers=folder / "answers.jsonl",
        out=folder / "ratings.jsonl",
        failed=folder / "unparsed.jsonl",
    )
    responses = [folder / f"{model}.jsonl" for model in "abcd"]
    files = {"out": folder / "scores.jsonl", "dropped": folder / "unscored.jsonl"}
    run(monkeypatch, "score_responses", names, ratings=folder / "ratings.jsonl", responses=responses, **files)
    return read_records(folder / "scores.jsonl", "score")


def rows_account(file: Path) -> dict:
    return orjson.loads(file.with_name(file.name + ".prov.json").read_bytes())["rows"]


def test_one_answer_a_speech_and_principle_with_one_order_a_speech(monkeypatch, files):
    answers = rate(monkeypatch, files)
    assert [(a["speech_id"], a["principle"]) for a in answers] == sorted(itertools.product([sid(1), sid(2)], rubric.RUBRIC))
    for number, models in ((1, "abcd"), (2, "ab")):
        orders = {tuple(a["order"]) for a in answers if a["speech_id"] == sid(number)}
        assert len(orders) == 1
        assert set(*orders) == {content_hash(number, model, digits=16) for model in models}
    account = rows_account(files / "answers.jsonl")
    assert account["speeches"] == {"in": 3, "out": 2, "dropped": {"fewer than two responses": 1}}
    assert account["requests"] == {"in": 14, "out": 14, "dropped": {}}
    assert read_records(files / "failed.jsonl", "failure") == []


def test_order_depends_on_the_seed_alone(monkeypatch, files):
    first = rate(monkeypatch, files)
    assert rate(monkeypatch, files, models="dbca") == first
    other = {tuple(a["order"]) for seed in range(2, 8) for a in rate(monkeypatch, files, seed=seed) if a["speech_id"] == sid(1)}
    assert len(other) > 1


def test_orders_are_uniform():
    shown_order = importlib.import_module("rate_responses").shown_order
    ids = [sid(n) for n in range(3)]
    orders = [tuple(shown_order(dict.fromkeys(ids, ""), sid(n), 7)) for n in range(1200)]
    assert all(140 < orders.count(order) < 260 for order in itertools.permutations(ids))  # 200 expected, standard deviation 13


def test_scores_are_the_judges_given_back_to_their_responses(monkeypatch, files):
    """Computed again from the texts, without order, prompt, JSON or files."""
    rate(monkeypatch, files)
    scores = {score["response_id"]: score for score in parse_and_score(monkeypatch, files)}
    assert len(scores) == 6
    for number, models in ((1, "abcd"), (2, "ab")):
        for model, text in zip(models, TEXTS, strict=False):
            features = rubric.measure(speech(number)["text"], text)
            expected = {p: rubric.score(rubric.value(features, p)) for p in rubric.RUBRIC}
            found = scores[content_hash(number, model, digits=16)]
            assert found["scores"] == expected
            assert (found["model"], found["total"], found["overall"]) == (model, sum(expected.values()), sum(expected.values()) / 7)
    assert read_records(files / "unscored.jsonl", "unscored") == [
        {
            "response_id": content_hash(3, "a", digits=16),
            "speech_id": sid(3),
            "model": "a",
            "reason": "not rated",
            "missing": list(rubric.RUBRIC),
        }
    ]


def test_requests_of_a_speech_are_adjacent_and_share_all_but_the_principle(monkeypatch, files):
    asked = []
    script(monkeypatch, lambda request: asked.append(request) or rubric.answer(request.task))
    rate(monkeypatch, files)
    prompts = [request.messages[-1]["content"] for request in asked]
    assert [request.id for request in asked] == [f"{sid(n)}/{p}" for n in (1, 2) for p in sorted(rubric.RUBRIC)]
    assert [request.group for request in asked] == [sid(1)] * 7 + [sid(2)] * 7
    for group in (prompts[:7], prompts[7:]):
        shared = len(list(itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*group, strict=False))))
        assert all("Principle" not in prompt[: shared - len("Principle: ")] for prompt in group)
        assert all(shared > 0.8 * len(prompt) for prompt in group)


def script(monkeypatch, judge) -> None:
    """Put a judge in the place of the client: judge(request) returns a text, or None for a request that failed for good."""

    def complete(spec, requests, *, check, **options):
        answers, failures = [], []
        for request in requests:
            text, key = judge(request), content_hash(request.id)
            if text is None:
                failures.append(ChatFailure(id=request.id, request_key=key, reason="no JSON", raw=["hm", "hm"]))
            else:
                answers.append(ChatAnswer(id=request.id, request_key=key, text=text, finish_reason="stop", usage=None, served_model=None))
        return answers, failures, {"requests": len(requests), "failed": len(failures), "from_journal": 0, **add_tokens({}, None)}

    monkeypatch.setattr("psychocounsel.asking.complete", complete)


def test_a_lost_principle_costs_the_overall_score_and_nothing_else(monkeypatch, files):
    lost = f"{sid(1)}/safety"
    script(monkeypatch, lambda request: None if request.id == lost else rubric.answer(request.task))
    answers = rate(monkeypatch, files)
    assert len(answers) == 13
    assert [f["request_id"] for f in read_records(files / "failed.jsonl", "failure")] == [lost]
    assert rows_account(files / "answers.jsonl")["requests"] == {"in": 14, "out": 13, "dropped": {"no usable answer": 1}}
    scores = parse_and_score(monkeypatch, files)
    assert {score["speech_id"] for score in scores} == {sid(2)}
    unscored = read_records(files / "unscored.jsonl", "unscored")
    assert {(row["speech_id"], row["reason"]) for row in unscored} == {(sid(1), "some principles not rated"), (sid(3), "not rated")}
    assert all(row["missing"] == ["safety"] for row in unscored if row["speech_id"] == sid(1))
    account = {"in": 7, "out": 2, "dropped": {"not rated": 1, "some principles not rated": 4}}
    assert rows_account(files / "scores.jsonl")["responses"] == account


def test_an_answer_that_does_not_parse_goes_to_the_side_file(monkeypatch, files):
    answers = rate(monkeypatch, files)
    answers[0]["raw"] = "I would say 4 out of 5."
    dump_records(files / "answers.jsonl", answers, "rating_answer")
    (files / "answers.jsonl.prov.json").unlink()
    parse_and_score(monkeypatch, files)
    (failure,) = read_records(files / "unparsed.jsonl", "failure")
    assert failure["request_id"] == f"{answers[0]['speech_id']}/{answers[0]['principle']}"
    assert failure["raw"] == ["I would say 4 out of 5."]
    assert failure["request_key"] == answers[0]["request_key"]
    assert len(read_records(files / "ratings.jsonl", "rating")) == 4 * 7 + 2 * 7 - 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answers: answers.append(answers[0]), "rated 2 times"),
        (lambda answers: answers.reverse(), "not sorted by speech_id"),
        (lambda answers: answers[0].update(principle="empaty"), "Did you mean 'empathy'"),
    ],
)
def test_answers_that_do_not_belong_together_are_refused(monkeypatch, files, capsys, spoil, message):
    answers = rate(monkeypatch, files)
    spoil(answers)
    dump_records(files / "answers.jsonl", answers, "rating_answer")
    (files / "answers.jsonl.prov.json").unlink()
    with pytest.raises(SystemExit):
        parse_and_score(monkeypatch, files)
    assert message in capsys.readouterr().err


def test_responses_and_ratings_must_have_their_partner(monkeypatch, files, capsys):
    rate(monkeypatch, files)
    parse_and_score(monkeypatch, files)
    dump_records(files / "a.jsonl", [], "response")
    with pytest.raises(SystemExit):
        parse_and_score(monkeypatch, files)
    assert "is in none of the files of responses" in capsys.readouterr().err
    dump_records(files / "a.jsonl", [response(9, "a", "Hello.")], "response")
    with pytest.raises(SystemExit):
        rate(monkeypatch, files)
    assert "which is not in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rate(monkeypatch, files, models="bb")
    assert "stands twice" in capsys.readouterr().err


# All principles in one call


def test_one_call_gives_the_same_scores_downstream_and_says_its_protocol(monkeypatch, files):
    rate(monkeypatch, files)
    scores = parse_and_score(monkeypatch, files)
    ratings = read_records(files / "ratings.jsonl", "rating")
    answers = rate(monkeypatch, files, **TOGETHER)
    assert [(a["speech_id"], a["principle"], a["protocol"]) for a in answers] == [(sid(n), None, "together") for n in (1, 2)]
    assert parse_and_score(monkeypatch, files) == scores
    assert read_records(files / "ratings.jsonl", "rating") == ratings


def test_one_call_shows_every_principle_and_asks_for_every_rating(monkeypatch, files):
    asked = []
    script(monkeypatch, lambda request: asked.append(request) or rubric.answer(request.task))
    rate(monkeypatch, files, **TOGETHER)
    assert [request.id for request in asked] == [f"{sid(n)}/together" for n in (1, 2)]
    for request in asked:
        prompt = request.messages[-1]["content"]
        for principle in PRINCIPLES:
            assert all(prompt.count(words) == 1 for words in (principle["definition"], *principle["aspects"]))
            assert prompt.index(principle["definition"]) < prompt.index("<client_speech>")  # what all calls share comes first
        assert list(request.response_schema["properties"]) == [principle["id"] for principle in PRINCIPLES]
        assert all(f"- response_{n}_rating" in prompt for n in range(1, len(request.task["responses"]) + 1))


def test_an_answer_that_lacks_a_principle_is_lost_as_a_whole(monkeypatch, files):
    answers = rate(monkeypatch, files, **TOGETHER)
    answers[0]["raw"] = json.dumps({k: v for k, v in json.loads(answers[0]["raw"]).items() if k != "safety"})
    dump_records(files / "answers.jsonl", answers, "rating_answer")
    (files / "answers.jsonl.prov.json").unlink()
    assert {score["speech_id"] for score in parse_and_score(monkeypatch, files)} == {answers[1]["speech_id"]}
    (failure,) = read_records(files / "unparsed.jsonl", "failure")
    assert (failure["request_id"], failure["reason"]) == (f"{answers[0]['speech_id']}/together", "missing: safety")


def test_answers_of_two_protocols_are_refused(monkeypatch, files, capsys):
    answers = rate(monkeypatch, files) + rate(monkeypatch, files, **TOGETHER)
    dump_records(files / "answers.jsonl", answers, "rating_answer")
    (files / "answers.jsonl.prov.json").unlink()
    with pytest.raises(SystemExit):
        parse_and_score(monkeypatch, files)
    assert "answers of the protocols one_by_one and together" in capsys.readouterr().err


# A sample rated again


def test_a_sample_is_rated_again_in_the_same_and_in_the_reverse_order(monkeypatch, files):
    asked = []
    script(monkeypatch, lambda request: asked.append(request) or rubric.answer(request.task))
    first = {answer["speech_id"]: answer["order"] for answer in rate(monkeypatch, files)}
    before = {request.id: request for request in asked}
    asked.clear()
    same = rate(monkeypatch, files, sample=1, repeat=1)
    assert len({answer["speech_id"] for answer in same}) == 1
    assert len(same) == 7
    assert rows_account(files / "answers.jsonl")["speeches"]["dropped"] == {"fewer than two responses": 1, "not in the sample": 1}
    for request in asked:
        assert (request.messages, request.seed, request.repeat) == (before[request.id].messages, before[request.id].seed, 1)
    back = rate(monkeypatch, files, sample=1, reversed=True)
    assert {answer["speech_id"] for answer in back} == {answer["speech_id"] for answer in same}
    assert all(answer["order"] == first[answer["speech_id"]][::-1] for answer in back)
    assert all(answer["order"] == first[answer["speech_id"]] for answer in same)


def test_a_sample_grows_by_others_and_keeps_its_own(monkeypatch, files):
    dump_records(files / "speeches.jsonl", [speech(n) for n in range(1, 30)], "speech")
    for model in "ab":
        dump_records(files / f"{model}.jsonl", [response(n, model, TEXTS[n % 4]) for n in range(1, 30)], "response")
    samples = [{answer["speech_id"] for answer in rate(monkeypatch, files, "ab", sample=n)} for n in (5, 9, 29, 500)]
    assert [len(sample) for sample in samples] == [5, 9, 29, 29]
    assert samples[0] < samples[1] < samples[2]
    assert samples[0] != {sid(n) for n in range(1, 6)}


@given(st.dictionaries(st.sampled_from(list(rubric.RUBRIC)), st.integers(1, 5), min_size=1))
def test_the_overall_score_is_the_mean(scores):
    found = importlib.import_module("score_responses").overall_score(scores)
    assert found["total"] == sum(scores.values())
    assert found["overall"] * len(scores) == pytest.approx(found["total"])


# Topics

TAXONOMY = {
    "core": {"title": "Core issues", "fine": {"anxiety": {"keywords": ["anxious"]}, "substance-abuse": {"keywords": ["alcohol"]}}},
    "special": {"title": "Special topics", "fine": {"others": {"keywords": []}}},
}


def label(monkeypatch, folder: Path, labels: list, texts: list[str], aliases: dict | None = None) -> dict[str, dict]:
    rows = [
        {"speech_id": sid(n), "text": text, "source": "s", "source_row": n, "source_key": None, "topic_label": label, "cluster_id": sid(n)}
        for n, (label, text) in enumerate(zip(labels, texts, strict=True))
    ]
    random.Random(0).shuffle(rows)
    dump_records(folder / "unique.jsonl", rows, "unique_speech")
    settings = {"model": RUBRIC, "prompt": TOPIC_PROMPT, "taxonomy": TAXONOMY, "aliases": aliases or {"Substance Abuse": "substance-abuse"}}
    asked = {"journal": folder / "journal", "endpoints": ENDPOINTS, "failed": folder / "failed.jsonl"}
    run(monkeypatch, "label_topics", settings, speeches=folder / "unique.jsonl", out=folder / "topics.jsonl", **asked)
    topics = read_records(folder / "topics.jsonl", "topic")
    assert [t["speech_id"] for t in topics] == sorted(sid(n) for n in range(len(labels)))
    return {n: {key: t[key] for key in ("topic", "coarse_topic", "topic_from", "judge")} for n, t in enumerate(topics)}


def test_a_source_label_counts_by_name_or_alias_whatever_its_case(monkeypatch, tmp_path):
    labels = ["anxiety", "ANXIETY ", "substance abuse", "Substance-Abuse"]
    topics = label(monkeypatch, tmp_path, labels, ["I drink alcohol."] * 4)
    assert [topics[n]["topic"] for n in range(4)] == ["anxiety", "anxiety", "substance-abuse", "substance-abuse"]
    assert {(t["topic_from"], t["judge"], t["coarse_topic"]) for t in topics.values()} == {("source", None, "core")}


def test_the_judge_labels_the_others(monkeypatch, tmp_path, caplog):
    topics = label(monkeypatch, tmp_path, [None, "Knitting", "", "anxiety"], ["I drink alcohol.", "I am anxious.", "I knit.", "I drink."])
    assert [topics[n]["topic"] for n in range(4)] == ["substance-abuse", "anxiety", "others", "anxiety"]
    assert [topics[n]["judge"] for n in range(4)] == ["rubric", "rubric", "rubric", None]
    assert "another topic: 1 ('Knitting' of 1); see" in caplog.text
    assert "anxious" not in caplog.text


def test_a_failed_judge_leaves_others_and_a_record(monkeypatch, tmp_path):
    script(monkeypatch, lambda request: None)
    topics = label(monkeypatch, tmp_path, [None, "anxiety"], ["I drink alcohol.", "I drink."])
    assert topics[0] == {"topic": "others", "coarse_topic": "special", "topic_from": "judge", "judge": "rubric"}
    assert read_records(tmp_path / "topics.jsonl", "topic")[0]["raw"] is None
    assert [f["request_id"] for f in read_records(tmp_path / "failed.jsonl", "failure")] == [sid(0)]


def test_an_alias_of_no_topic_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        label(monkeypatch, tmp_path, [None], ["I drink alcohol."], aliases={"Fear": "anxeity"})
    assert "Did you mean 'anxiety'?" in capsys.readouterr().err
