"""Scoring and pruning without training: the post-training way, on the loop's own scorer, selector and compaction.

The calibration batch is one global batch, the first of the data set, and every scoring sees the same one. No optimizer
step is taken, so Adam's moments are never allocated and the weights are the source's (but for second-order updates).
Ratio, group costs and smoothing of the configuration mean nothing here.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from megatron_prune.config import Config
from megatron_prune.data.batches import Dataset
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.history import Removal, before
from megatron_prune.pruning.selector import Decision, choose
from megatron_prune.resharding.coordinator import Coordinator
from megatron_prune.resharding.live import LiveModel
from megatron_prune.saliency.scores import UnitScores
from megatron_prune.training.pruner import Scored, Scoring
from megatron_prune.training.pruning_settings import pruning_settings, selector_rules
from megatron_prune.training.state import RunState
from megatron_prune.training.step import Batches, forward_backward, microbatches, open_stream, read_batch


def _ignore(*_: Any) -> None:
    """What is called where the caller gave nothing to call."""


class OneShot:
    """A model and the batch that its units are scored on. All ranks call the same methods in the same order.

    Args:
        config: see `launch.assembly.one_shot_run.one_shot_config`; its global batch is the calibration batch.
        dataset: where the calibration batch comes from.
        on_batch: called with every micro-batch of this rank. on_removal: called with the architecture after every
            removal on the way to the target.
    """

    def __init__(
        self,
        config: Config,
        model: LiveModel,
        dataset: Dataset,
        on_batch: Callable[[], None] = _ignore,
        on_removal: Callable[[Architecture], None] = _ignore,
    ) -> None:
        self.config, self.model, self.dataset = config, model, dataset
        self.coordinator = Coordinator(model, config.training.check_invariants)
        self._on_batch, self._on_removal = on_batch, on_removal

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that this rank sees per scoring."""
        return microbatches(self.config, self.model.mesh)

    def unit_scores(self, metric: str) -> UnitScores:
        """Sums per unit of the criterion called `metric`, as training would score the same batch; nothing is removed.
        Raises UserError: a sum is not finite, on all ranks."""
        scores = self._score(self._config_of(metric), RunState()).unit_scores()
        if scores.not_finite:
            where = "; ".join(scores.not_finite)
            raise UserError(f"{metric}: scores are not finite on this data ({where}); check the model and the data")
        return scores

    def first_choice(self, scores: UnitScores, metric: str) -> Decision | None:
        """The group that would go first by these scores; None when every kind is at its floor."""
        return choose(scores, scores.architecture, selector_rules(self._config_of(metric), scores.architecture))

    def rounds(self, state: RunState, groups_per_scoring: int | None = None) -> Iterator[list[Removal]]:
        """Prune to the target; yields what each scoring led to. `state.history` grows, the model is compacted
        when that frees a quantum.

        Args:
            groups_per_scoring: removals after which the units are scored again; None: all of them after one scoring.

        Raises:
            UserError: the target cannot be reached: floors, or saliencies that are not finite.
        """
        architecture = before(self.model.architecture, state.history)
        budget = selector_rules(self.config, architecture).budget
        while not budget.is_met(self.model.architecture):
            scored, removed = self._score(self.config, state), list[Removal]()
            while not budget.is_met(self.model.architecture) and len(removed) != groups_per_scoring:
                removal = scored.remove()
                if removal is None:
                    break
                removed.append(removal)
                self._on_removal(self.model.architecture)
            if not removed:
                raise UserError(
                    f"pruning.target: {budget.described()} is not reached; at {self.model.architecture.parameters} "
                    "parameters every kind of group is at its floor, or a saliency is not finite; nothing was saved"
                )
            is_there = budget.is_met(self.model.architecture)
            removed += scored.round_widths() if is_there else []
            self.coordinator.compact_if_due()
            yield removed

    def _config_of(self, metric: str) -> Config:
        """The configuration, but scoring by `metric`."""
        return dataclasses.replace(self.config, pruning=dataclasses.replace(self.config.pruning, metric=metric))

    def _score(self, config: Config, state: RunState) -> Scored:
        """Gradients of the calibration batch, watched as in training; nothing is smoothed."""
        mesh, training = self.model.mesh, config.training
        settings = pruning_settings(config, mesh.dp_size, before(self.model.architecture, state.history))
        settings = dataclasses.replace(settings, momentum=0.0, limits={})
        scoring = Scoring(self.coordinator, settings, state)
        if settings.looks_at_data:
            batches = open_stream(self.dataset, config, mesh, is_single=True)
            forward_backward(
                self.model,
                self._announced(read_batch(batches, self.num_microbatches, mesh)),
                self.num_microbatches,
                training.micro_batch_size,
                config.data.seq_length,
            )
        return scoring.finish()

    def _announced(self, batches: Batches) -> Batches:
        for batch in batches:
            self._on_batch()
            yield batch
