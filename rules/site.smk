# What the site decides about Slurm jobs, applied to all rules above, and the driver's lock; no rule. Only profiles/slurm sets
# `slurm`, a default resource that Snakemake hands on to the jobs that it starts: local runs are left as they are.

from psychocounsel import site

has_site = "slurm" in (workflow.resource_settings.default_resources or {})

try:
    if workflow.is_main_process:
        site.check_trainings(workflow, flow.study, has_site)
    at_site = site.load_site(site.site_file()) if has_site else None
except UserError as error:
    raise WorkflowError(str(error)) from None

if has_site:
    site.apply(workflow, at_site)
    if workflow.remote_exec:  # in the jobs, not in the driver
        shell.prefix(site.before_each_job(at_site).replace("{", "{{").replace("}", "}}"))


onstart:  # of the driver alone, whatever the profile, and not of a dry run
    if unpinned and not config["allow_unpinned"]:
        raise WorkflowError(f"names of this run are not pinned: the {len(unpinned)} that are listed above, with what to do")
    if workflow.executor_plugin.name == "slurm" and not has_site:
        raise WorkflowError("--default-resources replaces those of profiles/slurm: add slurm=1 to it, or no site file is applied")
    try:
        workflow.globals["driver_lock"] = site.hold_driver_lock()  # a local name would let go of it
    except UserError as error:
        raise WorkflowError(str(error)) from None
