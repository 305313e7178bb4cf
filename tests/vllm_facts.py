"""What a version of vLLM says of itself: the options of `vllm serve` and the models that it serves, as facts for a test.

    VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.24.0 pip download --no-deps --no-build-isolation --no-binary vllm vllm==0.24.0
    python tests/vllm_facts.py vllm-0.24.0.tar.gz > tests/unit/vllm_facts.json

(The first in an environment with torch, setuptools-scm, setuptools-rust and cmake, since pip asks the package's setup.py for its
metadata; nothing is built.) Reads the source package by its syntax trees, without vLLM: its options follow from the annotated
fields of its configuration classes (vllm/engine/arg_utils.py: get_kwargs).
"""

import argparse
import ast
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = r"vllm/(config/\w+|engine/arg_utils|entrypoints/openai/cli_args|entrypoints/chat_utils|model_executor/models/registry)\.py"
FRONTEND = ("BaseFrontendArgs", "FrontendArgs")  # every field is an option
CALLS = ("EngineArgs", "AsyncEngineArgs", "make_arg_parser")  # options are added one by one, by their fields
SERVED = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")


class Source:
    """The parts of vLLM's source that say what its options and models are."""

    def __init__(self, archive: Path) -> None:
        self.trees, self.version = [], ""
        with tarfile.open(archive) as tar:
            for member in tar:
                path = member.name.partition("/")[2]
                if re.fullmatch(SOURCES, path):
                    self.trees.append(ast.parse(tar.extractfile(member).read()))
                elif path == "PKG-INFO":
                    self.version = re.search(r"^Version: (.+)$", tar.extractfile(member).read().decode(), re.MULTILINE)[1]
        statements = [node for tree in self.trees for node in tree.body]
        self.definitions = {node.name: node for node in statements if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        named = [node for node in statements if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
        self.values = {node.targets[0].id: node.value for node in named}

    def fields(self, name: str) -> dict[str, ast.expr]:
        """Return the annotations of a class's fields, those of its bases too."""
        node = self.definitions.get(name)
        if node is None:
            return {}
        inherited = [self.fields(base.id) for base in node.bases if isinstance(base, ast.Name)]
        own = {n.target.id: n.annotation for n in node.body if isinstance(n, ast.AnnAssign)}
        return {key: value for fields in [*inherited, own] for key, value in fields.items()}

    def parts(self, annotation: ast.expr) -> Iterator[ast.expr]:
        """Yield the alternatives of an annotation: those of `A | B`, of Annotated and of names that stand for others."""
        if isinstance(annotation, ast.BinOp):
            yield from self.parts(annotation.left)
            yield from self.parts(annotation.right)
        elif isinstance(annotation, ast.Subscript) and outer(annotation) in ("SkipValidation", "Annotated"):
            inner = annotation.slice
            yield from self.parts(inner.elts[0] if isinstance(inner, ast.Tuple) else inner)
        elif isinstance(annotation, ast.Name) and isinstance(self.values.get(annotation.id), ast.Subscript | ast.BinOp):
            yield from self.parts(self.values[annotation.id])
        else:
            yield annotation

    def literals(self, annotation: ast.expr) -> list[str]:
        """Return the values of a Literal, those of nested ones too."""
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        named = [one for part in inner if isinstance(part, ast.Name) for one in self.literals(self.values[part.id])]
        return sorted([str(part.value) for part in inner if isinstance(part, ast.Constant)] + named)

    def fact(self, annotation: ast.expr) -> dict:
        """Return kind and choices of the option that a field becomes (as get_kwargs decides)."""
        parts = list(self.parts(annotation))
        kinds = {outer(part) for part in parts}
        if "bool" in kinds:
            return {"kind": "optional" if "str" in kinds else "flag"}
        if "Literal" in kinds:
            choices = [value for part in parts if outer(part) == "Literal" for value in self.literals(part)]
            return {"kind": "str"} if "str" in kinds else {"kind": "choice", "choices": choices}
        for collection in ("list", "tuple", "set"):
            if collection in kinds:
                return {"kind": "list"}
        for plain in ("int", "float", "str"):
            if plain in kinds and not kinds & {"dict"}:
                return {"kind": plain}
        return {"kind": "other"}

    def options(self) -> dict[str, dict]:
        """Return the options of `vllm serve` by name; a flag has its --no- form too."""
        found = {f"--{name.replace('_', '-')}": self.fact(kind) for cls in FRONTEND for name, kind in self.fields(cls).items()}
        for name in CALLS:
            node = self.definitions[name]
            groups = {n.targets[0].id: n.value.args[0].id for n in ast.walk(node) if is_kwargs(n)}
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
                    flags = [arg.value for arg in call.args if arg.value.startswith("--")]
                    found |= dict.fromkeys(flags, self.option(call, groups))
        return dict(sorted(found.items()))

    def option(self, call: ast.Call, groups: dict[str, str]) -> dict:
        """Return kind and choices of an option that is added by a call, with the field of a group or a type of its own."""
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        for node in ast.walk(call):
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in groups:
                return self.fact(self.fields(groups[node.value.id])[node.slice.value])
        if "action" in given:
            plain = isinstance(given["action"], ast.Constant)
            return {"kind": "switch" if plain else "flag"}  # a switch has no --no- form
        return {"kind": getattr(given.get("type"), "id", "other") if "type" in given else "str"}

    def architectures(self) -> list[str]:
        """Return the architectures (config.json) of the text models that it serves."""
        return sorted({key.value for name in SERVED for key in self.values[name].keys})


def outer(annotation: ast.expr) -> str:
    """Return the outermost name of an annotation."""
    if isinstance(annotation, ast.Subscript):
        return outer(annotation.value)
    return annotation.id if isinstance(annotation, ast.Name) else str(getattr(annotation, "value", ""))


def is_kwargs(node: ast.AST) -> bool:
    """Whether a statement is `x = get_kwargs(SomeConfig)`."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "get_kwargs"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="vLLM's source package")
    source = Source(parser.parse_args().archive)
    options = ",\n".join(f"    {json.dumps(name)}: {json.dumps(fact)}" for name, fact in source.options().items())
    served = ",\n".join(f"    {json.dumps(name)}" for name in source.architectures())
    sys.stdout.write(
        f'{{\n  "version": {json.dumps(source.version)},\n  "options": {{\n{options}\n  }},\n  "architectures": [\n{served}\n  ]\n}}\n'
    )
