"""The loop. The order of one pruning-aware iteration is `Trainer.iterate`; everything else is when to do what.

1. forward and backward over the global batch, gradients reduced     (step.forward_backward)
2. if a group is due: score the output layer group at (w_t, g_t)     (Scoring.finish)
3. optimizer step, unless something is not finite                    (LiveModel.step)
4. every rank sees the stepped weights; decide, broadcast, retire    (Pruner.prune)
5. compact when a quantum is free                                    (Coordinator.compact_if_due)
6. log; evaluate, save and stop when due                             (StepAgreement.after_step)
"""

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_prune.checkpoint.record import CONTINUED, FINISHED, PRUNING
from megatron_prune.config import Config
from megatron_prune.errors import TrainingStoppedError, UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.history import HistoryWriter, Removal, before
from megatron_prune.resharding.coordinator import Coordinator
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.device import PartClock
from megatron_prune.training.learning_rate import build_scheduler
from megatron_prune.training.metrics import IterationReport, Reporter
from megatron_prune.training.pruner import Pruner
from megatron_prune.training.pruning_settings import pruning_schedule, pruning_settings
from megatron_prune.training.state import RunState
from megatron_prune.training.step import (
    NEXT_TOKEN,
    Objective,
    forward_backward,
    microbatches,
    most,
    open_stream,
    read_batch,
    validation_loss,
)
from megatron_prune.training.stopping import StepAgreement, Stop

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Datasets:
    """megatron-core data sets; `valid` may be None when nothing is evaluated."""

    train: Any
    valid: Any


class Saver(Protocol):
    """Writes checkpoints; all ranks call its methods together. A failed save is its own to report."""

    @property
    def complete(self) -> int | None:
        """Iteration of the newest complete checkpoint of this run, if there is one."""

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes in the background."""

    def save(self, state: RunState) -> None:
        """Write one, or begin to."""

    def finish(self) -> None:
        """Wait for one that is still being written."""


class Trainer:
    """Trains, prunes and trains on.

    Args:
        saver: writes a checkpoint when one is due, or None.
        history: where removals are recorded on this rank, or None.
        agreement: when to stop early; None: as `config` says, signals are not looked at.
        objective: what is minimised.
    """

    def __init__(
        self,
        config: Config,
        model: LiveModel,
        datasets: Datasets,
        state: RunState,
        reporter: Reporter,
        saver: Saver | None = None,
        history: HistoryWriter | None = None,
        agreement: StepAgreement | None = None,
        objective: Objective = NEXT_TOKEN,
    ) -> None:
        self.config, self.model, self.datasets, self.state = config, model, datasets, state
        self.reporter, self.saver, self.history, self.objective = reporter, saver, history, objective
        self.coordinator = Coordinator(model, config.training.check_invariants)
        self.clock = PartClock(model.mesh.device)
        self.pruner: Pruner | None = None
        if config.pruning.enabled:
            source = before(model.architecture, state.history)
            self.pruner = Pruner(
                pruning_settings(config, model.mesh.dp_size, source),
                pruning_schedule(config, source),
                self.coordinator,
                state,
                config.tokens_per_iteration,
                self.clock,
            )
        self.scheduler = build_scheduler(config, model, state)
        model.rebuilt.append(self._follow_optimizer)
        self._begin_phase()
        self.agreement = agreement or StepAgreement(config.training, model.mesh)

    @property
    def architecture(self) -> Architecture:
        """Live widths now."""
        return self.model.architecture

    # The run ---------------------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Run until the end or an exit condition; returns the run's status (see `stopping`). Raises
        TrainingStoppedError: the run broke one of its own rules; what was being written is complete then."""
        try:
            status = self._loop()
        except TrainingStoppedError:
            self._finish_saving()
            raise
        self._finish_saving()
        if self.saver and self.saver.complete != self.state.iteration:
            raise TrainingStoppedError(
                f"{self.config.checkpoint.save}: iteration {self.state.iteration}, the run's last, could not be saved; "
                f"{self.where_to_resume()}"
            )
        if status == FINISHED and self.state.nonfinite_in_a_row:
            raise TrainingStoppedError(
                f"the run ends at iteration {self.state.iteration} with its last {self.state.nonfinite_in_a_row} steps "
                f"skipped, since they were not finite; {self._cure()}"
            )
        memory = self.model.mesh.device.peak_memory_bytes()
        self.reporter.summary(status, self.state.iteration, self.architecture, memory)
        return status

    def _loop(self) -> str:
        if self.config.training.eval_interval and "source" not in self.state.stages:
            self._measure("source")
        if self.state.phase == PRUNING and self.pruner and self.pruner.is_at_target:
            self._enter_continued()
        self.clock.collect()  # what came before the first iteration is none of its parts
        self.reporter.begin(self.architecture)
        while not self.state.progress.is_finished(self.config):
            self.iterate()
            if self._due(self.config.training.eval_interval):
                with self.clock.part("evaluate"):
                    loss, _ = self._validation_loss()
                self.reporter.evaluation(self.state.iteration, loss)
            stop, is_writing = self.agreement.after_step(
                self.state.iteration, self.saver is not None and self.saver.is_writing
            )
            if not is_writing:
                self._finish_saving()
            if stop or self._due(self.config.checkpoint.save_interval):
                self._save()
            if stop:
                self.reporter.message(self._farewell(stop))
                return stop.status
        if self.config.training.eval_interval and not self.config.training.exit_at_target:
            self._measure("final")
        self._save()
        if self.pruner and self.state.phase == PRUNING:
            logger.warning(
                "training.train_iters ended at %d parameters, above the target of %s; give more iterations, or prune "
                "faster",
                self.architecture.parameters,
                self.pruner.target,
            )
        return FINISHED

    def iterate(self) -> None:
        """One iteration, in the order of the module's docstring."""
        state, training = self.state, self.config.training
        scoring = self.pruner.begin() if self.pruner else None
        learning_rate = self.model.learning_rate
        with self.clock.part("forward-backward"):
            batches = read_batch(self.batches, self.num_microbatches, self.model.mesh)
            parts = forward_backward(
                self.model,
                batches,
                self.num_microbatches,
                self._passes.training.micro_batch_size,
                self.config.data.seq_length,
                NEXT_TOKEN if scoring and self.config.distillation.scores == "cross_entropy" else self.objective,
            )
            loss = parts.pop("loss")
        with self.clock.part("scoring"):
            scored = scoring.finish() if scoring else None
        with self.clock.part("optimizer"):
            stepped, grad_norm = self.model.step()
        state.iteration += 1
        state.consumed_samples += training.global_batch_size
        state.consumed_tokens += self.config.tokens_per_iteration
        self.scheduler.step(1)
        self._count_nonfinite(stepped, loss)
        with self.clock.part("retire"):
            removed = self.pruner.prune(scored, stepped, loss) if self.pruner else []
        del scoring, scored  # they hold inputs of layers and element scores, which a compaction needs the memory of
        self._record(removed)
        reached = state.phase == PRUNING and bool(self.pruner and self.pruner.is_at_target)
        with self.clock.part("compact"):
            self.coordinator.compact_if_due()
        self._report(loss, parts, grad_norm, learning_rate, removed)
        if reached:
            self._enter_continued()

    def _follow_optimizer(self) -> None:
        self.scheduler.optimizer = self.model.optimizer

    # Parts -----------------------------------------------------------------------------------------------------------

    def _begin_phase(self) -> None:
        """Micro-batches and recomputation as the phase wants them; the data go on where they are."""
        is_small = self.state.phase == CONTINUED
        self._passes = self.config.after_target if is_small else self.config
        if is_small and self.config.continued.continue_recompute_granularity is not None:
            self.model.recompute(self._passes.model.recompute_granularity)
        self.num_microbatches = microbatches(self._passes, self.model.mesh)
        self.batches = open_stream(self.datasets.train, self._passes, self.model.mesh, self.state.consumed_samples)

    def _enter_continued(self) -> None:
        """The target is reached: from here on the small model trains on its own schedule."""
        state = self.state
        self.reporter.message(
            f"target reached at iteration {state.iteration}: {self.architecture.parameters} parameters, "
            f"{len(state.history)} groups removed"
        )
        state.phase, state.phase_start = CONTINUED, state.iteration
        self.scheduler = build_scheduler(self.config, self.model, state)
        if self._passes != self.config.after_target:
            self._begin_phase()
        if self.config.training.eval_interval and "pruned" not in state.stages:
            self._measure("pruned")

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.state.iteration % int(interval or 1) == 0

    def _farewell(self, stop: Stop) -> str:
        reason = {Stop.PREEMPTED: "a signal asked for it", Stop.TIME_LIMIT: "training.exit_duration_in_mins is over"}
        then = "--load goes on from here" if self.saver else "nothing is saved: checkpoint.save is not set"
        return f"stopping at iteration {self.state.iteration}, {reason.get(stop, 'as asked')}; {then}"

    def where_to_resume(self) -> str:
        """What to do after this run has failed, as a phrase."""
        complete = self.saver.complete if self.saver else None
        if complete is None:
            return "there is no checkpoint of this run to resume from"
        return f"resume from iteration {complete} of {self.config.checkpoint.save}"

    def _count_nonfinite(self, stepped: bool, loss: float) -> None:
        state, limit = self.state, self.config.training.max_nonfinite_steps
        if stepped:
            state.nonfinite_in_a_row = 0
            return
        state.skipped_iterations += 1
        state.nonfinite_in_a_row += 1
        self.reporter.message(f"iteration {state.iteration}: loss {loss}, gradients not finite: step skipped")
        if state.nonfinite_in_a_row >= limit:
            raise TrainingStoppedError(
                f"training.max_nonfinite_steps: {limit} steps in a row were not finite (up to iteration "
                f"{state.iteration}); {self._cure()}"
            )

    @torch.no_grad()
    def _cure(self) -> str:
        """What helps after steps that were not finite (a collective): weights that are not, no rate can mend."""
        own = any(not bool(torch.isfinite(weight).all()) for weight in self.model.module.parameters())
        if most([int(own)], self.model.mesh)[0]:
            start = self.config.checkpoint.load or self.config.model.hf_model
            return f"the weights themselves hold NaN or Inf: check those of {start}, or go back further"
        return f"{self.where_to_resume()}, with a lower learning rate or other data"

    def _record(self, removed: list[Removal]) -> None:
        if self.history is not None:
            for removal in removed:
                self.history.append(removal)

    def _report(
        self, loss: float, parts: dict[str, float], grad_norm: float, learning_rate: float, removed: list[Removal]
    ) -> None:
        state = self.state
        report = IterationReport(
            iteration=state.iteration,
            total_iterations=state.progress.end(self.config),
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            loss=loss,
            parts=parts,
            scores=state.smoothed,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped_iterations=state.skipped_iterations,
            removed=tuple(removed),
            seconds=self.clock.collect,
            memory=self.model.mesh.device.peak_memory_bytes,
        )
        self.reporter.iteration(report, self.architecture)

    def _save(self) -> None:
        if self.saver is None or self.saver.complete == self.state.iteration:
            return
        with self.clock.part("save"):
            self.saver.save(self.state)
        with self.clock.part("figures"):
            self.reporter.figures(self.state.history, self.architecture)
        self.coordinator.last_checkpoint = self.saver.complete

    def _finish_saving(self) -> None:
        if self.saver is not None:
            self.saver.finish()
            self.coordinator.last_checkpoint = self.saver.complete

    def _validation_loss(self) -> tuple[float, float]:
        if self.datasets.valid is None:
            raise UserError("training.eval_interval: there is no validation data; see data.split and valid_data_path")
        return validation_loss(self.model, self.datasets.valid, self._passes)

    def _measure(self, stage: str) -> None:
        """Record loss and speed of the model as it stands now, under the stage's name."""
        with self.clock.part("evaluate"):
            loss, tokens_per_second = self._validation_loss()
        self.state.record_stage(stage, self.architecture, loss, tokens_per_second)
        self.reporter.evaluation(self.state.iteration, loss)
