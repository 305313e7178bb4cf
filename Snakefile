# From client speeches to the tables of reward models and policies. Loads and validates the config, includes the rules
# in the order of the pipeline and names the targets; nothing else.


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/models.smk"
include: "rules/sources.smk"


if flow.starts_at_pairs:

    include: "rules/given_pairs.smk"

else:

    include: "rules/selection.smk"
    include: "rules/responses.smk"
    include: "rules/ratings.smk"
    include: "rules/pairs.smk"


include: "rules/speeches.smk"
include: "rules/contamination.smk"
include: "rules/reward_models.smk"
include: "rules/policies.smk"
include: "rules/evaluation.smk"
include: "rules/release.smk"
include: "rules/report.smk"
include: "rules/site.smk"


rule all:
    default_target: True
    input:
        flow.pairs(),
        rules.write_release.output,
        [flow.reward_model(name) for name in flow.reward_models],
        [flow.policy(name) for name in flow.trained_policies],
        flow.removals(),
        rules.make_tables.output,
        rules.plot_figures.output,
        rules.write_cards.output,
        pages.case_tables(),
        rules.write_report.output,
        rules.summarise_run.output,
    localrule: True


rule dataset:
    input:
        flow.pairs(),
        rules.write_release.output,
    localrule: True
