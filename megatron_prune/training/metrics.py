"""What is shown and recorded, by one rank: Megatron's log line, TensorBoard scalars, a progress bar on a terminal.

Window      sums over the iterations since the last log line
Reporter    takes one record per iteration and shows it
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import GROUP_KINDS, Architecture
from megatron_prune.pruning.history import Removal
from megatron_prune.training.flops import training_flops_per_token

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IterationReport:
    """What one iteration did; `seconds` is wall time by part (`forward-backward`, `scoring`, `optimizer`, `retire`,
    ...).
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
    seconds: dict[str, float]


@dataclass
class Window:
    """Iterations since the last line."""

    started: float = field(default_factory=time.perf_counter)
    iterations: int = 0
    flops: float = 0.0
    removed: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)


class Reporter:
    """Shows iterations; does nothing on ranks where `is_active` is False.

    Args:
        directory: default place of TensorBoard files, or None to write none.
    """

    def __init__(self, config: Config, world_size: int, directory: Path | None, is_active: bool) -> None:
        self.config, self.world_size, self.is_active = config, world_size, is_active
        self.window = Window()
        self._board: Any = None
        self._wandb: Any = None
        self._bar: Any = None
        if not is_active:
            return
        board = config.logging.tensorboard_dir or (directory / "tensorboard" if directory else None)
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(board))
        if config.logging.wandb_project:
            self._wandb = _start_wandb(config)
        wants_bar = config.logging.progress == "bar" or (config.logging.progress == "auto" and sys.stderr.isatty())
        if wants_bar:
            from tqdm import tqdm

            self._bar = tqdm(unit="it", dynamic_ncols=True, desc="training")

    def iteration(self, report: IterationReport, architecture: Architecture) -> None:
        """Take in one iteration; print a line when `logging.log_interval` is complete."""
        if not self.is_active:
            return
        window, tokens = self.window, self.config.tokens_per_iteration
        window.iterations += 1
        window.flops += tokens * training_flops_per_token(architecture, self.config.data.seq_length)
        window.removed.update(removal.kind for removal in report.removed)
        window.seconds.update(report.seconds)
        self._scalars_of_removals(report)
        if self._bar is not None:
            self._bar.total = report.total_iterations
            self._bar.update(report.iteration - self._bar.n)
            self._bar.set_postfix(loss=f"{report.loss:.4f}", parameters=f"{architecture.parameters:,}", refresh=False)
        if report.iteration % self.config.logging.log_interval == 0:
            self._line(report, architecture)
            self.window = Window()

    def evaluation(self, iteration: int, loss: float) -> None:
        """Take in a validation loss."""
        if not self.is_active:
            return
        self.message(f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} |")
        self._record("validation loss", loss, iteration)

    def message(self, text: str) -> None:
        """A line of its own, above a progress bar if there is one."""
        if not self.is_active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            logger.info("%s", text)

    def close(self) -> None:
        """Flush and close what is open."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _line(self, report: IterationReport, architecture: Architecture) -> None:
        window = self.window
        elapsed = (time.perf_counter() - window.started) / window.iterations
        tokens_per_second = self.config.tokens_per_iteration / elapsed
        tflops = window.flops / window.iterations / elapsed / self.world_size / 1e12
        removed = "/".join(str(window.removed[kind]) for kind in GROUP_KINDS)
        throughput = f" throughput per GPU (TFLOP/s/GPU): {tflops:.3f} |" if self.config.logging.log_throughput else ""
        self.message(
            f" iteration {report.iteration:8d}/{report.total_iterations:8d} | "
            f"consumed samples: {report.consumed_samples:12d} | "
            f"elapsed time per iteration (ms): {elapsed * 1000:.1f} |{throughput} "
            f"learning rate: {report.learning_rate:.6E} | "
            f"global batch size: {self.config.training.global_batch_size:5d} | "
            f"lm loss: {report.loss:.6E} | grad norm: {report.grad_norm:.3f} | "
            f"number of skipped iterations: {report.skipped_iterations:3d} | parameters: {architecture.parameters} | "
            f"heads: {architecture.num_attention_heads} | ffn: {architecture.ffn_hidden_size} | "
            f"hidden: {architecture.hidden_size} | kv cache/token: {architecture.kv_cache_channels} | "
            f"pruned groups (head/ffn/stem): {removed} |"
        )
        self._scalars(report, architecture, tokens_per_second, tflops)

    def _scalars(
        self, report: IterationReport, architecture: Architecture, tokens_per_second: float, tflops: float
    ) -> None:
        scalars = {
            "lm loss": report.loss,
            "learning rate": report.learning_rate,
            "grad norm": report.grad_norm,
            "tokens per second": tokens_per_second,
            "TFLOP/s per GPU": tflops,
            "parameters": architecture.parameters,
            "width/heads": architecture.num_attention_heads,
            "width/ffn": architecture.ffn_hidden_size,
            "width/hidden": architecture.hidden_size,
            "KV cache elements per token": architecture.kv_cache_channels,
            **{f"seconds/{part}": s / self.window.iterations for part, s in self.window.seconds.items()},
        }
        for name, value in scalars.items():
            self._record(name, value, report.iteration)

    def _record(self, name: str, value: float, iteration: int) -> None:
        if self._board is not None:
            self._board.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log({name: value, "iteration": iteration})

    def _scalars_of_removals(self, report: IterationReport) -> None:
        for removal in report.removed:
            for kind, score in removal.scores.items():
                self._record(f"saliency/{kind}", score, report.iteration)


def _start_wandb(config: Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("logging.wandb_project: wandb is not installed; install it or leave the field null") from error
    return wandb.init(project=config.logging.wandb_project)
