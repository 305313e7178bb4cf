"""From a table's cell down to what it was computed from: results, judgements or predictions, pairs, answers, speeches, raw rows.

The way down is that of the provenance records: a file's inputs are those that its record names. On the way the cell is computed
again, from the table's inputs by the table's own program and from single records where there are such.
"""

import csv
import io
from collections import defaultdict
from pathlib import Path

import make_tables
from psychocounsel import data_lineage, evaluation_lineage, policy_lineage
from psychocounsel.config import locate
from psychocounsel.explanation import Explanation, Node
from psychocounsel.record_lineage import RecordLineage
from psychocounsel.records import read_result
from psychocounsel.run_files import RunFiles
from psychocounsel.stage import parse_settings
from psychocounsel.table_cells import Cell
from psychocounsel.table_settings import TableSettings
from psychocounsel.tables import to_csv
from psychocounsel.workflow import Workflow

RECORDS = ("speech", "dropped_row", "failure", "unscored", "score", "pair")  # what tables are made of: kinds of records,
RESULTS = ("judge", "metrics", "win_rates", "assessment", "contamination", "differences", "agreement")  # and kinds of JSON results
UNDER = {  # table -> what finds the formula of a cell and what stands under it
    "dataset": data_lineage.under_dataset,
    "topics": data_lineage.under_topics,
    "pool": data_lineage.under_pool,
    "model_groups": data_lineage.under_model_groups,
    "pairs": data_lineage.under_pairs,
    "judge_consistency": data_lineage.under_judge_consistency,
    "judge_positions": data_lineage.under_judge_positions,
    "contamination": data_lineage.under_contamination,
    "reward_models": evaluation_lineage.under_reward_models,
    "reward_ablation": evaluation_lineage.under_reward_ablation,
    "win_rates": policy_lineage.under_win_rates,
    "win_rates_again": policy_lineage.under_win_rates,
    "lengths": policy_lineage.under_lengths,
    "win_rate_differences": policy_lineage.under_differences,
    "win_rate_principles": policy_lineage.under_principles,
    "judge_agreement": policy_lineage.under_agreement,
    "monitor": policy_lineage.under_monitor,
}


def explain(flow: Workflow, table: str, row: str, column: str, *, everything: bool) -> Explanation:
    """Explain one cell; of many records under it the first few are shown, or everything.

    Raises UserError where the table, row or column is none, or where a file on the way down, or its record, is not there.
    """
    cell, run = Cell(flow, table, row, column), RecordLineage(flow, everything)
    identity = run.record(cell.path)["identity"]
    settings = parse_settings(TableSettings, identity["settings"])
    again = rebuilt(cell, run, [item["path"] for item in identity["inputs"]], settings)
    if cell.x == 1 or column in ("Source", "Base", "Training data"):
        formula, under = "a name", []
    elif column.startswith("Paper") or cell.row.get("Source") == "paper":
        formula, under = "the figure that the paper reports", [paper(cell, flow)]
    else:
        formula, under = UNDER[cell.table](cell, run, settings)
    if column != cell.base:
        formula = f"{column.removeprefix(cell.base).strip()} end of the 95 % bootstrap interval over speeches of: {formula}"
    return Explanation(
        cell.path, cell.y + 1, cell.labels[cell.y - 1], column, cell.value, formula, again, again == cell.value, under
    )  # line: the header is line 1 and no cell holds a line end


def rebuilt(cell: Cell, run: RunFiles, inputs: list[str], settings: TableSettings) -> str:
    """Return what the cell is when the program that made the table makes it again from its inputs."""
    by_kind = defaultdict(list)
    for path in inputs:
        by_kind[run.kind(path)].append(path)
    records = ([row for path in by_kind[kind] for _, row in run.rows(path)] for kind in RECORDS)
    results = ([read_result(Path(path), kind) for path in by_kind[kind]] for kind in RESULTS)
    study = run.flow.study
    tables = make_tables.all_tables(*records, *results, study.taxonomy["coarse"], study.paper, settings)
    grid = list(csv.reader(io.StringIO(to_csv(next(table for table in tables if table.name == cell.table)))))
    return grid[cell.y][cell.x] if cell.y < len(grid) and grid[0] == cell.header else "another table"


def paper(cell: Cell, flow: Workflow) -> Node:
    """The registry of the paper's figures."""
    if cell.table == "topics":
        return Node("the paper's counts of topics", flow.config["files"]["taxonomy"])
    file = flow.config["files"]["paper"]
    place = locate((cell.table, cell.name), [Path(file)])
    return Node("figures that the paper reports", file, int(place.rpartition(":")[2]) if ":" in place else None)
