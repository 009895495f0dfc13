"""Sharded saliency: every rank sums S over the weights it owns, and only the small sums travel.

    ElementScores    S on this rank's owned ranges; `drop` a removed group, `reduce` to UnitScores
    score_elements   compute it at (w_t, g_t), between gradient reduction and the optimizer step

Heads and FFN channels live on one tensor-parallel rank; stem sums add over TP, PP and layers; with the distributed
optimizer each DP rank scores just the range it owns. Neither weights nor gradients are gathered. Per scoring
layers x (heads + ffn) + hidden numbers are summed over TP x PP (and over DP with the distributed optimizer).
No atomic adds: the sums of a rank are bit-reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prune.model.architecture import FFN, HEAD, Group
from megatron_prune.model.layout import EMPTY, ShardLayout
from megatron_prune.optimizer.build import ShardedModel
from megatron_prune.optimizer.owned import OwnedShard, owned_shards
from megatron_prune.runtime.mesh import all_reduce_sum
from megatron_prune.saliency.criteria import Criterion, Elements
from megatron_prune.saliency.scores import UnitScores, score_length


@dataclass
class ElementScores:
    """S of every element of the output projections that this rank owns, at one (w_t, g_t)."""

    model: ShardedModel
    pieces: list[tuple[OwnedShard, Tensor]]

    def drop(self, group: Group, layout: ShardLayout) -> None:
        """Forget the elements of a removed group; `layout` is the one before its removal."""
        for shard, scores in self.pieces:
            shard.zero([scores], shard.row.group_positions(group, layout, self.model.mesh.tp_rank))

    @torch.no_grad()
    def reduce(self) -> UnitScores:
        """Sums per live unit over all ranks (a collective over the whole model)."""
        mesh, layout = self.model.mesh, self.model.layout
        architecture = layout.architecture
        layers, heads, ffn = (
            architecture.shape.num_layers,
            architecture.num_attention_heads,
            architecture.ffn_hidden_size,
        )
        vector = torch.zeros(score_length(architecture), dtype=torch.float32, device=mesh.device.device)
        stem = vector[layers * (heads + ffn) :]
        live_stem = torch.from_numpy(np.flatnonzero(layout.stem != EMPTY)).to(vector.device)
        for shard, scores in self.pieces:
            row_sums, column_sums = _sums(shard, scores)
            stem += row_sums[live_stem]
            dim = shard.row.parts[0].dims[1]
            slots = layout.slots(dim.kind, shard.row.layer, mesh.tp_rank)
            base, width = (0, heads) if dim.kind == HEAD else (layers * heads, ffn)
            assert dim.kind in (HEAD, FFN)
            live = np.flatnonzero(slots != EMPTY)
            if not len(live):
                continue
            # Live slots of a rank are ascending ids, but not always neighbours in the canonical order of the layer.
            first = base + shard.row.layer * width
            places = first + np.searchsorted(architecture.live(dim.kind, shard.row.layer), slots[live])
            units = column_sums.view(len(slots), dim.size).sum(dim=1)
            at = torch.from_numpy(places).to(vector.device)
            vector[at] += units[torch.from_numpy(live).to(vector.device)]
        groups = [mesh.mp, mesh.dp] if self.model.options.use_distributed_optimizer else [mesh.mp]
        all_reduce_sum(vector, *groups)
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
    model: ShardedModel, criterion: Criterion, fisher: str, microbatch_fisher: dict[str, Tensor] | None = None
) -> ElementScores:
    """S of this rank's owned output weights; call after the gradients are reduced and before the optimizer steps.

    Args:
        fisher: `microbatch` (then `microbatch_fisher` is `MicrobatchFisher.reduce()`), `adam` (exp_avg_sq as it is
            before this step; zeros at first) or `batch` (the reduced gradient squared). The latter two are free and
            unscaled: a squared mean gradient is far smaller than the mean of squares.
    """
    pieces = []
    for shard in owned_shards(model):
        if not shard.row.is_output:
            continue
        gradient, weight = shard.grad.float(), shard.main.float()
        squares = None
        if "fisher" in criterion.needs:
            if fisher == "microbatch":
                assert microbatch_fisher is not None
                squares = microbatch_fisher[shard.name]
            elif fisher == "adam":
                squares = shard.moments.get("exp_avg_sq", torch.zeros_like(gradient))
            else:
                squares = gradient.square()
        pieces.append((shard, criterion.score(Elements(weight, gradient, squares))))
    return ElementScores(model, pieces)
