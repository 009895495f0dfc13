"""Where numbers go besides the log: TensorBoard, a file for Prometheus, and Weights & Biases when it is asked for and
installed.

Sinks        everything that is open; `record` hands a set of numbers of one iteration to each
start_wandb  a run that a requeued job goes on with, told by the folder it saves to
"""

import hashlib
import logging
import re
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.config import Config, dump
from megatron_prune.errors import UserError
from megatron_prune.runtime.folders import replace_file

logger = logging.getLogger(__name__)
FILE_NAME = "metrics.prom"


class Sinks:
    """Opens what the configuration names.

    Args:
        directory: where TensorBoard's files go unless `logging.tensorboard_dir` says otherwise; None: nowhere.
        iteration: that the run goes on from; TensorBoard forgets later ones.
    """

    def __init__(self, config: Config, directory: Path | None, iteration: int = 0) -> None:
        self._board: Any = None
        self._place: str | Path = ""
        self._wandb: Any = None
        metrics = config.logging.prometheus_file
        self._metrics = Path(metrics) if metrics else directory and directory / FILE_NAME
        self._run = directory.resolve().name if directory else "run"
        self._last = dict[str, float]()
        board = config.logging.tensorboard_dir or (directory / "tensorboard" if directory else None)
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter

            _leave_telling_to_draw()
            # What a run that was killed wrote after its last checkpoint is hidden, or the curve would be drawn twice.
            purge = iteration + 1 if iteration else None
            try:
                self._board = SummaryWriter(str(board), purge_step=purge)
            except OSError as error:
                raise UserError(
                    f"logging.tensorboard_dir (--tensorboard-dir): {board} cannot be written: {error.strerror}"
                ) from error
            self._place = board
            text = textwrap.indent(dump(config), "    ")
            self._draw(lambda board: board.add_text("configuration", text, iteration))
        if config.logging.wandb_project:
            self._wandb = start_wandb(config)

    def publish(self, iteration: int, scores: Mapping[str, np.ndarray]) -> None:
        """The last numbers for Prometheus; `scores` of units by kind, of which TensorBoard draws histograms."""
        finite = {name: values for name, values in scores.items() if np.isfinite(values).all()}
        self._draw(lambda board: [board.add_histogram(f"scores/{name}", finite[name], iteration) for name in finite])
        if self._metrics is None:
            return
        try:
            numbers = {"iteration": iteration, "time seconds": time.time(), **self._last}
            replace_file(self._metrics, exposition(numbers, self._run).encode(), lasting=False)
        except OSError as error:
            logger.warning("no more %s: %s", self._metrics, error.strerror)
            self._metrics = None

    def record(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Numbers by name, of one iteration."""
        self._last |= scalars
        self._draw(lambda board: [board.add_scalar(name, value, iteration) for name, value in scalars.items()])
        if self._wandb is not None:
            self._wandb.log({**scalars, "iteration": iteration})

    def flush(self) -> None:
        """Write to TensorBoard's files what is not in them yet."""
        self._draw(lambda board: board.flush())

    def close(self, report: Path | None = None) -> None:
        """Flush and close what is open; Weights & Biases keeps the `report` as an artifact of the run."""
        self._draw(lambda board: board.close())
        if self._wandb is None:
            return
        if report is not None:
            self._wandb.log_artifact(str(report), name=f"report-{self._wandb.id}", type="report")
        self._wandb.finish()

    def _draw(self, write: Callable[[Any], object]) -> None:
        """`write` to TensorBoard, if it is there; a full disk, met here or by its writing thread, ends only that."""
        if self._board is not None:
            try:
                write(self._board)
            except OSError as error:
                self._board = None
                logger.warning("no more TensorBoard figures: %s: %s", self._place, error.strerror)


def _leave_telling_to_draw() -> None:
    """What TensorBoard's writing thread cannot write is raised at the next call, too: no traceback of the thread."""
    before = threading.excepthook
    if before.__module__ == __name__:
        return

    def tell(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            before(failed)

    threading.excepthook = tell


def check_wandb(config: Config) -> None:
    """Raise UserError where Weights & Biases is asked for and not installed."""
    if config.logging.wandb_project and find_spec("wandb") is None:
        raise UserError(
            "logging.wandb_project (--wandb-project): wandb is not installed; install it or leave the field null"
        )


def start_wandb(config: Config) -> Any:
    """A run of Weights & Biases. Raises UserError where it is not installed, or refuses to start."""
    field = "logging.wandb_project (--wandb-project)"
    check_wandb(config)
    import wandb
    import yaml

    same = {}
    if config.checkpoint.save:
        folder = Path(config.checkpoint.save).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        same = {"id": hashlib.sha256(str(folder).encode()).hexdigest()[:16], "name": folder.name, "resume": "allow"}
        same["dir"] = str(folder)
    try:
        return wandb.init(project=config.logging.wandb_project, config=yaml.safe_load(dump(config)), **same)
    except wandb.Error as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{field}: {reason}; WANDB_MODE=offline needs neither account nor network") from error


def exposition(values: Mapping[str, float], run: str) -> str:
    """The numbers in `values` in Prometheus' format, all of them gauges. Every name begins with `megatron_prune_`,
    every line says which run it is of; `seconds/save` becomes `megatron_prune_seconds{run="...",part="save"}`."""
    metrics: dict[str, list[str]] = {}
    for name, value in values.items():
        head, _, part = name.partition("/")
        metric = "megatron_prune_" + re.sub(r"[^a-z0-9]+", "_", head.lower()).strip("_")
        labels = {"run": run, **({"part": part} if part else {})}
        told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        metrics.setdefault(metric, [f"# TYPE {metric} gauge"]).append(f"{metric}{{{told}}} {float(value)!r}")
    return "".join(f"{line}\n" for lines in metrics.values() for line in lines).replace("} nan", "} NaN")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
