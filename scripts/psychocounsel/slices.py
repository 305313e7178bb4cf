"""The slice of the config that each rule hands to its program: one method a rule, by the rule's name.

A slice is a JSON string with sorted keys and names, because Snakemake compares params by value without their names; it
holds what determines the outputs (prompts by their text, sources by their sha256) and nothing that a site decides.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

from psychocounsel.models import ModelSpec
from psychocounsel.pins import is_unpinned_model
from psychocounsel.records import canonical_json, file_sha256
from psychocounsel.workflow import Workflow


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


class Slices:
    """Settings of the rules of one study; those of report.smk are presentation.py's."""

    def __init__(self, flow: Workflow) -> None:
        self.flow, self.study, self.config = flow, flow.study, flow.config

    def spec(self, model: str, **changes) -> dict:
        """Return the part of a model's description that determines its answers."""
        entry = self.study.models[model] | changes
        facts = {key: value for key, value in entry.items() if key in ModelSpec.model_fields and key != "serve"}
        if entry.get("serve"):
            facts["serve"] = {k: v for k, v in entry["serve"].items() if k != "tensor_parallel"}
            if path := facts["serve"].get("chat_template"):
                facts["serve"]["chat_template"] = self.study.template(Path(path))
        if is_unpinned_model(entry, self.study.endpoints):
            facts["unpinned"] = True
        return {"name": model} | facts

    @property
    def split_seed(self) -> int:
        """Return the seed of the split, which may differ from the study's."""
        return self.config["seed"] if self.config["split"]["seed"] is None else self.config["split"]["seed"]

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
        holds_speeches = entry["adapter"] == "pairs_psychocounsel"
        return dict(
            source=wildcards.source,
            adapter=entry["adapter"],
            columns=entry.get("columns"),
            split=entry.get("split"),
            prompt=self.study.prompt(self.config["responses"]["prompt"]) if holds_speeches else None,
            dev_fraction=self.config["split"]["dev_fraction"],
            seed=self.split_seed,
        )

    @settings
    def select_speeches(self, wildcards) -> dict:
        """Lengths, duplicates and the limit."""
        return dict(**self.config["speeches"], seed=self.config["seed"])

    @settings
    def read_pairs(self, wildcards) -> dict:
        """The adapters of the files of pairs, the names of models, and which speeches are too similar."""
        speeches = self.config["speeches"]
        sources = [{"source": name, **self.study.sources[name]} for name in self.flow.sources]
        return dict(
            sources=[{key: source.get(key) for key in ("source", "adapter", "columns", "split")} for source in sources],
            models=self.model_aliases(),
            near_duplicates=speeches["near_duplicates"],
            drop_near_test=self.config["pairs"]["drop_near_test"],
            personal_data=speeches["personal_data"],
            limit=speeches["limit"],
            seed=self.config["seed"],
        )

    def model_aliases(self) -> dict[str, str]:
        """Return what published data may call a model of the pool, in lower case: its name, its id with and without the
        organisation, its title; not what several models share."""
        names = {}
        for name in self.flow.pool:
            model = self.study.models[name]
            for alias in {alias.casefold() for alias in (name, model["id"], model["id"].rpartition("/")[2], model["title"])}:
                names.setdefault(alias, set()).add(name)
        return {alias: alias if alias in found else found.pop() for alias, found in names.items() if alias in found or len(found) == 1}

    @settings
    def label_topics(self, wildcards) -> dict:
        """The taxonomy with its words, and the judge of speeches without a label."""
        return self._topics("keywords") | {"prompt": self.study.prompt(self.config["topics"]["prompt"])} | self.requests()

    @settings
    def embed_topics(self, wildcards) -> dict:
        """The taxonomy, and the embedder that stands in for a judge."""
        return self._topics()

    def _topics(self, *facts: str) -> dict:
        taxonomy = self.study.taxonomy
        coarse = {
            name: {"title": entry["title"], "fine": {topic: {fact: fine[fact] for fact in facts} for topic, fine in entry["fine"].items()}}
            for name, entry in taxonomy["coarse"].items()
        }
        return dict(model=self.spec(self.config["topics"]["judge"]), taxonomy=coarse, aliases=taxonomy["aliases"])

    @settings
    def split_speeches(self, wildcards) -> dict:
        """Sizes of the split."""
        return self.config["split"] | {"seed": self.split_seed}

    @settings
    def assign_models(self, wildcards) -> dict:
        """The pool and how many of it answer a speech."""
        return dict(pool=self.flow.pool, models_per_speech=self.config["responses"]["models_per_speech"], seed=self.config["seed"])

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

    def _rating(self, **more) -> dict:
        ratings = self.config["ratings"]
        return dict(
            model=self.spec(ratings["judge"]),
            prompt=self.study.prompt(ratings["prompt" if ratings["protocol"] == "one_by_one" else "together_prompt"]),
            principles=self.rated_principles(),
            protocol=ratings["protocol"],
            seed=self.config["seed"],
            **more,
            **self.requests(),
        )

    @settings
    def rate_responses(self, wildcards) -> dict:
        """The judge, its prompt, protocol and principles."""
        return self._rating()

    @settings
    def rate_again(self, wildcards) -> dict:
        """The sample that the judge rates again: the same requests once more, or others, which show the responses in reverse order."""
        same = wildcards.order == "same"
        return self._rating(sample=self.config["ratings"]["consistency"]["speeches"], reversed=not same, repeat=int(same))

    def principle_ids(self) -> list[str]:
        """The ids of the principles that a complete score has."""
        return [p["id"] for p in self.study.principles]

    @settings
    def parse_ratings(self, wildcards) -> dict:
        """The principles that are rated."""
        return {"principles": self.principle_ids()}

    @settings
    def parse_again(self, wildcards) -> dict:
        """The principles that are rated."""
        return {"principles": self.principle_ids()}

    @settings
    def assess_judge(self, wildcards) -> dict:
        """What makes a pair, whose label may flip, and the intervals."""
        return dict(
            principles=self.principle_ids(),
            min_gap=self.config["pairs"]["min_gap"],
            bootstrap=self.config["evaluation"]["bootstrap"],
            seed=self.config["seed"],
        )

    @settings
    def score_responses(self, wildcards) -> dict:
        """The principles that a complete score has."""
        return {"principles": self.principle_ids()}

    @settings
    def build_pairs(self, wildcards) -> dict:
        """The gap, and the prompt that stands before both answers."""
        return dict(min_gap=self.config["pairs"]["min_gap"], prompt=self.study.prompt(self.config["responses"]["prompt"]))

    @settings
    def divide_pairs(self, wildcards) -> dict:
        """The prompt that stands before both answers."""
        return {"prompt": self.study.prompt(self.config["responses"]["prompt"])}

    @settings
    def report_contamination(self, wildcards) -> dict:
        """The measure by which speeches are selected; the sides of given pairs are taken as they are."""
        return dict(
            near_duplicates=self.config["speeches"]["near_duplicates"], seed=self.config["seed"], own_split=not self.flow.starts_at_pairs
        )

    @settings
    def prepare_model(self, wildcards) -> dict:
        """Embedded weights: the package that holds them and their sha256."""
        return dict(**self.flow.embedded_weights[wildcards.weights])

    @settings
    def train_reward_model(self, wildcards) -> dict:
        """Base, recipe and seed of a reward model."""
        entry = self.study.reward_models[wildcards.reward_model]
        return dict(model=self.spec(entry["base"]), recipe=self.study.recipe(entry["recipe"]), seed=self.config["seed"])

    def _scoring(self) -> dict:
        return {key: self.config["reward_evaluation"][key] for key in ("max_length", "batch_size")}

    @settings
    def score_pairs(self, wildcards) -> dict:
        """A reward model of ours that scores the test pairs."""
        return self._our_scorer(wildcards.reward_model)

    @settings
    def score_benchmark(self, wildcards) -> dict:
        """A reward model of ours that scores the pairs of the general benchmark."""
        return self._our_scorer(wildcards.reward_model)

    def _our_scorer(self, name: str) -> dict:
        spec = self.spec(self.study.reward_models[name]["base"], reward_from="classifier")
        return dict(model=spec, seed=self.config["seed"], **self._scoring())

    @settings
    def score_baseline(self, wildcards) -> dict:
        """A published reward model that scores the test pairs."""
        return dict(model=self.spec(wildcards.baseline), seed=self.config["seed"], **self._scoring())

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
        return self._evaluation(wildcards.reward_model, benchmark=True)

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
    def score_checkpoints(self, wildcards) -> dict:
        """How dev pairs are scored."""
        return dict(model=self.spec(self.study.policies[wildcards.policy]["base"]), **self._scoring())

    @settings
    def select_checkpoint(self, wildcards) -> dict:
        """Nothing."""
        return {}

    @settings
    def remove_checkpoints(self, wildcards) -> dict:
        """Whether this is the last round, from which a further one would go on."""
        entry = self.study.policies[wildcards.policy]
        return {"keep_last": entry["method"] == "dpo_iter" and int(wildcards.iteration) == entry["iterations"]}

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
        """A checkpoint of a policy, or a base, in the free setting."""
        model = self.spec(self.flow.checkpoint_base(wildcards), name=checkpoint_name(wildcards.policy, wildcards.checkpoint))
        return self._generation(model, self.config["responses"]["prompt"])

    @settings
    def assess_checkpoint(self, wildcards) -> dict:
        """A checkpoint's base, the reward model that it is assessed by, and the intervals."""
        entry = self.study.policies[wildcards.policy]
        reward_base = self.study.reward_models[entry["reward_model"]]["base"]
        number = int(wildcards.checkpoint)
        return dict(
            policy=wildcards.policy,
            checkpoint=number,
            name=checkpoint_name(self.flow.answering(wildcards.policy, number), number),
            model=self.spec(entry["base"]),
            reward_model=self.spec(reward_base, name=entry["reward_model"]),
            prompt=self.study.prompt(self.config["responses"]["prompt"]),
            bootstrap=self.config["evaluation"]["bootstrap"],
            seed=self.config["seed"],
            **self._scoring(),
        )

    def _judgement(self, policy: str, setting: str, judge: str = "judge") -> dict:
        evaluation = self.config["evaluation"]
        return dict(
            model=self.spec(evaluation[judge]),
            prompt=self.study.prompt(evaluation["prompt" if evaluation["protocol"] == "together" else "one_by_one_prompt"]),
            principles=self.rated_principles(),
            protocol=evaluation["protocol"],
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
    def judge_again(self, wildcards) -> dict:
        """The second judge of the same answers."""
        return self._judgement(wildcards.policy, wildcards.setting, "second_judge")

    @settings
    def judge_checkpoint(self, wildcards) -> dict:
        """The judge of a checkpoint's answers, in the free setting."""
        return self._judgement(checkpoint_name(wildcards.policy, wildcards.checkpoint), "free")

    @settings
    def parse_judgements(self, wildcards) -> dict:
        """The principles that a comparison has a verdict on where they are judged one by one."""
        return {"principles": self.principle_ids()}

    @settings
    def parse_checkpoint(self, wildcards) -> dict:
        """The same."""
        return {"principles": self.principle_ids()}

    @settings
    def parse_judged_again(self, wildcards) -> dict:
        """The same."""
        return {"principles": self.principle_ids()}

    def _win_rates(self, policy: str, setting: str) -> dict:
        return dict(policy=policy, setting=setting, bootstrap=self.config["evaluation"]["bootstrap"], seed=self.config["seed"])

    @settings
    def compute_win_rates(self, wildcards) -> dict:
        """Intervals of a policy's win rates."""
        return self._win_rates(wildcards.policy, wildcards.setting)

    @settings
    def compute_win_rates_again(self, wildcards) -> dict:
        """Intervals of a policy's win rates under the second judge."""
        return self._win_rates(wildcards.policy, wildcards.setting)

    @settings
    def sample_judged_again(self, wildcards) -> dict:
        """Which test speeches the second judge sees: the same share of each coarse topic."""
        count = self.config["evaluation"]["second_judge_speeches"]
        return dict(split="test", speeches=count, stratified=True, iteration=0, seed=self.config["seed"])

    @settings
    def compare_judges(self, wildcards) -> dict:
        """Intervals of the judges' agreement."""
        return dict(bootstrap=self.config["evaluation"]["bootstrap"], seed=self.config["seed"])

    @settings
    def compare_policies(self, wildcards) -> dict:
        """Which policies are compared, and the intervals of their differences."""
        return dict(contrasts=self.flow.contrasts(), bootstrap=self.config["evaluation"]["bootstrap"], seed=self.config["seed"])

    @settings
    def compute_checkpoint_win_rate(self, wildcards) -> dict:
        """Intervals of a checkpoint's win rates."""
        return self._win_rates(checkpoint_name(wildcards.policy, wildcards.checkpoint), "free")


def checkpoint_name(answering: str, number: int | str) -> str:
    """Return the name of a checkpoint of a policy, or of a base as checkpoint 0, in its answers and judgements."""
    return f"{answering}.checkpoint-{number}"
