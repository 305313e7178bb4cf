"""The config is checked before any job: each message names file, line, key, value and remedy."""

import copy
import shutil
from pathlib import Path

import pytest
import yaml

from psychocounsel.config import check_config_files, load_registry, load_study, merged, read_config, resolve_extends
from psychocounsel.errors import UserError

PAPER = Path("config/config.yaml")


def study_of(tmp_path: Path, text: str):
    """Load the paper's config with a study file above it."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    config = merged(yaml.safe_load(PAPER.read_text()), yaml.safe_load(text) or {})
    return load_study(config, [PAPER, mine])


@pytest.mark.parametrize("overlays", [[], ["published"], ["demo"], ["demo", "demo_counsel_chat"], ["demo", "demo_counselling_bench"]])
def test_shipped_configs_are_valid(overlays):
    files = [PAPER, *(Path(f"config/{name}.yaml") for name in overlays)]
    config = read_config(files)
    assert load_study(config, files).config["run"] == config["run"]


def test_the_paper_config_is_the_paper(tmp_path):
    config = study_of(tmp_path, "{}").config
    assert len(config["responses"]["pool"]) == len(set(config["responses"]["pool"])) == 20
    assert config["split"]["test_speeches"] == 3291
    theirs = "published-psychocounsel-llama3-8b"
    assert {p["base"] for p in config["policies"]} == {"llama-3.2-3b-instruct", "llama-3.1-8b-instruct", theirs}
    assert [p["method"] for p in config["policies"] if p["base"] == theirs] == ["none"]
    assert f"{theirs}-reward" in config["reward_evaluation"]["baselines"]
    iterative = [p for p in config["policies"] if p["name"].endswith("dpo-iter")]
    assert all(p["iterations"] * p["speeches_per_iteration"] == 1600 * 64 for p in iterative)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seeed: 3\n", ["mine.yaml:1", "unknown key seeed", "Did you mean 'seed'?"]),
        ("run: x\nspeeches:\n  min_char: 5\n", ["mine.yaml:3", "speeches.min_char", "Did you mean 'min_chars'?"]),
        ("split: {test_speeches: many}\n", ["mine.yaml:1", "split.test_speeches", "'many' is not of type 'integer'", "Exact number"]),
        ("split: {dev_fraction: 0.9}\n", ["split.dev_fraction", "0.9", "0.5"]),
        (
            "ratings: {judge: gpt4o-judge}\n",
            ["mine.yaml:1", "ratings.judge", "no chat model 'gpt4o-judge'", "Did you mean 'gpt-4o-judge'?"],
        ),
        ("sources:\n  - demo\n  - counselchat\n", ["mine.yaml:3", "sources[1]", "Did you mean 'counsel-chat'?"]),
        ("sources: [counselling-bench-alpaca-7b]\n", ["no source of speeches or pairs 'counselling-bench-alpaca-7b'"]),
        ("responses: {pool: [gpt-4o, gpt-4o-mini, o1-mini]}\n", ["responses.pool has 3 models", "models_per_speech"]),
        ("responses: {pool: [gpt-4o, gpt-4o, o1-mini, gpt-4o-mini]}\n", ["names 'gpt-4o' twice"]),
        ("ratings: {prompt: rates}\n", ["ratings.prompt", "Did you mean 'rate'?"]),
        (
            "reward_models: [{name: a, base: gpt-5, data: [psychocounsel], recipe: config/train/dpo.yaml}]\npolicies: []\n",
            ["reward_models[0].base"],
        ),
        ("policies: [{name: a, base: gpt-4o, method: dppo}]\n", ["policies[0].method", "'dppo'", "Did you mean 'dpo'?"]),
        ("policies: [{name: a, base: gpt-4o, method: dpo}]\n", ["policies[0] lacks the key 'recipe'"]),
        ("speeches: {min_chars: 2000}\n", ["min_chars is greater than"]),
        ("report: {crisis_topics: [self-harn]}\n", ["Did you mean 'self-harm'?"]),
        ("run: a\nrun: b\n", ["mine.yaml:2", "'run' stands twice"]),
        ("files: {models: [config/modells.yaml]}\n", ["config/modells.yaml: no such file", f"this is {Path.cwd()}"]),
        ("files: {models: [config]}\n", ["config: a folder"]),
        ("policies: []\n", ["evaluation.policies[0]: no policy", "There is none."]),
        (
            "reward_models:\n  - {name: helpsteer2, base: gemma-2-9b-it, data: [helpsteer2], recipe: config/train/reward_model.yaml}\n"
            "  - {name: gemma-2-9b-it-ranker, base: gemma-2-9b-it, data: [psychocounsel], recipe: config/train/reward_model.yaml}\n"
            "policies: [{name: psychocounsel, base: gpt-4o, method: none}, {name: gemma-2-9b-it-ranker, base: gpt-4o, method: none}]\n",
            [
                "mine.yaml:2: reward_models[0].name: 'helpsteer2' is the name of a source too; choose another",
                "mine.yaml:3: reward_models[1].name: 'gemma-2-9b-it-ranker' is the name of a baseline or ranker of reward_evaluation too",
                "mine.yaml:4: policies[0].name: 'psychocounsel' is the name of the run's own pairs too",
                "mine.yaml:4: policies[1].name: 'gemma-2-9b-it-ranker' is the name of a reward model too",
            ],
        ),
    ],
)
def test_mistakes_are_explained(tmp_path, text, expected):
    with pytest.raises(UserError) as caught:
        study_of(tmp_path, text)
    for part in expected:
        assert part in str(caught.value)


def test_a_model_that_is_called_as_a_source_is_named(tmp_path):
    models = tmp_path / "models.yaml"
    models.write_text("counsel-chat:\n  extends: gemma-2-9b-it\n")
    with pytest.raises(UserError, match=r"models\.yaml:1: models\.counsel-chat is the name of a source too"):
        study_of(tmp_path, f"files: {{models: [config/models.yaml, {models}]}}\n")


def test_all_mistakes_are_shown_at_once(tmp_path):
    with pytest.raises(UserError, match=r"(?s)seeed.*nott|nott.*seeed"):
        study_of(tmp_path, "seeed: 1\nnott: 2\n")


def test_broken_yaml_names_the_line(tmp_path):
    models = tmp_path / "models.yaml"
    models.write_text("a:\n  b: [1\nc: 2\n")
    with pytest.raises(UserError, match=r"models\.yaml:3: not YAML"):
        study_of(tmp_path, f"files: {{models: [{models}]}}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sources: [demo\nrun: x\n", r"mine\.yaml:2: not YAML"),
        (b"split:\n\ttest_speeches: 3\n", r"mine\.yaml:2: not YAML"),
        (b"run: caf\xe9\n", r"mine\.yaml: not UTF-8"),
        (b"- a\n", r"mine\.yaml: holds no keys"),
        (b"", r"mine\.yaml: holds no keys"),
        (None, r"mine\.yaml: no such file"),
    ],
)
def test_a_study_that_is_no_config_is_named_before_snakemake_reads_it(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_config_files(["--profile", "slurm", "--configfile", "config/demo.yaml", str(tmp_path / "mine.yaml"), "--", "dataset"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "respond",
            "{# Box 7 #}\nAnswer.\n{{ client_speach }}",
            r"respond\.jinja:3: no variable 'client_speach'. Did you mean 'client_speech'?",
        ),
        (
            "rate",
            "{% for r in responses %}{{ r.text }}{% endfor %}{{ words }}",
            r"rate\.jinja:1: no variable 'words'. Allowed: client_speech,",
        ),
        ("judge", "Compare.\n{{ responses", r"judge\.jinja:2: not a Jinja template: "),
    ],
)
def test_a_prompt_that_could_not_be_filled_is_told_before_any_job(tmp_path, name, text, message):
    shutil.copytree("config/prompts", tmp_path / "prompts")
    (tmp_path / f"prompts/{name}.jinja").write_text(text)
    with pytest.raises(UserError, match=message):
        study_of(tmp_path, f"files: {{prompts: {tmp_path}/prompts}}\n")


def test_a_file_of_ones_own_that_is_not_there_is_named(tmp_path):
    sources = tmp_path / "sources.yaml"
    entry = {"kind": "speeches", "title": "M", "adapter": "generic", "path": "lost.csv", "licence": "none", "quotable": False}
    sources.write_text(yaml.safe_dump({"mine": entry | {"columns": {"text": "a"}}}, sort_keys=False))
    study = study_of(tmp_path, f"files: {{sources: [config/sources.yaml, {sources}]}}\nsources: [mine]\n")
    assert study.unpinned([], ["mine"])["mine"] == f"{sources}:5: sources.mine.path: no file 'lost.csv'."


def test_a_chat_template_that_is_not_there_is_named(tmp_path):
    models = tmp_path / "models.yaml"
    models.write_text("baichuan2-7b-chat:\n  extends: gemma-2-9b-it\n  serve:\n    chat_template: lost.jinja\n")
    with pytest.raises(UserError, match=r"models\.yaml:4: models\.baichuan2-7b-chat\.serve\.chat_template: no file 'lost\.jinja'"):
        study_of(tmp_path, f"files: {{models: [config/models.yaml, {models}]}}\n")


def test_extends_inherits_deeply_and_refuses_circles(tmp_path):
    models = {"a": {"x": {"p": 1, "q": 2}, "y": 0}, "b": {"extends": "a", "x": {"q": 3}}, "c": {"extends": "b", "y": 5}}
    before = copy.deepcopy(models)
    resolved = resolve_extends(models, [])
    assert resolved["c"] == {"x": {"p": 1, "q": 3}, "y": 5}
    assert models == before
    with pytest.raises(UserError, match="models.a.extends: b -> a -> b is a circle|models.b.extends: a -> b -> a is a circle"):
        resolve_extends({"a": {"extends": "b"}, "b": {"extends": "a"}}, [])
    with pytest.raises(UserError, match="no model 'z'"):
        resolve_extends({"a": {"extends": "z"}}, [])


def test_every_schema_key_is_described():
    def undescribed(schema: dict, path: str):
        for name, value in schema.get("properties", {}).items():
            if "description" not in value and "$ref" not in value and "const" not in value:
                yield f"{path}.{name}"
            yield from undescribed(value, f"{path}.{name}")
        if isinstance(schema.get("items"), dict):
            yield from undescribed(schema["items"], f"{path}[]")

    import json

    for file in sorted(Path("config/schemas").glob("*.json")):
        schema = json.loads(file.read_text())
        assert not list(undescribed(schema, file.stem)), file
        if file.stem not in ("paper.schema",):
            assert '"additionalProperties"' in file.read_text(), f"{file} is not closed"


def test_every_source_says_whether_a_release_may_hold_it_and_why():
    sources = load_registry([Path("config/sources.yaml")], "sources")
    assert all("redistribution" in entry for entry in sources.values())
    forbidden = {name for name, entry in sources.items() if entry["kind"] == "speeches" and not entry["redistribution"]["allowed"]}
    assert forbidden == {"therapistqa", "psych8k", "amod-counsel", "mentalchat16k-interview", "phi2mental"}


def test_a_run_starts_at_speeches_or_at_pairs(tmp_path):
    assert not study_of(tmp_path, "").starts_at_pairs
    assert study_of(tmp_path, "sources: [psychocounsel-preference, psychocounsel-preference-test]").starts_at_pairs
    with pytest.raises(UserError, match=r"mine.yaml:1: sources names files of client speeches and files of preference pairs"):
        study_of(tmp_path, "sources: [counsel-chat, psychocounsel-preference]")


def test_rights_are_those_to_a_source(tmp_path):
    with pytest.raises(UserError, match=r"release.rights\[0\]: no source 'psych8'. Did you mean 'psych8k'"):
        study_of(tmp_path, "release: {rights: [psych8]}")


def test_a_budget_needs_the_price_of_every_model_that_costs_money(tmp_path):
    endpoints = yaml.safe_load(Path("config/endpoints.yaml").read_text())
    (tmp_path / "endpoints.yaml").write_text(yaml.safe_dump(endpoints | {"mine": endpoints["openai"]}))
    entry = {**load_registry([Path("config/models.yaml")], "models")["gpt-4o-judge"], "endpoint": "mine"}
    del entry["price"]
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"my-judge": entry}))
    files = f"files: {{models: [config/models.yaml, {tmp_path}/models.yaml], endpoints: {tmp_path}/endpoints.yaml}}"
    text = f"{files}\nratings: {{judge: my-judge}}\n"
    study_of(tmp_path, text)
    with pytest.raises(UserError, match=r"models\.yaml:1: models\.my-judge has no price, so the budget cannot be kept"):
        study_of(tmp_path, text + "budget: 10\n")


def test_the_readmes_models_of_ones_own_fit(tmp_path):
    block = Path("README.md").read_text().split("# my_models.yaml")[1].split("```")[0]
    (tmp_path / "my_models.yaml").write_text(f"#{block}")
    models = load_registry([Path("config/models.yaml"), tmp_path / "my_models.yaml"], "models")
    assert models["my-judge-of-pairs"]["reward_from"] == "classifier"
    study_of(
        tmp_path,
        f"files: {{models: [config/models.yaml, {tmp_path}/my_models.yaml]}}\nreward_evaluation: {{baselines: [my-judge-of-pairs]}}\n",
    )
