"""Counts that say whether the structure holds: how many files know a kind of unit, how many a pruning step enters.

`python tests/test_structure.py` prints them with the files.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTANTS = {"HEAD", "KV_HEAD", "FFN", "STEM"}
NAMES = {"head", "kv_head", "ffn", "stem"}
ATTRIBUTES = {"heads", "kv_heads", "ffn", "stem"}  # of what holds something per kind
HOLDERS = {"a", "after", "architecture", "before", "layout", "scores", "units"}
MOST = 12  # 42 before every kind was data


def kinds_named(path: Path) -> set[str]:
    """What a module says of single kinds: their constants, their names as text, what only one kind has."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and node.id in CONSTANTS:
            found.add(node.id)
        elif isinstance(node, ast.alias) and node.name in CONSTANTS:
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            found.add(repr(node.value))
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            holder = getattr(node.value, "id", getattr(node.value, "attr", ""))
            found |= {f".{node.attr}"} if holder in HOLDERS else set()
    return found


def files_that_name_a_kind(root: Path = ROOT) -> Iterator[tuple[str, set[str]]]:
    """(file, what it names), of the package and the tools."""
    for folder in ("megatron_prune", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            found = kinds_named(path)
            if found:
                yield str(path.relative_to(root)), found


def test_few_files_name_a_kind():
    found = dict(files_that_name_a_kind())
    assert "megatron_prune/model/kinds.py" in found, "the count sees nothing"
    assert len(found) <= MOST, "\n".join(f"{path}: {', '.join(sorted(names))}" for path, names in found.items())


def test_the_count_sees_every_way_of_naming_one(tmp_path):
    ways = ["from x import FFN", "y = STEM", 'kind == "head"', "architecture.heads", "self.scores.ffn"]
    for way in [*ways, "shape.heads_per_group", '"""head"""\n"a head"']:
        (tmp_path / "module.py").write_text(way + "\n")
        assert bool(kinds_named(tmp_path / "module.py")) == (way in ways or way.startswith('"""head')), way


if __name__ == "__main__":
    lines = [f"{path}: {', '.join(sorted(names))}" for path, names in files_that_name_a_kind()]
    sys.stdout.write("\n".join([f"{len(lines)} files name a kind of unit (at most {MOST})", *lines]) + "\n")
