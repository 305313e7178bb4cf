"""A plan's causes, sums and GPU hours, on jobs as Snakemake's dry run tells of them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psychocounsel import plan
from psychocounsel.estimates import ABOUT, AT_MOST, EXACT, assignments, pairs, requests_of, speeches
from psychocounsel.plan import Cause, Job, causes, gpu_hours, nearest
from psychocounsel.plan_text import alike, needs, reasons, sums, table
from psychocounsel.site import requested_gpus

MISSING = "Missing output files: results/run/01/a.jsonl"


def job(rule: str = "rule", program: str = "build_pairs", reason: str = MISSING, settings: dict | None = None, **changes) -> Job:
    words = [f"scripts/{program}.py", "--settings", json.dumps({"job": {}, **(settings or {})})]
    words += [word for flag, value in changes.pop("words", {}).items() for word in (f"--{flag}", value)]
    facts = {"wildcards": {}, "inputs": [], "outputs": ["results/run/01/a.jsonl"], "gpus": 0, "limit_s": None}
    return Job(rule=rule, reason=reason, command=words, **facts | changes)


def asking(left: int, meant: int, bound: bool, cost: float | None) -> dict:
    return {"left": left, "left_meant": meant, "bound": bound, "cost": cost, "prompt_tokens": 10 * left, "completion_tokens": 2 * left} | {
        "model": "m",
        "endpoint": "openai",
    }


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Why ----------------------------------------------------------------------------------------------------------------------------------


def words(of: Job) -> list[str]:
    return [cause.words.format(cause.file) for cause in causes(of)]


def test_what_was_never_made_follows_from_nothing():
    assert words(job(above=[job("other")])) == ["not made yet"]


def test_a_loss_is_told_by_its_file(folder, monkeypatch):
    one = job(outputs=["results/run/01/a.jsonl", "results/run/01/b.jsonl"])
    (folder / "results/run/01").mkdir(parents=True)
    (folder / "results/run/01/b.jsonl").touch()
    assert words(one) == ["results/run/01/a.jsonl is missing"]


def test_settings_and_code_are_told_by_the_record(monkeypatch):
    monkeypatch.setattr(plan, "modules", lambda program: {"a.py": "new", "b.py": "same"})
    one = job(reason="Params have changed since last execution: …", settings={"seed": 2, "note": "{braces}"})
    one.record = {"identity": {"settings": {"seed": 1}, "modules": {"a.py": "old", "b.py": "same"}}}
    assert words(one) == ["note: not set -> {braces}", "seed: 1 -> 2", "code of a.py changed"]
    one.record = None
    assert words(one) == ["settings or code changed (no sound record tells which)"]


def test_a_job_follows_from_the_nearest_alone():
    first, second = job("first"), job("second")
    second.above = [first]
    third = job("third", reason="Input files updated by another job: x", above=[first, second])
    assert nearest(third) == [second]
    assert words(third) == ["follows from second"]


def test_snakemakes_words_stand_where_there_are_no_better_ones():
    assert words(job(reason="Something that is new in Snakemake")) == ["Something that is new in Snakemake"]


# Sums ---------------------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from([EXACT, ABOUT, AT_MOST]), st.booleans(), st.none() | st.floats(0, 1e6)), max_size=5
    )
)
def test_sums_add_up_and_are_as_vague_as_their_vaguest_part(parts):
    jobs = [job(asks=asking(*part)) for part in parts]
    total = sums(jobs)
    assert total["requests"] == (sum(left for left, *_ in parts), max((meant for left, meant, *_ in parts if left), default=EXACT))
    assert total["tokens in"].value == 10 * total["requests"].value
    assert total["money"].value == pytest.approx(sum(cost or 0 for left, _, _, cost in parts if left))
    vague = [AT_MOST if bound else max(meant, ABOUT) for left, meant, bound, _ in parts if left]
    assert total["tokens out"].meant == max(vague, default=EXACT)


def test_jobs_alike_stand_in_one_line():
    lost = [job(causes=[Cause("{} is missing", f"results/run/{n}")]) for n in "abc"]
    groups = alike([*lost, job(causes=[Cause("seed: 1 -> 2")])])
    assert [(len(group), reasons(group)) for group in groups] == [(3, "results/run/a is missing (and 2 like it)"), (1, "seed: 1 -> 2")]
    assert "results/run/a is missing" in table(lost)


def test_a_job_without_a_price_is_named():
    one = job(asks=asking(3, EXACT, False, None), causes=[Cause("seed: 1 -> 2")])
    assert needs(one)["money"].value == 0
    assert "No price in the registry, so not in the sum: m." in table([one])


@pytest.mark.parametrize(
    ("spent", "bound", "says"),
    [(2, False, "this plan stays below"), (7.5, False, "this plan passes it: the run stops before"), (7.5, True, "may pass it")],
)
def test_a_plan_is_compared_with_the_budget(folder, spent, bound, says):
    (folder / "spending.json").write_text(json.dumps({"a": {"spent": spent - 1, "batches": {"b": 1}}}))
    one = job(asks=asking(3, EXACT, bound, 5.0), causes=[Cause("seed: 1 -> 2")], words={"budget": "10.0", "ledger": "spending.json"})
    assert f"Budget: $10.00, of which ${spent:.2f} are spent" in table([one])
    assert says in table([one])
    assert "Budget" not in table([job(asks=asking(3, EXACT, bound, 5.0), causes=[Cause("seed: 1 -> 2")])])


# GPU hours ----------------------------------------------------------------------------------------------------------------------------


def record(folder: Path, name: str, rule: str, started: str, seconds: float, **facts) -> None:
    path = folder / "results/run" / f"{name}.prov.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"job": {"rule": rule}, "run": {"started": started, "seconds": seconds, "facts": facts}}))


def test_gpu_hours_come_from_the_last_run_that_did_the_work(folder):
    plan.latest_records.cache_clear()
    training, answering = job("train", gpus=2, limit_s=7200), job("answer", gpus=4, limit_s=3600, asks=asking(30, EXACT, False, None))
    assert gpu_hours(training) == (4.0, AT_MOST)
    plan.latest_records.cache_clear()
    record(folder, "old", "train", "2025-01-01", 1.0)
    record(folder, "new", "train", "2025-01-02", 1800.0)
    record(folder, "adopted", "train", "2025-01-03", 2.0, adopted=True)
    record(folder, "answers", "answer", "2025-01-01", 360.0, api={"requests": 110, "from_journal": 100})
    record(folder, "journalled", "answer", "2025-01-02", 3.0, api={"requests": 110, "from_journal": 110})
    assert gpu_hours(training) == (1.0, ABOUT)  # two GPUs for half an hour
    assert gpu_hours(answering) == (pytest.approx(4 * 3 * 0.1), ABOUT)  # three times as many requests as took a tenth of an hour
    answering.asks["left"] = 0
    assert gpu_hours(answering) == (0.0, EXACT)  # no server is started
    plan.latest_records.cache_clear()


# Estimates ----------------------------------------------------------------------------------------------------------------------------


def test_counts_come_from_the_jobs_that_make_the_inputs_and_else_from_the_files(folder):
    split = job(program="split_speeches", settings={"test_speeches": 20, "dev_fraction": 0.25}, words={"speeches": "unique"})
    makers = {
        "unique": job(program="select_speeches", settings={"limit": 100}, outputs=["unique"]),
        "speeches": split,
        "assigned": job(program="assign_models", settings={"pool": list("abcde"), "models_per_speech": 4}, words={"speeches": "speeches"}),
        "sampled": job(program="sample_prompts", settings={"speeches": None, "split": "train"}, words={"speeches": "speeches"}),
        "pairs": job(program="build_pairs", words={"speeches": "speeches"}),
    }
    assert speeches("speeches", None, makers) == (100, AT_MOST)
    assert speeches("speeches", "test", makers) == (20, AT_MOST)
    assert speeches("sampled", None, makers) == (60, AT_MOST)  # 80 but for a quarter
    assert assignments("assigned", makers) == (80, AT_MOST)
    assert pairs("pairs", makers) == (20, AT_MOST)
    sampling = job(program="generate_responses", settings={"samples": 8}, words={"speeches": "sampled"})
    assert requests_of(sampling, makers) == (480, AT_MOST)

    (folder / "speeches").write_text("".join(json.dumps({"split": side}) + "\n" for side in ["test", "test", "train"]))
    for protocol, asked in (("together", 4), ("one_by_one", 8)):  # two test speeches, both orders, two principles
        judges = {"principles": [1, 2], "protocol": protocol}
        assert requests_of(job(program="judge_answers", settings=judges, words={"speeches": "speeches"}), {}) == (asked, EXACT)
    for more, asked in (({}, 6), ({"protocol": "together"}, 3), ({"sample": 2}, 4), ({"sample": 9}, 6)):
        rates = {"principles": [1, 2], "protocol": "one_by_one"} | more
        assert requests_of(job(program="rate_responses", settings=rates, words={"speeches": "speeches"}), {}) == (asked, EXACT)


def test_gpus_are_counted_whichever_way_they_are_asked_for():
    asked = [{"gpu": 2}, {"gres": "gpu:h100:4"}, {"gres": "gpu:1", "gpu": None}, {"gpu": 0}, {}, {"gpu": "<TBD>"}, {"gres": None}]
    assert [requested_gpus(resources) for resources in asked] == [2, 4, 1, 0, 0, 0, 0]
    assert requested_gpus({"gres": "gpu:h100:4", "nodes": 2}) == 8
