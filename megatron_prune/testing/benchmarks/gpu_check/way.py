"""The whole way on the device: import, prune, save in mid-pruning, go on on the CPU, export, compare logits.

Each command is a process of its own, as users start them. The run that changes its device is held against one that
stayed on the CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.record import Progress
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row
from megatron_prune.testing.helpers.comparison import MARGIN
from megatron_prune.testing.helpers.ranks import ROOT, search_path
from megatron_prune.testing.helpers.tiny_runs import prepare

_STOP = 8  # iteration after which the device changes
_TRAIN = ("-m", "megatron_prune.pretrain")


def check(context: Context) -> Iterator[Row]:
    """Rows in the order of the module's docstring."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder, ThreadPoolExecutor(1) as beside:
        run, save, alone = prepare(Path(folder) / "files"), Path(folder) / "run", Path(folder) / "alone"
        undisturbed = beside.submit(python, *_TRAIN, *run.arguments(alone))
        stop = ("--device", context.device, "--exit-interval", _STOP, "--save-interval", _STOP)
        python(*_TRAIN, *run.arguments(save, *stop))
        iteration = Progress.read(save).iteration
        yield Row("pruned and saved", f"iteration {iteration}", str(_STOP), iteration == _STOP)
        python(*_TRAIN, *run.arguments(save))
        undisturbed.result()
        yield _compared(context, _history(alone), _history(save))
        export = ("--load", save, "--save", Path(folder) / "hf", "--verify")
        told = python("-m", "megatron_prune", "convert-to-hf", *export)
        line = next((line for line in told.splitlines() if "; logits (" in line), "no line of the verification")
        yield Row("exported, logits of transformers", line[line.find("logits") :][:120], "equal", "logits" in line)


def _compared(context: Context, expected: list[dict[str, Any]], mine: list[dict[str, Any]]) -> Row:
    alike = [a["gone"] == b["gone"] for a, b in zip(expected, mine, strict=False)]
    measured, passed = f"{len(mine)} of {len(expected)}", len(mine) == len(expected)
    if False in alike:
        number = alike.index(False)
        margin = expected[number]["margin"] or 0.0
        measured, passed = f"{number} of {len(expected)}, then margin {margin:.1e}", margin < MARGIN
    return Row(f"{context.device}, then CPU: removals as on the CPU alone", measured, "all", passed)


def _history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "pruning_history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"gone"' in line]


def python(*words: object) -> str:
    """Output of a command of this repository. Raises RuntimeError with its end when it fails."""
    environment = os.environ | {"PYTHONPATH": search_path()}
    environment["OMP_NUM_THREADS"] = "1"  # on many cores the threads of a tiny model cost more than its work
    command = [sys.executable, *(str(word) for word in words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stdout.write(done.stdout + done.stderr)
        raise RuntimeError(f"{' '.join(command[1:4])}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout + done.stderr
