"""What tables, figures, cards and the report are told beyond the run's own files: titles, order, licences, the paper's rows."""

import orjson

from psychocounsel.policy_tables import PAPERS
from psychocounsel.slices import Slices, Wildcards, settings
from psychocounsel.table_settings import Ratings
from psychocounsel.tables import FORMATS
from psychocounsel.workflow import OURS, Workflow, option

CODE_VERSION = 1  # only rules use it; what it hands to programs stands in their settings

PERSONAL_DATA = {
    "mask": "e-mail addresses, telephone numbers of people and web addresses in the speeches are masked; names are not looked for",
    "keep": "the speeches stand as their sources have them",
    "drop": "speeches with e-mail addresses, telephone numbers of people or web addresses are left out; names are not looked for",
}
PROTOCOLS = {"one_by_one": "one call a principle", "together": "all principles in one call (not the paper's protocol)"}
ASKED = ("id", "revision", "instruction", "system_role", "chat_template_kwargs")  # how a model is spoken to: parts of its ModelSpec
JUDGED = {"together": "all principles in one call", "one_by_one": "the verdict of most principles"}


class Presentation:
    """Settings and inputs of the rules in report.smk."""

    def __init__(self, flow: Workflow) -> None:
        self.flow, self.study, self.config = flow, flow.study, flow.config
        self.judge = self.title(self.config["ratings"]["judge"])
        self.labels = f"made by {self.judge} ({PROTOCOLS[self.config['ratings']['protocol']]}), not by people"
        if flow.starts_at_pairs:
            self.labels = f"published with {' and '.join(map(self.title, flow.sources))}; this run judged no response of its data set"
        one_by_one = self.config["evaluation"]["protocol"] == "one_by_one"
        judges = [self.title(name) + ", one principle at a time" * one_by_one for name in flow.judges_of_answers]
        self.judge_of_answers, self.second_judge = judges[0], judges[1] if len(judges) > 1 else None
        self.opponent = self.title(self.config["evaluation"]["opponent"])

    def title(self, name: str) -> str:
        """Return how a model, policy or source is printed."""
        for registry in (self.study.reward_models, self.study.policies, self.study.models, self.study.sources):
            if "title" in registry.get(name, {}):
                return registry[name]["title"]
        return "PsychoCounsel-Preference (this run)" if name == OURS else name

    def titles(self, names: list[str]) -> dict[str, str]:
        """Return the titles of several."""
        return {name: self.title(name) for name in names}

    def data(self, reward_model: str) -> str:
        """Return what a reward model was trained on, in words."""
        return " + ".join(self.title(name) for name in self.study.reward_models[reward_model]["data"])

    def reported(self, kind: str, names: list[str]) -> dict[str, str]:
        """Return the paper's row for each of our names that reproduces one."""
        rows = self.config["report"]["reported"][kind]
        return {name: rows[name] for name in names if name in rows}

    def reported_win_rates(self) -> dict[str, dict[str, float]]:
        """Return by setting the overall win rate that the paper reports of each policy that reproduces one of its rows."""
        rates, rows = self.study.paper["win_rates"], self.reported("policies", self.flow.policies)
        place = rates["columns"].index("overall")
        return {
            setting: {policy: rates[key][row][place] for policy, row in rows.items() if row in rates[key]}
            for setting, key in PAPERS.items()
        }

    def size_classes(self) -> list[dict]:
        """Return the pool by size class, in its order."""
        groups: dict[str, list[str]] = {}
        for model in self.flow.pool:
            groups.setdefault(self.study.models[model]["group"], []).append(model)
        return [{"title": group, "models": models} for group, models in groups.items()]

    def languages(self) -> dict[str, str]:
        """Return the main language of the institution of each model of the pool."""
        return {model: self.study.models[model]["language"] for model in self.flow.pool}

    def ratings(self) -> dict:
        """Return who scored the responses, and how."""
        judge = self.study.models[self.config["ratings"]["judge"]]
        return {
            "judge": None if self.flow.starts_at_pairs else self.judge,
            "protocol": self.config["ratings"]["protocol"],
            "offline": self.study.endpoints[judge["endpoint"]]["kind"] == "local",
            "principles": [(p["id"], p["name"]) for p in self.study.principles],
        }

    def ranked_by(self) -> dict[str, str]:
        """Return the reward model on whose rewards each policy is trained."""
        return {name: self.study.policies[name]["reward_model"] for name in self.flow.iterative_policies}

    @settings
    def make_tables(self, wildcards) -> dict:
        """Order, groups and titles of the tables' rows."""
        flow = self.flow
        ablation = self.config["reward_evaluation"]["ablation"]
        ours = [name for name in flow.reward_models if name not in ablation]
        rewards = [("Published reward models", flow.baselines), ("Prompted rankers", flow.rankers), ("Reward models of this run", ours)]
        data = [OURS, *flow.sources, *flow.general_preferences]
        policies = dict.fromkeys([*flow.policies, *self.config["evaluation"]["checkpoints"]])
        names = [*data, *flow.pool, *flow.baselines, *flow.rankers, *flow.reward_models, *policies]
        return dict(
            titles=self.titles(names),
            pool=self.size_classes(),
            languages=self.languages(),
            reward_models=[{"title": title, "models": models} for title, models in rewards if models],
            ablation=[
                {"model": name, "base": self.title(self.study.reward_models[name]["base"]), "data": self.data(name)} for name in ablation
            ],
            policies=flow.policies,
            monitored=self.config["evaluation"]["checkpoints"],
            ranked_by=self.ranked_by(),
            opponent=self.opponent,
            judge=self.judge_of_answers,
            second_judge=self.second_judge,
            judged_again_by=flow.judges_of_answers[1] if self.second_judge else None,
            ratings=self.ratings(),
            note=self.config["note"],
            starts_at_pairs=flow.starts_at_pairs,
            bootstrap=self.config["evaluation"]["bootstrap"],
            seed=self.config["seed"],
            reported={
                "reward_models": self.reported("reward_models", [*flow.baselines, *flow.rankers, *ours]),
                "ablation": self.reported("ablation", ablation),
                "policies": self.reported("policies", flow.policies),
            },
        )

    def tables(self) -> list[str]:
        """The tables of make_tables.py that this study has."""
        names = ["dataset", "topics", "pool", "model_groups", "pairs", "judge_consistency", "judge_positions", "contamination"]
        names += ["reward_models", "reward_ablation", "win_rates", "lengths"]
        names += ["win_rate_differences"] if self.flow.differences() else []
        names += ["win_rate_principles"] if self.flow.policies and self.config["evaluation"]["protocol"] == "one_by_one" else []
        names += ["judge_agreement", "win_rates_again"] if self.second_judge else []
        return names + (["monitor"] if self.flow.assessments() else [])

    def table_options(self) -> str:
        """The optional inputs of make_tables as command-line options."""
        options = {"--differences": self.flow.differences(), "--agreement": self.flow.agreement_of_judges()}
        options |= {"--assessments": self.flow.assessments()}
        return " ".join(option(flag, files) for flag, files in options.items() if files)

    def figures(self) -> list[str]:
        """The figures that this study has."""
        names = ["dataset", "pairs", "chosen_models", "rejected_models", "model_groups"]
        names += ["judge_positions"] if self.flow.judge_assessment() else []
        names += ["win_rates", "win_rate_topics"] if self.flow.policies else []
        names += ["training_reward_models"] if self.reward_logs() else []
        names += ["training_policies"] if self.policy_logs() else []
        names += ["monitor"] if self.flow.assessments() else []
        return names + (["checkpoints"] if self.config["evaluation"]["ablation"] else [])

    @settings
    def plot_figures(self, wildcards) -> dict:
        """Titles and order of the figures' series."""
        flow = self.flow
        return dict(
            titles=self.titles([*flow.pool, *flow.reward_models, *flow.study.policies]) | dict(self.ratings()["principles"]),
            pool=self.size_classes(),
            languages=self.languages(),
            policies=flow.policies,
            opponent=self.opponent,
            judge=self.judge_of_answers,
            scored_by=Ratings(**self.ratings()).note(),
            reported=self.reported_win_rates(),
            monitored=self.config["evaluation"]["checkpoints"],
            ablation=self.config["evaluation"]["ablation"],
            note=self.config["note"],
            starts_at_pairs=flow.starts_at_pairs,
            bootstrap=self.config["evaluation"]["bootstrap"],
            seed=self.config["seed"],
        )

    def reward_logs(self) -> list[str]:
        """The training logs of the reward models."""
        return [self.flow.results(f"06_reward_models/{name}/training.json") for name in self.flow.reward_models]

    def policy_logs(self) -> list[str]:
        """The training logs of the policies, round by round."""
        return [log for policy in self.flow.trained_policies for log in self._rounds(policy)]

    def _rounds(self, policy: str) -> list[str]:
        iterations = self.study.policies[policy].get("iterations", 1)
        return [self.flow.results(f"07_policies/{policy}/iteration-{i}/training.json") for i in range(1, iterations + 1)]

    def figure_options(self) -> str:
        """The optional inputs of plot_figures as command-line options."""
        rewards = [f"{name}={log}" for name, log in zip(self.flow.reward_models, self.reward_logs(), strict=True)]
        policies = [f"{policy}={log}" for policy in self.flow.trained_policies for log in self._rounds(policy)]
        options = {
            "--checkpoint-win-rates": self.flow.checkpoint_win_rates(),
            "--assessments": self.flow.assessments(),
            "--reward-logs": rewards,
            "--policy-logs": policies,
        }
        return " ".join(f"{flag} {' '.join(values)}" for flag, values in options.items() if values)

    def carded_models(self) -> list[str]:
        """The models that get a card: all that the run trained."""
        return [*self.flow.reward_models, *self.flow.trained_policies]

    def card_models(self) -> dict[str, str]:
        """The manifest of each model that gets a card."""
        flow = self.flow
        return {name: flow.reward_model(name) for name in flow.reward_models} | {name: flow.policy(name) for name in flow.trained_policies}

    def card_trainings(self) -> list[tuple[str, str]]:
        """Each policy that gets a card with its lists of checkpoints, round by round."""
        return [(name, file) for name in self.flow.trained_policies for file in self.flow.rounds(Wildcards(policy=name))]

    def card_options(self) -> str:
        """The models of the cards, and their trainings, as command-line options."""
        models = [f"{name}={manifest}" for name, manifest in self.card_models().items()]
        trainings = [f"{name}={file}" for name, file in self.card_trainings()]
        return f"{option('--models', models)} {option('--trainings', trainings)}".strip()

    def labels_of(self, data: list[str]) -> str:
        """How the preference labels of the named data came about."""
        others = " and ".join(self.title(name) for name in data if name != OURS)
        return ", or ".join([*([self.labels] if OURS in data else []), *([f"published with {others}"] if others else [])])

    def licences(self, data: list[str]) -> list[tuple[str, str]]:
        """The title and licence of what the named data hold; of this run's pairs: their speeches, and the terms of who answered."""
        found = []
        for name in data:
            sources = self.flow.sources if name == OURS else [name]
            found += [(self.title(source), self.study.sources[source]["licence"]) for source in sources]
            if name == OURS and not self.flow.starts_at_pairs:
                terms = dict.fromkeys(self.study.models[model]["licence"] for model in self.flow.pool)
                found.append(("Responses, by the models that gave them", ", ".join(terms)))
        return list(dict.fromkeys(found))

    def hub_datasets(self, data: list[str]) -> list[str]:
        """The data sets of the Hub among the named data."""
        sources = [source for name in data for source in (self.flow.sources if name == OURS else [name])]
        hubs = [self.study.sources[source].get("hub") for source in sources]
        return list(dict.fromkeys(hub["repository"] for hub in hubs if hub))

    @settings
    def write_cards(self, wildcards) -> dict:
        """Licences, bases and recipes for the cards."""
        config = self.config

        def model(name: str, entry: dict, kind: str, method: str, data: str, learnt_from: list[str], **more) -> dict:
            base = self.study.models[entry["base"]]
            return {
                "name": name, "title": self.title(name), "kind": kind, "base": base["title"],
                "chat": {"name": entry["base"]} | {fact: base[fact] for fact in ASKED if fact in base},
                "licence": base["licence"], "method": method, "labels": self.labels_of(learnt_from), "data": data,
                "recipe": self.study.recipe(entry["recipe"]),
                "data_licences": self.licences(learnt_from), "datasets": self.hub_datasets(learnt_from),
                "ranked_by": self.ranked_by().get(name), **more,
            }  # fmt: skip

        def policy(name: str) -> dict:
            entry = self.study.policies[name]
            if entry["method"] == "dpo":
                return model(name, entry, "policy", "DPO", self.title(OURS), [OURS])
            ranker, samples = entry["reward_model"], f"{entry['samples_per_speech']} own samples per training speech"
            keys = ("iterations", "speeches_per_iteration", "samples_per_speech", "start", "reference")
            learnt_from = list(dict.fromkeys([OURS, *self.study.reward_models[ranker]["data"]]))
            return model(
                name, entry, "policy", "iterative DPO", f"{samples}, ranked by {self.title(ranker)}",
                learnt_from, rounds={key: entry[key] for key in keys},
            )  # fmt: skip

        rewards = self.study.reward_models.items()
        return dict(
            run=config["run"],
            judge_of_answers=self.judge_of_answers,
            opponent=self.opponent,
            prompt=self.study.prompt(config["responses"]["prompt"]),
            models=[
                model(name, entry, "reward_model", "Bradley-Terry reward model", self.data(name), entry["data"]) for name, entry in rewards
            ]
            + [policy(name) for name in self.flow.trained_policies],
            note=config["note"],
        )

    @settings
    def write_release(self, wildcards) -> dict:
        """Which sources' texts may be passed on, the terms of the models that answered, and what the card tells."""
        rights, sources = self.config["release"]["rights"], self.study.sources

        def source(name: str) -> dict:
            entry = sources[name]
            terms = entry.get("redistribution") or {"allowed": False, "reason": "sources.yaml does not say that a release may hold it"}
            return (
                {"name": name, "address": entry.get("address"), "right": name in rights}
                | terms
                | {k: entry[k] for k in ("title", "licence")}
            )

        def answerer(name: str) -> dict:
            entry = self.study.models[name]
            recorded = entry.get("recorded") and source(entry["recorded"]["source"])
            withheld = recorded["reason"] if recorded and not (recorded["allowed"] or recorded["right"]) else None
            return {"name": name, "withheld": withheld} | {key: entry[key] for key in ("title", "id", "licence")}

        return dict(
            title=f"PsychoCounsel-Preference ({self.config['run']})",
            labels=self.labels,
            judge=None if self.flow.starts_at_pairs else self.config["ratings"]["judge"],
            starts_at_pairs=self.flow.starts_at_pairs,
            principles=[(p["id"], p["name"]) for p in self.study.principles],  # a list keeps its order in the settings' JSON
            sources=[source(name) for name in self.flow.sources],
            models=[answerer(name) for name in self.flow.pool],
            min_gap=self.config["pairs"]["min_gap"],
            personal_data=self.personal_data,
            note=self.config["note"],
        )

    @property
    def personal_data(self) -> str:
        """What was done about personal data in the speeches, in words."""
        return PERSONAL_DATA[self.config["speeches"]["personal_data"]]

    def case_policy(self) -> str | None:
        """The policy whose answers are shown as case studies: the last of the win-rate table, the paper's best."""
        return self.flow.policies[-1] if self.flow.policies else None

    def case_tables(self) -> list[str]:
        """The case studies in every format; none of a run without policies."""
        return [self.flow.results(f"10_tables/case_studies.{ending}") for ending in FORMATS if self.case_policy()]

    def case_files(self, folder: str) -> list[str]:
        """The judgements, or the answers, of the case studies' policy in both settings."""
        policy = self.case_policy()
        return [self.flow.results(f"{folder}/{policy}/{setting}.jsonl") for setting in ("free", "length") if policy]

    @settings
    def choose_cases(self, wildcards) -> dict:
        """Whose answers are shown, and what may be quoted."""
        sources = self.flow.sources
        return dict(
            policy=self.title(self.case_policy()),
            opponent=self.opponent,
            judge=self.judge_of_answers,
            quotable=[name for name in sources if self.study.sources[name]["quotable"]],
            crisis_topics=self.config["report"]["crisis_topics"],
            titles=self.titles(sources),
            note=self.config["note"],
        )

    def asked_models(self) -> list[str]:
        """Return all that may be asked: models and policies."""
        config = self.config
        judges = [config["topics"]["judge"], config["ratings"]["judge"], *self.flow.judges_of_answers, config["evaluation"]["opponent"]]
        return [*self.flow.pool, *judges, *self.flow.rankers, *self.study.policies, *self.flow.starts()]

    @settings
    def write_report(self, wildcards) -> dict:
        """The choices worth knowing."""
        config = self.config
        near = config["speeches"]["near_duplicates"]
        made = [
            ("Sources", ", ".join(self.title(name) for name in self.flow.sources)),
            ("Speeches", f"{config['speeches']['min_chars']} to {config['speeches']['max_chars']} characters, "
                         f"near duplicates above {near['drop_above']} dropped, above {near['cluster_above']} on one side of the split"),
            ("Personal data", self.personal_data),
            ("Responses", f"{config['responses']['models_per_speech']} models of a pool of {len(self.flow.pool)} per speech"),
            ("Judge of the responses", f"{self.judge}, seven principles, 1 to 5, {PROTOCOLS[config['ratings']['protocol']]}"),
            ("Pairs", f"gap of the mean scores of at least {config['pairs']['min_gap']}"),
        ]  # fmt: skip
        kept = "on one side of the split" if config["pairs"]["drop_near_test"] else "left where they are"
        titles = ", ".join(self.title(name) for name in self.flow.sources)
        given = [
            ("Pairs", f"as published: {titles}; near duplicates above {near['cluster_above']} {kept}; responses in no pair are not known")
        ]
        summary = [
            *(given if self.flow.starts_at_pairs else made),
            ("Opponent", self.opponent),
            ("Judge of the answers", f"{self.judge_of_answers}, {JUDGED[config['evaluation']['protocol']]}, both orders, no tie offered"),
            ("Seed", str(config["seed"])),
        ]  # fmt: skip
        if self.second_judge:
            sample = config["evaluation"]["second_judge_speeches"]
            seen = "all test speeches" if sample is None else f"{sample:,} test speeches, stratified by coarse topic"
            summary.append(("Second judge of the answers", f"{self.second_judge}, {seen}"))
        if unpinned := self.flow.unpinned():
            summary.append(("Not pinned", f"{', '.join(unpinned)}: what these stood for on the day is not known"))
        return dict(
            title=config["title"],
            labels=self.labels,
            judge_of_answers=self.judge_of_answers,
            opponent=self.opponent,
            summary=summary,
            note=config["note"],
            titles=self.titles(self.asked_models()),
        )

    @settings
    def summarise_run(self, wildcards) -> dict:
        """Titles, and where the run's files lie."""
        flow = self.flow
        cards = {"cards": "12_cards/"} if self.carded_models() else {}
        places = {"report": "report.html", "tables": "10_tables/", "figures": "11_figures/", **cards, "release": "13_release/"}
        return dict(
            title=self.config["title"],
            note=self.config["note"],
            titles=self.titles([*flow.reward_models, *flow.baselines, *flow.rankers, *flow.policies]),
            ranked_by=self.ranked_by(),
            opponent=self.opponent,
            judge=self.judge_of_answers,
            places={what: flow.results(where) for what, where in places.items()},
        )


def current_settings(flow: Workflow, job: dict) -> dict | None:
    """Return the settings that the config gives to a job, {"rule", "wildcards"}, now; None where it has no such job."""
    owner = next((owner for owner in (Slices(flow), Presentation(flow)) if hasattr(owner, job["rule"])), None)
    try:
        settings_now = orjson.loads(getattr(owner, job["rule"])(Wildcards(job["wildcards"]))) if owner else None
    except KeyError:  # a wildcard names a model, policy or source that is gone
        return None
    return settings_now and {name: value for name, value in settings_now.items() if name != "job"}
