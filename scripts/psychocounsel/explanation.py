"""An explanation of a table's cell: the cell, and under it a tree of what it was computed from; shown as text or as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from psychocounsel.tables import MISSING


@dataclass
class Node:
    """A file, or one record in it, that something was computed from."""

    what: str
    file: str | None = None
    line: int | None = None
    request_key: str | None = None
    text: str | None = None  # words of clients and models
    agrees: bool | None = None  # whether computing it again from what is under it gives the same
    under: list["Node"] = field(default_factory=list)
    more: int = 0  # nodes that are not shown


@dataclass
class Explanation:
    """Where a cell comes from."""

    table: str
    line: int
    row: str
    column: str
    value: str
    formula: str
    recomputed: str
    agrees: bool
    under: list[Node]

    @property
    def sound(self) -> bool:
        """Whether the cell and everything under it that was computed again agree."""
        waiting, agreed = list(self.under), self.agrees
        while waiting:
            node = waiting.pop()
            agreed = agreed and node.agrees is not False
            waiting += node.under
        return agreed

    def as_json(self, show_text: bool) -> dict:
        """All of it for scripts; texts only where they are asked for."""
        return trimmed({"sound": self.sound} | asdict(self), show_text)


def trimmed(value: object, show_text: bool) -> object:
    """Return nested dicts without empty fields and, unless they are asked for, without texts."""
    if isinstance(value, list):
        return [trimmed(item, show_text) for item in value]
    if isinstance(value, dict):
        empty = {key for key, item in value.items() if item is None or item == [] or (key, item) == ("more", 0)}
        hidden = empty if show_text else empty | {"text"}
        return {key: trimmed(item, show_text) for key, item in value.items() if key not in hidden}
    return value


def told(explanation: Explanation, show_text: bool) -> str:
    """Return an explanation as a tree of text."""
    lines = [
        f"{explanation.table}:{explanation.line}  {explanation.row}",
        f"{explanation.column} = {explanation.value}",
        f"  formula: {explanation.formula}",
        f"  made again from the table's inputs: {explanation.recomputed}: {'agrees' if explanation.agrees else 'DOES NOT AGREE'}",
        "  ✓ marks what follows from what stands under it",
        "",
    ]
    for node in explanation.under:
        lines += branch(node, "", show_text)
    if explanation.value == MISSING and not explanation.under:
        lines.append("no value, so nothing is under it; the table's last column says why")
    if not explanation.sound:
        lines += [
            "",
            "Something does not agree: `audit.py verify` tells which file was altered; a journal has no record and is not verified.",
        ]
    return "\n".join(lines).rstrip()


def branch(node: Node, indent: str, show_text: bool, folded: bool = False) -> Iterator[str]:
    """Yield the lines of a node and of what is under it; of records cut off after a few, all but the first are folded."""
    place = f"  {node.file}{f':{node.line}' if node.line else ''}" if node.file else ""
    verdict = {None: "", True: " ✓", False: " ✗ DOES NOT AGREE"}[node.agrees]
    key = f"  request {node.request_key[:12]}" if node.request_key else ""
    yield f"{indent}{node.what}{verdict}{place}{key}{' …' if folded and node.under else ''}"
    if show_text and node.text:
        yield from (f"{indent}    | {printable(line)}" for line in node.text.split("\n"))
    for number, under in enumerate(() if folded else node.under):
        yield from branch(under, indent + "  ", show_text, folded=bool(number and node.more))
    if node.more and not folded:
        yield f"{indent}  … and {node.more} more; --all shows all in full"


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal: what a model writes may hold control characters."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
