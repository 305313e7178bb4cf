"""Cells of a run's tables, found by what a user calls them, and the names behind the titles that stand there."""

import csv
from collections.abc import Iterable
from pathlib import Path

from psychocounsel.errors import UserError, nearest_or_all
from psychocounsel.table_settings import TableSettings
from psychocounsel.workflow import Workflow

NOT_COMPUTED = {
    "costs": "its figures are sums of `run.facts.api` in the provenance records (*.prov.json) of the jobs",
    "case_studies": "its texts are those of the records whose speech_id it names, in the files that its own record (*.prov.json) names",
}


class Cell:
    """A cell of a table's CSV file, found by what a user calls its row and column."""

    def __init__(self, flow: Workflow, table: str, row: str, column: str) -> None:
        self.path = table if table.endswith(".csv") else flow.results(f"10_tables/{table}.csv")
        self.table = Path(self.path).stem
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                self.grid = list(csv.reader(file))
        except FileNotFoundError:
            tables = sorted(path.stem for path in Path(flow.results("10_tables")).glob("*.csv"))
            hint = nearest_or_all(table, tables) if tables else " Has the run been made?"
            raise UserError(f"{self.path}: no such table.{hint}") from None
        if self.table in NOT_COMPUTED:
            raise UserError(f"{self.path}: {NOT_COMPUTED[self.table]}")
        self.header = self.grid[0]
        if column not in self.header[1:-1]:
            raise UserError(f"--column {column!r}: {self.path} has no such column.{nearest_or_all(column, self.header[1:-1])}")
        self.column, self.x = column, self.header.index(column)
        self.y = self._find(row)
        self.base = column.removesuffix(" low").removesuffix(" high")
        self.row = dict(zip(self.header, self.grid[self.y], strict=True))
        self.group, self.name, self.value = self.row["group"], self.grid[self.y][1], self.grid[self.y][self.x]

    @property
    def labels(self) -> list[str]:
        """What names each row: its group, first column, and where its figures come from."""
        columns = [index for index, name in enumerate(self.header) if index < 2 or name in ("Training data", "Source")]
        return [" | ".join(row[index] for index in columns if row[index]) for row in self.grid[1:]]

    def _find(self, wanted: str) -> int:
        """Return the place of the row that a number, or words of its label, name."""
        if wanted.isdecimal() and 1 <= int(wanted) <= len(self.labels):
            return int(wanted)
        parts = [label.casefold().split(" | ") for label in self.labels]
        found = set(range(1, len(parts) + 1))
        for word in (word.strip().casefold() for word in wanted.split("|")):
            exact = {y for y, label in enumerate(parts, 1) if word in label}  # "micro-dpo" is not "micro-dpo-iter"
            found &= exact or {y for y, label in enumerate(parts, 1) if any(word in part for part in label)}
        if len(found) == 1:
            return found.pop()
        rows = "\n".join(f"  {y:>3}  {label}" for y, label in enumerate(self.labels, 1) if y in (found or range(len(self.grid))))
        which = "fits several rows; take a number, or several parts of the label with | between them" if found else "fits no row"
        raise UserError(f"--row {wanted!r} {which}:\n{rows}")


def named(title: str, names: Iterable[str], settings: TableSettings) -> str:
    """Return the one of the names that has this title in the tables, or the title where none has."""
    return next((name for name in names if settings.title(name) == title), title)
