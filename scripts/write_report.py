"""Write one self-contained HTML report of a run: tables with the case studies, figures, how it was made, how to read it.

Rows in, out and dropped, times, tokens, dollars and commits come from the provenance records below --run-dir; the table of
costs, which is written beside, is made of them alone.
"""

import base64
from collections import Counter, defaultdict
from pathlib import Path

import orjson
from pydantic import Field

from psychocounsel.costs import cost_table
from psychocounsel.errors import UserError
from psychocounsel.stage import Settings, command_line, stage
from psychocounsel.tables import FORMATS
from psychocounsel.templates import REPORT, load_template, template_paths

SECTIONS = [  # heading, tables, figures; what a run does not have is left out
    (
        "The data set",
        ["dataset", "topics", "pairs", "pool", "model_groups", "judge_consistency", "judge_positions", "contamination"],
        ["dataset", "pairs", "chosen_models", "rejected_models", "model_groups", "judge_positions"],
    ),
    ("Reward models", ["reward_models", "reward_ablation"], ["training_reward_models"]),
    (
        "Policies",
        ["win_rates", "win_rate_differences", "win_rate_principles", "judge_agreement", "win_rates_again", "lengths", "monitor"],
        ["win_rates", "win_rate_topics", "training_policies", "checkpoints", "monitor"],
    ),
    ("Case studies", ["case_studies"], []),
    ("What it cost", ["costs"], []),
]


class ReportSettings(Settings):
    """What the run's files do not say."""

    title: str = Field(description="heading")
    labels: str = Field(description='how the preference labels came about: "made by …"')
    judge_of_answers: str = Field(description="title of the judge of the win rates")
    opponent: str = Field(description="title of the opponent")
    summary: list[tuple[str, str]] = Field([], description="[[label, value], …]: the choices of the config worth knowing, in their order")
    titles: dict[str, str] = Field({}, description="name of a model or policy -> its title, for the table of costs")
    note: str | None = Field(None, description="a sentence at the head, e.g. what a demonstration's numbers do not mean")


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ReportSettings)
    parser.add_argument("--tables", nargs="*", default=[], help="<table>.html of make_tables.py")
    parser.add_argument("--figures", nargs="*", default=[], help="<figure>.svg of plot_figures.py")
    parser.add_argument("--run-dir", required=True, help="folder of the run's results: its provenance records are read")
    parser.add_argument("--out-dir", help="folder for the table of costs: costs.csv, .md, .tex and .html")
    parser.add_argument("--out", required=True, help="report, as HTML")
    with stage(parser) as run:
        args, settings = run.args, run.settings
        captions = REPORT.glob("*.rst")
        for file in [*template_paths("report.html", "ethics.md"), *sorted(captions)]:
            run.uses(file)
        tables = {Path(file).stem: run.uses(file).read_text(encoding="utf-8") for file in args.tables}
        figures = {Path(file).stem: base64.b64encode(run.uses(file).read_bytes()).decode() for file in args.figures}
        # Provenance records are read but are no inputs: they hold times and hosts, and the tables' own records chain them.
        records = read_provenance(Path(args.run_dir), besides=run.program)
        costs = cost_table(records, settings.titles)
        if args.out_dir:
            for ending, render in FORMATS.items():
                run.write_text(Path(args.out_dir) / f"costs.{ending}", render(costs))
        tables |= {costs.name: FORMATS["html"](costs)} if costs.groups else {}
        check_known(tables, figures)
        html = load_template("report.html").render(
            settings=settings,
            sections=sections(tables, figures),
            stages=stage_rows(records),
            made=environment(records),
            ethics=[line.removeprefix("- ") for line in load_template("ethics.md").render().splitlines() if line],
        )
        run.write_text(args.out, html + "\n")
        run.account("tables and figures", rows_in=len(tables) + len(figures), rows_out=len(tables) + len(figures))


def check_known(tables: dict, figures: dict) -> None:
    """Raise UserError for a table or figure that no section shows."""
    known = [{name for section in SECTIONS for name in section[i]} for i in (1, 2)]
    if strangers := sorted((tables.keys() - known[0]) | (figures.keys() - known[1])):
        raise UserError(f"{strangers[0]}: no section of the report shows it")


def sections(tables: dict[str, str], figures: dict[str, str]) -> list[dict]:
    """Return the sections that have something to show, tables and figures with their captions (report/table_*.rst, report/figure_*.rst)."""
    found = []
    for heading, table_names, figure_names in SECTIONS:
        shown = [{"name": name, "svg": figures[name], "caption": caption(f"figure_{name}")} for name in figure_names if name in figures]
        section = {
            "heading": heading,
            "tables": [(caption(f"table_{name}"), tables[name]) for name in table_names if name in tables],
            "figures": shown,
        }
        if section["tables"] or section["figures"]:
            found.append(section)
    return found


def caption(name: str) -> str:
    """Return a caption as one paragraph: the file that Snakemake's report shows too."""
    return " ".join((REPORT / f"{name}.rst").read_text(encoding="utf-8").split())


# How the run was made


def read_provenance(folder: Path, besides: str) -> list[dict]:
    """Read the provenance records below a folder whose outputs still exist, one for each job (a job may have several outputs).

    Those of one program, the reader itself, are left out: they tell of an earlier report.
    """
    jobs: dict[tuple, dict] = {}
    for path in sorted(folder.rglob("*.prov.json")):
        output = path.with_name(path.name.removesuffix(".prov.json"))
        record = orjson.loads(path.read_bytes())
        if output.exists() and record["identity"]["program"] != besides:
            jobs.setdefault((record["identity_sha256"], record["run"]["started"]), record)
    if not jobs:
        raise UserError(f"{folder}: no provenance records (*.prov.json) below it; is it the results folder of a run?")
    return sorted(jobs.values(), key=lambda record: (record["run"]["started"], record["identity"]["program"]))


def stage_rows(records: list[dict]) -> list[dict]:
    """Sum up each program's jobs in the order of their first start: rows by unit, drops by reason, time, tokens."""
    stages: dict[str, dict] = {}
    for record in records:
        stage = stages.setdefault(
            record["identity"]["program"],
            {"jobs": 0, "seconds": 0.0, "units": defaultdict(Counter), "dropped": defaultdict(Counter), "api": Counter()},
        )
        stage["jobs"] += 1
        stage["seconds"] += record["run"]["seconds"]
        stage["api"].update({key: count for key, count in record["run"]["facts"].get("api", {}).items() if isinstance(count, int)})
        for unit, rows in record["rows"].items():
            stage["units"][unit].update({"in": rows["in"], "out": rows["out"]})
            stage["dropped"][unit].update(rows["dropped"])
    return [{"program": program, **stage} for program, stage in stages.items()]


def environment(records: list[dict]) -> list[tuple[str, str]]:
    """Facts of the jobs that made the run: each distinct value once, so that a run made in pieces shows it."""
    runs = [record["run"] for record in records]
    commits = {
        run["git"]["commit"][:12] + (" with uncommitted changes" if run["git"]["dirty"] else "") for run in runs if run["git"]["commit"]
    }
    packages = {f"{name} {version}" for run in runs for name, version in run["packages"].items()}
    seeds = {str(record["identity"]["settings"]["seed"]) for record in records if "seed" in record["identity"]["settings"]}
    facts = [
        ("Git commit", commits or {"not made from a git checkout"}),
        ("Seed", seeds),
        ("First job started", {min(run["started"] for run in runs)}),
        ("Last job started", {max(run["started"] for run in runs)}),
        ("Machine", {" ".join([run["host"]["system"], run["host"]["machine"], *run["host"]["gpus"]]) for run in runs}),
        ("Python", {run["python"] for run in runs}),
        ("Packages", packages),
    ]
    return [(label, ", ".join(sorted(values))) for label, values in facts if values]


if __name__ == "__main__":
    main()
