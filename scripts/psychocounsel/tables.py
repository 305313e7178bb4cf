"""Tables for people: cells that know their interval and why they have no value, written as CSV, Markdown, LaTeX and HTML.

CSV is for machines: bare numbers, the bounds of an interval in columns of their own, the notes of a row in its last
column. The others are for readers: rounded, intervals in brackets, groups as rows, notes as footnotes.
"""

import csv
import io
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from tabulate import tabulate

from psychocounsel.errors import UserError

MISSING = "n/a"
AT_CHANCE = "Not shown to rank better than chance: the interval of its accuracy reaches down to 50 %."
LINE = 120  # characters of a cell beyond which a column is one of prose
ORIENTATION = "Reported in the paper (other models; for orientation)"


@dataclass(frozen=True)
class Number:
    """A number, with its interval where it has one; `show_interval` is for readers alone, CSV always has the bounds."""

    value: float
    digits: int = 3
    low: float | None = None
    high: float | None = None
    show_interval: bool = True

    def __str__(self) -> str:
        return f"{self.rounded} {self.interval}".strip()

    @property
    def rounded(self) -> str:
        """The value as readers see it."""
        return f"{self.value:z,.{self.digits}f}"

    @property
    def interval(self) -> str:
        """The interval as readers see it, in brackets; empty where there is none to show."""
        if self.low is None or not self.show_interval:
            return ""
        return f"[{self.low:z,.{self.digits}f}, {self.high:z,.{self.digits}f}]"


@dataclass(frozen=True)
class Missing:
    """A cell without a value, with the reason that its footnote gives."""

    reason: str


Cell = str | Number | Missing
NOT_REPORTED = Missing("The paper does not report it.")


@dataclass
class Row:
    """One row: its cells by column; `notes` are footnotes to the row's first cell."""

    cells: list[Cell]
    notes: list[str] = field(default_factory=list)


@dataclass
class Table:
    """A table: rows under the titles of their groups (an empty title for none), and notes on the whole."""

    name: str
    title: str
    columns: list[str]
    groups: list[tuple[str, list[Row]]]
    notes: list[str]

    def __post_init__(self) -> None:
        self.groups = [(title, rows) for title, rows in self.groups if rows]
        for _, row in self.rows():
            assert len(row.cells) == len(self.columns), (
                f"table {self.name}: a row has {len(row.cells)} cells for {len(self.columns)} columns"
            )

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield (group, row)."""
        for title, rows in self.groups:
            for row in rows:
                yield title, row

    def footnotes(self) -> list[str]:
        """The reasons and notes of all cells, each once, in the order of reading: footnote a is the first."""
        return list(dict.fromkeys(note for _, row in self.rows() for note in row_notes(row)))


def row_notes(row: Row) -> list[str]:
    """All notes of a row: its own, then the reasons of its missing cells."""
    return list(dict.fromkeys([*row.notes, *(cell.reason for cell in row.cells if isinstance(cell, Missing))]))


def number(estimate: dict | None, reason: str, digits: int = 3, scale: float = 1.0, show_interval: bool = True) -> Number | Missing:
    """Return a cell of {"value", "low", "high"}, or a missing one where there is no estimate or it is undefined."""
    if estimate is None or estimate["value"] is None:
        return Missing(reason)
    return Number(estimate["value"] * scale, digits, estimate["low"] * scale, estimate["high"] * scale, show_interval)


def count(value: int) -> Number:
    """Return a cell that counts."""
    return Number(value, 0)


def letter(index: int) -> str:
    """Return the mark of a footnote: a, b, …, z, aa, ab, …"""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def to_csv(table: Table) -> str:
    """Write a table as CSV: group, columns (with low and high beside those that have intervals), notes."""
    intervals = [
        any(isinstance(row.cells[i], Number) and row.cells[i].low is not None for _, row in table.rows()) for i in range(len(table.columns))
    ]
    header = ["group"]
    for column, wide in zip(table.columns, intervals, strict=True):
        header += [column, f"{column} low", f"{column} high"] if wide else [column]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, "notes"])
    for group, row in table.rows():
        fields = [group]
        for cell, wide in zip(row.cells, intervals, strict=True):
            fields += csv_fields(cell) if wide else csv_fields(cell)[:1]
        notes = row_notes(row)
        if any(
            wide and not isinstance(cell, Missing) and csv_fields(cell)[1] == MISSING
            for cell, wide in zip(row.cells, intervals, strict=True)
        ):
            notes.append("Where low and high alone are n/a, no interval is given.")
        writer.writerow([*fields, " ".join(notes)])
    return text.getvalue()


def csv_fields(cell: Cell) -> list[str]:
    """A cell as value, low, high, with two digits more than readers see."""
    if isinstance(cell, Missing):
        return [MISSING] * 3
    if isinstance(cell, str):
        return [cell, MISSING, MISSING]
    digits = cell.digits + 2 if cell.digits else 0
    return [f"{x:z.{digits}f}" if x is not None else MISSING for x in (cell.value, cell.low, cell.high)]


def to_markdown(table: Table) -> str:
    """Write a table as GitHub-flavoured Markdown, with its title above and its footnotes below."""
    marks = {note: letter(i) for i, note in enumerate(table.footnotes())}

    def shown(cell: Cell) -> str:
        return f"{MISSING}[{marks[cell.reason]}]" if isinstance(cell, Missing) else str(cell).replace("|", "\\|").replace("\n", "<br>")

    body = []
    for group, rows in table.groups:
        if group:
            body.append([f"**{group}**", *[""] * (len(table.columns) - 1)])
        for row in rows:
            first, *others = map(shown, row.cells)
            body.append([first + "".join(f"[{marks[note]}]" for note in row.notes), *others])
    align = ["right" if is_numeric(table, i) else "left" for i in range(len(table.columns))]
    grid = tabulate(body, headers=table.columns, tablefmt="pipe", colalign=align, disable_numparse=True)
    notes = [*(f"[{mark}] {note}" for note, mark in marks.items()), *table.notes]
    return "\n\n".join([f"**{table.title}**", grid, *notes]) + "\n"


def to_latex(table: Table) -> str:
    """Write a table as LaTeX with booktabs; footnotes stand below the rules, as text.

    It is scaled to the page where it is too wide or too high; one with prose breaks over pages (longtable). A first cell that is that of
    the row above is left out.
    """
    marks = {note: letter(i) for i, note in enumerate(table.footnotes())}

    def shown(cell: Cell) -> str:
        return rf"{MISSING}\textsuperscript{{{marks[cell.reason]}}}" if isinstance(cell, Missing) else escape_latex(str(cell))

    prose = [is_prose(table, i) for i in range(len(table.columns))]
    lines = []
    for index, (group, rows) in enumerate(table.groups):
        if group:
            heading = rf"\multicolumn{{{len(table.columns)}}}{{l}}{{\textit{{{escape_latex(group)}}}}} \\"
            lines += [r"\midrule"] * bool(index) + [heading]
        above = None
        for row in rows:
            first, *others = map(shown, row.cells)
            first += "".join(rf"\textsuperscript{{{marks[note]}}}" for note in row.notes)
            lines.append(" & ".join(["" if first == above else first, *others]) + r" \\" + r" \addlinespace" * any(prose))
            above = first
    align = [LATEX_PROSE if prose[i] else "r" if is_numeric(table, i) else "l" for i in range(len(table.columns))]
    align[0] = LATEX_BESIDE if any(prose) and not prose[0] else align[0]
    heads = [stacked(head, kind) if kind in "rl" else escape_latex(head) for head, kind in zip(table.columns, align, strict=True)]
    notes = [*(rf"\textsuperscript{{{mark}}} {escape_latex(note)}" for note, mark in marks.items()), *map(escape_latex, table.notes)]
    top = [r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
    caption = [rf"\caption{{{escape_latex(table.title)}}}", rf"\label{{tab:{table.name.replace('_', '-')}}}"]
    below = [r"\par\smallskip\footnotesize\raggedright " + r"\\ ".join(notes) + r"\par"] if notes else []
    look = r"\small\setlength{\tabcolsep}{4pt}"
    if any(prose):
        body = [rf"\begin{{longtable}}{{{''.join(align)}}}", *caption, r"\\", *top, r"\endhead", *lines, r"\bottomrule", r"\end{longtable}"]
        return "\n".join([LATEX_NEEDS.format("longtable"), r"\begingroup" + look, *body, *below, r"\endgroup", ""])
    fitted = [r"\begin{adjustbox}{max width=\linewidth, max totalheight=0.85\textheight}", rf"\begin{{tabular}}{{{''.join(align)}}}"]
    ends = [r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}", *below, r"\end{table}", ""]
    return "\n".join([LATEX_NEEDS.format("adjustbox"), r"\begin{table}", r"\centering" + look, *caption, *fitted, *top, *lines, *ends])


def stacked(head: str, side: str) -> str:
    """Return the head of a column in lines, flush to a side, so that a long one does not make its column wide."""
    lines = [escape_latex(line) for line in textwrap.wrap(head, 11, break_long_words=False)]
    return rf"\shortstack[{side}]{{" + r" \\ ".join(lines) + "}" if len(lines) > 1 else "".join(lines)


def to_html(table: Table) -> str:
    """Write a table as an HTML fragment: a figure with its caption, the table and its footnotes."""
    marks = {note: letter(i) for i, note in enumerate(table.footnotes())}
    classes = ["number" if is_numeric(table, i) else "prose" if is_prose(table, i) else "text" for i in range(len(table.columns))]

    def shown(cell: Cell) -> str:
        if isinstance(cell, Missing):
            return f"{MISSING}<sup>{marks[cell.reason]}</sup>"
        if isinstance(cell, Number) and cell.interval:
            return f"{cell.rounded}<br><small>{cell.interval}</small>"
        return escape(str(cell))

    lines = []
    for group, rows in table.groups:
        if group:
            lines.append(f'<tr class="group"><th colspan="{len(table.columns)}" scope="rowgroup">{escape(group)}</th></tr>')
        for row in rows:
            first, *others = map(shown, row.cells)
            cells = [first + "".join(f"<sup>{marks[note]}</sup>" for note in row.notes), *others]
            lines.append("<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(cells, classes, strict=True)) + "</tr>")
    heads = "".join(f'<th class="{kind}" scope="col">{escape(column)}</th>' for column, kind in zip(table.columns, classes, strict=True))
    notes = [*(f"<sup>{mark}</sup> {escape(note)}" for note, mark in marks.items()), *map(escape, table.notes)]
    return "\n".join(
        [
            f'<figure class="table" id="table-{table.name}">',
            f"<figcaption>{escape(table.title)}</figcaption>",
            f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>",
            *lines,
            "</tbody>\n</table>",
            *(f"<p>{note}</p>" for note in notes),
            "</figure>",
            "",
        ]
    )


LATEX_NEEDS = "% needs \\usepackage{{booktabs,{}}}; texts with other scripts or emoji need lualatex or xelatex"
LATEX_PROSE, LATEX_BESIDE = r"p{0.75\linewidth}", r"p{0.2\linewidth}"
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "[": "{[}",  # after \\ a bare bracket would be read as its optional argument
        "]": "{]}",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "\n": r"\newline ",
    }
)


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it stands."""
    return text.translate(LATEX)


def is_prose(table: Table, column: int) -> bool:
    """Whether a column holds texts that need several lines."""
    texts = [row.cells[column] for _, row in table.rows() if isinstance(row.cells[column], str)]
    return any(len(text) > LINE or "\n" in text for text in texts)


def is_numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers (and so stands flush right)."""
    return any(isinstance(row.cells[column], Number) for _, row in table.rows())


def reported_row(rows: dict[str, dict], name: str) -> dict:
    """Return a row of one of the paper's tables; raise UserError where the settings name one that it does not have."""
    if name not in rows:
        raise UserError(f"--settings: reported: the paper has no row {name!r}; it has {', '.join(map(repr, rows))}")
    return rows[name]


FORMATS = {"csv": to_csv, "md": to_markdown, "tex": to_latex, "html": to_html}
