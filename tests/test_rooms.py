"""Data flows downwards: no room of megatron_prune imports a later one.

`violations` reads every module with ast, so that an import counts wherever it stands (in a function, under
TYPE_CHECKING, relative or absolute, or as importlib.import_module("...")), and nothing has to be importable. The
checker is itself tested on small trees that break the order in each of these ways.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_prune"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# A room may import itself and those before it. `commands` comes after `pretrain`, which is one of them. The package's
# own __init__ imports nothing of it: it runs before any room does.
ROOMS = (
    "errors",
    "reading",
    "config",
    "runtime",
    "model",
    "optimizer",
    "resharding",
    "saliency",
    "pruning",
    "data",
    "checkpoint",
    "training",
    "huggingface",
    "evaluation",
    "report",
    "launch",
    "testing",
    "pretrain",
    "commands",
    "__main__",
)
OUTSIDE = ("tools", "tests", "examples")  # of the repository, not of the package: they import it, never the reverse


def import_targets(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line, absolute dotted name as parts) for all that a module imports.

    `package` is the package the module lives in, which relative imports start from. `from a.b import c` yields
    ("a", "b", "c"), since c may be a module. A relative import that leaves the outermost package yields ().
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            kept = len(package) - (node.level - 1)
            if node.level and kept <= 0:
                yield node.lineno, ()
                continue
            base = package[:kept] if node.level else ()
            for alias in node.names:
                yield node.lineno, (*base, *module, alias.name)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, resolved(name.value, package)


def called_name(call: ast.Call) -> str:
    """The last part of the called function's name, or an empty string."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def resolved(name: str, package: tuple[str, ...]) -> tuple[str, ...]:
    """The absolute parts of a module name as importlib takes it: leading dots are relative to `package`."""
    dots = len(name) - len(name.lstrip("."))
    parts = tuple(part for part in name.split(".") if part)
    return (*package[: len(package) - (dots - 1)], *parts) if dots else parts


def rooms_on_disk(root: Path) -> set[str]:
    """Names of the modules and packages directly under the package's folder."""
    names = {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/*.py")}
    return names - {"__init__"}


def violations(root: Path, rooms: tuple[str, ...] = ROOMS) -> list[str]:
    """One line for every import that breaks the order of `rooms` in the package folder `root`; empty if all is well."""
    known = rooms_on_disk(root) | set(rooms)
    found = [f"{name}: no room of that name; give it its place in ROOMS" for name in sorted(known - set(rooms))]
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        room = parts[0]
        if room in known - set(rooms):
            continue
        # The package's __init__ may import no room at all, hence rank -1.
        rank = rooms.index(room) if room != "__init__" else -1
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for line, target in import_targets(tree, package=(root.name, *parts[:-1])):
            complaint = judge(target, root.name, rank, rooms, known)
            if complaint:
                found.append(f"{path.relative_to(root.parent)}:{line}: {complaint}")
    return found


def judge(target: tuple[str, ...], package: str, rank: int, rooms: tuple[str, ...], known: set[str]) -> str | None:
    """Say what is wrong with importing `target` from a module of the room at position `rank`; None if nothing is."""
    if not target:
        return "a relative import leaves the package"
    if target[0] in OUTSIDE:
        return f"the package imports {'.'.join(target)}, which is not part of it"
    if target[0] != package or len(target) == 1 or target[1] not in known:
        return None  # another package, or a name that the package's __init__ defines
    imported = target[1]
    if imported not in rooms:
        return f"imports {imported}, which has no place in ROOMS"
    if rooms.index(imported) > rank:
        importer = rooms[rank] if rank >= 0 else "__init__"
        return f"{importer} imports {imported}, a later room"
    return None


def test_no_room_imports_a_later_one() -> None:
    assert rooms_on_disk(ROOT), f"no modules found in {ROOT}"
    assert violations(ROOT) == []


def test_package_docstring_lists_the_rooms_in_order() -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = re.findall(r"^    (\w+)\s{2,}\S", docstring, re.MULTILINE)
    single = ("errors", "reading", "pretrain", "__main__")  # modules, not packages
    assert [room for room in listed if room not in single] == [room for room in ROOMS if room not in single]


# The checker itself, on trees of its own.

SMALL = ("errors", "model", "saliency", "pruning", "pretrain")


def write_tree(tmp_path: Path, **extra: str) -> Path:
    """A package in good order, with `extra` modules (path with __ for /, without .py) added or replaced."""
    files = {
        "__init__": "VERSION = 1",
        "errors": "class UserError(ValueError): ...",
        "model/__init__": "",
        "model/layout": "import numpy\nfrom ..errors import UserError\nfrom .. import VERSION",
        "model/layers/__init__": "",
        "model/layers/norm": "from ..layout import pack\nfrom ...errors import UserError",
        "saliency/__init__": "from .scores import score",
        "saliency/scores": "from megatron_prune.model import layout\nimport megatron_prune.errors",
        "pruning/__init__": "",
        "pruning/selector": "import megatron_prune\nfrom megatron_prune import model, saliency",
        "pretrain": "from . import model, pruning\nfrom .saliency import scores",
    }
    files.update({name.replace("__", "/") if name != "__init__" else name: source for name, source in extra.items()})
    root = tmp_path / PACKAGE
    for name, source in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n", encoding="utf-8")
    return root


def test_checker_accepts_a_tree_in_order(tmp_path: Path) -> None:
    assert violations(write_tree(tmp_path), SMALL) == []


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("model__bad", "import megatron_prune.pruning", "pruning"),
        ("model__bad", "import numpy, megatron_prune.pruning.selector as s", "pruning"),
        ("model__bad", "from megatron_prune import saliency", "saliency"),
        ("model__bad", "from megatron_prune.saliency.scores import score", "saliency"),
        ("model__bad", "from .. import errors, pruning", "pruning"),
        ("model__bad", "from ..pruning import selector", "pruning"),
        ("model__bad", "from ..pruning.selector import choose", "pruning"),
        ("model__layers__bad", "from ...saliency import scores", "saliency"),
        ("model__bad", "def later():\n    from ..saliency import scores", "saliency"),
        ("model__bad", "import typing\nif typing.TYPE_CHECKING:\n    from ..pruning import selector", "pruning"),
        ("model__bad", "import importlib\nimportlib.import_module('megatron_prune.pruning.selector')", "pruning"),
        ("model__bad", "from importlib import import_module\nimport_module('..pruning', __package__)", "pruning"),
        ("pruning__bad", "from ..pretrain import main", "pretrain"),
        ("errors", "from .model import layout", "model"),
        ("__init__", "from .errors import UserError", "errors"),
    ],
)
def test_checker_finds_a_later_room(tmp_path: Path, module: str, source: str, imported: str) -> None:
    root = write_tree(tmp_path, **{module: source})
    found = violations(root, SMALL)
    line = source.count("\n") + 1
    path = f"{PACKAGE}/{module if module == '__init__' else module.replace('__', '/')}.py"
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{line}: ")
    assert found[0].endswith(f"imports {imported}, a later room")


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("model__bad", "from tools import bench", "imports tools.bench, which is not part of it"),
        ("model__bad", "import tests.conftest", "imports tests.conftest, which is not part of it"),
        ("model__bad", "from .... import anything", "a relative import leaves the package"),
        ("newroom", "", "newroom: no room of that name"),
        ("newroom__inside", "", "newroom: no room of that name"),
    ],
)
def test_checker_finds_what_has_no_place(tmp_path: Path, module: str, source: str, message: str) -> None:
    found = violations(write_tree(tmp_path, **{module: source}), SMALL)
    assert len(found) == 1
    assert message in found[0]


def test_checker_fails_on_the_real_tree_with_one_wrong_import_added(tmp_path: Path) -> None:
    copy = tmp_path / PACKAGE
    for path in ROOT.rglob("*.py"):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    before = violations(copy)
    errors = copy / "errors.py"
    errors.write_text(errors.read_text(encoding="utf-8") + "\nfrom .training import loop\n", encoding="utf-8")
    added = set(violations(copy)) - set(before)
    assert [line.split(": ")[-1] for line in added] == ["errors imports training, a later room"]
