"""What a user's `pip install .` brings: all that the package imports, and no CUDA package.

setup.py is run with a recording `setup`, so that these tests see what pip would see without building anything.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_prune"
REMOTE = PACKAGE / "huggingface" / "remote"  # copied into exports and run there; nothing here imports it
TESTED_TORCH = Version("2.13.0+cpu")

# Names of distributions that hold CUDA code or exist only for it.
CUDA = re.compile(r"^(nvidia|cuda|cupy|triton|pytorch-triton|transformer-engine|flash-attn|apex|nvtx)(-|$)")

# Used when present, declared nowhere: there is nothing on the package index that could be declared (apex), or it is an
# account-bound service (wandb).
UNDECLARED_OPTIONAL = {"apex", "wandb"}
# Import names whose distribution is called otherwise and may be absent where the tests run.
DISTRIBUTIONS = {"transformer_engine": "transformer-engine", "lm_eval": "lm-eval", "megatron": "megatron-core"}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """The keyword arguments setup.py calls `setup` with."""
    import setuptools

    recorded: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: recorded.update(arguments))
        patch.chdir(REPOSITORY)
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return recorded


def names(requirements: list[str]) -> set[str]:
    """Canonical distribution names of requirement strings."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def closure(requirements: list[str], stop: set[str]) -> set[str]:
    """All installed distributions that `requirements` lead to, without looking behind those in `stop`."""
    seen: set[str] = set()
    pending = [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        if name not in stop:
            inner = [Requirement(text) for text in importlib.metadata.requires(name) or []]
            pending += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": ""})]
    return seen


def imported_packages(path: Path, *, on_import_only: bool) -> Iterator[tuple[str, int]]:
    """Yield (top-level package, line) of a file's absolute imports; optionally only those that run when it is imported.

    Functions run later; `if TYPE_CHECKING:` and `try:` blocks at module level may be skipped or fail, so do not count.
    """
    deferred = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.If, ast.Try)
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), filename=str(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0], node.lineno
        pending += [
            child for child in ast.iter_child_nodes(node) if not (on_import_only and isinstance(child, deferred))
        ]


def undeclared(folder: Path, allowed: set[str], *, on_import_only: bool) -> list[str]:
    """One line for each import under `folder` whose distribution is not among `allowed`; `REMOTE` counts as late."""
    by_import = importlib.metadata.packages_distributions()
    own = {"megatron_prune", "tools", "__future__"} | set(sys.stdlib_module_names)
    found = []
    for path in sorted(folder.rglob("*.py")):
        if on_import_only and path.parent == REMOTE:
            continue
        for package, line in imported_packages(path, on_import_only=on_import_only):
            if package in own:
                continue
            known = [DISTRIBUTIONS[package]] if package in DISTRIBUTIONS else by_import.get(package, [package])
            if not {canonicalize_name(name) for name in known} & allowed:
                found.append(f"{path.relative_to(REPOSITORY)}:{line}: {package}")
    return found


def test_no_requirement_brings_cuda_packages(declared: dict[str, Any]) -> None:
    extras = [text for extra, texts in declared["extras_require"].items() if extra != "gpu" for text in texts]
    assert [name for name in names(declared["install_requires"] + extras) if CUDA.match(name)] == []
    # torch's own requirements depend on its build, which is chosen before this package is installed.
    reached = closure(declared["install_requires"], stop={"torch"})
    assert {"torch", "megatron-core", "numpy"} <= reached
    assert [name for name in reached if CUDA.match(name)] == []


def test_apex_is_never_named_as_a_requirement(declared: dict[str, Any]) -> None:
    everything = declared["install_requires"] + [
        text for texts in declared["extras_require"].values() for text in texts
    ]
    assert "apex" not in names(everything)


def test_torch_present_is_kept(declared: dict[str, Any]) -> None:
    by_name = {canonicalize_name(r.name): r for r in map(Requirement, declared["install_requires"])}
    torch = by_name["torch"].specifier
    assert TESTED_TORCH in torch
    assert Version(importlib.metadata.version("torch")) in torch
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    pinned = re.search(r"^TORCH = torch==(\S+)$", makefile, re.MULTILINE)
    assert pinned is not None
    assert pinned.group(1) == TESTED_TORCH.public
    assert f"torch=={pinned.group(1)}" in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    # Alone and before the package, so that the package's requirements find it there.
    assert makefile.index("$(TORCH_PIP_ARGS) $(TORCH)") < makefile.index("-e '.[$(EXTRAS)]'")


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    """The lines of constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_constraints_are_exact_and_fit_any_platform(pins: list[Requirement]) -> None:
    assert [pin.name for pin in pins if CUDA.match(pin.name)] == []
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "==" and "+" not in version.version and not pin.extras, str(pin)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_tested_version_on_every_python(
    declared: dict[str, Any], pins: list[Requirement], python: str
) -> None:
    where = {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}
    chosen: dict[str, Requirement] = {}
    for pin in pins:
        if pin.marker is None or pin.marker.evaluate(where):
            assert canonicalize_name(pin.name) not in chosen, f"two versions of {pin.name} on Python {python}"
            chosen[canonicalize_name(pin.name)] = pin
    extras = [text for extra, texts in declared["extras_require"].items() if extra != "gpu" for text in texts]
    for requirement in map(Requirement, declared["install_requires"] + extras):
        (version,) = chosen[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(version.version), f"{requirement}, but {version.version} is tested"


def test_constraints_name_all_that_an_installation_brings(declared: dict[str, Any], pins: list[Requirement]) -> None:
    wanted = [*declared["install_requires"], *declared["extras_require"]["dev"]]
    assert closure(wanted, stop={"torch"}) <= {canonicalize_name(pin.name) for pin in pins}


def test_megatron_core_is_bounded_from_below_only(declared: dict[str, Any]) -> None:
    by_name = {canonicalize_name(r.name): r for r in map(Requirement, declared["install_requires"])}
    core = by_name["megatron-core"]
    assert not core.extras
    assert Version("0.16.1") in core.specifier
    assert Version("0.16.0") not in core.specifier
    assert Version("0.19.2") in core.specifier


def test_installed_environment_satisfies_the_requirements(declared: dict[str, Any]) -> None:
    wrong = []
    for requirement in map(Requirement, declared["install_requires"]):
        version = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} but {version} is installed")
    assert wrong == []


def test_every_folder_of_the_package_is_shipped(declared: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(REPOSITORY) for path in PACKAGE.rglob("*.py")}
    assert set(declared["packages"]) == {".".join(folder.parts) for folder in folders}
    assert declared["version"] == runpy.run_path(str(PACKAGE / "__init__.py"))["__version__"]


def test_importing_the_package_needs_only_plain_requirements(declared: dict[str, Any]) -> None:
    assert undeclared(PACKAGE, names(declared["install_requires"]), on_import_only=True) == []


def test_every_import_is_declared_somewhere(declared: dict[str, Any]) -> None:
    extras = [text for texts in declared["extras_require"].values() for text in texts]
    allowed = names(declared["install_requires"] + extras) | UNDECLARED_OPTIONAL
    assert undeclared(PACKAGE, allowed, on_import_only=False) == []
    assert undeclared(REPOSITORY / "tools", allowed, on_import_only=False) == []


def test_import_scan_tells_later_imports_from_immediate_ones(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import alpha.sub\nfrom beta import x\nfrom . import own\n"
        "def later():\n    import gamma\n"
        "try:\n    import delta\nexcept ImportError:\n    delta = None\n"
        "class Now:\n    import epsilon\n",
        encoding="utf-8",
    )
    assert dict(imported_packages(path, on_import_only=True)) == {"alpha": 1, "beta": 2, "epsilon": 11}
    assert dict(imported_packages(path, on_import_only=False)).keys() == {"alpha", "beta", "gamma", "delta", "epsilon"}
