"""Load and check the config and its registries before any job: every error names file, line, key, value and remedy."""

import argparse
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import jinja2
import jinja2.meta
import jsonschema
import orjson
import yaml

from psychocounsel.endpoints import is_remote
from psychocounsel.errors import UserError, nearest, nearest_or_all
from psychocounsel.pins import is_unpinned_model, is_unpinned_source, pin_models, pin_sources
from psychocounsel.records import SCHEMAS

CODE_VERSION = 1  # no program's result depends on how the config is checked

PROMPTS = {  # where the config names a prompt, and what its text may use
    ("topics", "prompt"): ["client_speech", "coarse"],
    ("responses", "prompt"): ["client_speech"],
    ("ratings", "prompt"): ["client_speech", "responses", "principle"],
    ("ratings", "together_prompt"): ["client_speech", "responses", "principles"],
    ("reward_evaluation", "ranker_prompt"): ["client_speech", "responses"],
    ("evaluation", "prompt"): ["client_speech", "responses", "principles"],
    ("evaluation", "one_by_one_prompt"): ["client_speech", "responses", "principle", "principles"],
    ("evaluation", "length_prompt"): ["client_speech", "words"],
}

KeyPath = tuple[str | int, ...]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster, where PyYAML was built with it


def read_config(files: list[Path]) -> dict:
    """Return the config of several files, merged as Snakemake does: mappings by key, everything else replaced by the later."""
    config: dict = {}
    for file in files:
        read = read_yaml(file)
        if not isinstance(read, dict):
            raise UserError(f"{file}: holds no keys; a file of a study gives those keys of config/config.yaml that it changes")
        config = merged(config, read)
    return config


def check_config_files(words: list[str]) -> None:
    """Raise UserError where a config file that Snakemake's words name is not there or broken: Snakemake names neither file nor line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--configfile", "--configfiles", nargs="+", type=Path, default=[])
    read_config(parser.parse_known_args(words)[0].configfile)


def merged(below: dict, above: dict) -> dict:
    """Return a mapping with what a second one adds or replaces."""
    return {**below, **{k: merged(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v for k, v in above.items()}}


def load_study(config: dict, files: list[Path]) -> "Study":
    """Check a merged config (read from `files`, the later wins) and its registries; return the study or raise UserError."""
    for file in files:
        check_duplicate_keys(file)
    complain(list(schema_errors(config, "config", files)))
    registries = load_registries(config)
    pins = load_pins(Path(config["files"]["pins"]))
    pin_models(registries["models"], pins["models"])
    pin_sources(registries["sources"], pins["files"])
    study = Study(config, files, **registries)
    complain(list(reference_errors(study)))
    return study


def load_registries(config: dict) -> dict[str, dict | list]:
    """Return the checked registries that a config names, as they stand in their files."""
    named = config["files"]
    return {
        "models": load_registry([Path(f) for f in named["models"]], "models"),
        "sources": load_registry([Path(f) for f in named["sources"]], "sources"),
        **{kind: load_registry([Path(named[kind])], kind) for kind in ("endpoints", "principles", "taxonomy", "paper")},
    }


class Study:
    """A checked config with its registries: models, sources, endpoints, principles, taxonomy, paper, prompts, recipes."""

    def __init__(self, config: dict, files: list[Path], *, models, sources, endpoints, principles, taxonomy, paper) -> None:
        self.config, self.files = config, files
        self.models: dict[str, dict] = models
        self.sources: dict[str, dict] = sources
        self.endpoints: dict[str, dict] = endpoints
        self.principles: list[dict] = principles
        self.taxonomy: dict = taxonomy
        self.paper: dict = paper
        self.reward_models = {entry["name"]: entry for entry in config["reward_models"]}
        self.policies = {entry["name"]: entry for entry in config["policies"]}

    @property
    def starts_at_pairs(self) -> bool:
        """Whether the run starts at preference pairs: its sources hold such, not speeches."""
        return any(self.sources[name]["kind"] == "preferences" for name in self.config["sources"])

    def prompt(self, name: str) -> str:
        """Return a prompt template's text without its comments."""
        return self.template(self.prompt_path(name))

    @staticmethod
    def template(path: Path) -> str:
        """Return a Jinja template's text without its comments, which reach no model: a comment edited reruns nothing."""
        return re.sub(r"\{#.*?#\}\s*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)

    def prompt_path(self, name: str) -> Path:
        """Return where a prompt template lies."""
        return Path(self.config["files"]["prompts"]) / f"{name}.jinja"

    def unpinned(self, models: list[str], sources: list[str]) -> dict[str, str]:
        """Return those of these models (by their id) and sources that nothing pins, each with place, key and what is not known."""
        models_files, sources_files = ([Path(f) for f in self.config["files"][kind]] for kind in ("models", "sources"))
        found: dict[str, str] = {}  # several entries may have one id
        for name in models:
            entry = self.models[name]
            if is_unpinned_model(entry, self.endpoints):
                place = locate((name, "revision"), models_files)
                found.setdefault(entry["id"], f"{place}: models.{name}.revision: which commit of {entry['id']}?")
        for name in sources:
            if is_unpinned_source(self.sources[name]):
                entry = self.sources[name]
                lost = "path" in entry and not any(entry.get(key) for key in ("file", "address", "hub"))
                key, fault = ("path", f"no file {entry['path']!r}.") if lost else ("sha256", "what is in its file?")
                found[name] = f"{locate((name, key), sources_files)}: sources.{name}.{key}: {fault}"
        return found

    @staticmethod
    @cache
    def recipe(path: str) -> dict:
        """Return a checked training recipe."""
        return load_registry([Path(path)], "recipe")


def load_registry(files: list[Path], kind: str) -> dict | list:
    """Read one registry from its files and check it against its schema.

    The later file wins: an entry of models replaces one of the same name (it may extend another), one of sources adds or replaces
    single keys, so that a study can name the columns of a file without repeating the rest.
    """
    found: dict | list = {}
    for file in files:
        value = read_yaml(file)
        if kind == "sources":
            found = merged(found, value) if isinstance(value, dict) else value
            complain(list(schema_errors(found, kind, files)))
        else:
            complain(list(schema_errors(value, kind, [file])))
            found = {**found, **value} if isinstance(value, dict) else value
    if kind == "models":
        found = resolve_extends(found, files)
        complain(list(schema_errors(found, kind, files)))
    return found


def load_pins(file: Path) -> dict[str, dict]:
    """Return the pins of a lock file; none where there is no such file yet."""
    return load_registry([file], "pins") if file.exists() else {"models": {}, "files": {}}


@lru_cache(maxsize=32)
def nodes(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, which know their lines; the files of a config are asked for theirs again and again."""
    return yaml.compose(text, LOADER)


def read_yaml(file: Path) -> object:
    """Read a YAML file; raise UserError with the line where it is broken or names a key twice."""
    check_duplicate_keys(file)
    return yaml.load(file.read_text(encoding="utf-8"), LOADER)


def check_duplicate_keys(file: Path) -> None:
    """Raise UserError where a YAML file is missing, broken, or names a key twice: the reader would keep only the last."""
    try:
        root = nodes(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; paths count from the project's folder, and this is {Path.cwd()}") from None
    except IsADirectoryError:
        raise UserError(f"{file}: a folder, where a YAML file is expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{file}:{line}: not YAML: {error.problem}") from None
    waiting = [root] if root else []
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    raise UserError(f"{file}:{key.start_mark.line + 1}: the key {key.value!r} stands twice in one mapping; remove one")
                seen.add(key.value)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def resolve_extends(models: dict[str, dict], files: list[Path]) -> dict[str, dict]:
    """Fill entries with what they inherit by `extends` (dicts are merged key by key)."""

    def resolved(name: str, trail: tuple[str, ...]) -> dict:
        entry = models[name]
        if "extends" not in entry:
            return entry
        parent, above = entry["extends"], (*trail, name)
        if parent in above:
            raise UserError(f"{locate((name, 'extends'), files)}: models.{name}.extends: {' -> '.join((*above, parent))} is a circle")
        if parent not in models:
            raise UserError(
                f"{locate((name, 'extends'), files)}: models.{name}.extends: no model {parent!r}.{nearest(parent, list(models))}"
            )
        return merged(resolved(parent, above), {k: v for k, v in entry.items() if k != "extends"})

    return {name: resolved(name, ()) for name in models}


def schema_errors(value: object, kind: str, files: list[Path]) -> Iterator[str]:
    """Yield one message for each place where a value does not fit config/schemas/<kind>.schema.json."""
    schema = orjson.loads((SCHEMAS / f"{kind}.schema.json").read_bytes())
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    for error in sorted((leaf for top in errors for leaf in leaves(top)), key=lambda e: [str(p) for p in e.absolute_path]):
        path: KeyPath = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            allowed = list(error.schema.get("properties", {}))
            for key in sorted(set(error.instance) - set(allowed)):
                yield f"{locate((*path, key), files)}: unknown key {shown((*path, key))}.{nearest_or_all(key, allowed)}"
        elif error.validator == "required":
            missing = sorted(set(error.validator_value) - set(error.instance))
            yield f"{locate(path, files)}: {shown(path) or 'the file'} lacks the key {', '.join(map(repr, missing))}."
        elif error.validator == "enum":
            allowed, hint = ", ".join(map(repr, error.validator_value)), nearest(error.instance, error.validator_value)
            yield f"{locate(path, files)}: {shown(path)} is {error.instance!r}; allowed: {allowed}.{hint}"
        else:
            meaning = f" ({error.schema['description']})" if "description" in error.schema else ""
            yield f"{locate(path, files)}: {shown(path)}: {error.message}{meaning}."


def leaves(error: jsonschema.ValidationError) -> Iterator[jsonschema.ValidationError]:
    """Yield the errors that matter of one that comes from anyOf or oneOf: those of the alternative that fits best."""
    if error.validator in ("anyOf", "oneOf") and error.context:
        yield jsonschema.exceptions.best_match([error])
    else:
        yield error


def shown(path: KeyPath) -> str:
    """Write a key path as a.b[0].c."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def locate(path: KeyPath, files: list[Path]) -> str:
    """Return file:line of a key path, in the last file that has it; the deepest part that is there counts."""
    best = (0, f"{files[-1]}" if files else "config")
    for file in files:
        node, depth, line = nodes(file.read_text(encoding="utf-8")), 0, 1
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = (node.value[part], node.value[part])
            else:
                found = None
            if found is None:
                break
            node, depth, line = found[1], depth + 1, found[0].start_mark.line + 1
        if depth and depth >= best[0]:
            best = (depth, f"{file}:{line}")
    return best[1]


def reference_errors(study: Study) -> Iterator[str]:
    """Yield one message for each name in the config that refers to nothing, and for choices that contradict each other."""
    config, files = study.config, study.files
    models_files = [Path(f) for f in config["files"]["models"]]

    def unknown(path: KeyPath, name: str, what: str, known: list[str]) -> Iterator[str]:
        if name not in known:
            yield f"{locate(path, files)}: {shown(path)}: no {what} {name!r}.{nearest_or_all(name, known)}"

    def unknown_each(path: KeyPath, names: list[str], what: str, known: list[str]) -> Iterator[str]:
        for index, name in enumerate(names):
            yield from unknown((*path, index), name, what, known)
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{locate(path, files)}: {shown(path)} names {name!r} twice."

    chat = [name for name, model in study.models.items() if model.get("kind") == "chat"]
    embedders = [name for name, model in study.models.items() if model.get("kind") == "embedder"]
    scorers = [name for name, model in study.models.items() if model.get("kind") == "reward_model"]
    of_kind = {kind: [n for n, s in study.sources.items() if s["kind"] == kind] for kind in ("speeches", "answers", "preferences")}
    topics = [*study.taxonomy["coarse"], *(topic for coarse in study.taxonomy["coarse"].values() for topic in coarse["fine"])]

    for name, model in study.models.items():
        if model.get("kind") == "chat" and model["endpoint"] not in study.endpoints:
            hint = nearest_or_all(model["endpoint"], list(study.endpoints))
            yield f"{locate((name, 'endpoint'), models_files)}: models.{name}.endpoint: no endpoint {model['endpoint']!r}.{hint}"
        if model.get("recorded") and model["recorded"]["source"] not in of_kind["answers"]:
            source = model["recorded"]["source"]
            yield (
                f"{locate((name, 'recorded', 'source'), models_files)}: models.{name}.recorded.source: "
                f"no source of answers {source!r}.{nearest(source, of_kind['answers'])}"
            )
        template = model.get("serve", {}).get("chat_template")
        if template and not Path(template).is_file():
            line = locate((name, "serve", "chat_template"), models_files)
            yield f"{line}: models.{name}.serve.chat_template: no file {template!r}."

    starts = [*of_kind["speeches"], *of_kind["preferences"]]
    yield from unknown_each(("sources",), config["sources"], "source of speeches or pairs", starts)
    if len({study.sources[name]["kind"] for name in config["sources"] if name in starts}) == 2:
        yield (
            f"{locate(('sources',), files)}: sources names files of client speeches and files of preference pairs; a run starts at one: "
            "name only speeches (the run makes pairs of them) or only pairs (it takes them as they are)."
        )
    rights = [name for name in study.sources if name in (*starts, *of_kind["answers"])]
    yield from unknown_each(("release", "rights"), config["release"]["rights"], "source", rights)
    yield from unknown(("topics", "judge"), config["topics"]["judge"], "chat model or embedder", [*chat, *embedders])
    yield from unknown_each(("responses", "pool"), config["responses"]["pool"], "chat model", chat)
    if len(config["responses"]["pool"]) < config["responses"]["models_per_speech"]:
        yield (
            f"{locate(('responses', 'pool'), files)}: responses.pool has {len(config['responses']['pool'])} models, fewer than "
            f"responses.models_per_speech ({config['responses']['models_per_speech']}); name more models or lower it."
        )
    yield from unknown(("ratings", "judge"), config["ratings"]["judge"], "chat model", chat)

    if config["budget"] is not None:
        asked = [
            config["topics"]["judge"],
            *config["responses"]["pool"],
            config["ratings"]["judge"],
            *config["reward_evaluation"]["rankers"],
        ]
        asked += [config["evaluation"][role] for role in ("opponent", "judge", "second_judge")]
        for name in dict.fromkeys(name for name in asked if name in chat):
            model = study.models[name]
            if not model.get("price") and is_remote(study.endpoints.get(model["endpoint"], {}).get("kind")):
                where = locate((name,), models_files)
                yield f"{where}: models.{name} has no price, so the budget cannot be kept; give it one, or set `budget` to null."

    near = config["speeches"]["near_duplicates"]
    if near["cluster_above"] > near["drop_above"]:
        yield f"{locate(('speeches', 'near_duplicates'), files)}: speeches.near_duplicates: cluster_above is greater than drop_above."
    if config["speeches"]["min_chars"] > config["speeches"]["max_chars"]:
        yield f"{locate(('speeches', 'min_chars'), files)}: speeches.min_chars is greater than speeches.max_chars."

    for key in ("reward_models", "policies"):
        names = [entry["name"] for entry in config[key]]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{locate((key,), files)}: {key} names {name!r} twice."
    yield from shared_names(study)
    for index, entry in enumerate(config["reward_models"]):
        yield from unknown(("reward_models", index, "base"), entry["base"], "chat model", chat)
        yield from unknown_each(
            ("reward_models", index, "data"), entry["data"], "preference data", ["psychocounsel", *of_kind["preferences"]]
        )
    for index, entry in enumerate(config["policies"]):
        yield from unknown(("policies", index, "base"), entry["base"], "chat model", chat)
        if "reward_model" in entry:
            yield from unknown(("policies", index, "reward_model"), entry["reward_model"], "reward model", list(study.reward_models))

    rewards = config["reward_evaluation"]
    yield from unknown_each(("reward_evaluation", "baselines"), rewards["baselines"], "published reward model", scorers)
    yield from unknown_each(("reward_evaluation", "rankers"), rewards["rankers"], "chat model", chat)
    yield from unknown_each(("reward_evaluation", "ablation"), rewards["ablation"], "reward model", list(study.reward_models))
    if rewards["benchmark"]:
        yield from unknown(("reward_evaluation", "benchmark"), rewards["benchmark"], "preference data", of_kind["preferences"])

    evaluation = config["evaluation"]
    yield from unknown(("evaluation", "opponent"), evaluation["opponent"], "chat model", chat)
    yield from unknown(("evaluation", "judge"), evaluation["judge"], "chat model", chat)
    if second := evaluation["second_judge"]:
        yield from unknown(("evaluation", "second_judge"), second, "chat model", chat)
        if second == evaluation["judge"]:
            yield (
                f"{locate(('evaluation', 'second_judge'), files)}: evaluation.second_judge is the judge itself ({second}); "
                "name another model, or null."
            )
    yield from unknown_each(("evaluation", "policies"), evaluation["policies"], "policy", list(study.policies))
    trained = [name for name, policy in study.policies.items() if policy["method"] != "none"]
    yield from unknown_each(("evaluation", "checkpoints"), evaluation["checkpoints"], "trained policy", trained)
    for index, name in enumerate(evaluation["checkpoints"]):
        if name in trained and "reward_model" not in study.policies[name]:
            yield (
                f"{locate(('evaluation', 'checkpoints', index), files)}: evaluation.checkpoints[{index}]: the policy {name!r} has no"
                " reward_model to assess its checkpoints by; give it one in policies, or leave it out here."
            )
    yield from unknown_each(
        ("evaluation", "ablation"), evaluation["ablation"], "policy in evaluation.checkpoints", evaluation["checkpoints"]
    )
    yield from unknown_each(("report", "crisis_topics"), config["report"]["crisis_topics"], "topic", topics)

    prompts = sorted(p.stem for p in Path(config["files"]["prompts"]).glob("*.jinja"))
    for path, variables in PROMPTS.items():
        name = config[path[0]][path[1]]
        yield from unknown(path, name, f"prompt in {config['files']['prompts']}", prompts)
        if name in prompts:
            yield from prompt_faults(study.prompt_path(name), variables)
    for key in ("reward_models", "policies"):
        for index, entry in enumerate(config[key]):
            if "recipe" in entry and not Path(entry["recipe"]).is_file():
                yield f"{locate((key, index, 'recipe'), files)}: {key}[{index}].recipe: no file {entry['recipe']!r}."


def shared_names(study: Study) -> Iterator[str]:
    """Yield one message for each name that two things of a run bear where its files or its tables go by name.

    A policy may be called as its base is: the two are told apart everywhere.
    """
    config = study.config
    data = dict.fromkeys(study.sources, "a source") | {"psychocounsel": "the run's own pairs"}
    scorers = [*config["reward_evaluation"]["baselines"], *config["reward_evaluation"]["rankers"]]
    taken = {
        "reward_models": data | dict.fromkeys(scorers, "a baseline or ranker of reward_evaluation"),
        "policies": data | dict.fromkeys(study.reward_models, "a reward model"),
    }
    for key, others in taken.items():
        for index, entry in enumerate(config[key]):
            if what := others.get(entry["name"]):
                line = locate((key, index, "name"), study.files)
                yield f"{line}: {key}[{index}].name: {entry['name']!r} is the name of {what} too; choose another."
    for name in sorted(study.models.keys() & study.sources.keys()):
        line = locate((name,), [Path(f) for f in config["files"]["models"]])
        yield f"{line}: models.{name} is the name of a source too; choose another."


def prompt_faults(file: Path, variables: list[str]) -> Iterator[str]:
    """Yield one message for each place where a prompt is no Jinja template, or uses a variable that nothing fills."""
    try:
        template = jinja2.Environment().parse(file.read_text(encoding="utf-8"))
    except jinja2.TemplateSyntaxError as error:
        yield f"{file}:{error.lineno}: not a Jinja template: {error.message}"
        return
    unfilled = jinja2.meta.find_undeclared_variables(template) - set(variables)
    for node in template.find_all(jinja2.nodes.Name):
        if node.name in unfilled:
            yield f"{file}:{node.lineno}: no variable {node.name!r}.{nearest_or_all(node.name, variables)}"


def about_unpinned(unpinned: dict[str, str], config: dict) -> str:
    """Say which names of a run nothing pins, and what to do or what follows."""
    if config["allow_unpinned"]:
        heading = "note: what these names stand for may differ tomorrow; the run's records say so (allow_unpinned: true):"
        return "\n  ".join([heading, *unpinned.values()])
    heading = "not pinned, so that nobody could repeat this run; it can be planned, and will not start:"
    remedy = (
        f"`make pin`, once where there is a network, resolves such names and writes {config['files']['pins']};"
        " `allow_unpinned: true` in the config takes what is there on the day."
    )
    return "\n  ".join([heading, *unpinned.values()]) + f"\n{remedy}"


def complain(messages: list[str]) -> None:
    """Raise one UserError with all messages, if there are any."""
    if messages:
        raise UserError("\n  ".join(["the configuration is wrong:", *dict.fromkeys(messages)]))
