# Helpers of all rules; no rule. The study is checked here, before the DAG.

import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))

from psychocounsel.config import about_unpinned, load_study
from psychocounsel.errors import UserError
from psychocounsel.presentation import Presentation
from psychocounsel.site import launcher, requested_gpus
from psychocounsel.slices import Slices
from psychocounsel.workflow import Workflow as StudyWorkflow  # these names live in Snakemake's own module, which has a Workflow
from psychocounsel.workflow import SECOND_JUDGE, code

# Snakemake lists the files of the command line before the one that they override; the later of ours wins.
overriding = workflow.overwrite_configfiles
config_files = [*(f for f in workflow.configfiles if f not in overriding), *overriding]

try:
    flow = StudyWorkflow(load_study(config, [Path(f) for f in config_files]))
except UserError as error:
    raise WorkflowError(str(error)) from None
slices = Slices(flow)
pages = Presentation(flow)

# Names that may stand for something else tomorrow. Whether this is a dry run is not known yet: site.smk refuses to start jobs.
unpinned = flow.unpinned()
if unpinned and workflow.is_main_process:
    print(about_unpinned(unpinned, config), file=sys.stderr)


wildcard_constraints:
    weights="|".join(flow.embedded_weights),
    source="|".join(flow.study.sources),
    model="|".join(flow.pool),
    reward_model="|".join(flow.reward_models) or "none",
    baseline="|".join(flow.baselines) or "none",
    scorer="|".join([*flow.reward_models, *flow.baselines]) or "none",
    ranker="|".join(flow.rankers) or "none",
    policy="|".join([*flow.study.policies, *flow.starts()]) or "none",
    setting="free|length",
    order="same|reversed",
    iteration=r"\d+",
    checkpoint=r"\d+",
    split="train|dev|test",


# Params from functions that take `input` or `output` are not recorded by Snakemake. For what follows from the files that is
# right, since the files themselves count; for what a site decides it is the point: a change there reruns nothing.


def endpoints_file(wildcards, input):
    """The site's facts about endpoints."""
    return flow.endpoints


def money_options(wildcards, input):
    """The registries of models with their list prices, the ledger of the run, and its budget if it has one."""
    return flow.money_options


def cache_option(wildcards, output):
    """--cache with the site's folder of raw files."""
    return flow.cache_option


def output_folder(wildcards, output):
    """The folder of a rule that writes several files."""
    return Path(output[0]).parent


def costs_folder(wildcards, output):
    """The folder of the table of costs, beside the other tables."""
    return Path(output.csv).parent


def checkpoints_folder(wildcards, output):
    """The folder of a training's checkpoints, beside the list that stands for them."""
    return Path(output.checkpoints).with_suffix("")


def weights_option(wildcards, input):
    """--weights for a model with local weights; a model of the Hub or behind an API has none."""
    return f"--weights {input.weights}" if input.weights else ""


def gpus_option(wildcards, input, resources):
    """--gpus for a model that the job serves on the GPUs that it is given, however the site asks for them."""
    gpus = requested_gpus(resources)
    return f"--gpus {gpus}" if gpus else ""


def chance_option(wildcards, input):
    """--stop-at-chance where the config says so: a guard, on which no result depends."""
    return "--stop-at-chance" if config["reward_evaluation"]["stop_at_chance"] else ""


def training_launcher(wildcards, input, resources, threads):
    """What stands in front of a training program on the GPUs and nodes that the job is given."""
    return launcher(requested_gpus(resources), resources.get("nodes") or 1, threads)


def recorded_option(wildcards, input):
    """--recorded for a pool model whose answers the user has in a file."""
    return f"--recorded {input.recorded}" if input.recorded else ""


def again_option(wildcards, input):
    """--again with the ratings of each order in which a sample was rated again; nothing where it was not."""
    return " ".join(f"--again {Path(file).stem}={file}" for file in input.again)
