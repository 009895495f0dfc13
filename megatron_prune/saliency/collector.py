"""Everything a scoring step needs besides weights and gradients, collected in one global batch's ordinary passes.

    Collector    arm() before the forward passes, finish() after the backward passes
    Collected    what `score_elements` takes, and the inputs that a second-order update will want

Nothing is collected that neither the criterion nor the update asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_prune.model.kinds import Kind
from megatron_prune.model.table import ENTRANCES
from megatron_prune.resharding.live import LiveModel
from megatron_prune.saliency.criteria import (
    FISHER,
    INPUT_MAGNITUDE,
    INPUT_NORM,
    INPUT_VARIANCE,
    INVERSE_HESSIAN,
    STEM_MAGNITUDE,
    Criterion,
)
from megatron_prune.saliency.fisher import MicrobatchFisher
from megatron_prune.saliency.hessian import inverse_diagonals, local_columns
from megatron_prune.saliency.influence import InfluenceWatcher
from megatron_prune.saliency.inputs import InputNeeds, InputWatcher, KeptInputs, Moments
from megatron_prune.saliency.reducer import ColumnStatistics, ElementScores, score_elements


@dataclass(frozen=True)
class CollectorSettings:
    """What the statistics depend on.

    Args:
        fisher: source of squared gradients, as `pruning.fisher`.
        fisher_scale: see `saliency.fisher`.
        num_microbatches: per iteration and data-parallel rank.
        kept_microbatches: of them, how many a Hessian is made from.
        damping: of that Hessian, relative to its mean diagonal.
        block_influence: whether that of the layers is wanted (see `saliency.influence`).
    """

    fisher: str = "microbatch"
    fisher_scale: float = 1.0
    num_microbatches: int = 1
    kept_microbatches: int = 1
    damping: float = 0.01
    block_influence: bool = False


@dataclass(frozen=True)
class Collected:
    """Statistics of one global batch.

    Args:
        fisher: `MicrobatchFisher.reduce()`, where the criterion wants it.
        columns: statistics of the inputs per stored column.
        diagonals: [H^-1]_pp per live column, where they were computed.
        kept: inputs for a second-order update, or None.
        besides: scores of units that are no sums over output projections.
    """

    fisher: dict[str, Tensor] | None
    columns: ColumnStatistics
    diagonals: dict[str, Tensor] | None
    kept: KeptInputs | None
    besides: Mapping[Kind, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def score(self, model: LiveModel, criterion: Criterion, fisher: str) -> ElementScores:
        """S of every owned element of the output projections, from these statistics; see `score_elements`."""
        return score_elements(model, criterion, fisher, self.fisher, self.columns, self.besides)


class Collector:
    """Collects what `criterion` needs, and inputs for an update where `for_update` asks for them.

    Args:
        diagonals: [H^-1]_pp to use instead of computing them.
        for_update: inputs that are kept beyond what the criterion needs.
    """

    def __init__(
        self,
        model: LiveModel,
        criterion: Criterion,
        settings: CollectorSettings,
        diagonals: dict[str, Tensor] | None = None,
        for_update: InputNeeds | None = None,
    ) -> None:
        self._model, self._criterion, self._settings, self._diagonals = model, criterion, settings, diagonals
        needs = criterion.needs - ({INVERSE_HESSIAN} if diagonals is not None else set())
        own = InputNeeds.of_criterion(frozenset(needs), settings.kept_microbatches)
        update = for_update or InputNeeds()
        wanted = InputNeeds(own.moments, own.stem_moments, max(own.kept, update.kept), update.keep_stem)
        self._watcher = InputWatcher(model, wanted) if wanted else None
        self._fisher = None
        if FISHER in criterion.needs and settings.fisher == "microbatch":
            self._fisher = MicrobatchFisher(model, settings.num_microbatches, settings.fisher_scale)
        self._influence = InfluenceWatcher(model) if settings.block_influence else None

    def arm(self) -> None:
        """Hook the layers; call before the forward passes."""
        for part in (self._fisher, self._watcher, self._influence):
            if part is not None:
                part.arm()

    @torch.no_grad()
    def finish(self) -> Collected:
        """Unhook and reduce over ranks (collective); call when the gradients are reduced."""
        model, diagonals = self._model, self._diagonals
        squares = self._fisher.reduce() if self._fisher is not None else None
        inputs = self._watcher.finish() if self._watcher is not None else None
        kept = inputs.kept if inputs is not None else None
        if INVERSE_HESSIAN in self._criterion.needs and diagonals is None:
            assert kept is not None
            diagonals = inverse_diagonals(kept, model, self._settings.damping)
        moments = inputs.moments if inputs is not None else {}
        besides = self._influence.finish() if self._influence is not None else {}
        return Collected(squares, _columns(model, moments, diagonals or {}), diagonals, kept, besides)


def _columns(model: LiveModel, moments: dict[str, Moments], diagonals: dict[str, Tensor]) -> ColumnStatistics:
    """Statistics by output weight and name."""
    columns: dict[str, dict[str, Tensor]] = {}
    for name, found in moments.items():
        row = model.table.row(name)
        if not row.is_output:
            continue
        columns[name] = {
            INPUT_NORM: found.mean_square.sqrt(),
            INPUT_VARIANCE: found.variance,
            INPUT_MAGNITUDE: found.magnitude,
        }
        entrance = model.table.find(ENTRANCES[row.role], row.layer).name
        if entrance in moments:
            columns[name][STEM_MAGNITUDE] = moments[entrance].magnitude
    for name, diagonal in diagonals.items():
        columns.setdefault(name, {})[INVERSE_HESSIAN] = local_columns(diagonal, model, name, empty=1.0)
    return columns
