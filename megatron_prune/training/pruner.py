"""One iteration's pruning: what the loop calls around its optimizer step.

Pruner.begin     before the forward pass: is a group due? then watch gradients and inputs, as the criterion needs
Pruner.score     gradients are reduced, weights not yet stepped: S at (w_t, g_t)
Pruner.prune     after the step: decide on rank 0, broadcast, update the survivors (variant B), retire, until the
                 schedule's credit is used up
"""

from __future__ import annotations

import dataclasses
import logging
import math

from torch import Tensor

from megatron_prune.config import Config
from megatron_prune.model.architecture import FFN, STEM, Architecture
from megatron_prune.optimizer.build import ShardedModel
from megatron_prune.pruning.history import Removal
from megatron_prune.pruning.schedule import PruningSchedule
from megatron_prune.pruning.second_order import SecondOrderUpdate
from megatron_prune.pruning.selector import Decision, SelectorSettings, choose
from megatron_prune.pruning.spike_guard import SpikeGuard
from megatron_prune.resharding.coordinator import Coordinator
from megatron_prune.saliency.collector import Collected, Collector, CollectorSettings
from megatron_prune.saliency.criteria import INVERSE_HESSIAN, Criterion, find_criterion
from megatron_prune.saliency.hessian import DiagonalCache
from megatron_prune.saliency.inputs import InputNeeds
from megatron_prune.saliency.reducer import ElementScores
from megatron_prune.saliency.scores import UnitScores, smooth
from megatron_prune.training.clock import PartClock
from megatron_prune.training.state import PRUNING, RunState
from megatron_prune.training.step import most

logger = logging.getLogger(__name__)


def selector_settings(config: Config) -> SelectorSettings:
    """The selector's part of the configuration."""
    pruning = config.pruning
    assert pruning.target_params is not None
    return SelectorSettings(
        target_params=pruning.target_params,
        types=tuple(pruning.types),
        gqa=pruning.gqa,
        head_score=pruning.head_score,
        normalize=pruning.normalize,
        finish=pruning.finish,
        min_heads=pruning.min_heads,
        min_ffn=pruning.min_ffn,
        min_hidden=pruning.min_hidden,
        draw_seed=config.training.seed if pruning.metric == "random" else None,
    )


def pruning_schedule(config: Config, kv_channels: int) -> PruningSchedule:
    """The schedule's part of the configuration."""
    pruning = config.pruning
    assert pruning.target_params is not None
    steps, gradients = pruning.ratio_steps
    cost = pruning.group_cost.resolved(kv_channels)
    return PruningSchedule(steps, gradients, pruning.first_prune_iter, cost, pruning.target_params)


def collector_settings(config: Config, num_microbatches: int, dp_size: int) -> CollectorSettings:
    """The part of the configuration that statistics depend on."""
    pruning, micro_batch_tokens = config.pruning, config.training.micro_batch_size * config.data.seq_length
    kept = math.ceil(pruning.second_order.calibration_tokens / (micro_batch_tokens * dp_size))
    return CollectorSettings(
        fisher=pruning.fisher,
        fisher_scale=micro_batch_tokens if pruning.fisher_unit == "token" else config.training.micro_batch_size,
        num_microbatches=num_microbatches,
        kept_microbatches=min(kept, num_microbatches),
        damping=pruning.second_order.damping,
    )


class Pruner:
    """Scores and removes groups of `model` as the schedule says; progress is kept in `state`."""

    def __init__(
        self,
        config: Config,
        model: ShardedModel,
        coordinator: Coordinator,
        state: RunState,
        clock: PartClock | None = None,
    ) -> None:
        self.clock = clock or PartClock(model.mesh.device)
        self.model, self.coordinator, self.state = model, coordinator, state
        self.config = config
        self.settings = selector_settings(config)
        self.schedule = pruning_schedule(config, model.table.shape.kv_channels)
        self.criterion: Criterion = find_criterion(config.pruning.metric)
        self._collector: Collector | None = None
        self._scores: ElementScores | None = None
        self._update: SecondOrderUpdate | None = None
        self._due = self._scheduled = False
        guard = config.pruning.spike_guard
        self.guard = None if guard.factor is None else SpikeGuard(guard.factor, guard.window)

    @property
    def _architecture(self) -> Architecture:
        return self.model.layout.architecture

    def begin(self, num_microbatches: int) -> None:
        """Before the forward pass of the next iteration."""
        parameters = self._architecture.parameters
        self._scheduled = self.state.phase == PRUNING and self.schedule.is_scheduled(
            self.state.iteration + 1, parameters
        )
        credits = self.schedule.credited(self.state.credits)
        self._due = self._scheduled and self.schedule.may_prune(credits, parameters)
        if self._due:
            settings = collector_settings(self.config, num_microbatches, self.model.mesh.dp_size)
            update = self._inputs_for_update(settings.kept_microbatches)
            self._collector = Collector(self.model, self.criterion, settings, self._cached_diagonals(), update)
            self._collector.arm()

    def score(self) -> None:
        """After the backward pass, before the optimizer step."""
        if self._collector is None:
            return
        collected, self._collector = self._collector.finish(), None
        self._cache_diagonals(collected)
        if self.config.pruning.second_order.enabled and collected.kept is not None:
            self._update = SecondOrderUpdate(self.model, collected.kept, self.config.pruning.second_order.damping)
        self._scores = collected.score(self.model, self.criterion, self.config.pruning.fisher)

    def unit_scores(self) -> UnitScores:
        """Sums per unit of what `score` found, not smoothed (a collective); for looking at them, nothing is removed."""
        assert self._scores is not None, "begin, forward and backward, score: then there is something to sum"
        return self._scores.reduce()

    def _inputs_for_update(self, micro_batches: int) -> InputNeeds:
        """What variant B wants to keep; nothing when it is off."""
        settings = self.config.pruning.second_order
        if not settings.enabled:
            return InputNeeds()
        return InputNeeds(kept=micro_batches, keep_stem=settings.stem and STEM in self.config.pruning.types)

    def _cached_diagonals(self) -> dict[str, Tensor] | None:
        """Inverse Hessians from an earlier step, while they are young enough."""
        cache = self.state.diagonals
        if cache is None or len(self.state.history) - cache.removals >= self.config.pruning.second_order.refresh:
            return None
        return cache.of_stage(self.model)

    def _cache_diagonals(self, collected: Collected) -> None:
        """Keep fresh inverse Hessians for later steps, where that is asked for."""
        if INVERSE_HESSIAN not in self.criterion.needs or self.config.pruning.second_order.refresh == 1:
            return
        if self._cached_diagonals() is None:
            assert collected.diagonals is not None
            cache = DiagonalCache.of_stages(collected.diagonals, self.model, len(self.state.history))
            self.state.diagonals = cache if cache.is_finite else None

    def prune(self, stepped: bool, loss: float | None = None) -> list[Removal]:
        """After the optimizer step of iteration `state.iteration`; returns what was removed.

        Args:
            stepped: False when the step was skipped for non-finite gradients: nothing is scored, earned or removed
                then.
            loss: of this iteration, for the guard against spikes; nothing is earned or removed during a spike.
        """
        scores, self._scores = self._scores, None
        is_paused = stepped and self._pauses(loss)
        removed = self._prune(None if is_paused else scores, stepped and not is_paused)
        self._update = None  # lets go of the inputs
        return removed

    def _prune(self, scores: ElementScores | None, stepped: bool) -> list[Removal]:
        if not self._scheduled or not stepped:
            return []
        state = self.state
        state.credits = self.schedule.credited(state.credits)
        if scores is None or not self._due:
            return []
        before, removed = state.smoothed, list[Removal]()
        self.model.force_param_sync()
        while self.schedule.may_prune(state.credits, self._architecture.parameters):
            removal = self._remove_one(scores, before, self.settings)
            if removal is None:
                break
            removed.append(removal)
        return removed + self._round_widths(scores, before)

    def _pauses(self, loss: float | None) -> bool:
        """Whether a spike of the loss keeps everything in place now (collective when there is a guard)."""
        guard, state = self.guard, self.state
        if guard is None or loss is None or state.phase != PRUNING:
            return False
        before = state.guard
        is_above = most([int(guard.is_above(before, loss))], self.model.mesh)[0] > 0
        now = state.guard = guard.observe(before, loss, is_above, state.iteration)
        if now.is_pausing and not before.is_pausing:
            logger.info(
                "iteration %d: loss %.4f against %.4f before: pruning pauses until it is back at %.4f",
                *(state.iteration, loss, now.reference, guard.threshold(now)),
            )
        elif before.since is not None and not now.is_pausing:
            paused = state.iteration - before.since
            logger.info("iteration %d: loss %.4f is back: pruning goes on after %d", state.iteration, loss, paused)
        return now.is_pausing

    def _remove_one(
        self, scores: ElementScores, before: UnitScores | None, settings: SelectorSettings
    ) -> Removal | None:
        """Sum, smooth (from the scores before this iteration), choose, remove; None when nothing can be removed."""
        state = self.state
        sums = scores.reduce()
        if sums.not_finite:
            logger.warning(
                "iteration %d: pruning.metric %s gives scores that are not finite (%s); nothing is pruned",
                state.iteration,
                self.config.pruning.metric,
                "; ".join(sums.not_finite),
            )
            return None
        state.smoothed = smooth(before, sums, self.config.pruning.saliency_momentum)
        decision = None
        if self.model.mesh.rank == 0:
            decision = choose(state.smoothed, self._architecture, settings, len(state.history))
        decision = self.coordinator.prepare(decision)
        if decision is None:
            logger.warning("iteration %d: every kind of group is at its floor; nothing is pruned", state.iteration)
            return None
        return self._commit(decision, scores)

    def _round_widths(self, scores: ElementScores, before: UnitScores | None) -> list[Removal]:
        """At the target: bring live widths down to multiples for fast deployment, least salient groups first."""
        rounding, removed = self.config.pruning.round_widths, list[Removal]()
        if self._architecture.parameters > self.schedule.target_params:
            return removed
        for kind, field, multiple in (
            (FFN, "ffn_hidden_size", rounding.ffn),
            (STEM, "hidden_size", rounding.hidden),
        ):
            settings = dataclasses.replace(self.settings, types=(kind,), finish="first")
            while getattr(self._architecture, field) % multiple:
                removal = self._remove_one(scores, before, settings)
                if removal is None:
                    break
                removed.append(removal)
        return removed

    def _commit(self, decision: Decision, scores: ElementScores) -> Removal:
        layout, state = self.model.layout, self.state
        errors = None
        if self._update is not None:
            with self.clock.part("second-order"):
                errors = self._update.compensate(decision.group)
        self.coordinator.commit(decision.group)
        scores.drop(decision.group, layout)
        state.credits = self.schedule.spent(state.credits, decision.group.kind)
        architecture = self._architecture
        assert state.smoothed is not None
        state.smoothed = state.smoothed.restricted(architecture)
        removal = Removal(
            iteration=state.iteration,
            tokens=state.consumed_tokens,
            kind=decision.group.kind,
            units=decision.group.units,
            scores=decision.scores,
            margin=decision.margin if math.isfinite(decision.margin) else None,
            parameters=architecture.parameters,
            num_attention_heads=architecture.num_attention_heads,
            ffn_hidden_size=architecture.ffn_hidden_size,
            hidden_size=architecture.hidden_size,
            layer_errors=None if errors is None else dataclasses.asdict(errors),
        )
        state.history.append(removal)
        return removal
