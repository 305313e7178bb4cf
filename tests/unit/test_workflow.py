"""Rules hand programs settings that they accept, and nothing that a site decides is among them."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from psychocounsel.config import Study, load_study, merged, read_config
from psychocounsel.presentation import JUDGED, Presentation, current_settings
from psychocounsel.slices import Slices, Wildcards
from psychocounsel.stage import Settings, parse_settings, read_settings
from psychocounsel.workflow import Workflow

STUDIES = {
    "paper": [],
    "published": ["published"],
    "demo": ["demo"],
    "counsel-chat": ["demo", "demo_counsel_chat"],
    "bench": ["demo", "demo_counselling_bench"],
}


def load(overlays: list[str]) -> Workflow:
    files = [Path("config/config.yaml"), *(Path(f"config/{name}.yaml") for name in overlays)]
    return Workflow(load_study(read_config(files), files))


@pytest.fixture(scope="module", params=STUDIES)
def flow(request) -> Workflow:
    return load(STUDIES[request.param])


def calls(flow: Workflow) -> list[tuple[str, str]]:
    """Return (program, settings JSON) of every job kind of a study, for every value of its wildcards."""
    w, slices, pages = Wildcards, Slices(flow), Presentation(flow)
    made = ("select_speeches", "assign_models", "rate_responses", "parse_ratings", "assess_judge", "score_responses", "build_pairs")
    common = ("embed_topics" if flow.topics_by_embedding else "label_topics", "split_speeches", "report_contamination", "parse_judgements")
    once = (*(("read_pairs", "divide_pairs") if flow.starts_at_pairs else made), *common)
    found = [(name, getattr(slices, name)(w())) for name in once]
    if not flow.starts_at_pairs:
        found += [("rate_responses", slices.rate_again(w(order=order))) for order in ("same", "reversed")]
        found.append(("parse_ratings", slices.parse_again(w(order="same"))))
    found += [("generate_responses", slices.answer_opponent(w())), ("sample_prompts", slices.sample_test_speeches(w()))]
    found += [
        (name, getattr(pages, name)(w()))
        for name in ("make_tables", "plot_figures", "write_release", "write_cards", "write_report", "summarise_run")
    ]
    for source in [*flow.sources, *flow.general_preferences, *flow.answer_sources]:
        found.append(("fetch_source", slices.fetch_source(w(source=source))))
    found += [("read_source", slices.read_source(w(source=source))) for source in flow.speech_sources]
    found += [("read_preferences", slices.read_preferences(w(source=source))) for source in flow.general_preferences]
    found += [("generate_responses", slices.generate_responses(w(model=model))) for model in flow.pool]
    found += [("train_reward_model", slices.train_reward_model(w(reward_model=name))) for name in flow.reward_models]
    for name in flow.reward_models:
        where = w(reward_model=name)
        found += [("score_pairs", slices.score_pairs(where)), ("score_pairs", slices.score_benchmark(where))]
        found.append(("evaluate_rewards", slices.evaluate_benchmark(where)))
    found += [("score_pairs", slices.score_baseline(w(baseline=name))) for name in flow.baselines]
    found += [("evaluate_rewards", slices.evaluate_rewards(w(scorer=name))) for name in [*flow.reward_models, *flow.baselines]]
    for ranker in flow.rankers:
        found += [("rank_pairs", slices.rank_pairs(w(ranker=ranker))), ("evaluate_rewards", slices.evaluate_rankings(w(ranker=ranker)))]
    for policy in flow.trained_policies:
        found += [
            ("train_policy", slices.train_policy(w(policy=policy))),
            ("score_checkpoints", slices.score_checkpoints(w(policy=policy, iteration="1"))),
            ("select_checkpoint", slices.select_checkpoint(w(policy=policy))),
            ("remove_checkpoints", slices.remove_checkpoints(w(policy=policy, iteration="1"))),
        ]
        for checkpoint in (w(policy=policy, checkpoint="1"), w(policy=flow.study.policies[policy]["base"], checkpoint="0")):
            found += [("generate_responses", slices.answer_checkpoint(checkpoint)), ("judge_answers", slices.judge_checkpoint(checkpoint))]
            found.append(("compute_win_rates", slices.compute_checkpoint_win_rate(checkpoint)))
        if policy in flow.config["evaluation"]["checkpoints"]:
            found += [("assess_checkpoint", slices.assess_checkpoint(w(policy=policy, checkpoint=number))) for number in "01"]
    for policy in flow.iterative_policies:
        for name in ("sample_prompts", "rank_samples"):
            found.append((name, getattr(slices, name)(w(policy=policy, iteration="1"))))
        found.append(("generate_responses", slices.sample_responses(w(policy=policy, iteration="1"))))
    for policy in flow.policies:
        found.append(("generate_responses", slices.answer_speeches(w(policy=policy))))
        for setting in ("free", "length"):
            where = w(policy=policy, setting=setting)
            found += [("judge_answers", slices.judge_answers(where)), ("compute_win_rates", slices.compute_win_rates(where))]
    return found


def settings_class(program: str) -> type[Settings]:
    """Return the Settings that a program hands to command_line."""
    module = importlib.import_module(program)
    return getattr(module, re.search(r"command_line\(__doc__, (\w+)\)", Path(module.__file__).read_text())[1])


def test_programs_accept_the_settings_of_every_rule(flow):
    for program, settings in calls(flow):
        parse_settings(settings_class(program), read_settings([settings])[0])


def test_a_source_of_ones_own_needs_few_keys(tmp_path):
    """The README's example."""
    mine = tmp_path / "mine.csv"
    mine.write_text("id,question,label\n1,hello,anxiety\n")
    sources = tmp_path / "sources.yaml"
    entry = {"kind": "speeches", "title": "Mine", "adapter": "generic", "path": str(mine), "columns": {"text": "question"}}
    sources.write_text(yaml.safe_dump({"my-clinic": entry | {"licence": "not for release", "quotable": False}}))
    files = {"sources": ["config/sources.yaml", str(sources)]}
    config = merged(yaml.safe_load(Path("config/config.yaml").read_text()), {"files": files, "sources": ["my-clinic"]})
    slices = Slices(Workflow(load_study(config, [Path("config/config.yaml")])))
    for program in ("fetch_source", "read_source"):
        settings = getattr(slices, program)(Wildcards(source="my-clinic"))
        parse_settings(settings_class(program), read_settings([settings])[0])
    before = slices.fetch_source(Wildcards(source="my-clinic"))
    mine.write_text("id,question,label\n1,hallo,anxiety\n")
    assert slices.fetch_source(Wildcards(source="my-clinic")) != before


def test_settings_are_canonical_json(flow):
    for _, settings in calls(flow):
        json.loads(settings, object_pairs_hook=in_order)


def in_order(pairs: list[tuple[str, object]]) -> dict:
    assert pairs == sorted(pairs, key=lambda pair: pair[0])
    return dict(pairs)


def test_site_facts_are_in_no_settings(flow):
    titles = ("make_tables", "plot_figures", "write_release", "write_cards", "write_report", "summarise_run")
    for program, settings in calls(flow):
        for word in ("requests_per_minute", "api_key", "base_url", "price", "concurrency", "tensor_parallel"):
            assert f'"{word}' not in settings, program
        if program not in titles:
            assert '"title":"GPT-4o"' not in settings, program


def test_a_change_reaches_exactly_the_settings_that_use_it(tmp_path):
    before = calls(load([]))

    def changed(edit) -> set[str]:
        study = load([]).study
        edit(study)
        after = calls(Workflow(Study(**vars_of(study))))
        return {program for (program, old), (_, new) in zip(before, after, strict=True) if old != new}

    def vars_of(study: Study) -> dict:
        return {k: getattr(study, k) for k in ("config", "files", "models", "sources", "endpoints", "principles", "taxonomy", "paper")}

    assert changed(lambda s: s.principles[2].update(definition="another")) == {"rate_responses", "judge_answers"}
    assert changed(lambda s: s.models["o1-mini"]["price"].update(input=99)) == set()
    assert changed(lambda s: s.endpoints["openai"].update(requests_per_minute=7)) == set()
    assert changed(lambda s: s.config.update(budget=7)) == set()
    assert changed(lambda s: s.models["o1-mini"]["sampling"].update(max_tokens=9)) == {"generate_responses"}
    ours = Path("config/chat_templates/baichuan2.jinja").read_text()
    for template, programs in ((f"{{# A remark. #}}\n{ours}", set()), (f"{ours}!", {"generate_responses"})):
        (tmp_path / "new.jinja").write_text(template)
        assert changed(lambda s: s.models["baichuan2-7b-chat"]["serve"].update(chat_template=str(tmp_path / "new.jinja"))) == programs
    assert changed(lambda s: s.models["gemma-2-9b-it"]["serve"].update(tensor_parallel=2)) == set(), "the GPUs of a site"
    assert changed(lambda s: s.config["pairs"].update(min_gap=2.0)) == {"build_pairs", "assess_judge", "write_release", "write_report"}
    assert changed(lambda s: s.sources["counsel-chat"].update(sha256="0" * 64)) == {"fetch_source"}
    masked = {"select_speeches", "write_release", "write_report"}
    assert changed(lambda s: s.config["speeches"].update(personal_data="keep")) == masked


def test_rounds_chain_from_the_base_to_the_last(flow):
    for policy in flow.iterative_policies:
        last = flow.study.policies[policy]["iterations"]
        where = [Wildcards(policy=policy, iteration=str(i)) for i in range(1, last + 1)]
        assert flow.round_before(where[0]) == flow.policy_base(where[0])
        for earlier, later in zip(where, where[1:], strict=False):
            assert flow.round_before(later) == [flow.results(f"07_policies/{policy}/iteration-{earlier.iteration}/checkpoints.json")]
            assert f"iteration-{earlier.iteration}/" in flow.sampling_weights(later)
        assert flow.rounds(where[0]) == flow.rounds_so_far(where[-1])
        assert len(flow.round_scores(where[0])) == last


@pytest.mark.parametrize("start", ["previous", "base"])
@pytest.mark.parametrize("reference", ["previous", "base"])
def test_a_round_starts_from_and_stays_close_to_what_the_policy_says(start, reference):
    flow = load(["demo"])
    policy = "smollm2-135m-dpo-iter"
    flow.study.policies[policy].update(start=start, reference=reference, iterations=3)
    (base,) = flow.policy_base(Wildcards(policy=policy))
    for iteration in (1, 2, 3):
        where = Wildcards(policy=policy, iteration=str(iteration))
        newest = flow.results(f"07_policies/{policy}/iteration-{iteration - 1}/checkpoints/1/manifest.json") if iteration > 1 else base
        trained, close_to = (newest if choice == "previous" else base for choice in (start, reference))
        assert flow.start_options(where) == f"--weights {trained} --reference {close_to}"
        assert flow.sampling_weights(where) == f"--weights {newest}", "answers are sampled from the newest policy whatever is trained"
        assert flow.round_before(where)[0] == (base if iteration == 1 else f"{Path(newest).parents[2]}/checkpoints.json")


def test_checkpoints_are_numbered_through_all_rounds(flow):
    """Against a walk over the rounds: each checkpoint has one number, and is found in its own round."""
    for policy in flow.trained_policies:
        entry, number = flow.study.policies[policy], 0
        for iteration in range(1, entry.get("iterations", 1) + 1):
            for k in range(1, entry.get("checkpoints", 1) + 1):
                number += 1
                where = Wildcards(policy=policy, checkpoint=str(number))
                folder = flow.results(f"07_policies/{policy}/iteration-{iteration}")
                assert flow.checkpoint_weights(where) == flow.assessed_weights(where) == f"--weights {folder}/checkpoints/{k}/manifest.json"
                assert flow.checkpoint_list(where) == flow.checkpoint_lists(where)[-1:] == [f"{folder}/checkpoints.json"]
                assert len(flow.checkpoint_lists(where)) == iteration
        assert (policy in flow.config["evaluation"]["checkpoints"]) == ((policy, number) in flow.monitored())
        assert (policy, number + 1) not in flow.monitored()


@pytest.mark.parametrize("configs", [["demo"], []])
def test_a_base_answers_and_is_judged_once_and_is_assessed_for_each_policy(configs):
    """Its weights, name and settings are the base's, whichever policy starts from it; it has no list of checkpoints."""
    flow = load(configs)
    slices, monitored = Slices(flow), flow.config["evaluation"]["checkpoints"]
    bases = {policy: flow.study.policies[policy]["base"] for policy in monitored}
    assert flow.starts() == list(dict.fromkeys(bases.values()))
    assert len(flow.starts()) < len(monitored)
    rates = [file for file in flow.checkpoint_win_rates() if "checkpoint-0." in file]
    assert rates == [flow.results(f"09_judgements/{base}/checkpoint-0.win_rates.json") for base in flow.starts()]
    assert [p for p, number in flow.monitored() if number == 0] == monitored
    for policy, base in bases.items():
        where, answering = Wildcards(policy=policy, checkpoint="0"), Wildcards(policy=base, checkpoint="0")
        assert flow.checkpoint_answers(where) == flow.results(f"08_answers/{base}/checkpoint-0.jsonl")
        assert flow.checkpoint_list(answering) == flow.weights(base)
        assert flow.checkpoint_weights(answering) == " ".join(["--weights", *flow.weights(base)]) * bool(flow.weights(base))
        assert (flow.checkpoint_lists(where), flow.assessed_weights(where)) == ([], "")
        asked, assessed = json.loads(slices.answer_checkpoint(answering)), json.loads(slices.assess_checkpoint(where))
        judged = json.loads(slices.judge_checkpoint(answering))
        assert asked["model"]["name"] == judged["policy"] == assessed["name"] == f"{base}.checkpoint-0"
        assert asked["model"] | {"name": base} == assessed["model"]


def test_checkpoints_are_removed_after_all_who_read_them_unless_the_policy_keeps_them():
    flow = load([])
    policy = "llama3-8b-dpo-iter"
    folder = flow.results(f"07_policies/{policy}")
    readers = flow.checkpoint_readers(Wildcards(policy=policy, iteration="3"))
    assert readers == [f"{folder}/iteration-4/checkpoints.json", *(flow.assessment(policy, number) for number in (1, 2, 3))]
    assert f"{folder}/iteration-17/checkpoints.json" not in flow.checkpoint_readers(Wildcards(policy=policy, iteration="16"))
    of_one_round = flow.checkpoint_readers(Wildcards(policy="llama3-8b-dpo", iteration="1"))
    assert of_one_round == [flow.assessment("llama3-8b-dpo", number) for number in range(1, 9)]
    assert [file for file in flow.removals() if f"/{policy}/" in file] == [f"{folder}/iteration-{i}/removed.json" for i in range(1, 17)]
    flow.study.policies[policy]["keep_checkpoints"] = True
    assert not [file for file in flow.removals() if f"/{policy}/" in file]


def test_a_policy_without_a_title_is_called_as_its_base_where_it_has_the_bases_name():
    flow = load(["demo"])
    flow.study.policies["smollm2-135m"] = {"name": "smollm2-135m", "base": "smollm2-135m", "method": "none"}
    assert Presentation(flow).title("smollm2-135m") == flow.study.models["smollm2-135m"]["title"] == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("protocol", "words"), [("together", "all principles in one call"), ("one_by_one", "the verdict of most principles")]
)
def test_the_report_says_how_the_judge_of_the_answers_was_asked(protocol, words):
    flow = load([])
    flow.config["evaluation"]["protocol"] = protocol
    (said,) = [text for what, text in json.loads(Presentation(flow).write_report(Wildcards()))["summary"] if what == "Judge of the answers"]
    assert [known for known in JUDGED if JUDGED[known] in said] == [protocol]


def rules() -> list[tuple[str, str]]:
    """Return (rule, function of its settings) of all rules, from the text of the Snakefile's parts."""
    text = "\n".join(file.read_text() for file in sorted(Path("rules").glob("*.smk")))
    parts = re.split(r"^(?:use rule \w+ as|rule) (\w+)", text, flags=re.MULTILINE)[1:]
    return [(name, re.search(r"settings=(?:slices|pages)\.(\w+)", body)[1]) for name, body in zip(parts[::2], parts[1::2], strict=True)]


def test_every_rules_settings_carry_its_name():
    """A record names the job whose settings made it; a later audit asks the config for that job's settings again."""
    found = rules()
    assert len(found) > 30
    assert [rule for rule, function in found if function != rule] == []


def test_the_settings_of_a_recorded_job_are_found_again(flow):
    for _, text in calls(flow):
        job = json.loads(text)["job"]
        settings, recorded = read_settings([text])
        assert recorded == job
        assert current_settings(flow, job) == settings


@pytest.mark.parametrize(
    "job", [("generate_responses", {"model": "gone"}), ("train_policy", {"policy": "gone", "iteration": "1"}), ("gone", {})]
)
def test_a_job_that_the_config_does_not_have_has_no_settings(flow, job):
    assert current_settings(flow, {"rule": job[0], "wildcards": job[1]}) is None


def test_rules_that_may_ask_a_remote_endpoint_wait_for_each_other():
    """`remote` keeps an account's limits over all jobs of a run; a policy in training has weights of its own and is served."""
    parts = [re.split(r"^(use rule|rule) (.+?):?$", file.read_text(), flags=re.MULTILINE)[1:] for file in Path("rules").glob("*.smk")]
    rules = [part[i : i + 3] for part in parts for i in range(0, len(part), 3)]
    asking = {name: (kind, block) for kind, name, block in rules if "endpoints=endpoints_file" in block}
    assert all("gpus=gpus_option" in block for _, block in asking.values()), "their shells name it"
    own = {name: block for name, (kind, block) in asking.items() if kind == "rule"}
    assert all("{params.gpus}" in block and "gpu=" in block for block in own.values())
    assert {name for name, block in own.items() if "remote=" not in block} == {"sample_responses", "answer_checkpoint"}


def programs_planned(overlays: list[str], targets: list[str]) -> str:
    """Return the command lines of all programs that make some files from nothing."""
    files = [f"config/{name}.yaml" for name in ("config", *overlays)]
    command = [sys.executable, "-m", "snakemake", "-n", "-p", "--cores", "1", "--configfile", *files, "--forceall", *targets]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def paper_planned() -> str:
    """The command lines that make a 70B model's answers, the judgements of the published policy, and the pairs of an iteration."""
    files = (
        "03_responses/llama-3.1-70b-instruct.jsonl",
        "09_judgements/llama3-8b-published/free.win_rates.json",
        "07_policies/llama3-3b-dpo-iter/iteration-1/pairs.jsonl",
    )
    return programs_planned([], [load([]).results(file) for file in files])


def test_a_model_is_spread_over_the_gpus_that_its_job_asks_for(paper_planned):
    asked = re.findall(r"generate_responses\.py .*03_responses/llama-3.1-70b-instruct.jsonl", paper_planned)
    assert [" --gpus 4 " in command for command in asked] == [True]


def test_a_published_reward_model_is_given_the_gpus_that_hold_it():
    gpus = {"llama-3.1-nemotron-70b-reward": 4, "published-psychocounsel-llama3-8b-reward": 1}
    targets = [f"results/{load([]).run}/06_reward_models/{model}/predictions.jsonl" for model in gpus]
    command = [sys.executable, "scripts/plan_run.py", "--json", "--profile", "slurm", *targets]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    hours = {job["wildcards"]["baseline"]: job["needs"]["GPU_hours"] for job in planned["jobs"] if job["rule"] == "score_baseline"}
    assert hours == {model: {"value": 4 * count, "meant": "at most"} for model, count in gpus.items()}  # a job has four hours


def test_tables_tell_the_published_models_from_ours():
    """The authors' reward model and policy stand beside those of the run, each with the paper's row, under titles that differ."""
    settings = json.loads(Presentation(load([])).make_tables(Wildcards()))
    for kind, ours, theirs in (
        ("reward_models", "psychocounsel-llama3-8b-reward", "published-psychocounsel-llama3-8b-reward"),
        ("policies", "llama3-8b-dpo-iter", "llama3-8b-published"),
    ):
        assert settings["reported"][kind][ours] == settings["reported"][kind][theirs]
        assert settings["titles"][theirs].endswith("(published)")
        assert not settings["titles"][ours].endswith("(published)")


def test_cards_name_the_labels_licences_and_data_sets_of_what_a_model_learnt_from():
    models = {model["name"]: model for model in json.loads(Presentation(load([])).write_cards(Wildcards()))["models"]}
    general, ours, merged = (
        models[name] for name in ("llama3-8b-helpsteer2", "psychocounsel-llama3-8b-reward", "llama3-8b-helpsteer2-ours")
    )
    assert general["labels"] == "published with HelpSteer2"
    assert ours["labels"] == "made by GPT-4o (judge) (one call a principle), not by people"
    assert merged["labels"] == f"{ours['labels']}, or {general['labels']}"
    assert general["data_licences"] == [["HelpSteer2", "CC BY 4.0"]]
    assert general["datasets"] == ["nvidia/HelpSteer2"]
    assert [title for title, terms in ours["data_licences"] if "OpenAI Terms of Use" in terms] == [
        "Responses, by the models that gave them"
    ]
    iterated = models["llama3-8b-dpo-iter"]
    assert iterated["ranked_by"] == "psychocounsel-llama3-8b-reward"
    assert iterated["data_licences"] == ours["data_licences"]
    assert iterated["rounds"] == {
        "iterations": 16, "speeches_per_iteration": 6400, "samples_per_speech": 8, "start": "previous", "reference": "previous",
    }  # fmt: skip


def test_the_authors_policy_is_evaluated_as_it_was_published(paper_planned):
    """A policy of method none with weights of its own: nothing is trained, and its own weights are served."""
    about = [line for line in paper_planned.splitlines() if "llama3-8b-published" in line and ".py " in line]
    assert not [line for line in about if "train_policy.py" in line]
    (answered,) = [line for line in about if "generate_responses.py" in line and "08_answers/llama3-8b-published/free.jsonl" in line]
    assert '"id":"Psychotherapy-LLM/PsychoCounsel-Llama3-8B"' in answered
    assert " --gpus 1 " in answered
    assert "--weights" not in answered


@pytest.mark.parametrize(("study", "stops"), [("paper", True), ("demo", False)])
def test_the_first_job_that_uses_a_reward_model_waits_for_its_metrics_and_stops_at_chance_where_the_config_says_so(study, stops, request):
    if study == "paper":
        shown = request.getfixturevalue("paper_planned")
    else:
        shown = programs_planned(["demo"], [load(["demo"]).results("07_policies/smollm2-135m-dpo-iter/iteration-1/pairs.jsonl")])
    (asked,) = re.findall(r"rank_samples\.py .*", shown)
    assert (" --stop-at-chance " in asked) is stops
    (metrics,) = re.findall(r"--metrics (\S+)", asked)
    assert any(f"--out {metrics}" in line for line in re.findall(r"evaluate_rewards\.py .*", shown)), "they are made before"
