"""The package stays easy to find one's way in: names occur once, functions are short, and modules import each other in
one direction.

Read with ast from the sources, as in test_rooms. Imports inside functions count as well; those under TYPE_CHECKING,
which only say what an annotation means, do not.
"""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.test_rooms import PACKAGE, ROOT, import_targets

MOST_LINES = 60  # of a function, docstring and signature counted


def sources(root: Path) -> dict[Path, ast.Module]:
    """Every module below `root`, parsed, by its path relative to it."""
    return {
        path.relative_to(root): ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for path in sorted(root.rglob("*.py"))
    }


def repeated(names: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """Names that stand in more than one place, with the places."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in names:
        places[name].append(str(path))
    return {name: where for name, where in places.items() if len(where) > 1}


def imports(modules: Mapping[Path, ast.Module], package: str) -> dict[str, set[str]]:
    """Module -> modules of the package it imports; a package's name stands for its __init__."""
    names = {path: ".".join((package, *path.with_suffix("").parts)).removesuffix(".__init__") for path in modules}
    graph = {}
    for path, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                node.body.clear()
        targets = (target for _, target in import_targets(tree, package=(package, *path.parts[:-1])))
        candidates = {".".join(target[:end]) for target in targets for end in (len(target), len(target) - 1)}
        exact = {name for name in candidates if name in names.values()}
        packages = {name for name in exact if any(other.startswith(f"{name}.") for other in exact)}
        graph[names[path]] = exact - packages - {names[path]}
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_two_modules_share_a_name() -> None:
    assert repeated((path.stem, path) for path in sources(ROOT) if path.stem != "__init__") == {}


def test_no_two_classes_share_a_name() -> None:
    nodes = ((node, path) for path, tree in sources(ROOT).items() for node in ast.walk(tree))
    assert repeated((node.name, path) for node, path in nodes if isinstance(node, ast.ClassDef)) == {}


def test_modules_import_each_other_in_one_direction() -> None:
    graph = imports(sources(ROOT), PACKAGE)
    assert sum(map(len, graph.values())) > len(graph), "imports are not seen"
    assert cycle(graph) == []


def test_functions_are_short() -> None:
    nodes = ((node, path) for path, tree in sources(ROOT).items() for node in ast.walk(tree))
    functions = ((n, path) for n, path in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    lines = {f"{path}: {n.name}": (n.end_lineno or 0) - n.lineno + 1 for n, path in functions}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize(
    "source",
    ["from pkg import b", "from pkg.b import x", "import pkg.b", "from . import b", "def f():\n    from .b import x"],
)
def test_a_cycle_is_found(source: str) -> None:
    modules = {Path("__init__.py"): "", Path("a.py"): source, Path("b.py"): "from pkg.a import y"}
    assert set(cycle(imports({path: ast.parse(text) for path, text in modules.items()}, "pkg"))) == {"pkg.a", "pkg.b"}
