"""Private names of other packages: all are known, each is still there, and only one module uses them."""

from __future__ import annotations

import ast
import importlib
import pydoc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_prune
from megatron_prune.runtime.compat import PRIVATE

PACKAGE = Path(megatron_prune.__file__).parent
DOOR = "runtime/compat.py"
# Exported folders bring this file along; it builds on transformers as transformers' own models do, and on nothing else.
ELSEWHERE = {("huggingface/remote/modeling_cluster_llama.py", "_attn_implementation")}
DOCUMENTED = {"_exit", "_foreach_zero_"}  # of os, of torch


@pytest.mark.parametrize("name", PRIVATE)
def test_each_private_name_is_still_there(name: str):
    module, _, path = name.partition(":")
    if module == "transformers":
        pytest.importorskip(module)
    if sys.version_info < (3, 11) and "_spawn_children" in name:
        pytest.skip("needed from Python 3.11 on")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        is_instance = part.endswith("()")
        found = getattr(found, part.removesuffix("()"))
        found = found() if is_instance else found


def test_they_are_few():
    assert len(PRIVATE) <= 10


def test_they_are_used_behind_one_door():
    own = set().union(*(_own_names(tree) for tree in _trees().values()))
    found = {(path, name) for path, tree in _trees().items() for name in _foreign_names(tree, own)}
    assert {place for place in found if place[0] != DOOR} == ELSEWHERE, "such names belong into runtime/compat.py"
    listed = {name for names in PRIVATE for name in re.split(r"\W+", names) if _is_private(name)}
    assert {name for _, name in found} <= listed, "runtime/compat.py lists in PRIVATE what it uses"


@pytest.mark.parametrize(
    "code, found",
    [
        ("import torch._dynamo", {"_dynamo"}),
        ("from torch._C import _nn", {"_C", "_nn"}),
        ("from .mine import _own", set()),
        ("from megatron_prune.x import _own", set()),
        ("x._private", {"_private"}),
        ("self._mine = 1; other._mine", set()),
        ("module._get = 1", {"_get"}),
        ("getattr(x, '_hidden', None)", {"_hidden"}),
        ("class Mine(Theirs):\n def f(self): super()._theirs", {"_theirs"}),
        ("from json import JSONEncoder\nclass Mine(JSONEncoder):\n def _mine(self): ...", set()),
        ("import threading as t\nclass Mine(t.Thread):\n def _bootstrap(self): ...", {"_bootstrap"}),
        ("os._exit(1); x.__dict__", set()),
    ],
)
def test_the_reading_of_modules(code: str, found: set[str]):
    tree = ast.parse(code)
    assert set(_foreign_names(tree, _own_names(tree))) == found


def _trees() -> dict[str, ast.Module]:
    return {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_" and name not in DOCUMENTED


def _own_names(tree: ast.AST) -> set[str]:
    """Names that a module defines: functions, classes, variables, attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _foreign_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names that a module takes from others and that no module of the package defines."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("megatron_prune"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and node.attr not in own:
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            names = [name for name in [getattr(node.args[1], "value", "")] if isinstance(name, str) and name not in own]
        elif isinstance(node, ast.ClassDef):
            names = [name for base in node.bases for name in dir(_foreign_class(base, tree)) if name in _methods(node)]
        yield from filter(_is_private, names)


def _methods(node: ast.ClassDef) -> set[str]:
    return {part.name for part in node.body if isinstance(part, ast.FunctionDef)}


def _foreign_class(base: ast.expr, tree: ast.AST) -> Any:
    """The class of another package that `base` names by the imports of its module; None for others."""
    first, *rest = ast.unparse(base).split(".")
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            imported = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            if (alias.asname or alias.name) == first and not imported.startswith(("None.", PACKAGE.name)):
                return pydoc.locate(".".join([imported, *rest]))
    return None
