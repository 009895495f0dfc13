"""What is shown and recorded, by one rank: Megatron's log line, scalars, figures, a dashboard on a terminal.

IterationReport   what one iteration did
Window            sums over the iterations since the last log line
Reporter          takes one report per iteration and shows it

Nothing here makes the device wait, except reading the clock once per log line.
"""

import importlib.util
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prune.config import Config
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.budget import training_flops
from megatron_prune.pruning.groups import group_names
from megatron_prune.pruning.history import Removal
from megatron_prune.pruning.history_plot import plot_history
from megatron_prune.saliency.scores import UnitScores
from megatron_prune.training.dashboard import Dashboard, Snapshot
from megatron_prune.training.sinks import Sinks

logger = logging.getLogger(__name__)
MIB = 1 << 20
# The parts of an iteration, in the order in which they are shown; "other" is what lies between them.
PARTS = ("forward-backward", "scoring", "optimizer", "second-order", "retire", "compact", "evaluate", "save", "figures")


@dataclass(frozen=True)
class IterationReport:
    """What one iteration did.

    Args:
        parts: of the loss, by name, where it is a sum of several.
        scores: the last ones of all units, smoothed, where there are any.
        seconds: time by part since the last call (see `PartClock`); called once per log line.
        memory: peak bytes of this rank's device (see `DeviceRuntime`).
    """

    iteration: int
    total_iterations: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped_iterations: int
    removed: tuple[Removal, ...]
    parts: Mapping[str, float] = field(default_factory=dict)
    scores: UnitScores | None = None
    seconds: Callable[[], dict[str, float]] = dict
    memory: Callable[[], int] = int


@dataclass
class Window:
    """Iterations since the last line."""

    started: float = field(default_factory=lambda: time.perf_counter())
    iterations: int = 0
    flops: float = 0.0
    removed: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Rates:
    """Speed over one window or a whole session: per second, TFLOP/s per device, and their share of its peak."""

    seconds_per_iteration: float
    tokens_per_second: float
    tflops: float
    mfu: float | None


class Reporter:
    """Shows iterations; does nothing on ranks where `is_active` is False.

    Args:
        directory: the run's folder, for figures and TensorBoard files; None: neither is written.
        iteration: that the run goes on from.
    """

    def __init__(
        self, config: Config, world_size: int, directory: Path | None, is_active: bool, iteration: int = 0
    ) -> None:
        self.config, self.world_size, self.is_active, self.directory = config, world_size, is_active, directory
        self.window, self.session = Window(), Window()
        self._first: Architecture | None = None
        self._dashboard: Dashboard | None = None
        self._bar: Any = None
        self._drawn = -1
        self._facts: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        if not is_active:
            return
        self._peak = config.logging.peak_tflops or _own_peak(config)
        self._sinks = Sinks(config, directory, iteration)
        progress = config.logging.progress
        if progress == "auto":
            progress = "dashboard" if sys.stderr.isatty() else "lines"
        if progress == "dashboard":
            self._dashboard = Dashboard(sys.stderr)
        elif progress == "bar":
            from tqdm import tqdm

            self._bar = tqdm(unit="it", dynamic_ncols=True, desc="training")

    def begin(self, architecture: Architecture) -> None:
        """The first iteration follows."""
        self._first, self.window, self.session = architecture, Window(), Window()

    def iteration(self, report: IterationReport, architecture: Architecture) -> None:
        """Take in one iteration; print a line when `logging.log_interval` is complete."""
        if not self.is_active:
            return
        flops = self.config.tokens_per_iteration * training_flops(architecture, self.config.data.seq_length)
        for window in (self.window, self.session):
            window.iterations += 1
            window.flops += flops
            window.removed.update(removal.kind for removal in report.removed)
        for removal in report.removed:
            scores = {f"saliency/{kind}": score for kind, score in removal.scores.items()}
            self._sinks.record(scores, report.iteration)
        if self._bar is not None:
            self._bar.total = report.total_iterations
            self._bar.update(report.iteration - self._bar.n)
            self._bar.set_postfix(loss=f"{report.loss:.4f}", parameters=f"{architecture.parameters:,}", refresh=False)
        if report.iteration % self.config.logging.log_interval == 0:
            self._line(report, architecture)
            self.window = Window()
        if self._dashboard is not None:
            self._draw(self._dashboard, report, architecture)

    def evaluation(self, iteration: int, loss: float) -> None:
        """Take in a validation loss."""
        if not self.is_active:
            return
        self.message(f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} |")
        self._sinks.record({"validation loss": loss}, iteration)

    def message(self, text: str) -> None:
        """A line of its own, above a progress display if there is one."""
        if not self.is_active:
            return
        if self._dashboard is not None:
            self._dashboard.write(text)
        elif self._bar is not None:
            self._bar.write(text)
        else:
            logger.info("%s", text)

    def figures(self, history: Sequence[Removal], architecture: Architecture) -> None:
        """Draw the history so far, which led to `architecture`, into the run's folder, if it has grown.

        A failure is a warning, not the run's end.
        """
        if not self.is_active or self.directory is None or len(history) <= max(self._drawn, 0):
            return
        if importlib.util.find_spec("matplotlib") is None:
            return
        try:
            plot_history(history, architecture, self.directory)
            self._drawn = len(history)
        except OSError as error:
            self.message(f"figures could not be written: {error}")

    def summary(self, status: str, iteration: int, architecture: Architecture, memory: int) -> None:
        """The run's last line."""
        if not self.is_active or self._first is None:
            return
        rates, removed = self._rates(self.session), self.session.removed
        minutes = (time.perf_counter() - self.session.started) / 60
        mfu = "" if rates.mfu is None else f", MFU {rates.mfu:.1%}"
        self.message(
            f"{status}: iteration {iteration} ({self.session.iterations} in this session, {minutes:.1f} min), "
            f"{self._first.parameters:,} to {architecture.parameters:,} parameters "
            f"({_widths(architecture, ' ', ', ')}; groups removed, {self._counts(removed)}), "
            f"{rates.tokens_per_second:,.0f} tokens/s, {rates.tflops:.3g} TFLOP/s per device{mfu}, "
            f"peak memory {memory / MIB:,.0f} MiB"
        )

    def flush(self) -> None:
        """Take the progress display down and write what was recorded to where others read it."""
        for display in filter(None, (self._dashboard, self._bar)):
            display.close()
        self._dashboard = self._bar = None
        if self.is_active:
            self._sinks.flush()

    def close(self, report: Path | None = None) -> None:
        """Hand on the run's `report`, if there is one, and close what is open."""
        self.flush()
        if self.is_active:
            self._sinks.close(report)

    def _rates(self, window: Window) -> Rates:
        elapsed = max(time.perf_counter() - window.started, 1e-9) / max(window.iterations, 1)
        tflops = window.flops / max(window.iterations, 1) / elapsed / self.world_size / 1e12
        mfu = None if self._peak is None else tflops / self._peak
        return Rates(elapsed, self.config.tokens_per_iteration / elapsed, tflops, mfu)

    def _line(self, report: IterationReport, architecture: Architecture) -> None:
        rates = self._rates(self.window)
        memory = report.memory()
        throughput = ""
        if self.config.logging.log_throughput:
            throughput = f" throughput per GPU (TFLOP/s/GPU): {rates.tflops:.3f} |"
            throughput += f" tokens per second: {rates.tokens_per_second:.0f} |"
            throughput += "" if rates.mfu is None else f" MFU: {rates.mfu:.2%} |"
        self.message(
            f" iteration {report.iteration:8d}/{report.total_iterations:8d} | "
            f"consumed samples: {report.consumed_samples:12d} | "
            f"elapsed time per iteration (ms): {rates.seconds_per_iteration * 1000:.1f} |{throughput} "
            f"learning rate: {report.learning_rate:.6E} | "
            f"global batch size: {self.config.training.global_batch_size:5d} | "
            f"{_losses(report)} | grad norm: {report.grad_norm:.3f} | "
            f"number of skipped iterations: {report.skipped_iterations:3d} | parameters: {architecture.parameters} | "
            f"{_widths(architecture, ': ', ' | ')} | kv cache/token: {architecture.kv_cache_channels} | "
            f"pruned groups ({self._counts(self.window.removed, '): ')} | memory (MiB): {memory / MIB:.0f} |"
        )
        self._seconds = self._split(report.seconds(), rates)
        parts = " | ".join(f"{part}: {1000 * seconds:.1f}" for part, seconds in self._seconds.items())
        self.message(f" time per iteration (ms) | {parts} |")
        self._facts = {"tokens/s": f"{rates.tokens_per_second:,.0f}", "memory": f"{memory / MIB:,.0f} MiB"}
        self._facts |= {} if rates.mfu is None else {"MFU": f"{rates.mfu:.1%}"}
        self._scalars(report, architecture, rates, memory)

    def _split(self, seconds: dict[str, float], rates: Rates) -> dict[str, float]:
        """Seconds per iteration by part, and what is left over."""
        known = [part for part in PARTS if part in seconds] + [part for part in seconds if part not in PARTS]
        split = {part: seconds[part] / max(self.window.iterations, 1) for part in known}
        return {**split, "other": max(rates.seconds_per_iteration - sum(split.values()), 0.0)}

    def _scalars(self, report: IterationReport, architecture: Architecture, rates: Rates, memory: int) -> None:
        scalars = {
            **({"distilled loss": report.loss, **report.parts} if report.parts else {"lm loss": report.loss}),
            "learning rate": report.learning_rate,
            "grad norm": report.grad_norm,
            "tokens per second": rates.tokens_per_second,
            "TFLOP/s per GPU": rates.tflops,
            **({} if rates.mfu is None else {"MFU": rates.mfu}),
            "peak memory (MiB)": memory / MIB,
            "consumed tokens": report.consumed_tokens,
            "parameters": architecture.parameters,
            **{f"width/{kind.label}": architecture.width(kind) for kind in architecture.table.prunable},
            "KV cache elements per token": architecture.kv_cache_channels,
            **{f"seconds/{part}": seconds for part, seconds in self._seconds.items()},
        }
        self._sinks.record(scalars, report.iteration)
        scored = report.scores if self.window.removed else None
        values = {} if scored is None else {k.name: np.concatenate(sites) for k, sites in scored.values.items()}
        self._sinks.publish(report.iteration, values)

    def _counts(self, removed: Counter[str], colon: str = ": ") -> str:
        """`head/ffn/stem: 0/5/2`, of the kinds of groups that may leave, in the order of their registration."""
        names = [name for name in group_names() if name in self.config.pruning.types]
        return "/".join(names) + colon + "/".join(str(removed[name]) for name in names)

    def _draw(self, dashboard: Dashboard, report: IterationReport, architecture: Architecture) -> None:
        dashboard.losses.append(report.loss)
        dashboard.saliencies.extend(removal.scores[removal.kind] for removal in report.removed)
        if not dashboard.is_due() and report.iteration < report.total_iterations:
            return
        source = Architecture.full(architecture.shape)
        dashboard.draw(
            Snapshot(
                iteration=report.iteration,
                total_iterations=report.total_iterations,
                consumed_tokens=report.consumed_tokens,
                parameters=(source.parameters, architecture.parameters, self.config.pruning.target_params),
                widths={k.label: (source.width(k), architecture.width(k)) for k in source.table.prunable},
                losses=tuple(dashboard.losses),
                saliencies=tuple(dashboard.saliencies),
                facts=self._facts,
                seconds=self._seconds,
            )
        )


def _losses(report: IterationReport) -> str:
    """What is minimised; where that has parts, those first."""
    named = {**report.parts, "distilled loss": report.loss} if report.parts else {"lm loss": report.loss}
    return " | ".join(f"{name}: {value:.6E}" for name, value in named.items())


def _widths(architecture: Architecture, colon: str, between: str) -> str:
    return between.join(f"{kind.label}{colon}{architecture.span(kind)}" for kind in architecture.table.prunable)


# Dense bf16 peaks in TFLOP/s, from the manufacturer's data sheets; the first name found in the device's own wins.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "V100": 125.0,
}


def known_peak_tflops(device_name: str) -> float | None:
    """Dense peak of a device by its name, e.g. `NVIDIA A100-SXM4-80GB` -> 312; None for one that is not listed."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def _own_peak(config: Config) -> float | None:
    """The peak of this process's GPU in bf16, when it is one whose data sheet is known."""
    if config.parallel.device == "cpu" or not torch.cuda.is_available() or not config.training.bf16:
        return None
    return known_peak_tflops(torch.cuda.get_device_name())
