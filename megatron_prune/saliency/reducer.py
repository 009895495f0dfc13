"""Sharded saliency: every rank sums S over the weights it owns, and only the small sums travel.

    ElementScores    S on this rank's owned ranges; `drop` a removed group, `reduce` to UnitScores
    score_elements   compute it at (w_t, g_t), between gradient reduction and the optimizer step

Heads and FFN channels live on one tensor-parallel rank; stem sums add over TP, PP and layers; with the distributed
optimizer each DP rank scores just the range it owns. Neither weights nor gradients are gathered. Per scoring
layers x (heads + ffn) + hidden numbers, one per unit, are summed over TP x PP (and over DP with the distributed
optimizer).
No atomic adds: the sums of a rank are bit-reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_prune.model.architecture import Group
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import EMPTY
from megatron_prune.optimizer.owned import OwnedShard
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import all_reduce_sum
from megatron_prune.saliency.criteria import FISHER, GRADIENT, LIVE, STEM_MAGNITUDE, Criterion, Elements
from megatron_prune.saliency.scores import UnitScores, places, score_length

# Weight name -> statistic -> one value per stored column (`stem_magnitude`: per stored row) of this rank.
ColumnStatistics = Mapping[str, Mapping[str, Tensor]]


@dataclass
class ElementScores:
    """S of every element of the output projections that this rank owns, at one (w_t, g_t).

    Args:
        pieces: owned ranges and their S.
        row_pieces: the S to sum over rows, by weight name, where the criterion has one of its own.
    """

    model: LiveModel
    pieces: list[tuple[OwnedShard, Tensor]]
    row_pieces: dict[str, Tensor] = field(default_factory=dict)

    def drop(self, group: Group, layout: ShardLayout) -> None:
        """Forget the elements of a removed group; `layout` is the one before its removal."""
        for shard, scores in self.pieces:
            tensors = [scores, *([self.row_pieces[shard.name]] if self.row_pieces else [])]
            shard.zero(tensors, shard.row.group_positions(group, layout, self.model.mesh.tp_rank))

    @torch.no_grad()
    def reduce(self) -> UnitScores:
        """Sums per live unit over all ranks (a collective over the whole model)."""
        mesh, layout, architecture = self.model.mesh, self.model.layout, self.model.architecture
        vector = torch.zeros(score_length(architecture), dtype=torch.float32, device=mesh.device.device)
        starts = places(architecture)
        for shard, scores in self.pieces:
            row_sums, column_sums = _sums(shard, scores)
            if self.row_pieces:
                row_sums, _ = _sums(shard, self.row_pieces[shard.name])
            for dim, sums in zip(shard.row.dims, (row_sums, column_sums), strict=True):
                if dim.kind not in starts:
                    continue
                slots = layout.slots(dim.kind, shard.row.site, mesh.tp_rank)
                live = np.flatnonzero(slots != EMPTY)
                if not len(live):
                    continue
                # Live slots of a rank are ascending ids, but not always neighbours in the canonical order of the layer.
                first = starts[dim.kind][dim.kind.site(shard.row.site)]
                order = np.searchsorted(architecture.ids(dim.kind, shard.row.site), slots[live])
                units = sums if dim.size == 1 else sums.view(len(slots), dim.size).sum(dim=1)
                at = torch.from_numpy(first + order).to(vector.device)
                vector[at] += units[torch.from_numpy(live).to(vector.device)]
        axes = [mesh.over("model"), *([mesh.over("owners")] if self.model.options.use_distributed_optimizer else [])]
        all_reduce_sum(vector, *axes)
        return UnitScores.from_vector(architecture, vector.cpu().numpy())


def _sums(shard: OwnedShard, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums [rows] and column sums [columns] of the owned range inside its whole local matrix."""
    rows, columns = shard.parameter.shape
    row_sums, column_sums = scores.new_zeros(rows), scores.new_zeros(columns)
    for offset, length, row, column in shard.blocks():
        block = scores[offset : offset + length].view(row.stop - row.start, column.stop - column.start)
        row_sums[row] += block.sum(dim=1)
        column_sums[column] += block.sum(dim=0)
    return row_sums, column_sums


@torch.no_grad()
def score_elements(
    model: LiveModel,
    criterion: Criterion,
    fisher: str,
    microbatch_fisher: dict[str, Tensor] | None = None,
    inputs: ColumnStatistics | None = None,
) -> ElementScores:
    """S of this rank's owned output weights; call after the gradients are reduced and before the optimizer steps.

    Args:
        fisher: `microbatch` (then `microbatch_fisher` is `MicrobatchFisher.reduce()`), `adam` (exp_avg_sq as it is
            before this step; zeros at first) or `batch` (the reduced gradient squared). The latter two are free and
            unscaled: a squared mean gradient is far smaller than the mean of squares.
        inputs: what the criterion needs to know of the layers' inputs (see `saliency.collector`).
    """
    pieces, row_pieces = [], {}
    for shard in model.owned():
        if not shard.row.is_output:
            continue
        gradient, weight, statistics = shard.grad.float(), shard.main.float(), {}
        for name in criterion.needs - {GRADIENT}:
            if name == FISHER:
                statistics[name] = _fisher(shard, gradient, fisher, microbatch_fisher)
            elif name == LIVE:
                statistics[name] = _live(shard, model)
            else:
                assert inputs is not None, f"criterion {criterion.name} needs {name}"
                statistics[name] = _spread(shard, inputs[shard.name][name], by_row=name == STEM_MAGNITUDE)
        elements = Elements(weight, gradient, statistics)
        pieces.append((shard, criterion.score(elements)))
        if criterion.stem is not None:
            row_pieces[shard.name] = criterion.stem(elements)
    return ElementScores(model, pieces, row_pieces)


def _fisher(shard: OwnedShard, gradient: Tensor, source: str, microbatch_fisher: dict[str, Tensor] | None) -> Tensor:
    if source == "microbatch":
        assert microbatch_fisher is not None
        return microbatch_fisher[shard.name]
    if source == "adam":
        return shard.moments.get("exp_avg_sq", torch.zeros_like(gradient))
    return gradient.square()


def _live(shard: OwnedShard, model: LiveModel) -> Tensor:
    """1 where both row and column of an element hold a unit, else 0."""
    masks = [
        torch.from_numpy(shard.row.element_ids(dim, model.layout, model.mesh.tp_rank) != EMPTY).to(shard.key.device)
        for dim in range(2)
    ]
    return _spread(shard, masks[0].float(), by_row=True).mul_(_spread(shard, masks[1].float(), by_row=False))


def _spread(shard: OwnedShard, values: Tensor, by_row: bool) -> Tensor:
    """One value per row (or column) of the local matrix, at every element of the owned range; flat fp32."""
    spread = torch.empty(shard.end - shard.start, dtype=torch.float32, device=values.device)
    for offset, length, rows, columns in shard.blocks():
        block = spread[offset : offset + length].view(rows.stop - rows.start, columns.stop - columns.start)
        block.copy_(values[rows][:, None].expand_as(block) if by_row else values[columns].expand_as(block))
    return spread
