"""What all tests share: one thread per rank, no network, repeatable examples, and where the real inputs are.

Real inputs (the pretrained stories260K, texts) are no part of the repository. The environment variable
MEGATRON_PRUNE_DATA names their folder; a test asks for the fixture `real_data` (or `stories260k`, `tinystories`) and is
skipped, with the reason, where the variable is unset. A variable that names no folder is an error, not a skip.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before torch, transformers or matplotlib are imported by any test; spawned ranks inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from hypothesis import HealthCheck, settings

DATA_VARIABLE = "MEGATRON_PRUNE_DATA"

settings.register_profile(
    "quick",
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("full", parent=settings.get_profile("quick"), max_examples=500)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    """Make the data folder absolute: tests and the processes they start run in folders of their own.

    transformers copies code that comes with a model into a cache and imports it from there: one of the session's own.
    """
    cache = tempfile.TemporaryDirectory(prefix="modules-")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_MODULES_CACHE"] = cache.name
    folder = os.environ.get(DATA_VARIABLE, "")
    if not folder:
        os.environ.pop(DATA_VARIABLE, None)
    elif not Path(folder).is_dir():
        raise pytest.UsageError(f"{DATA_VARIABLE}={folder} is no folder; unset it to skip the tests on real inputs")
    else:
        os.environ[DATA_VARIABLE] = str(Path(folder).resolve())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs, absolute; skips where MEGATRON_PRUNE_DATA is unset."""
    folder = os.environ.get(DATA_VARIABLE)
    if folder is None:
        pytest.skip(f"{DATA_VARIABLE} is unset: it names the folder of real inputs")
    return Path(folder)


@pytest.fixture(scope="session")
def stories260k(real_data: Path) -> Path:
    """The Hugging Face folder of the pretrained stories260K: 5 layers, hidden 64, 8 query and 4 KV heads, FFN 172."""
    return real_data / "stories260K"


@pytest.fixture(scope="session")
def tinystories(real_data: Path) -> Path:
    """0.94 MB of the text stories260K was trained on; documents are split by blank lines."""
    return real_data / "text" / "tinystories_944k.txt"


@pytest.fixture
def run_tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the `main` of one of tools/ in this process (its imports take longer than its work); returns its output."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        assert status == 0, told.out + told.err
        return told.out + told.err

    return run
