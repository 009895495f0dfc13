"""One iteration's pruning: what the loop calls around its optimizer step.

Pruner.begin     before the forward pass: is a group due? then watch the micro-batches' gradients
Pruner.score     gradients are reduced, weights not yet stepped: S at (w_t, g_t)
Pruner.prune     after the step: decide on rank 0, broadcast, retire, until the schedule's credit is used up
"""

from __future__ import annotations

import dataclasses
import logging
import math

from megatron_prune.config import Config
from megatron_prune.model.architecture import FFN, STEM, Architecture
from megatron_prune.optimizer.build import ShardedModel
from megatron_prune.pruning.history import Removal
from megatron_prune.pruning.schedule import PruningSchedule
from megatron_prune.pruning.selector import Decision, SelectorSettings, choose
from megatron_prune.resharding.coordinator import Coordinator
from megatron_prune.saliency.criteria import Criterion, find_criterion
from megatron_prune.saliency.fisher import MicrobatchFisher
from megatron_prune.saliency.reducer import ElementScores, score_elements
from megatron_prune.saliency.scores import UnitScores, smooth
from megatron_prune.training.state import PRUNING, RunState

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


class Pruner:
    """Scores and removes groups of `model` as the schedule says; progress is kept in `state`."""

    def __init__(self, config: Config, model: ShardedModel, coordinator: Coordinator, state: RunState) -> None:
        self.model, self.coordinator, self.state = model, coordinator, state
        self.config = config
        self.settings = selector_settings(config)
        self.schedule = pruning_schedule(config, model.table.shape.kv_channels)
        self.criterion: Criterion = find_criterion(config.pruning.metric)
        self._fisher: MicrobatchFisher | None = None
        self._scores: ElementScores | None = None
        self._due = self._scheduled = False

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
        if self._due and "fisher" in self.criterion.needs and self.config.pruning.fisher == "microbatch":
            training, pruning = self.config.training, self.config.pruning
            scale = training.micro_batch_size * (self.config.data.seq_length if pruning.fisher_unit == "token" else 1)
            self._fisher = MicrobatchFisher(self.model, num_microbatches, scale)
            self._fisher.arm()

    def score(self) -> None:
        """After the backward pass, before the optimizer step."""
        if not self._due:
            return
        squares = self._fisher.reduce() if self._fisher is not None else None
        self._fisher = None
        self._scores = score_elements(self.model, self.criterion, self.config.pruning.fisher, squares)

    def unit_scores(self) -> UnitScores:
        """Sums per unit of what `score` found, not smoothed (a collective); for looking at them, nothing is removed."""
        assert self._scores is not None, "begin, forward and backward, score: then there is something to sum"
        return self._scores.reduce()

    def prune(self, stepped: bool) -> list[Removal]:
        """After the optimizer step of iteration `state.iteration`; returns what was removed.

        Args:
            stepped: False when the step was skipped for non-finite gradients: nothing is scored, earned or removed
                then.
        """
        scores, self._scores = self._scores, None
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

    def _remove_one(
        self, scores: ElementScores, before: UnitScores | None, settings: SelectorSettings
    ) -> Removal | None:
        """Sum, smooth (from the scores before this iteration), choose, remove; None when nothing can be removed."""
        state = self.state
        sums = scores.reduce()
        if not sums.is_finite:
            logger.warning("iteration %d: a saliency is not finite; nothing is pruned", state.iteration)
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
        )
        state.history.append(removal)
        return removal
