"""One iteration's pruning: what the loop calls around its optimizer step.

    Pruner.begin       before the forward pass: is a group due? then a `Scoring` watches gradients and inputs
    Scoring.finish     gradients are reduced, weights not yet stepped: S at (w_t, g_t), as `Scored`
    Pruner.prune       after the step: remove groups by it while the schedule says that one is due
    Scored.remove      one group: decide on rank 0, broadcast, update the survivors (second order), retire

Pruning without training (`training.one_shot`) uses `Scoring` and `Scored` without a schedule.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter

from torch import Tensor

from megatron_prune.pruning.groups import Rules, find_group
from megatron_prune.pruning.history import Removal
from megatron_prune.pruning.schedule import Schedule
from megatron_prune.pruning.second_order import SecondOrderUpdate
from megatron_prune.pruning.selector import Decision, choose
from megatron_prune.resharding.coordinator import Coordinator
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.device import PartClock
from megatron_prune.saliency.collector import Collected, Collector
from megatron_prune.saliency.criteria import INVERSE_HESSIAN
from megatron_prune.saliency.hessian import DiagonalCache
from megatron_prune.saliency.inputs import InputNeeds
from megatron_prune.saliency.reducer import ElementScores
from megatron_prune.saliency.scores import UnitScores, smooth
from megatron_prune.training.pruning_settings import PruningSettings
from megatron_prune.training.state import PRUNING, RunState
from megatron_prune.training.step import most

logger = logging.getLogger(__name__)


class Scoring:
    """Watches one global batch for what the criterion and the second-order update need; begin it before the forward
    passes, `finish` it after the backward passes. Collectives."""

    def __init__(
        self, coordinator: Coordinator, settings: PruningSettings, state: RunState, clock: PartClock | None = None
    ) -> None:
        self._coordinator, self._settings, self._state = coordinator, settings, state
        self._model = coordinator.model
        self._clock = clock or PartClock(self._model.mesh.device)
        update = InputNeeds()
        if settings.updates:
            update = InputNeeds(kept=settings.collector.kept_microbatches, keep_stem=settings.updates_stem)
        self._collector = Collector(
            self._model, settings.criterion, settings.collector, self._cached_diagonals(), update
        )
        self._collector.arm()

    def finish(self) -> Scored:
        """The scores, once the gradients are reduced and before the optimizer steps."""
        collected, settings = self._collector.finish(), self._settings
        self._cache_diagonals(collected)
        update = None
        if settings.updates and collected.kept is not None:
            update = SecondOrderUpdate(self._model, collected.kept, settings.collector.damping)
        scores = collected.score(self._model, settings.criterion, settings.collector.fisher)
        return Scored(self._coordinator, settings, self._state, self._clock, scores, update)

    def _cached_diagonals(self) -> dict[str, Tensor] | None:
        """Inverse Hessians from an earlier step, while they are young enough."""
        cache = self._state.diagonals
        if cache is None or len(self._state.history) - cache.removals >= self._settings.refresh:
            return None
        return cache.of_stage(self._model)

    def _cache_diagonals(self, collected: Collected) -> None:
        """Keep fresh inverse Hessians for later steps, where that is asked for."""
        if INVERSE_HESSIAN not in self._settings.criterion.needs or self._settings.refresh == 1:
            return
        if self._cached_diagonals() is None:
            assert collected.diagonals is not None
            cache = DiagonalCache.of_stages(collected.diagonals, self._model, len(self._state.history))
            self._state.diagonals = cache if cache.is_finite else None


class Scored:
    """Scores of one global batch, and removals by them."""

    def __init__(
        self,
        coordinator: Coordinator,
        settings: PruningSettings,
        state: RunState,
        clock: PartClock,
        scores: ElementScores,
        update: SecondOrderUpdate | None,
    ) -> None:
        self._coordinator, self._settings, self._state, self._clock = coordinator, settings, state, clock
        self._scores, self._update, self._before = scores, update, state.smoothed
        self._gone = Counter[str]()  # groups removed by these scores, by kind

    @property
    def _model(self) -> LiveModel:
        return self._coordinator.model

    def unit_scores(self) -> UnitScores:
        """Sums per live unit, not smoothed (a collective)."""
        return self._scores.reduce()

    def remove(self, rules: Rules | None = None) -> Removal | None:
        """Remove the least salient group by `rules` (None: the settings', within its limits); `state` records it. A
        collective.

        Returns None when nothing can be removed: what is left must wait for the next scores, or, with a warning,
        scores are not finite or all kinds at their floors.
        """
        state, settings = self._state, self._settings
        resting = self._resting() if rules is None else set()
        sums = self.unit_scores()
        if sums.not_finite:
            logger.warning(
                "iteration %d: pruning.metric %s gives scores that are not finite (%s); nothing is pruned",
                state.iteration,
                settings.criterion.name,
                "; ".join(sums.not_finite),
            )
            return None
        # Smoothed from the scores before this batch, however many groups leave by it.
        state.smoothed = smooth(self._before, sums, settings.momentum)
        decision = None
        if self._model.mesh.rank == 0:
            architecture, step = self._model.architecture, len(state.history)
            if settings.replay is not None:
                decision = settings.replay.next(architecture)
            else:
                decision = choose(state.smoothed, architecture, rules or settings.rules, step, resting)
        decision = self._coordinator.prepare(decision)
        if decision is None:
            if resting:
                return None
            logger.warning("iteration %d: every kind of group is at its floor; nothing is pruned", state.iteration)
            return None
        return self._commit(decision)

    def _resting(self) -> set[str]:
        """Names of the kinds of which enough have left by these scores."""
        return {name for name, limit in self._settings.limits.items() if self._gone[name] >= limit}

    def round_widths(self) -> list[Removal]:
        """At the target: bring live widths down to multiples for fast deployment, least salient groups first."""
        removed = list[Removal]()
        for name, multiple in self._settings.round_to.items():
            kind = find_group(name, "pruning.groups").kind
            rules = dataclasses.replace(self._settings.rules, types=(name,), finish="first")
            while self._model.architecture.width(kind) % multiple:
                removal = self.remove(rules)
                if removal is None:
                    break
                removed.append(removal)
        return removed

    def _commit(self, decision: Decision) -> Removal:
        layout, state = self._model.layout, self._state
        errors = None
        if self._update is not None:
            with self._clock.part("second-order"):
                errors = self._update.compensate(decision.group)
        self._coordinator.commit(decision.group)
        self._scores.drop(decision.group, layout)
        architecture = self._model.architecture
        assert state.smoothed is not None
        state.smoothed = state.smoothed.restricted(architecture)
        removal = Removal(
            iteration=state.iteration,
            tokens=state.consumed_tokens,
            group=decision.group,
            scores=decision.scores,
            margin=decision.margin if math.isfinite(decision.margin) else None,
            parameters=architecture.parameters,
            widths=architecture.widths(architecture.table.prunable),
            layer_errors=None if errors is None else dataclasses.asdict(errors),
        )
        state.history.append(removal)
        self._gone[decision.group.name] += 1
        return removal


class Pruner:
    """Scores and removes groups as the schedule says; progress is kept in `state`.

    Args:
        tokens_per_iteration: of one global batch; what `state` will have consumed is known before it is.
    """

    def __init__(
        self,
        settings: PruningSettings,
        schedule: Schedule,
        coordinator: Coordinator,
        state: RunState,
        tokens_per_iteration: int,
        clock: PartClock | None = None,
    ) -> None:
        self.settings, self.schedule, self.coordinator, self.state = settings, schedule, coordinator, state
        self.tokens_per_iteration = tokens_per_iteration
        self.clock = clock or PartClock(coordinator.model.mesh.device)
        self._is_open = False

    @property
    def _size(self) -> float:
        return self.settings.rules.budget.size(self.coordinator.model.architecture)

    @property
    def is_at_target(self) -> bool:
        """Whether the model keeps all limits."""
        return self._size <= self.schedule.target_params

    @property
    def target(self) -> str:
        """The limits, for people."""
        return self.settings.rules.budget.described()

    def begin(self) -> Scoring | None:
        """Before the forward pass of the next iteration: what watches it, if a group is due."""
        state, size = self.state, self._size
        iteration, tokens = state.iteration + 1, state.consumed_tokens + self.tokens_per_iteration
        self._is_open = state.phase == PRUNING and self.schedule.is_open(iteration, tokens, size)
        credits = self.schedule.credited(state.credits)
        if not self._is_open or not self.schedule.is_due(credits, tokens, size):
            return None
        return Scoring(self.coordinator, self.settings, state, self.clock)

    def prune(self, scored: Scored | None, stepped: bool, loss: float | None = None) -> list[Removal]:
        """After the optimizer step of iteration `state.iteration`; returns what was removed.

        Args:
            scored: of this iteration, where `begin` gave a scoring.
            stepped: False when the step was skipped for non-finite gradients: nothing is earned or removed then.
            loss: of this iteration, for the guard against spikes; nothing is earned or removed during a spike.
        """
        is_paused = stepped and self._pauses(loss)
        if not self._is_open or not stepped or is_paused:
            return []
        state = self.state
        state.credits = self.schedule.credited(state.credits)
        if scored is None:
            return []
        removed = list[Removal]()
        while self.schedule.is_due(state.credits, state.consumed_tokens, self._size):
            removal = scored.remove()
            if removal is None:
                break
            state.credits = self.schedule.spent(state.credits, removal.kind)
            removed.append(removal)
        if self.is_at_target:
            rounding = scored.round_widths()
            for removal in rounding:
                state.credits = self.schedule.spent(state.credits, removal.kind)
            removed += rounding
        if removed and self.settings.resets_adam:
            self.coordinator.model.reset_adam()
        return removed

    def _pauses(self, loss: float | None) -> bool:
        """Whether a spike of the loss keeps everything in place now (collective when there is a guard)."""
        guard, state = self.settings.guard, self.state
        if guard is None or loss is None or state.phase != PRUNING:
            return False
        before = state.guard
        is_above = most([int(guard.is_above(before, loss))], self.coordinator.model.mesh)[0] > 0
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
