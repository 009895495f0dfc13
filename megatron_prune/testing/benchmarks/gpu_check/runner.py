"""Run the steps one after another, each in a process of its own and within its seconds.

A step that raises, dies or takes too long leaves the rows it had, and one more that says so; the next one starts
whatever happened.
"""

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prune.config import Config
from megatron_prune.runtime.places import rank_settings
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row, append, read_rows, table
from megatron_prune.testing.helpers.ranks import search_path

logger = logging.getLogger(__name__)

LOG = "log.txt"
_PACKAGE = "megatron_prune.testing.benchmarks.gpu_check"


@dataclass(frozen=True)
class Step:
    """A module of this package with a function `check(context)` that yields rows, and its budget in seconds."""

    name: str
    seconds: float

    @property
    def check(self) -> Callable[[Context], Iterator[Row]]:
        """The function `check` of its module."""
        found: Callable[[Context], Iterator[Row]] = importlib.import_module(f"{_PACKAGE}.{self.name}").check
        return found


STEPS = (
    Step("smoke", 60),
    Step("cover", 110),
    Step("speed", 120),
    Step("memory", 70),
    Step("way", 80),
    Step("shared", 40),
    Step("science", 60),
)


def run_steps(context: Context, names: Sequence[str], slowness: float = 1.0) -> int:
    """Run the steps `names`; the number of rows that fail. Log and rows go to `context.out`, which they are added to.

    Args:
        slowness: budgets are multiplied by it (a CPU takes longer).
    """
    context.out.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        if step.name in names:
            seconds = step.seconds * slowness
            if step.name == "science":
                seconds = max(seconds, context.minutes * 60 + 60)
            _run_apart(step, context, seconds)
    rows = [row for row in read_rows(context.out) if row.step in names]
    text = table(rows)
    (context.out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return sum(row.passed is False for row in rows)


def _run_apart(step: Step, context: Context, seconds: float) -> None:
    command = [sys.executable, "-m", f"{_PACKAGE}.runner", step.name, context.device, str(context.out)]
    command += ["tiny" if context.tiny else "full", str(context.minutes)]
    command += [str(path) if path is not None else "" for path in (context.data, context.model, context.state)]
    environment = os.environ | {"PYTHONPATH": search_path()}
    environment |= rank_settings(Config(), environment)  # as the launcher starts a rank
    started = time.monotonic()
    logger.info("%s: %d seconds at most", step.name, seconds)
    with (context.out / LOG).open("ab") as log:
        log.write(f"\n===== {step.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            fault = "" if code == 0 else f"ended with status {code}, see {LOG}"
        except subprocess.TimeoutExpired:
            fault = f"not finished after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # whatever it started ends with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    spent = time.monotonic() - started
    row = Row("the step itself", fault or f"{spent:.0f} s", f"{seconds:.0f} s", not fault, spent, step.name)
    append(context.out, row)


def run_step(name: str, context: Context) -> int:
    """Run one step here; 0, or 1 after an error (which is a row, and a traceback in the log)."""
    step = next(step for step in STEPS if step.name == name)
    try:
        for row in step.check(context):
            append(context.out, replace(row, step=name))
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())[:200]
        append(context.out, Row("error", f"{type(error).__name__}: {words}", "none", False, step=name))
        return 1
    return 0


def _main(words: Sequence[str]) -> int:
    name, device, out, size, minutes, *paths = words
    data, model, state = (Path(path) if path else None for path in paths)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    context = Context(device, size == "tiny", Path(out), data, model, state, float(minutes))
    return run_step(name, context)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
