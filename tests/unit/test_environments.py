"""The conda environments agree with the lock file of `make`, and hold what the programs of their rules import."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import yaml

from psychocounsel.fingerprint import SCRIPTS, reachable_files, syntax_tree

LOCK = Path("requirements/pipeline.lock")
OF_VLLM = {
    "vllm",
    "torch",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "numpy",
    "requests",
}  # vLLM pins its own; it is not in the lock
OF_SERVING = {"vllm", "datamodel-code-generator"}  # in a server alone, so not in the lock either
ENVIRONMENTS = sorted(path.stem for path in Path("envs").glob("*.yaml"))


def name_of(requirement: str) -> str:
    """Return a requirement's package name in its normal form."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def pins(lines: list[str]) -> dict[str, str]:
    """Return the version of each package that is pinned."""
    return {name_of(line): line.split("==")[1].split()[0] for line in lines if "==" in line and not line.startswith("#")}


def packages(environment: str) -> list[str]:
    """Return what pip installs in a conda environment."""
    return yaml.safe_load(Path(f"envs/{environment}.yaml").read_text())["dependencies"][-1]["pip"]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_version_is_pinned_as_in_the_lock(environment):
    locked = pins(LOCK.read_text().splitlines())
    mine = pins(packages(environment))
    assert len(mine) == len(packages(environment)), "every package has a version"
    assert {name: version for name, version in mine.items() if name not in OF_SERVING and locked.get(name) != version} == {}


def programs(environment: str) -> set[str]:
    """Return the programs of the rules with this environment; a rule that `uses` another's shell has its environment too."""
    found = set()
    for file in Path("rules").glob("*.smk"):
        for block in re.split(r"^(?:use )?rule ", file.read_text(), flags=re.MULTILINE)[1:]:
            if f"envs/{environment}.yaml" in block:
                found |= set(re.findall(r"(?:python|launcher}) scripts/(\w+)\.py", block))
    return found


def imports(program: str) -> set[str]:
    """Return the top-level names of other people's packages that a program can reach."""
    found = set()
    for file in reachable_files(SCRIPTS / f"{program}.py"):
        for node in ast.walk(syntax_tree(file)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"psychocounsel"} - {path.stem for path in SCRIPTS.glob("*.py")}


def with_dependencies(names: set[str]) -> set[str]:
    """Return packages and what they need, as far as they are installed here."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [name_of(one) for one in needed if "extra ==" not in one]
    return seen


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_programs_of_its_rules_find_what_they_import(environment):
    there = with_dependencies({name_of(one) for one in packages(environment)}) | (OF_VLLM if environment == "serve" else set())
    distributions = importlib.metadata.packages_distributions()
    lacking = {
        f"{program}: {name}"
        for program in programs(environment)
        for name in imports(program)
        if not {name_of(one) for one in distributions.get(name, [name])} & there
    }
    assert programs(environment)
    assert lacking == set()
