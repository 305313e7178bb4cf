"""Policies compared with each other, and two judges: paired by speech, against naive counts, scikit-learn and closed forms."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

import make_tables
from psychocounsel import winrates
from psychocounsel.agreement import agreement
from psychocounsel.policy_tables import agreement_table, difference_table, principle_table
from psychocounsel.records import dump_records, validator
from psychocounsel.table_settings import TableSettings
from psychocounsel.tables import FORMATS, to_csv, to_markdown
from test_ratings import rows_account, run
from test_winrates import SPEECH, judgement, speech

POINTS = [1.0, 0.5, 0.0]


# Two judges


@given(st.lists(st.tuples(st.integers(0, 9).map(SPEECH), st.sampled_from(POINTS), st.sampled_from(POINTS)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_agreement_is_that_of_naive_counts_and_of_scikit_learn(verdicts):
    found = agreement(verdicts, 20, 1)
    first, second = ([row[i] for row in verdicts] for i in (1, 2))
    assert found["n"] == len(verdicts)
    assert found["speeches"] == len({speech for speech, *_ in verdicts})
    assert found["agreement"]["value"] == pytest.approx(np.mean(np.equal(first, second)))
    assert [rate["value"] for rate in found["win_rates"]] == pytest.approx([np.mean(first), np.mean(second)])
    assert found["difference"]["value"] == pytest.approx(np.mean(second) - np.mean(first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappa = cohen_kappa_score([str(x) for x in first], [str(x) for x in second])
    if len({*first, *second}) == 1:
        assert found["kappa"]["value"] is None
    else:
        assert found["kappa"]["value"] == pytest.approx(kappa)


def test_a_judge_agrees_with_itself_fully_and_with_a_coin_as_by_chance():
    rng = np.random.default_rng(1)
    judged = [(SPEECH(i), float(rng.choice(POINTS))) for i in range(3000)]
    same = agreement([(s, p, p) for s, p in judged], 50, 1)
    assert same["kappa"] == same["agreement"] == {"value": 1, "low": 1, "high": 1}
    chance = agreement([(s, p, float(rng.choice(POINTS))) for s, p in judged], 200, 1)
    assert chance["kappa"]["low"] < 0 < chance["kappa"]["high"]


def test_the_interval_of_kappa_covers_what_repeated_samples_give():
    """The bootstrap's width against the spread of kappa over fresh samples."""
    rng = np.random.default_rng(2)

    def sample() -> list[tuple[str, float, float]]:
        first = rng.integers(0, 2, 300)
        second = np.where(rng.random(300) < 0.8, first, 1 - first)
        return [(SPEECH(i), float(a), float(b)) for i, (a, b) in enumerate(zip(first, second, strict=True))]

    spread = np.std([agreement(sample(), 1, 1)["kappa"]["value"] for _ in range(200)])
    kappa = agreement(sample(), 400, 1)["kappa"]
    assert (kappa["high"] - kappa["low"]) / (2 * 1.96) == pytest.approx(spread, rel=0.25)


def test_comparisons_of_one_speech_are_drawn_together():
    """Four policies that always get the same verdict on a speech bear no more than one of them."""
    rng = np.random.default_rng(3)
    once = [(SPEECH(i), float(a), float(b)) for i, (a, b) in enumerate(rng.integers(0, 2, (100, 2)))]
    width = [agreement(rows, 400, 1)["agreement"] for rows in (once, once * 4)]
    assert width[0] == pytest.approx(width[1])


# Two policies


def test_a_paired_difference_is_told_where_the_policies_own_intervals_overlap():
    rng = np.random.default_rng(4)
    hard = rng.random(400)
    first = {SPEECH(i): float(h < 0.55) for i, h in enumerate(hard)}
    second = {SPEECH(i): float(h < 0.50) for i, h in enumerate(hard)}
    topic_of = {s: f"topic{i % 2}" for i, s in enumerate(first)}
    rates = [winrates.win_rates(scores, topic_of, 500, 1)["overall"] for scores in (first, second)]
    paired = winrates.win_rate_differences(first, second, topic_of, 500, 1)
    assert rates[0]["low"] < rates[1]["high"], "the two intervals overlap"
    assert paired["overall"]["low"] > 0
    assert paired["overall"]["difference"] == pytest.approx(rates[0]["win_rate"] - rates[1]["win_rate"])
    by_topic = paired["topics"].values()
    assert sum(t["n"] * t["difference"] for t in by_topic) == pytest.approx(400 * paired["overall"]["difference"])


def test_a_difference_is_over_the_speeches_that_both_have_and_changes_its_sign():
    first, second = {SPEECH(1): 1.0, SPEECH(2): 0.5, SPEECH(3): 0.0}, {SPEECH(2): 0.0, SPEECH(3): 0.0, SPEECH(4): 1.0}
    topic_of = dict.fromkeys([*first, *second], "topic")
    one, other = winrates.win_rate_differences(first, second, topic_of, 9, 1), winrates.win_rate_differences(second, first, topic_of, 9, 1)
    assert one["overall"] == {"difference": 0.25, "n": 2, "low": one["overall"]["low"], "high": one["overall"]["high"]}
    assert other["overall"]["difference"] == -0.25
    assert (other["overall"]["low"], other["overall"]["high"]) == pytest.approx((-one["overall"]["high"], -one["overall"]["low"]))


# The programs


def write(folder, name: str, policy: str, setting: str, wins: set[int], judge: str = "j", speeches=range(6), **changes) -> str:
    """Judgements of a policy that wins some speeches in both orders and loses the others."""
    facts = {"policy": policy, "setting": setting, "judge": judge, **changes}
    rows = [judgement(i, first, "win" if i in wins else "loss", **facts) for i in speeches for first in (True, False)]
    dump_records(folder / name, rows, "judgement")
    return str(folder / name)


@pytest.fixture
def folder(tmp_path):
    """Six test speeches."""
    dump_records(tmp_path / "speeches.jsonl", [speech(i) for i in range(6)], "speech")
    return tmp_path


def compare_policies(monkeypatch, folder, files: list[str], **changes) -> dict:
    """Run compare_policies.py."""
    options = {"contrasts": [["dpo", "base"]], "bootstrap": 20, "seed": 1} | changes
    run(monkeypatch, "compare_policies", options, speeches=folder / "speeches.jsonl", judgements=files, out=folder / "differences.json")
    return validator("differences")(json.loads((folder / "differences.json").read_text()))


def test_policies_are_compared_in_each_setting_on_shared_speeches(monkeypatch, folder):
    files = [write(folder, f"{s}.{p}.jsonl", p, s, wins) for s in ("free", "length") for p, wins in (("base", {0}), ("dpo", {0, 1, 2}))]
    write(folder, "free.dpo.jsonl", "dpo", "free", {0, 1, 2}, speeches=range(5))
    found = compare_policies(monkeypatch, folder, files)
    overall = {row["setting"]: row["protocols"]["robust"]["overall"] for row in found["differences"]}
    assert (overall["free"]["difference"], overall["free"]["n"]) == (pytest.approx(2 / 5), 5)
    assert (overall["length"]["difference"], overall["length"]["n"]) == (pytest.approx(2 / 6), 6)
    rows = rows_account(folder / "differences.json")["speeches of two policies"]
    assert rows == {"in": 12, "out": 11, "dropped": {"judged for one of the two alone": 1}}


def compare_judges(monkeypatch, folder, first: list[str], second: list[str]) -> dict:
    """Run compare_judges.py."""
    files = {"judgements": first, "second": second, "out": folder / "agreement.json"}
    run(monkeypatch, "compare_judges", {"bootstrap": 20, "seed": 1}, **files)
    return validator("agreement")(json.loads((folder / "agreement.json").read_text()))


def test_two_judges_are_compared_by_policy_and_together(monkeypatch, folder):
    first = [write(folder, f"{p}.jsonl", p, "free", {0, 1, 2}) for p in ("base", "dpo")]
    second = [
        write(folder, "base.second.jsonl", "base", "free", {0, 1}, "k", range(4)),
        write(folder, "dpo.second.jsonl", "dpo", "free", {0, 1, 2}, "k", range(4)),
    ]
    found = compare_judges(monkeypatch, folder, first, second)
    assert found["judges"] == ["j", "k"]
    rows = {row["policy"]: row["protocols"] for row in found["agreement"]}
    assert [rows[p]["robust"]["agreement"]["value"] for p in ("base", "dpo", None)] == [0.75, 1.0, 0.875]
    assert (rows[None]["paper"]["n"], rows[None]["paper"]["speeches"]) == (8, 4)
    assert [rate["value"] for rate in rows["base"]["paper"]["win_rates"]] == [0.75, 0.5]
    account = rows_account(folder / "agreement.json")["comparisons"]
    assert account == {"in": 12, "out": 8, "dropped": {"not judged in both orders by the second judge": 4}}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"judge": "j"}, "expected two judges"),
        ({"judge": "k", "opponent": "another"}, "about one opponent"),
        ({"judge": "k", "protocol": "one_by_one", "principles": {"empathy": "win"}}, "asked by one protocol"),
        ({"judge": "k", "policy": "other"}, "not of the same policies and settings"),
        ({"judge": "k", "speeches": [9]}, "was judged in both orders by both judges"),
    ],
)
def test_judges_of_different_things_are_not_compared(monkeypatch, folder, capsys, second, message):
    first = write(folder, "first.jsonl", "dpo", "free", {0})
    other = write(folder, "second.jsonl", **{"policy": "dpo", "setting": "free", "wins": {0}} | second)
    with pytest.raises(SystemExit):
        compare_judges(monkeypatch, folder, [first], [other])
    assert message in capsys.readouterr().err


def test_policies_that_were_not_judged_alike_are_not_compared(monkeypatch, folder, capsys):
    files = [write(folder, "base.jsonl", "base", "free", {0}), write(folder, "dpo.jsonl", "dpo", "free", {0}, "k")]
    with pytest.raises(SystemExit):
        compare_policies(monkeypatch, folder, files)
    assert "of several judges, opponents or protocols" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_policies(monkeypatch, folder, files[:1])
    assert "no judgements of 'dpo' are given" in capsys.readouterr().err


# The tables


OPTIONS = TableSettings(
    opponent="GPT-4o",
    judge="Judge One",
    second_judge="Judge Two",
    policies=["base", "dpo"],
    titles={"base": "Base", "dpo": "Base + DPO"},
    reported={"policies": {"base": "Llama3-8B", "dpo": "Llama3-8B+DPO"}},
    ratings={"principles": [("empathy", "Empathy"), ("safety", "Safety")]},
)
TOPICS = {"topic0": "Zero", "topic1": "One"}


def test_the_papers_differences_stand_beside_ours(monkeypatch, folder):
    from test_tables import PAPER

    files = [write(folder, f"{p}.jsonl", p, "free", wins) for p, wins in (("base", {0}), ("dpo", {0, 1, 2}))]
    made = difference_table(compare_policies(monkeypatch, folder, files), TOPICS, PAPER["win_rates"], OPTIONS)
    rows = [row.cells for _, row in made.rows()]
    assert [row[:2] for row in rows] == [["Base + DPO minus Base", source] for source in ("one order", "both orders", "paper")]
    assert str(rows[2][-2]) == "43.6"  # 72.9 - 29.3 of Table 3
    assert "judged by Judge One" in to_markdown(made)
    assert "protocol together" in to_markdown(made)


def test_both_judges_are_named_with_what_each_found(monkeypatch, folder):
    first = [write(folder, f"{p}.jsonl", p, "free", {0, 1, 2}) for p in ("base", "dpo")]
    second = [write(folder, f"{p}.second.jsonl", p, "free", {0, 1}, "k") for p in ("base", "dpo")]
    made = agreement_table(compare_judges(monkeypatch, folder, first, second), OPTIONS)
    assert [row.cells[0] for _, row in made.rows()] == ["Base"] * 2 + ["Base + DPO"] * 2 + ["All policies"] * 2
    for render in FORMATS.values():
        assert "nan" not in render(made).lower().replace("finan", "")
    assert made.title == "Agreement of Judge One and Judge Two"
    assert "Cohen's kappa low" in to_csv(made)


def test_win_rates_under_the_second_judge_stand_apart():
    """Table 3 and all that stands behind it are the first judge's alone; the second's has no rows of the paper."""
    from test_tables import PAPER, TAXONOMY, win_rates

    def all_tables(found: list[dict], options: TableSettings) -> dict[str, str]:
        made = make_tables.all_tables(*[[]] * 8, found, *[[]] * 4, TAXONOMY, PAPER, options)
        return {table.name: to_markdown(table) for table in made}

    first = [win_rates(policy, setting) for policy in ("base", "dpo") for setting in ("free", "length")]
    rates = {"overall": {"win_rate": 0.125, "n": 4, "low": 0.0, "high": 0.5}, "topics": {}}
    second = [win_rates("dpo", "free") | {"judge": "k", "protocols": {"paper": rates, "robust": rates}}]
    options = OPTIONS.model_copy(update={"judged_again_by": "k"})
    both, alone = all_tables([*second, *first], options), all_tables(first, options)
    again = both.pop("win_rates_again")
    assert both == alone
    assert "12.5" in again
    assert "judged by Judge Two" in again
    assert not any(words in again for words in ("| paper", "Judge One", "Test speeches"))
    assert {line.split("|")[1].strip() for line in again.splitlines() if "orders" in line and "|" in line} == {"Base + DPO"}


def test_win_rates_by_principle_stand_where_the_judge_was_asked_one_at_a_time():
    from test_tables import win_rates

    rate = {"win_rate": 0.25, "n": 4, "low": 0.0, "high": 0.5}
    asked = win_rates("dpo", "free") | {"protocol": "one_by_one", "principles": {"empathy": rate, "safety": rate | {"win_rate": 1.0}}}
    made = principle_table({("dpo", "free"): asked, ("base", "free"): win_rates("base", "free")}, OPTIONS)
    assert [[str(cell) for cell in row.cells] for _, row in made.rows()] == [["Base + DPO", "25.0", "100.0", "4"]]
