"""What this machine has for a run, and what is missing for which feature.

    megatron-prune doctor

Versions, devices, engines, memory, disk, Slurm; then a line per feature. Exit status 1 when training cannot work.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_prune import __version__

_VERSIONS = ("torch", "megatron-core", "numpy", "transformers", "tokenizers", "safetensors", "tensorboard")
_CORE = ("torch", "megatron.core", "numpy", "yaml", "safetensors", "sentencepiece", "psutil", "isal", "rich")
# Feature -> (packages to import, what brings them).
_FEATURES = {
    "training, pruning, export": (_CORE, "make install, or pip install megatron-prune after torch"),
    "tokenizer.json, exports re-read": (("transformers", "tokenizers"), "pip install 'megatron-prune[hf]'"),
    "figures (PNG)": (("matplotlib",), "pip install 'megatron-prune[plot]'"),
    "report.html": (("plotly",), "pip install 'megatron-prune[report]'"),
    "GGUF files": (("gguf",), "pip install 'megatron-prune[gguf]'"),
    "zero-shot tasks": (("lm_eval", "accelerate", "datasets"), "pip install 'megatron-prune[eval]'"),
    "Weights & Biases": (("wandb",), "pip install wandb; only for --wandb-project"),
    "TransformerEngine": (("transformer_engine",), "pip install 'megatron-prune[gpu]'; only on GPUs, optional"),
}


@dataclass(frozen=True)
class DoctorOptions:
    """The command has no options."""


def examined() -> Iterator[tuple[str, str]]:
    """(what, finding), a line each."""
    yield "megatron_prune", f"{__version__}, Python {platform.python_version()} ({sys.executable})"
    yield "versions", ", ".join(f"{name} {_version(name)}" for name in _VERSIONS)
    yield from _devices()
    yield "engine", _engine()
    yield "memory", _memory()
    yield "disk", ", ".join(f"{_size(shutil.disk_usage(place).free)} free in {place}" for place in _places())
    yield "Slurm", _slurm()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(missing)"


def _devices() -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0))
    yield "processors", f"{cores} cores for this process, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}"
    if find_spec("torch") is None:
        yield "GPUs", "unknown: torch is missing"
        return
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield "GPUs", f"none visible ({built}): runs use the CPU and gloo"
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield f"GPU {number}", f"{facts.name}, {_size(facts.total_memory)}, {bf16}"


def _engine() -> str:
    if find_spec("torch") is None or find_spec("megatron") is None or find_spec("megatron.core") is None:
        return "none: megatron-core is missing"
    from megatron_prune.errors import first_line

    try:
        from megatron_prune.model.classes import AUTO, engine_of
    except ImportError as error:  # of megatron-core's own
        return f"megatron-core cannot be imported: {first_line(error)}"
    return f"model.engine auto is {engine_of(AUTO)}; others: docs/engines.md"


def _memory() -> str:
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    told = f"{_size(shared)} of shared memory free"
    if find_spec("psutil") is None:
        return told
    import psutil

    found = psutil.virtual_memory()
    return f"{_size(found.available)} of {_size(found.total)} available, {told}"


def _places() -> list[Path]:
    own = [Path.cwd(), Path(os.environ.get("TMPDIR", "/tmp"))]
    return [place for place in dict.fromkeys(own) if place.is_dir()]


def _slurm() -> str:
    if "SLURM_JOB_ID" in os.environ:
        nodes = os.environ.get("SLURM_JOB_NUM_NODES", "?")
        return f"inside job {os.environ['SLURM_JOB_ID']}, {nodes} node(s)"
    return "sbatch is here" if shutil.which("sbatch") else "not here; torchrun starts several ranks without it"


def _size(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def missing() -> dict[str, tuple[list[str], str]]:
    """Feature -> (packages that are not there, what brings them)."""

    def lacks(name: str) -> bool:
        return find_spec(name.partition(".")[0]) is None or ("." in name and find_spec(name) is None)

    return {feature: ([name for name in names if lacks(name)], mend) for feature, (names, mend) in _FEATURES.items()}


def report(_options: DoctorOptions | None = None) -> int:
    """Print all of it; the exit status."""
    from megatron_prune.errors import one_line

    for what, finding in examined():
        print(one_line(f"{what:16} {finding}"))
    print()
    found = missing()
    for feature, (lacking, mend) in found.items():
        need = f"{', '.join(lacking)}: {mend}" if lacking else ""
        print(f"{'missing' if lacking else 'ok':8} {feature:32} {need}".rstrip())
    return 1 if next(iter(found.values()))[0] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status. Works without torch, which is what it is asked about."""
    if any(find_spec(name) is None for name in ("torch", "numpy", "yaml")):
        return report()
    from megatron_prune.commands.running import run_command

    return run_command("doctor", DoctorOptions, report, argv)
