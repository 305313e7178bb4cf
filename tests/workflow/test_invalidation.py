"""The invalidation matrix: what reruns when what changes, exactly; and that what reruns asks and trains nothing anew without need.

A row holds an edit of the finished micro study and the rules that the edit itself concerns. Expected are these and all that read
from them, over READERS, which is written by hand and not taken from the workflow; compared with Snakemake's own dry run.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.project import ROOT, Project, copy_project

from psychocounsel.provenance import read_record, record_path
from psychocounsel.records import read_records

pytestmark = pytest.mark.slow

READERS = {  # rule -> rules that read its outputs
    "fetch_source": "read_source",  # of speeches; a file of preferences is another job's, which no row changes alone
    "read_preferences": "report_contamination train_reward_model score_benchmark evaluate_benchmark",
    "read_source": "select_speeches make_tables",
    "select_speeches": "label_topics split_speeches make_tables",
    "label_topics": "split_speeches",
    "split_speeches": "assign_models generate_responses rate_responses rate_again build_pairs report_contamination sample_prompts"
    " sample_test_speeches answer_opponent answer_speeches judge_answers compute_win_rates compare_policies sample_judged_again"
    " make_tables plot_figures write_release choose_cases summarise_run",
    "assign_models": "generate_responses",
    "generate_responses": "rate_responses rate_again score_responses build_pairs make_tables write_release",
    "rate_responses": "parse_ratings",
    "parse_ratings": "score_responses assess_judge",
    "rate_again": "parse_again",
    "parse_again": "assess_judge",
    "assess_judge": "make_tables plot_figures",
    "score_responses": "build_pairs make_tables plot_figures write_release",
    "build_pairs": "report_contamination train_reward_model score_pairs score_baseline rank_pairs evaluate_rewards evaluate_rankings"
    " train_policy score_checkpoints make_tables plot_figures write_release summarise_run",
    "report_contamination": "make_tables",
    "train_reward_model": "score_pairs score_benchmark rank_samples assess_checkpoint plot_figures write_cards",
    "score_pairs": "evaluate_rewards",
    "score_baseline": "evaluate_rewards",
    "score_benchmark": "evaluate_benchmark",
    "evaluate_benchmark": "make_tables write_cards",
    "rank_pairs": "evaluate_rankings",
    "evaluate_rewards": "rank_samples assess_checkpoint make_tables write_cards summarise_run",
    "evaluate_rankings": "make_tables write_cards summarise_run",
    "sample_prompts": "sample_responses rank_samples",
    "sample_responses": "rank_samples",
    "rank_samples": "train_policy",
    "train_policy": "sample_responses train_policy score_checkpoints select_checkpoint answer_checkpoint"
    " assess_checkpoint remove_checkpoints plot_figures write_cards",
    "score_checkpoints": "select_checkpoint remove_checkpoints",
    "select_checkpoint": "answer_speeches write_cards",
    "remove_checkpoints": "",
    "answer_opponent": "answer_speeches judge_answers judge_again compute_win_rates compute_win_rates_again choose_cases judge_checkpoint"
    " compute_checkpoint_win_rate assess_checkpoint",
    "answer_speeches": "judge_answers judge_again compute_win_rates compute_win_rates_again choose_cases",
    "judge_answers": "parse_judgements",
    "parse_judgements": "compute_win_rates compare_policies compare_judges choose_cases",
    "compare_policies": "make_tables",
    "sample_judged_again": "judge_again compute_win_rates_again",
    "judge_again": "parse_judged_again",
    "parse_judged_again": "compare_judges compute_win_rates_again",
    "compare_judges": "make_tables",
    "compute_win_rates_again": "make_tables",
    "compute_win_rates": "make_tables plot_figures write_cards summarise_run",
    "sample_test_speeches": "answer_checkpoint judge_checkpoint compute_checkpoint_win_rate assess_checkpoint",
    "answer_checkpoint": "judge_checkpoint compute_checkpoint_win_rate assess_checkpoint",
    "judge_checkpoint": "parse_checkpoint",
    "parse_checkpoint": "compute_checkpoint_win_rate",
    "compute_checkpoint_win_rate": "make_tables plot_figures",
    "assess_checkpoint": "remove_checkpoints make_tables plot_figures",
    "make_tables": "write_report",
    "choose_cases": "write_report",
    "plot_figures": "write_report",
    "write_cards": "write_report",
    "write_release": "write_report",
    "write_report": "",
    "summarise_run": "",
}
ASKING = (
    "label_topics generate_responses rate_responses rate_again rank_pairs sample_responses answer_opponent answer_speeches judge_answers"
    " judge_again answer_checkpoint judge_checkpoint"
)
EVERY = " ".join(READERS)
CLIENT_EDIT = ('reason, raw, spent = "", []', 'reason, raw, spent = "none", []')  # in code that every stage which asks runs


def closure(rules: str) -> set[str]:
    """Return the rules with all that read from them, directly or not."""
    found, waiting = set(), rules.split()
    while waiting:
        if (rule := waiting.pop()) not in found:
            found.add(rule)
            waiting.extend(READERS[rule].split())
    return found


# Edits: each changes a copy of the project -------------------------------------------------------------------------------------------


def text(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace the first place of a text in a file."""

    def edit(folder: Path) -> None:
        content = (folder / file).read_text()
        assert old in content, f"{file}: {old!r} is not there any more: mend the matrix"
        (folder / file).write_text(content.replace(old, new, 1))

    return edit


def study(**changes) -> Callable[[Path], None]:
    """Override keys of the study."""
    return lambda folder: (folder / "work/edit.yaml").write_text(yaml.safe_dump(changes))


def delete(name: str) -> Callable[[Path], None]:
    """Delete an output."""
    return lambda folder: (folder / "results/micro" / name).unlink()


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make several edits."""

    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def touch_all(folder: Path) -> None:
    """Give every file a new time stamp, the results in an order that would make each older than what it was made from."""
    files = sorted((f for f in folder.rglob("*") if f.is_file() and ".snakemake" not in f.parts), reverse=True)
    for number, file in enumerate(files):
        os.utime(file, (1_900_000_000 + number,) * 2)


def older_source(folder: Path) -> None:
    """Replace the raw source by one with an older time stamp."""
    text("resources/demo/speeches.jsonl", "the", "teh")(folder)
    os.utime(folder / "resources/demo/speeches.jsonl", (1_000_000_000,) * 2)


def comments(folder: Path) -> None:
    """Add a comment to every file of the shared library, every program and every rule."""
    for file in [*folder.glob("scripts/**/*.py"), *folder.glob("rules/*.smk"), folder / "Snakefile"]:
        file.write_text(file.read_text() + "\n# a remark\n")


def one_more_iteration(folder: Path) -> None:
    """Let iterative DPO have a third round."""
    policies = yaml.safe_load((folder / "tests/workflow/micro.yaml").read_text())["policies"]
    policies[1]["iterations"] = 3
    study(policies=policies)(folder)


def another_pool(*names: str) -> Callable[[Path], None]:
    """Change the pool."""
    return study(responses={"pool": list(names)})


POOL = ("micro", "scripted-warm", "scripted-advice", "scripted-terse", "scripted-cold")
WARMER = ("tests/workflow/micro_models.yaml", "id: scripted-terse}", "id: scripted-terse, sampling: {temperature: 0.5}}")

# what changes, the edit, the rules that it concerns, and for some of these the number of their jobs
MATRIX = [
    (
        "one principle's definition",
        text("config/principles.yaml", "genuine empathy", "true empathy"),
        "rate_responses rate_again judge_answers judge_again judge_checkpoint",
        {},
    ),
    (
        "a principle's name",
        text("config/principles.yaml", "Clarity and C", "Clearness and C"),
        "rate_responses rate_again judge_answers judge_again judge_checkpoint make_tables plot_figures write_release",
        {},
    ),
    (
        "the rating prompt",
        text("config/prompts/rate.jinja", "Rate the", "Please rate the"),
        "rate_responses rate_again",
        {"generate_responses": 0},
    ),
    ("a comment in a prompt", text("config/prompts/rate.jinja", "{#", "{# Remark. "), "", {}),
    (
        "the responding prompt",
        text("config/prompts/respond.jinja", "{{", "Client: {{"),
        "generate_responses build_pairs sample_responses rank_samples answer_opponent answer_speeches answer_checkpoint assess_checkpoint",
        {},
    ),
    (
        "the judge",
        study(ratings={"judge": "rubric"}),
        "rate_responses rate_again make_tables write_release write_cards write_report summarise_run",
        {},
    ),
    (
        "all principles in one call",
        study(ratings={"protocol": "together"}),
        "rate_responses rate_again make_tables write_release write_cards write_report",
        {"generate_responses": 0},
    ),
    (
        "the sample that is rated again",
        study(ratings={"consistency": {"speeches": 5}}),
        "rate_again",
        {"rate_again": 2, "rate_responses": 0, "score_responses": 0},
    ),
    (
        "no sample rated again",
        study(ratings={"consistency": None}),
        "assess_judge",
        {"rate_responses": 0, "score_responses": 0},
    ),
    (
        "the judge of the answers asked about one principle at a time",
        study(evaluation={"protocol": "one_by_one"}),
        "judge_answers judge_again judge_checkpoint make_tables plot_figures choose_cases write_cards write_report summarise_run",
        {"rate_responses": 0, "answer_speeches": 0},
    ),
    (
        "the speeches that the second judge sees",
        study(evaluation={"second_judge_speeches": 5}),
        "sample_judged_again write_report",
        {"judge_again": 4, "judge_answers": 0, "compute_win_rates": 0},
    ),
    ("no second judge", study(evaluation={"second_judge": None}), "make_tables write_report", {"judge_answers": 0}),
    ("one pool model's sampling", text(*WARMER), "generate_responses", {"generate_responses": 1, "assign_models": 0}),
    ("a model added to the pool", another_pool(*POOL, "scripted-kind"), "assign_models generate_responses", {"generate_responses": 6}),
    ("a model removed from the pool", another_pool(*POOL[:-1]), "assign_models", {"generate_responses": 4}),
    ("the gap of a pair", study(pairs={"min_gap": 2.0}), "build_pairs assess_judge write_release write_report", {"rate_responses": 0}),
    ("the split seed", study(split={"seed": 5}), "split_speeches read_preferences", {"label_topics": 0}),
    ("the near-duplicate threshold", study(speeches={"near_duplicates": {"drop_above": 0.9}}), "select_speeches", {"read_source": 0}),
    ("whether personal data are masked", study(speeches={"personal_data": "keep"}), "select_speeches write_release write_report", {}),
    ("DPO's beta", text("tests/workflow/micro_recipe_dpo.yaml", "beta: 0.1", "beta: 0.2"), "train_policy write_cards", {"train_policy": 3}),
    (
        "the reward model's learning rate",
        text("tests/workflow/micro_recipe.yaml", "1.0e-3", "2.0e-3"),
        "train_reward_model write_cards",
        {"train_policy": 2, "rank_pairs": 0, "score_baseline": 0},
    ),
    (
        "an iteration more",
        one_more_iteration,
        "sample_prompts select_checkpoint remove_checkpoints write_cards",
        {
            "remove_checkpoints": 2,
            "sample_prompts": 1,
            "sample_responses": 1,
            "rank_samples": 1,
            "train_policy": 1,
            "select_checkpoint": 1,
            "judge_answers": 2,
        },
    ),
    (
        "the format of a table",
        text("scripts/make_tables.py", 'Number(result["temperature"], 2)', 'Number(result["temperature"], 3)'),
        "make_tables",
        {},
    ),
    ("a comment everywhere in code and rules", comments, "", {}),
    ("a docstring", text("scripts/psychocounsel/chat.py", '"""The one client', '"""The only client'), "", {}),
    ("the module of near duplicates", text("scripts/psychocounsel/near_duplicates.py", "0.98", "0.99"), "select_speeches", {}),
    (
        "a module of several programs",
        text("scripts/psychocounsel/winrates.py", "0.5", "0.25"),
        "compute_win_rates compute_win_rates_again compare_policies compare_judges choose_cases compute_checkpoint_win_rate",
        {},
    ),
    ("the chat client", text("scripts/psychocounsel/chat.py", *CLIENT_EDIT), ASKING, {}),
    ("how requests are carried", text("scripts/psychocounsel/line.py", "S = 1.0, 60.0", "S = 1.0, 30.0"), "", {}),
    (
        "the version of a file format",
        text("scripts/psychocounsel/records.py", "CODE_VERSION = 1", "CODE_VERSION = 2"),
        " ".join(READERS),
        {},
    ),
    ("an endpoint's limits and address", text("work/micro_endpoints.yaml", "concurrency: 64", "concurrency: 8"), "", {}),
    ("what a site decides about Slurm", text("profiles/slurm/site.yaml", "partition: cpu", "partition: long"), "", {}),
    ("prices", text("tests/workflow/micro_models.yaml", "price: {input: 0", "price: {input: 7"), "", {}),
    ("the budget", study(budget=1000), "", {}),
    ("GPUs that serve a model", text("tests/workflow/micro_models.yaml", "tensor_parallel: 1", "tensor_parallel: 2"), "", {}),
    (
        "GPUs that train a policy",
        text("profiles/local/config.yaml", "keep-going: true", "keep-going: true\nset-resources: {train_policy: {gpu: 2}}"),
        "",
        {},
    ),
    (
        "resources and the profile",
        both(
            text("rules/policies.smk", "mem_mb=8000", "mem_mb=9000"), text("profiles/local/config.yaml", "keep-going: true", "retries: 1")
        ),
        "",
        {},
    ),
    (
        "a model's title",
        text("tests/workflow/micro_models.yaml", "scripted, terse", "scripted, short"),
        "make_tables plot_figures write_release",
        {},
    ),
    ("the time stamps of all files", touch_all, "", {}),
    ("a raw source", text("resources/demo/speeches.jsonl", "the", "teh"), "fetch_source", {"fetch_source": 1}),
    ("a raw source by an older one", older_source, "fetch_source", {"fetch_source": 1}),
    (
        "two values of one rule, swapped",
        study(reward_evaluation={"max_length": 8, "batch_size": 768}),
        "score_pairs score_baseline score_benchmark rank_samples score_checkpoints assess_checkpoint",
        {"train_reward_model": 0},
    ),
    (
        "the resamples of a reward model's metrics",
        study(reward_evaluation={"bootstrap": 60}),
        "evaluate_rewards evaluate_benchmark evaluate_rankings",
        {},
    ),
    ("whether a reward model at chance stops the run", study(reward_evaluation={"stop_at_chance": True}), "", {}),
    ("a table deleted", delete("10_tables/win_rates.csv"), "make_tables", {"make_tables": 1}),
    # Snakemake makes a file again when something that reruns needs it; that it is missing, `audit.py verify` says before.
    ("an output deleted that nothing needs", delete("04_ratings/scores.jsonl"), "", {}),
    (
        "an output deleted that a change needs",
        both(delete("04_ratings/scores.jsonl"), study(pairs={"min_gap": 2.0})),
        "score_responses build_pairs assess_judge write_release write_report",
        {},
    ),
]


@pytest.fixture
def copy(project, finished, tmp_path) -> Iterator[Project]:
    """A copy of the finished run to edit."""
    folder = tmp_path / "project"
    shutil.copytree(project.folder, folder, symlinks=True)
    (folder / "work/edit.yaml").write_text("{}")
    yield replace(project, folder=folder)
    shutil.rmtree(folder)


STUDY = ("--configfile", "tests/workflow/micro.yaml", "work/micro_sources.yaml", "work/edit.yaml")


def dry_run(project: Project) -> tuple[Counter, set[str]]:
    """Return the jobs by rule that Snakemake would run, and the rules among them whose params have changed."""
    done = project.snakemake(*STUDY, "-n", "--quiet", "rules")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    shown = done.stdout + done.stderr
    if "Nothing to be done" in shown:
        return Counter(), set()
    table = shown[shown.index("Job stats:") :].split("\ntotal")[0]
    jobs = Counter({rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, flags=re.MULTILINE) if rule != "all"})
    changed = re.search(r"params have changed since last execution:\n +(.*)", shown)
    return jobs, set(changed[1].split(", ")) if changed else set()


@pytest.mark.parametrize(("edit", "rules", "counts"), [row[1:] for row in MATRIX], ids=[row[0] for row in MATRIX])
def test_what_reruns_when_what_changes(copy, edit, rules, counts):
    edit(copy.folder)
    jobs, changed = dry_run(copy)
    assert set(jobs) == closure(rules)
    assert changed <= set(rules.split())
    for rule, count in counts.items():
        assert jobs[rule] == count, rule


def test_general_preferences_concern_the_reward_models_that_learn_from_them(copy):
    text("tests/workflow/preferences/general.jsonl", "Paris is the capital", "Paris, the capital")(copy.folder)
    jobs, _ = dry_run(copy)
    trained = {"fetch_source", "read_preferences", "report_contamination", "train_reward_model", "score_pairs", "evaluate_rewards"}
    assert set(jobs) == trained | closure("score_benchmark plot_figures summarise_run")
    assert {rule: jobs[rule] for rule in ("fetch_source", "read_preferences", "train_reward_model", "score_benchmark")} == {
        "fetch_source": 1, "read_preferences": 1, "train_reward_model": 2, "score_benchmark": 2,
    }  # fmt: skip


def test_readers_are_those_of_the_workflow(copy):
    """The table of this file names every rule that the micro study runs."""
    done = copy.snakemake(*STUDY, "-n", "--forceall", "--quiet", "rules")
    rules = re.findall(r"^(\w+) +\d+$", done.stdout + done.stderr, flags=re.MULTILINE)
    assert set(rules) - {"all", "total", "prepare_model"} == set(READERS)


def test_the_documented_matrix_is_this_one():
    documented = (ROOT / "docs" / "reruns.md").read_text()
    said = {EVERY: "every rule", "": "nothing"}
    rows = [f"| {what} | {said.get(rules, ', '.join(rules.split()))} |" for what, _, rules, _ in MATRIX]
    assert "\n".join(rows) in documented


def test_a_fresh_clone_beside_the_results_reruns_nothing(copy, tmp_path):
    clone = tmp_path / "clone"
    copy_project(clone)
    for name in ("results", "work", ".snakemake"):
        shutil.copytree(copy.folder / name, clone / name)
    jobs, _ = dry_run(replace(copy, folder=clone))
    assert jobs == {}


def test_an_output_edited_by_hand_stops_what_reads_it(copy):
    """Snakemake sees that the file has changed and would build on it; the programs do not."""
    before, scores = len(copy.server.requests), copy.path("04_ratings/scores.jsonl")
    scores.write_text(scores.read_text().replace('"overall":1.0', '"overall":5.0', 1))
    jobs, changed = dry_run(copy)
    assert set(jobs) == closure("build_pairs make_tables plot_figures write_release")
    assert not changed
    done = copy.snakemake(*STUDY)
    assert done.returncode != 0
    assert "results/micro/04_ratings/scores.jsonl: altered by hand, or damaged, since it was made" in done.stdout + done.stderr
    repaired = copy.snakemake(*STUDY, "--forcerun", "results/micro/04_ratings/scores.jsonl")
    assert repaired.returncode == 0, repaired.stderr[-3000:]
    assert len(copy.server.requests) == before


# Real reruns: what they ask and train -------------------------------------------------------------------------------------------------


def test_a_change_in_the_chat_client_asks_nothing_and_trains_nothing_anew(copy):
    text("scripts/psychocounsel/chat.py", *CLIENT_EDIT)(copy.folder)
    before = len(copy.server.requests)
    old = {f.relative_to(copy.folder): f.read_bytes() for f in copy.path(".").rglob("*.jsonl")}
    started = server_starts(copy)
    done = copy.snakemake(*STUDY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(copy.server.requests) == before
    assert started
    assert server_starts(copy) == started
    assert old == {f.relative_to(copy.folder): f.read_bytes() for f in copy.path(".").rglob("*.jsonl")}
    for output in ("06_reward_models/micro-reward/model/manifest.json", "07_policies/micro-dpo-iter/iteration-2/checkpoints.json"):
        record = read_record(record_path(copy.path(output)))
        assert record["run"]["facts"]["adopted"] is True, output
    assert dry_run(copy)[0] == {}


def server_starts(project: Project) -> dict[str, int]:
    """Return when the log of each server of the run was last written; a start begins it anew."""
    return {str(f.relative_to(project.folder)): f.stat().st_mtime_ns for f in (project.folder / "work").rglob("*.server.log")}


def test_a_model_more_in_the_pool_is_asked_for_what_it_wins_and_only_changed_speeches_are_rated_anew(copy):
    before = assignments(copy)
    start = len(copy.server.requests)
    another_pool(*POOL, "scripted-kind")(copy.folder)
    done = copy.snakemake(*STUDY, "--until", "rate_responses")
    assert done.returncode == 0, done.stderr[-3000:]
    after = assignments(copy)
    won = after["scripted-kind"]
    assert won
    assert len(won) < len(set().union(*after.values()))
    for model in POOL:
        assert after[model] <= before[model], "a model more takes speeches from others and gives them none"
    counted = Counter(body["model"] for body in copy.server.requests[start:])
    assert counted == {"scripted-kind": len(won), "scripted-judge": 7 * len(won)}


def assignments(project: Project) -> dict[str, set[str]]:
    """Return the speeches of each model."""
    files = project.path("03_responses/assignments").glob("*.jsonl")
    return {f.stem: {row["speech_id"] for row in read_records(f, "assignment")} for f in files}
