"""Counts that say whether the structure holds: how many files know a kind of unit, how many a pruning step enters.

`python -m tests.test_structure` prints them with the files, and those that other tests hold: private names of other
packages (tests/runtime/test_compat.py) and import cycles (tests/test_names.py). docs/design.md has those of before.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.runtime.compat import PRIVATE
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import close_mesh, init_mesh
from megatron_prune.testing.helpers.oracle_cases import MODELS
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun
from tests import test_names

ROOT = Path(__file__).resolve().parents[1]
CONSTANTS = {"HEAD", "KV_HEAD", "FFN", "STEM"}
NAMES = {"head", "kv_head", "ffn", "stem"}
ATTRIBUTES = {"heads", "kv_heads", "ffn", "stem"}  # of what holds something per kind
HOLDERS = {"a", "after", "architecture", "before", "layout", "scores", "units"}
MOST = 11  # 42 before every kind was data
MOST_ENTERED = 35  # by a step that retires and compacts


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


def entered(_rank: int, _world_size: int) -> list[str]:
    """Files of the package (but of `testing`) with a function that one iteration enters, which trains, removes a group
    and compacts."""
    run = SteppedRun(
        Setup(shape_from_config(MODELS["gqa-untied"]), Case(), 16, 2, 4), init_mesh(choose_device("cpu"), 1, 1)
    )
    run.trainer.iterate()  # what happens once, beforehand
    found, before = set[str](), (run.architecture.parameters, run.coordinator.compactions)
    sys.setprofile(lambda frame, event, _: found.add(frame.f_code.co_filename) if event == "call" else None)
    run.trainer.iterate()
    sys.setprofile(None)
    assert run.architecture.parameters < before[0] and run.coordinator.compactions > before[1]
    close_mesh()
    package = ROOT / "megatron_prune"
    files = (Path(name).relative_to(package) for name in found if Path(name).is_relative_to(package))
    return sorted(str(file) for file in files if file.parts[0] != "testing")


def test_a_pruning_step_enters_few_files():
    files = run_ranks(entered, 1)[0]
    assert "training/trainer.py" in files and "pruning/selector.py" in files, "the count sees nothing"
    assert len(files) <= MOST_ENTERED, "\n".join(files)


if __name__ == "__main__":
    named = [f"{path}: {', '.join(sorted(names))}" for path, names in files_that_name_a_kind()]
    steps = run_ranks(entered, 1)[0]
    ring = test_names.cycle(test_names.imports(test_names.sources(test_names.ROOT), test_names.PACKAGE))
    counts = [
        *(f"{len(named)} files name a kind of unit (at most {MOST})", *named),
        *(f"{len(steps)} files are entered by a pruning step with its compaction (at most {MOST_ENTERED})", *steps),
        f"{len(PRIVATE)} private names of other packages",
        f"import cycles: {' -> '.join(ring) or 'none'}",
    ]
    sys.stdout.write("\n".join(counts) + "\n")
