"""Fingerprint of a program's code: its own file and the project modules that it imports, transitively.

Computed over syntax trees without comments, docstrings and layout, so that a cosmetic edit changes nothing and a real
one changes exactly the programs concerned. Machinery that cannot change a result (logging, provenance, journals) counts
by its CODE_VERSION, which its authors raise when what it writes changes.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

from psychocounsel.records import content_hash

SCRIPTS = Path(__file__).resolve().parent.parent
PACKAGE = "psychocounsel"

CODE_VERSION = 1  # a change in how fingerprints are made changes them all by itself


def code_fingerprint(program: str) -> str:
    """Return 16 hex digits that stand for `scripts/<program>.py` and all project code that it can reach."""
    return content_hash(code_modules(program), digits=16)


def code_modules(program: str) -> dict[str, str]:
    """Return a fingerprint of each file, by its path below scripts/, that the program consists of."""
    files = reachable_files(SCRIPTS / f"{program}.py")
    found = {file.relative_to(SCRIPTS).as_posix(): hashlib.sha256(essence(file).encode()).hexdigest()[:16] for file in files}
    return dict(sorted(found.items()))


def reachable_files(program: Path) -> set[Path]:
    """Return the program and every project file that it imports, directly or not."""
    seen: set[Path] = set()
    waiting = [program]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting.extend(imported_files(file))
    return seen


@cache
def imported_files(file: Path) -> frozenset[Path]:
    """Return the project files that one file imports, at top level or inside a function."""
    found = set()
    for node in ast.walk(syntax_tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE:
                path = SCRIPTS.joinpath(*name.split("."))
                found.update(p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file())
    return frozenset(found)


@cache
def essence(file: Path) -> str:
    """Return a file's code without comments, docstrings and layout, or its CODE_VERSION where it has one."""
    tree = syntax_tree(file)
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["CODE_VERSION"]:
            return ast.unparse(node)
    return ast.unparse(without_docstrings(tree))


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove the docstrings of a module, its classes and its functions, in place."""
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def syntax_tree(file: Path) -> ast.Module:
    """Parse one file."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
