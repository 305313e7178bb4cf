# From client speeches to the tables of reward models and policies. Loads and validates the config, includes the rules
# in the order of the pipeline and names the targets; nothing else.


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/models.smk"
include: "rules/sources.smk"
include: "rules/speeches.smk"
include: "rules/responses.smk"
include: "rules/ratings.smk"
include: "rules/pairs.smk"
include: "rules/reward_models.smk"
include: "rules/policies.smk"
include: "rules/evaluation.smk"
include: "rules/report.smk"
include: "rules/site.smk"


rule all:
    default_target: True
    input:
        flow.results("report.html"),
        flow.results("summary.txt"),
    localrule: True


rule dataset:
    input:
        expand(flow.results("05_pairs/{split}.jsonl"), split=["train", "dev", "test"]),
    localrule: True
