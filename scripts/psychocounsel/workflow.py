"""What rules ask of the study: where files lie, which slice of the config a program gets, which files it reads.

A slice is a JSON string with sorted keys and names, because Snakemake compares params by value without their names; it
holds what determines the outputs (prompts by their text, sources by their sha256) and nothing that a site decides.
"""

import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from psychocounsel.config import Study
from psychocounsel.fingerprint import code_fingerprint
from psychocounsel.models import ModelSpec
from psychocounsel.records import canonical_json, file_sha256

OURS = "psychocounsel"  # the run's own pairs, where a config names preference data


def settings(method: Callable) -> Callable:
    """Turn a method that is named like a rule and returns its slice of the config into the function for the rule's params.

    The JSON names the job too, so that a provenance record tells which slice of a later config it is to be compared with.
    """

    @wraps(method)
    def params(self, wildcards) -> str:
        return canonical_json({"job": {"rule": method.__name__, "wildcards": dict(wildcards.items())}, **method(self, wildcards)})

    return params


class Wildcards(dict):
    """Values of wildcards, outside of Snakemake: an attribute each."""

    __getattr__ = dict.__getitem__


class Workflow:
    """Paths, inputs and settings of all rules for one study."""

    def __init__(self, study: Study) -> None:
        self.study, self.config, self.run = study, study.config, study.config["run"]
        self.pool = self.config["responses"]["pool"]
        self.speech_sources = [name for name in self.config["sources"] if self.available(name)]
        self.preference_sources = sorted({name for entry in self.config["reward_models"] for name in entry["data"]} - {OURS})
        benchmark = self.config["reward_evaluation"]["benchmark"]
        self.general_preferences = sorted({*self.preference_sources, *([benchmark] if benchmark else [])})
        self.answer_sources = sorted({m["recorded"]["source"] for m in map(self.study.models.get, self.pool) if m.get("recorded")})
        self.baselines = self.config["reward_evaluation"]["baselines"]
        self.rankers = self.config["reward_evaluation"]["rankers"]
        self.reward_models = list(self.study.reward_models)
        self.trained_policies = [name for name, p in self.study.policies.items() if p["method"] != "none"]
        self.iterative_policies = [name for name, p in self.study.policies.items() if p["method"] == "dpo_iter"]
        self.policies = self.config["evaluation"]["policies"]

    # Where files lie

    def results(self, path: str) -> str:
        """Return a path below results/<run>."""
        return f"results/{self.run}/{path}"

    def work(self, path: str) -> str:
        """Return a path below work/<run>: journals, checkpoints to resume from, raw files; never a declared result."""
        return f"work/{self.run}/{path}"

    def logs(self, path: str) -> str:
        """Return a path below logs/<run>."""
        return f"logs/{self.run}/{path}"

    @property
    def endpoints(self) -> str:
        """Return the file of site facts: read by programs, named in no params, so that a change reruns nothing."""
        return self.config["files"]["endpoints"]

    @property
    def source_cache(self) -> str:
        """Return the folder of raw files that the user has, or an empty string."""
        return os.environ.get("PSYCHOCOUNSEL_SOURCES") or self.config["source_cache"] or ""

    @property
    def cache_option(self) -> str:
        """Return --cache for fetch_source, or nothing: then it looks at the environment itself."""
        return option("--cache", [shlex.quote(self.config["source_cache"])] if self.config["source_cache"] else [])

    def available(self, source: str) -> bool:
        """Whether a source can be had; an optional one that cannot is left out, aloud. A required one fails when it is fetched."""
        entry = self.study.sources[source]
        there = any(p.is_file() for p in (Path(self.source_cache, entry.get("file") or ""), Path(entry.get("path") or "")))
        if entry.get("optional") and not there and not entry.get("address"):
            print(f"note: the optional source {source} is left out: {entry['file']} is not in the source cache", file=sys.stderr)
            return False
        return True

    def raw(self, source: str) -> str:
        """Return where a source's checked raw file lies after fetch_source."""
        entry = self.study.sources[source]
        return self.work(f"sources/{source}/{Path(entry.get('path') or entry['file']).name}")

    def raw_by_name(self, wildcards) -> str:
        """Return the raw file of the source that a rule's wildcard names."""
        return self.raw(wildcards.source)

    @property
    def split_seed(self) -> int:
        """Return the seed of the split, which may differ from the study's."""
        return self.config["seed"] if self.config["split"]["seed"] is None else self.config["split"]["seed"]

    # Models

    def weights(self, model: str) -> list[str]:
        """Return the manifest of a model's local weights, or nothing for a model of the Hub or an API."""
        entry = self.study.models[model]
        if "path" in entry:
            return [f"{entry['path']}/manifest.json"]
        return [f"work/models/{Path(entry['weights']['gguf']).stem}/manifest.json"] if "weights" in entry else []

    @property
    def embedded_weights(self) -> dict[str, dict]:
        """Return where embedded weights come from, by the stem of their GGUF file."""
        found = [model["weights"] for model in self.study.models.values() if "weights" in model]
        return {Path(weights["gguf"]).stem: weights for weights in found}

    def spec(self, model: str, **changes) -> dict:
        """Return the part of a model's description that determines its answers."""
        entry = self.study.models[model] | changes
        facts = {key: value for key, value in entry.items() if key in ModelSpec.model_fields and key != "serve"}
        if entry.get("serve"):
            facts["serve"] = {k: v for k, v in entry["serve"].items() if k != "tensor_parallel"}
        return {"name": model} | facts

    def remote_slots(self, model: str) -> int:
        """Return 1 for a model behind a remote endpoint: jobs that share an account's limits run one at a time."""
        return int(self.study.endpoints[self.study.models[model]["endpoint"]]["kind"] == "openai")

    def gpus(self, model: str) -> int:
        """Return the GPUs that serving a model takes: none where it is served on the CPU or not by us."""
        served = self.study.endpoints[self.study.models[model]["endpoint"]]
        return self.study.models[model]["serve"]["tensor_parallel"] if served.get("server") == "vllm" else 0

    def pool_remote_slots(self, wildcards) -> int:
        """remote_slots of a pool model."""
        return self.remote_slots(wildcards.model)

    def pool_gpus(self, wildcards) -> int:
        """GPUs of a pool model."""
        return self.gpus(wildcards.model)

    def ranker_remote_slots(self, wildcards) -> int:
        """remote_slots of a ranker."""
        return self.remote_slots(wildcards.ranker)

    def ranker_gpus(self, wildcards) -> int:
        """GPUs of a ranker."""
        return self.gpus(wildcards.ranker)

    def policy_gpus(self, wildcards) -> int:
        """GPUs that serving a policy takes: those of its base."""
        return self.gpus(self.study.policies[wildcards.policy]["base"])

    # Settings: one method a rule, by the rule's name

    def requests(self) -> dict:
        """Return the settings that every stage shares which asks a model."""
        return self.config["requests"]

    @settings
    def fetch_source(self, wildcards) -> dict:
        """A raw file by address and sha256; a file of the user's own without a pinned sha256 counts by its content."""
        entry = self.study.sources[wildcards.source]
        facts = {key: entry.get(key) for key in ("file", "path", "address", "sha256", "access")} | {"gated": entry.get("gated", False)}
        if entry.get("path") and not entry.get("sha256") and Path(entry["path"]).is_file():
            facts["sha256"] = file_sha256(entry["path"])
        return dict(source=wildcards.source, **facts)

    @settings
    def read_source(self, wildcards) -> dict:
        """The adapter and the columns that it reads."""
        entry = self.study.sources[wildcards.source]
        return dict(source=wildcards.source, adapter=entry["adapter"], columns=entry.get("columns"))

    @settings
    def read_preferences(self, wildcards) -> dict:
        """The adapter of a file of preferences; the dev share is that of our speeches, and so is the prompt of a published pair."""
        entry = self.study.sources[wildcards.source]
        return dict(
            source=wildcards.source,
            adapter=entry["adapter"],
            columns=entry.get("columns"),
            split=entry.get("split"),
            prompt=self.study.prompt(self.config["responses"]["prompt"]),
            dev_fraction=self.config["split"]["dev_fraction"],
            seed=self.split_seed,
        )

    @settings
    def select_speeches(self, wildcards) -> dict:
        """Lengths, duplicates and the limit."""
        return dict(**self.config["speeches"], seed=self.config["seed"])

    @settings
    def label_topics(self, wildcards) -> dict:
        """The taxonomy with its words, and the judge of speeches without a label."""
        taxonomy = self.study.taxonomy
        coarse = {
            name: {"title": entry["title"], "fine": {topic: {"keywords": fine["keywords"]} for topic, fine in entry["fine"].items()}}
            for name, entry in taxonomy["coarse"].items()
        }
        topics = self.config["topics"]
        return dict(
            model=self.spec(topics["judge"]),
            prompt=self.study.prompt(topics["prompt"]),
            taxonomy=coarse,
            aliases=taxonomy["aliases"],
            **self.requests(),
        )

    @settings
    def split_speeches(self, wildcards) -> dict:
        """Sizes of the split."""
        return self.config["split"] | {"seed": self.split_seed}

    @settings
    def assign_models(self, wildcards) -> dict:
        """The pool and how many of it answer a speech."""
        return dict(pool=self.pool, models_per_speech=self.config["responses"]["models_per_speech"], seed=self.config["seed"])

    def _generation(self, model: dict, prompt: str, **more) -> dict:
        return dict(model=model, prompt=self.study.prompt(prompt), seed=self.config["seed"], **more, **self.requests())

    @settings
    def generate_responses(self, wildcards) -> dict:
        """One pool model, and how to read its answers where they are recorded."""
        more = {}
        if recorded := self.study.models[wildcards.model].get("recorded"):
            source = self.study.sources[recorded["source"]]
            more = {"recorded": {"adapter": source["adapter"], "columns": source.get("columns") or {}}}
        return self._generation(self.spec(wildcards.model), self.config["responses"]["prompt"], **more)

    def rated_principles(self) -> list[dict]:
        """The principles as the judge is told them."""
        return [{key: p[key] for key in ("id", "name", "definition", "aspects")} for p in self.study.principles]

    @settings
    def rate_responses(self, wildcards) -> dict:
        """The judge, its prompt and the principles."""
        ratings = self.config["ratings"]
        return dict(
            model=self.spec(ratings["judge"]),
            prompt=self.study.prompt(ratings["prompt"]),
            principles=self.rated_principles(),
            seed=self.config["seed"],
            **self.requests(),
        )

    def principle_ids(self) -> list[str]:
        """The ids of the principles that a complete score has."""
        return [p["id"] for p in self.study.principles]

    @settings
    def parse_ratings(self, wildcards) -> dict:
        """The principles that are rated."""
        return {"principles": self.principle_ids()}

    @settings
    def score_responses(self, wildcards) -> dict:
        """The principles that a complete score has."""
        return {"principles": self.principle_ids()}

    @settings
    def build_pairs(self, wildcards) -> dict:
        """The gap, and the prompt that stands before both answers."""
        return dict(min_gap=self.config["pairs"]["min_gap"], prompt=self.study.prompt(self.config["responses"]["prompt"]))

    @settings
    def prepare_model(self, wildcards) -> dict:
        """Embedded weights: the package that holds them and their sha256."""
        return dict(**self.embedded_weights[wildcards.weights])

    @settings
    def train_reward_model(self, wildcards) -> dict:
        """Base, recipe and seed of a reward model."""
        entry = self.study.reward_models[wildcards.reward_model]
        return dict(model=self.spec(entry["base"]), recipe=self.study.recipe(entry["recipe"]), seed=self.config["seed"])

    def _scoring(self) -> dict:
        return {key: self.config["reward_evaluation"][key] for key in ("max_length", "batch_size")}

    @settings
    def score_pairs(self, wildcards) -> dict:
        """A reward model that scores the test pairs."""
        return self._scorer(wildcards.scorer)

    @settings
    def score_benchmark(self, wildcards) -> dict:
        """A reward model that scores the pairs of the general benchmark."""
        return self._scorer(wildcards.scorer)

    def _scorer(self, name: str) -> dict:
        """A reward model: ours, by its base, or a published one."""
        ours = self.study.reward_models.get(name)
        spec = self.spec(ours["base"], reward_from="classifier") if ours else self.spec(name)
        return dict(model=spec, seed=self.config["seed"], **self._scoring())

    @settings
    def rank_pairs(self, wildcards) -> dict:
        """A prompted ranker."""
        return dict(
            model=self.spec(wildcards.ranker),
            prompt=self.study.prompt(self.config["reward_evaluation"]["ranker_prompt"]),
            **self.requests(),
        )

    def _evaluation(self, name: str, benchmark: bool = False) -> dict:
        rewards = self.config["reward_evaluation"]
        sections = self.study.paper["rewardbench_sections"] if benchmark else None
        return dict(
            name=name, bins=rewards["calibration_bins"], bootstrap=rewards["bootstrap"], seed=self.config["seed"], sections=sections
        )

    @settings
    def evaluate_rewards(self, wildcards) -> dict:
        """Metrics of a reward model."""
        return self._evaluation(wildcards.scorer)

    @settings
    def evaluate_benchmark(self, wildcards) -> dict:
        """Metrics of a reward model on the general benchmark, by its sections."""
        return self._evaluation(wildcards.scorer, benchmark=True)

    @settings
    def evaluate_rankings(self, wildcards) -> dict:
        """Metrics of a prompted ranker."""
        return self._evaluation(wildcards.ranker)

    @settings
    def sample_prompts(self, wildcards) -> dict:
        """Which training speeches a round samples answers to."""
        entry = self.study.policies[wildcards.policy]
        return dict(
            split="train",
            speeches=entry["speeches_per_iteration"],
            stratified=False,
            iteration=int(wildcards.iteration),
            seed=self.config["seed"],
        )

    @settings
    def sample_test_speeches(self, wildcards) -> dict:
        """Which test speeches checkpoints are judged on: the same share of each coarse topic."""
        count = self.config["evaluation"]["checkpoint_speeches"]
        return dict(split="test", speeches=count, stratified=True, iteration=0, seed=self.config["seed"])

    @settings
    def sample_responses(self, wildcards) -> dict:
        """The current policy's sampling."""
        entry = self.study.policies[wildcards.policy]
        model = self.spec(entry["base"], name=wildcards.policy, sampling=entry["sampling"])
        return self._generation(model, self.config["responses"]["prompt"], samples=entry["samples_per_speech"])

    @settings
    def rank_samples(self, wildcards) -> dict:
        """The reward model that ranks a round's samples."""
        entry = self.study.policies[wildcards.policy]
        base = self.study.reward_models[entry["reward_model"]]["base"]
        prompt = self.study.prompt(self.config["responses"]["prompt"])
        return dict(model=self.spec(base), prompt=prompt, policy=wildcards.policy, **self._scoring())

    @settings
    def train_policy(self, wildcards) -> dict:
        """Base, recipe and number of checkpoints of one training."""
        entry = self.study.policies[wildcards.policy]
        recipe = self.study.recipe(entry["recipe"])
        return dict(model=self.spec(entry["base"]), recipe=recipe, checkpoints=entry.get("checkpoints", 1), seed=self.config["seed"])

    @settings
    def select_checkpoint(self, wildcards) -> dict:
        """How dev pairs are scored."""
        return dict(model=self.spec(self.study.policies[wildcards.policy]["base"]), **self._scoring())

    @settings
    def answer_opponent(self, wildcards) -> dict:
        """The opponent, asked as the pool was."""
        return self._generation(self.spec(self.config["evaluation"]["opponent"]), self.config["responses"]["prompt"])

    @settings
    def answer_speeches(self, wildcards) -> dict:
        """A policy in both settings."""
        model = self.spec(self.study.policies[wildcards.policy]["base"], name=wildcards.policy)
        length_prompt = self.study.prompt(self.config["evaluation"]["length_prompt"])
        return self._generation(model, self.config["responses"]["prompt"], length_prompt=length_prompt)

    @settings
    def answer_checkpoint(self, wildcards) -> dict:
        """A checkpoint of a policy in the free setting."""
        model = self.spec(self.study.policies[wildcards.policy]["base"], name=checkpoint_name(wildcards))
        return self._generation(model, self.config["responses"]["prompt"])

    def _judgement(self, policy: str, setting: str) -> dict:
        evaluation = self.config["evaluation"]
        return dict(
            model=self.spec(evaluation["judge"]),
            prompt=self.study.prompt(evaluation["prompt"]),
            principles=self.rated_principles(),
            policy=policy,
            opponent=evaluation["opponent"],
            setting=setting,
            seed=self.config["seed"],
            **self.requests(),
        )

    @settings
    def judge_answers(self, wildcards) -> dict:
        """The judge of a policy's answers against the opponent's."""
        return self._judgement(wildcards.policy, wildcards.setting)

    @settings
    def judge_checkpoint(self, wildcards) -> dict:
        """The judge of a checkpoint's answers, in the free setting."""
        return self._judgement(checkpoint_name(wildcards), "free")

    @settings
    def parse_judgements(self, wildcards) -> dict:
        """Nothing."""
        return {}

    @settings
    def parse_checkpoint(self, wildcards) -> dict:
        """Nothing."""
        return {}

    def _win_rates(self, policy: str, setting: str) -> dict:
        return dict(policy=policy, setting=setting, bootstrap=self.config["evaluation"]["bootstrap"], seed=self.config["seed"])

    @settings
    def compute_win_rates(self, wildcards) -> dict:
        """Intervals of a policy's win rates."""
        return self._win_rates(wildcards.policy, wildcards.setting)

    @settings
    def compute_checkpoint_win_rate(self, wildcards) -> dict:
        """Intervals of a checkpoint's win rates."""
        return self._win_rates(checkpoint_name(wildcards), "free")

    # Inputs that depend on the study

    def pool_responses(self) -> list[str]:
        """The responses of the whole pool."""
        return [self.results(f"03_responses/{model}.jsonl") for model in self.pool]

    def pool_weights(self, wildcards) -> list[str]:
        """Local weights of a pool model."""
        return self.weights(wildcards.model)

    def recorded_answers(self, wildcards) -> list[str]:
        """The raw file of a pool model's recorded answers, or nothing."""
        recorded = self.study.models[wildcards.model].get("recorded")
        return [self.raw(recorded["source"])] if recorded else []

    def training_pairs(self, wildcards) -> list[str]:
        """The preference data that a reward model is trained on."""
        return self._preferences(wildcards.reward_model, "train")

    def dev_pairs(self, wildcards) -> list[str]:
        """The dev pairs of the same data."""
        return self._preferences(wildcards.reward_model, "dev")

    def _preferences(self, reward_model: str, split: str) -> list[str]:
        data = self.study.reward_models[reward_model]["data"]
        return [self.results(f"05_pairs/{split}.jsonl" if name == OURS else f"05_pairs/{name}/{split}.jsonl") for name in data]

    def benchmark_pairs(self, wildcards) -> str:
        """The pairs of the general benchmark."""
        return self.results(f"05_pairs/{self.config['reward_evaluation']['benchmark']}/test.jsonl")

    def reward_model_base(self, wildcards) -> list[str]:
        """Local weights of a reward model's base."""
        return self.weights(self.study.reward_models[wildcards.reward_model]["base"])

    def scorer_weights(self, wildcards) -> list[str]:
        """The manifest of a reward model that scores pairs; nothing for one of the Hub."""
        if wildcards.scorer in self.study.reward_models:
            return [self.reward_model(wildcards.scorer)]
        return self.weights(wildcards.scorer)

    def reward_model(self, name: str) -> str:
        """The manifest of a reward model of ours."""
        return self.results(f"06_reward_models/{name}/model/manifest.json")

    def ranker_weights(self, wildcards) -> list[str]:
        """Local weights of a prompted ranker."""
        return self.weights(wildcards.ranker)

    def ranking_reward_model(self, wildcards) -> str:
        """The reward model that ranks a policy's samples."""
        return self.reward_model(self.study.policies[wildcards.policy]["reward_model"])

    # Rounds of a policy's training; a DPO policy has one

    def _round(self, policy: str, iteration: int) -> str:
        return self.results(f"07_policies/{policy}/iteration-{iteration}")

    def _last_checkpoint(self, policy: str, iteration: int) -> list[str]:
        """The policy after a round; after round 0, the base."""
        entry = self.study.policies[policy]
        if iteration == 0:
            return self.weights(entry["base"])
        return [f"{self._round(policy, iteration)}/checkpoints/{entry.get('checkpoints', 1)}/manifest.json"]

    def round_before(self, wildcards) -> list[str]:
        """The declared output of the round before, or the base's weights."""
        before = int(wildcards.iteration) - 1
        return [f"{self._round(wildcards.policy, before)}/checkpoints.json"] if before else self.policy_base(wildcards)

    def sampling_weights(self, wildcards) -> str:
        """--weights of the policy that a round samples from: the newest."""
        return option("--weights", self._last_checkpoint(wildcards.policy, int(wildcards.iteration) - 1))

    def start_options(self, wildcards) -> str:
        """--weights and --reference of a training: the round before or the base, as the policy says."""
        entry, before = self.study.policies[wildcards.policy], int(wildcards.iteration) - 1
        base, newest = self.policy_base(wildcards), self._last_checkpoint(wildcards.policy, before)
        start, reference = (newest if entry.get(role) == "previous" else base for role in ("start", "reference"))
        return f"{option('--weights', start)} {option('--reference', reference)}".strip()

    def round_pairs(self, wildcards) -> str:
        """The pairs of a training: the run's own for DPO, the round's for iterative DPO."""
        if self.study.policies[wildcards.policy]["method"] == "dpo":
            return self.results("05_pairs/train.jsonl")
        return f"{self._round(wildcards.policy, int(wildcards.iteration))}/pairs.jsonl"

    def rounds(self, wildcards) -> list[str]:
        """The lists of checkpoints of all rounds of a policy."""
        iterations = self.study.policies[wildcards.policy].get("iterations", 1)
        return [f"{self._round(wildcards.policy, i)}/checkpoints.json" for i in range(1, iterations + 1)]

    def candidates(self, wildcards) -> str:
        """The manifests of all checkpoints of a policy, in the order of training."""
        entry = self.study.policies[wildcards.policy]
        return " ".join(
            f"{self._round(wildcards.policy, iteration)}/checkpoints/{number}/manifest.json"
            for iteration in range(1, entry.get("iterations", 1) + 1)
            for number in range(1, entry.get("checkpoints", 1) + 1)
        )

    def checkpoint_weights(self, wildcards) -> str:
        """--weights of a checkpoint of a policy's first round."""
        return option("--weights", [f"{self._round(wildcards.policy, 1)}/checkpoints/{wildcards.checkpoint}/manifest.json"])

    def policy_base(self, wildcards) -> list[str]:
        """Local weights of a policy's base."""
        return self.weights(self.study.policies[wildcards.policy]["base"])

    def policy_weights(self, wildcards) -> list[str]:
        """The manifest of a policy: the selected checkpoint's, or the base's own."""
        if self.study.policies[wildcards.policy]["method"] == "none":
            return self.policy_base(wildcards)
        return [self.policy(wildcards.policy)]

    def policy(self, name: str) -> str:
        """The manifest of a policy of ours: its selected checkpoint."""
        return self.results(f"07_policies/{name}/model/manifest.json")

    # What the report needs

    def scorers_with_metrics(self) -> list[str]:
        """The metrics of every reward model and ranker on the test pairs."""
        return [self.results(f"06_reward_models/{name}/metrics.json") for name in [*self.reward_models, *self.baselines, *self.rankers]]

    def benchmark_metrics(self) -> list[str]:
        """The metrics of the ablation's reward models on the general benchmark."""
        rewards = self.config["reward_evaluation"]
        return [self.results(f"06_reward_models/{name}/benchmark.json") for name in rewards["ablation"] if rewards["benchmark"]]

    def win_rates(self) -> list[str]:
        """The win rates of the table's policies in both settings."""
        return [
            self.results(f"09_judgements/{policy}/{setting}.win_rates.json") for policy in self.policies for setting in ("free", "length")
        ]

    def checkpoint_win_rates(self) -> list[str]:
        """The win rates of all checkpoints of the policies in Figure 4."""
        return [
            self.results(f"09_judgements/{policy}/checkpoint-{number}.win_rates.json")
            for policy in self.config["evaluation"]["checkpoints"]
            for number in range(1, self.study.policies[policy].get("checkpoints", 1) + 1)
        ]


def option(flag: str, values: list[str]) -> str:
    """Return a command-line option, or nothing where it has no value."""
    return f"{flag} {' '.join(values)}" if values else ""


def checkpoint_name(wildcards) -> str:
    """Return the name under which a checkpoint of a policy answers."""
    return f"{wildcards.policy}.checkpoint-{wildcards.checkpoint}"


def code(program: str) -> str:
    """Return the fingerprint of a program, for a rule's params."""
    return code_fingerprint(program)
