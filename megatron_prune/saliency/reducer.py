"""Sharded saliency: every rank sums S over the weights it owns, and only the small sums travel.

    ElementScores    S on this rank's owned ranges; `drop` a removed group, `reduce` to UnitScores
    ScoredRows       S of what this rank owns of one output projection
    score_elements   compute it at (w_t, g_t), between gradient reduction and the optimizer step

Heads and FFN channels live on one tensor-parallel rank; stem sums add over TP, PP and layers; with the distributed
optimizer each DP rank scores just the range it owns. Neither weights nor gradients are gathered. Per scoring
layers x (heads + ffn) + hidden numbers, one per unit, are summed over TP x PP (and over DP with the distributed
optimizer).

S is summed once per global batch; what a removed group added is subtracted. The terms are fp32 sums like the first
ones and the differences are kept in fp64, so a sum is wrong by the rounding of an fp32 sum over what was there at
first, however many groups have left; when half of that may be gone all is summed anew.
No atomic adds: the sums of a rank are bit-reproducible.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import Kind
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import EMPTY, Param
from megatron_prune.optimizer.owned import OwnedShard
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import all_reduce_sum
from megatron_prune.saliency.criteria import FISHER, GRADIENT, LIVE, STEM_MAGNITUDE, Criterion, Elements
from megatron_prune.saliency.scores import UnitScores, places, score_length

# Weight name -> statistic -> one value per stored column (`stem_magnitude`: per stored row) of this rank.
ColumnStatistics = Mapping[str, Mapping[str, Tensor]]
Site = tuple[Kind, int]  # where units of a kind are counted
LEAST_LEFT = 0.5  # of the elements that were there when the sums were formed; below it they are formed anew
Terms = defaultdict[Site, list[tuple[int, Tensor]]]  # what is added to the sums there: (first element, fp32 values)


@dataclass(frozen=True)
class ScoredRows:
    """S of those rows of an output projection of which this rank owns something; zero where it does not.

    Args:
        first: which row of the local matrix comes first. rows: of the whole local matrix.
        by_column, by_row: fp32 [rows here, columns], to be summed over columns and over rows; the same tensor unless
            the criterion has an S of its own for rows.
    """

    row: Param
    first: int
    rows: int
    by_column: Tensor
    by_row: Tensor

    @classmethod
    def of(cls, shard: OwnedShard, by_column: Tensor, by_row: Tensor | None) -> ScoredRows:
        """From flat values on the owned range."""
        rows, columns = shard.parameter.shape
        first, last = shard.start // columns, -(-shard.end // columns)

        def whole(values: Tensor) -> Tensor:
            if len(values) < (last - first) * columns:
                padded = values.new_zeros((last - first) * columns)
                padded[shard.start - first * columns :][: len(values)] = values
                values = padded
            return values.view(-1, columns)

        matrix = whole(by_column)
        return cls(shard.row, first, rows, matrix, matrix if by_row is None else whole(by_row))

    @property
    def sites(self) -> tuple[Site, Site]:
        """Where the units of its rows and of its columns are counted."""
        row, column = ((dim.kind, dim.kind.site(self.row.site)) for dim in self.row.dims)
        return row, column


class ElementScores:
    """S of every element of the output projections that this rank owns, at one (w_t, g_t).

    Args:
        model: in the layout that `pieces` were computed in.
        pieces: what there is of each output projection.
        besides: scores of other units, the same on all ranks, that `reduce` adds.
    """

    def __init__(
        self, model: LiveModel, pieces: list[ScoredRows], besides: Mapping[Kind, tuple[np.ndarray, ...]] | None = None
    ) -> None:
        self.model, self.pieces, self._besides = model, pieces, besides or {}
        self._layout = model.layout
        self._places: Tensor | None = None
        self._nothing: dict[int, Tensor] = {}
        scored = self._layout.architecture.table.scored
        dims = [
            (site, dim.size, length)
            for piece in pieces
            for site, dim, length in zip(piece.sites, piece.row.dims, (piece.rows, piece.by_row.shape[1]), strict=True)
            if dim.kind in scored
        ]
        self._sizes = {site[0]: size for site, size, _ in dims}  # elements per unit
        self._lengths = {site: length for kind in self._sizes for site, _, length in dims if site[0] == kind}
        self._sum_up()

    @torch.no_grad()
    def drop(self, group: Group, layout: ShardLayout) -> None:
        """Forget the elements of a removed group; `layout` is the one before its removal."""
        slots, terms, gone = layout.group_slots(group, self.model.mesh.tp_rank), Terms(list), list[Tensor]()
        for piece in self.pieces:
            (row, column), (rows, columns) = piece.sites, piece.row.group_runs(slots)
            has_own_rows = piece.by_row is not piece.by_column
            for first, last in rows:
                a, b = max(first - piece.first, 0), min(last - piece.first, len(piece.by_column))
                if a < b:
                    part = _stretch(piece.by_column, 0, a, b)
                    terms[column].append((0, part.sum(dim=0) if b - a > 1 else part))
                    gone += [part, _stretch(piece.by_row, 0, a, b)] if has_own_rows else [part]
            for a, b in columns:
                part = _stretch(piece.by_row, 1, a, b)
                terms[row].append((piece.first, part.sum(dim=1) if b - a > 1 else part))
                gone += [part, _stretch(piece.by_column, 1, a, b)] if has_own_rows else [part]
        if gone:
            self._sums -= self._flat(terms)
            torch._foreach_zero_(gone)
        if _share_left(self.model.architecture, self._summed) < LEAST_LEFT:
            self._sum_up()

    @torch.no_grad()
    def reduce(self) -> UnitScores:
        """Sums per live unit over all ranks (a collective over the whole model)."""
        mesh, architecture = self.model.mesh, self._layout.architecture
        if self._places is None:
            self._places = torch.from_numpy(self._places_of_units()).to(mesh.device.device)
        vector = self._per_slot(self._sums).index_select(0, self._places).float()
        axes = [mesh.over("model"), *([mesh.over("owners")] if self.model.options.use_distributed_optimizer else [])]
        all_reduce_sum(vector, *axes)
        sums = UnitScores.from_vector(architecture, vector.cpu().numpy()).values
        return UnitScores(architecture, {**sums, **self._besides}).restricted(self.model.architecture)

    @torch.no_grad()
    def _sum_up(self) -> None:
        """The sums of what is there: fp64, of the elements along dims, site after site."""
        self._summed, terms = self.model.architecture, Terms(list)
        for piece in self.pieces:
            row, column = piece.sites
            terms[row].append((piece.first, piece.by_row.sum(dim=1)))
            terms[column].append((0, piece.by_column.sum(dim=0)))
        self._sums = self._flat(terms)

    def _flat(self, terms: Terms) -> Tensor:
        """`terms` added up, fp64, site after site; those of kinds without scores are left out."""
        added = []
        for site, length in self._lengths.items():
            found = terms.get(site)
            if not found:
                added.append(self._zeros(length))
            elif any(len(values) < length for _, values in found):  # rows that are split over ranks
                added.append(self._zeros(length).clone())
                for first, values in found:
                    added[-1][first : first + len(values)] += values
            else:
                added.append(torch.stack([values for _, values in found]).sum(dim=0) if found[1:] else found[0][1])
        return torch.cat([self._zeros(0), *added]).double()

    def _per_slot(self, flat: Tensor) -> Tensor:
        """Sums of elements -> sums of slots, site after site, and at the end a zero for slots that are not here."""
        lengths = {kind: sum(n for (k, _), n in self._lengths.items() if k == kind) for kind in self._sizes}
        parts = [
            part if self._sizes[kind] == 1 else part.view(-1, self._sizes[kind]).sum(dim=1)
            for kind, part in zip(lengths, flat.split(list(lengths.values())), strict=True)
        ]
        return torch.cat([*parts, flat.new_zeros(1)])

    def _places_of_units(self) -> np.ndarray:
        """Where each live unit, in the order in which scores travel, stands in `_per_slot`."""
        layout, architecture, rank = self._layout, self._layout.architecture, self.model.mesh.tp_rank
        starts, at = places(architecture), 0
        found = np.full(score_length(architecture), sum(n // self._sizes[k] for (k, _), n in self._lengths.items()))
        for (kind, site), length in self._lengths.items():
            slots = layout.slots(kind, site, rank)
            live = np.flatnonzero(slots != EMPTY)
            # Live slots of a rank are ascending ids, but not always neighbours in the canonical order of the layer.
            found[starts[kind][site] + np.searchsorted(architecture.ids(kind, site), slots[live])] = at + live
            at += length // self._sizes[kind]
        return found

    def _zeros(self, length: int) -> Tensor:
        if length not in self._nothing:
            self._nothing[length] = torch.zeros(length, device=self.model.mesh.device.device)
        return self._nothing[length]


def _stretch(matrix: Tensor, dim: int, first: int, last: int) -> Tensor:
    """Rows or columns [first, last) of `matrix`; a single one as a vector."""
    return matrix.select(dim, first) if last - first == 1 else matrix.narrow(dim, first, last - first)


def _share_left(now: Architecture, before: Architecture) -> float:
    """A lower bound of the share of the scored elements of `before` that `now` still has."""
    kinds = now.table.scored
    return math.prod(sum(map(len, now.sites(k))) / max(sum(map(len, before.sites(k))), 1) for k in kinds)


@torch.no_grad()
def score_elements(
    model: LiveModel,
    criterion: Criterion,
    fisher: str,
    microbatch_fisher: dict[str, Tensor] | None = None,
    inputs: ColumnStatistics | None = None,
    besides: Mapping[Kind, tuple[np.ndarray, ...]] | None = None,
) -> ElementScores:
    """S of this rank's owned output weights; call after the gradients are reduced and before the optimizer steps.

    Args:
        fisher: `microbatch` (then `microbatch_fisher` is `MicrobatchFisher.reduce()`), `adam` (exp_avg_sq as it is
            before this step; zeros at first) or `batch` (the reduced gradient squared). The latter two are free and
            unscaled: a squared mean gradient is far smaller than the mean of squares.
        inputs: what the criterion needs to know of the layers' inputs (see `saliency.collector`).
        besides: as `ElementScores` takes it.
    """
    pieces = []
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
        own_rows = criterion.stem(elements) if criterion.stem is not None else None
        pieces.append(ScoredRows.of(shard, criterion.score(elements), own_rows))
    return ElementScores(model, pieces, besides)


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
