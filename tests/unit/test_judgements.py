"""Comparisons: both orders, verdicts for the right side, whatever the place."""

import importlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from psychocounsel.parsing import parse_better
from psychocounsel.prompts import SPEECH_LABEL
from psychocounsel.records import dump_records, read_records
from test_ratings import ENDPOINTS, PRINCIPLES, ROOT, RUBRIC, response, rows_account, run, script, sid, speech

JUDGE_PROMPT = (ROOT / "config" / "prompts" / "judge.jinja").read_text(encoding="utf-8")
RANK_PROMPT = (ROOT / "config" / "prompts" / "rank.jinja").read_text(encoding="utf-8")
GOOD = "It sounds like you're anxious about your boss, and that makes sense. What worries you most?"
BAD = "Just relax."


@pytest.fixture
def files(tmp_path):
    """Four test speeches: the policy is better, worse, silent; the opponent is silent; and one for training."""
    speeches = [speech(n, "test") for n in (1, 2, 3, 4)] + [speech(5, "train")]
    dump_records(tmp_path / "speeches.jsonl", speeches, "speech")
    policy = {1: GOOD, 2: BAD, 4: GOOD, 5: GOOD}
    opponent = {1: BAD, 2: GOOD, 3: GOOD, 5: BAD}
    dump_records(tmp_path / "policy.jsonl", [response(n, "ours", text) for n, text in policy.items()], "response")
    dump_records(tmp_path / "opponent.jsonl", [response(n, "theirs", text) for n, text in opponent.items()], "response")
    return tmp_path


def judge(monkeypatch, folder: Path, **changes) -> list[dict]:
    settings = {
        "model": RUBRIC,
        "prompt": JUDGE_PROMPT,
        "principles": PRINCIPLES,
        "protocol": "together",
        "policy": "ours",
        "opponent": "theirs",
        "setting": "free",
    }
    asked = {"journal": folder / "journal", "endpoints": ENDPOINTS, "failed": folder / "failed.jsonl"}
    files = {"speeches": folder / "speeches.jsonl", "answers": folder / "policy.jsonl", "opponent": folder / "opponent.jsonl"}
    run(monkeypatch, "judge_answers", settings | {"seed": 1} | changes, **files, out=folder / "answers.jsonl", **asked)
    return read_records(folder / "answers.jsonl", "judgement_answer")


def parse(monkeypatch, folder: Path) -> list[dict]:
    files = {"answers": folder / "answers.jsonl", "out": folder / "judged.jsonl", "failed": folder / "unparsed.jsonl"}
    run(monkeypatch, "parse_judgements", {"principles": [p["id"] for p in PRINCIPLES]}, **files)
    return read_records(folder / "judged.jsonl", "judgement")


def test_the_better_answer_wins_from_both_places(monkeypatch, files):
    answers = judge(monkeypatch, files)
    assert [(a["speech_id"], a["policy_first"]) for a in answers] == [(sid(1), True), (sid(1), False), (sid(2), True), (sid(2), False)]
    verdicts = {(j["speech_id"], j["policy_first"]): j["verdict"] for j in parse(monkeypatch, files)}
    assert verdicts == {(sid(1), True): "win", (sid(1), False): "win", (sid(2), True): "loss", (sid(2), False): "loss"}
    lost = {"no answer of the opponent": 1, "no answer of the policy": 1}
    assert rows_account(files / "answers.jsonl")["speeches"] == {"in": 4, "out": 2, "dropped": lost}


def test_a_judge_that_takes_the_first_splits_every_speech(monkeypatch, files):
    script(monkeypatch, lambda request: '{"rationale": "first", "better": 1}')
    judge(monkeypatch, files)
    judgements = parse(monkeypatch, files)
    assert all((j["verdict"] == "win") == j["policy_first"] for j in judgements)


def test_prompts_offer_no_tie_and_show_each_answer_in_its_place(monkeypatch, files):
    prompts = {}
    script(monkeypatch, lambda request: prompts.update({request.id: request.messages[-1]["content"]}) or '{"better": 2}')
    judge(monkeypatch, files)
    first, second = prompts[f"{sid(1)}/policy first"], prompts[f"{sid(1)}/opponent first"]
    assert first.index(GOOD) < first.index(BAD)
    assert second.index(BAD) < second.index(GOOD)
    assert all("tie" not in prompt.lower().split() for prompt in prompts.values())
    assert all(p["definition"] in first for p in PRINCIPLES)


def test_a_lost_order_is_recorded(monkeypatch, files):
    script(monkeypatch, lambda request: None if request.id.endswith("policy first") else '{"better": 1}')
    assert [a["policy_first"] for a in judge(monkeypatch, files)] == [False, False]
    assert len(read_records(files / "failed.jsonl", "failure")) == 2


def test_an_answer_that_does_not_parse_goes_to_the_side_file(monkeypatch, files):
    answers = judge(monkeypatch, files)
    answers[1]["raw"] = '{"better": "tie"}'
    dump_records(files / "answers.jsonl", answers, "judgement_answer")
    (files / "answers.jsonl.prov.json").unlink()
    assert len(parse(monkeypatch, files)) == 3
    (failure,) = read_records(files / "unparsed.jsonl", "failure")
    assert failure["request_id"] == f"{sid(1)}/opponent first"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([response(1, "others", GOOD)], "expected answers of 'ours' alone"),
        ([response(1, "ours", GOOD), response(1, "ours", BAD)], "has two answers"),
    ],
)
def test_answers_that_do_not_belong_are_refused(monkeypatch, files, capsys, rows, message):
    dump_records(files / "policy.jsonl", rows, "response")
    with pytest.raises(SystemExit):
        judge(monkeypatch, files)
    assert message in capsys.readouterr().err


# One principle at a time

ONE_BY_ONE = {"protocol": "one_by_one", "prompt": (ROOT / "config" / "prompts" / "judge_one_by_one.jinja").read_text(encoding="utf-8")}
SEVEN = [principle["id"] for principle in PRINCIPLES]


def verdicts(*won: str):
    """A judge for whom the policy's answer, wherever it stands, is the better one on these principles alone."""

    def answer(request) -> str:
        policy_first, principle = "policy first" in request.id, request.id.rpartition("/")[2]
        return json.dumps({"rationale": "x", "better": 1 if policy_first == (principle in won) else 2})

    return answer


@pytest.mark.parametrize("won", range(8))
def test_the_verdict_is_that_of_most_principles(monkeypatch, files, won):
    script(monkeypatch, verdicts(*SEVEN[:won]))
    answers = judge(monkeypatch, files, **ONE_BY_ONE)
    assert len(answers) == 2 * 2 * 7
    judged = parse(monkeypatch, files)
    assert {j["verdict"] for j in judged} == {"win" if won > 3 else "loss"}
    assert all(j["principles"] == {p: "win" if p in SEVEN[:won] else "loss" for p in SEVEN} for j in judged)
    assert all(len(j["rationale"].splitlines()) == 7 for j in judged)


def test_the_rubric_judges_single_principles(monkeypatch, files):
    judge(monkeypatch, files, **ONE_BY_ONE)
    judged = {(j["speech_id"], j["policy_first"]): j for j in parse(monkeypatch, files)}
    assert [j["verdict"] for j in judged.values()] == ["win", "win", "loss", "loss"]
    assert judged[sid(1), True]["principles"]["empathy"] == "win"


def test_the_principle_comes_last_after_what_the_seven_calls_share(monkeypatch, files):
    prompts, groups = {}, {}

    def answer(request) -> str:
        prompts[request.id], groups[request.id] = request.messages[-1]["content"], request.group
        return '{"rationale": "", "better": 1}'

    script(monkeypatch, answer)
    judge(monkeypatch, files, **ONE_BY_ONE)
    for order in ("policy first", "opponent first"):
        seven = [prompts[f"{sid(1)}/{order}/{name}"] for name in SEVEN]
        shared = os.path.commonprefix(seven)
        assert GOOD in shared
        assert BAD in shared
        assert shared.rstrip().endswith("Principle:")
        for principle, prompt in zip(PRINCIPLES, seven, strict=True):
            assert [p["definition"] in prompt for p in PRINCIPLES] == [p is principle for p in PRINCIPLES]
        assert {groups[f"{sid(1)}/{order}/{name}"] for name in SEVEN} == {f"{sid(1)}/{order}"}


def test_a_comparison_that_lacks_a_principle_makes_no_judgement(monkeypatch, files):
    script(monkeypatch, verdicts(*SEVEN))
    answers = judge(monkeypatch, files, **ONE_BY_ONE)
    answers[3]["raw"] = "I cannot decide."
    del answers[-1]  # a request without a usable answer
    dump_records(files / "answers.jsonl", answers, "judgement_answer")
    (files / "answers.jsonl.prov.json").unlink()
    assert [(j["speech_id"], j["policy_first"]) for j in parse(monkeypatch, files)] == [(sid(1), False), (sid(2), True)]
    failures = read_records(files / "unparsed.jsonl", "failure")
    assert Counter(f["reason"] for f in failures)["another principle of this comparison has no usable verdict"] == 6 + 6
    dropped = rows_account(files / "judged.jsonl")["answers"]["dropped"]
    assert dropped == {"does not parse": 1, "another principle of this comparison has no usable verdict": 12}


def test_an_even_number_of_principles_may_tie(monkeypatch, files):
    script(monkeypatch, verdicts(*SEVEN[:3]))
    answers = judge(monkeypatch, files, **ONE_BY_ONE, principles=PRINCIPLES[:6])
    read = {"answers": files / "answers.jsonl", "out": files / "judged.jsonl", "failed": files / "unparsed.jsonl"}
    run(monkeypatch, "parse_judgements", {"principles": SEVEN[:6]}, **read)
    assert len(answers) == 2 * 2 * 6
    assert {j["verdict"] for j in read_records(files / "judged.jsonl", "judgement")} == {"tie"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.append(rows[0]), "was judged 2 times"),
        (lambda rows: rows[0].update(principle="empaty"), "unknown principle 'empaty'. Did you mean 'empathy'?"),
        (lambda rows: rows[0].update(protocol="together", principle=None), "must not be mixed"),
    ],
)
def test_raw_comparisons_that_do_not_belong_together_are_refused(monkeypatch, files, capsys, edit, message):
    script(monkeypatch, verdicts(*SEVEN))
    answers = judge(monkeypatch, files, **ONE_BY_ONE)
    edit(answers)
    dump_records(files / "answers.jsonl", answers, "judgement_answer")
    (files / "answers.jsonl.prov.json").unlink()
    with pytest.raises(SystemExit):
        parse(monkeypatch, files)
    assert message in capsys.readouterr().err


# Rankers


def pair(n: int, prompt: list[dict], chosen: str, rejected: str) -> dict:
    turns = {"chosen": [{"role": "assistant", "content": chosen}], "rejected": [{"role": "assistant", "content": rejected}]}
    unknown = dict.fromkeys(["chosen_model", "rejected_model", "chosen_scores", "rejected_scores", "gap", "subset"])
    ids = {"pair_id": sid(n), "speech_id": sid(n), "chosen_id": sid(100 + n), "rejected_id": sid(200 + n), "split": "test"}
    return ids | {"prompt": prompt} | turns | unknown


def test_pairs_are_ranked_in_both_orders(monkeypatch, tmp_path):
    prompt = [{"role": "user", "content": "You are a therapist.\n\nClient Speech: My boss makes me anxious."}]
    dump_records(tmp_path / "pairs.jsonl", [pair(1, prompt, GOOD, BAD), pair(2, prompt, BAD, GOOD)], "pair")
    asked = {"journal": tmp_path / "journal", "endpoints": ENDPOINTS, "failed": tmp_path / "failed.jsonl"}
    run(
        monkeypatch,
        "rank_pairs",
        {"model": RUBRIC, "prompt": RANK_PROMPT},
        pairs=tmp_path / "pairs.jsonl",
        out=tmp_path / "out.jsonl",
        **asked,
    )
    rows = read_records(tmp_path / "out.jsonl", "ranking_answer")
    right = {(r["pair_id"], r["chosen_first"]): (parse_better(r["raw"])[0] == 1) == r["chosen_first"] for r in rows}
    assert right == {(sid(1), True): True, (sid(1), False): True, (sid(2), True): False, (sid(2), False): False}


@pytest.mark.parametrize(
    ("content", "speech_text"),
    [("Answer.\n\nClient Speech: I am sad.", "I am sad."), ("What is two and two?", "What is two and two?")],
)
def test_the_ranker_sees_the_clients_words(content, speech_text):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": content}]
    assert importlib.import_module("rank_pairs").client_speech(turns) == speech_text


def test_the_respond_prompt_has_the_label_that_the_ranker_looks_for():
    prompt = (ROOT / "config" / "prompts" / "respond.jinja").read_text(encoding="utf-8")
    assert SPEECH_LABEL in prompt
