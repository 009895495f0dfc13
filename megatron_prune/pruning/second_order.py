"""Second-order weight update before a removal (EfficientLLM-B, arXiv 2502.06663): survivors take over.

Removing the input columns p of a weight W [out, in] changes its output by W_p X_p; the other columns can make up for
most of it where inputs are correlated. With H = X^T X / tokens + ridge, Y = H^-1 E_p and M = (Y_pp)^-1 Y^T [p, in] the
least-squares answer is W -= W_p M, whose columns p vanish because M_p = I. Summing updates of single columns is not
that: they do not vanish.

    block_update       M and what the error needs, from a layer's Hessian (pure)
    LayerErrors        the layers' output error, without and with the update
    SecondOrderUpdate  apply it to every weight that reads a group, on any layout

A head or FFN channel is read by the attention output or FFN down projection of its layer; a stem channel by qkv and
gate/up of all layers and by an untied LM head, after their norm. A tied LM head is left alone: it is the embedding too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.model.architecture import Group
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import Param, positions
from megatron_prune.optimizer.wrapped import WrappedModel
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import all_reduce_sum
from megatron_prune.saliency.hessian import Hessian, local_columns, solve_on_owners
from megatron_prune.saliency.inputs import KeptInputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerErrors:
    """Squared error of the outputs of all layers that read a group, summed over outputs, mean over tokens.

    Args:
        removed: when the group's columns are cut out and nothing else changes.
        compensated: when the update is made as well.
    """

    removed: float
    compensated: float


def block_update(hessian: Hessian, columns: Tensor) -> Tensor:
    """[M | G_pp | M G M^T], fp64 [p, in + 2 p], for int64 `columns` p and G = X^T X / tokens (the damping left out).

    The output error of a row w of W is w_p G_pp w_p^T without the update, and w_p (M G M^T) w_p^T with it.
    """
    size = len(columns)
    unit = torch.eye(size, dtype=torch.float64, device=columns.device)
    y = hessian.inverse_columns(columns)
    m = torch.linalg.solve(y[columns], y.T) if bool(torch.isfinite(y).all()) else y.T * torch.nan
    m[:, columns] = unit
    removed = hessian.damped[columns][:, columns] - hessian.ridge * unit
    # H M^T = E_p (Y_pp)^-1, so M H M^T = (Y_pp)^-1 = M_p H M^T.
    compensated = m @ hessian.damped @ m.T - hessian.ridge * m @ m.T
    return torch.cat([m, removed, compensated], dim=1)


def source_columns(row: Param, group: Group) -> np.ndarray:
    """Source positions (int64, ascending) of the columns of weight `row` that read `group`."""
    units = np.array(sorted(group.units(row.dims[1].kind, row.site)), dtype=np.int32)
    return positions(units, row.dims[1].size)


class SecondOrderUpdate:
    """Updates the weights of `model` with the inputs `kept` from this iteration's batch.

    Args:
        damping: of the Hessians, relative to their mean diagonal.
    """

    def __init__(self, model: LiveModel, kept: KeptInputs, damping: float) -> None:
        self._model, self._kept, self._damping = model, kept, damping

    @torch.no_grad()
    def compensate(self, group: Group) -> LayerErrors | None:
        """Update all weights that read `group`, which is then to be retired (a collective over the whole model).

        Returns None when none of them may be updated: a stem channel whose inputs were
        not kept.
        """
        model, kept = self._model, self._kept
        names = [name for name, row in kept.rows.items() if row.dims[1].kind in group.gone]
        if not names and any(kind.is_shared for kind in group.gone):
            return None
        live = {name: self._live_columns(name, group) for name in names}
        editor, errors = WeightEditor(model), torch.zeros(2, dtype=torch.float64, device=model.mesh.device.device)

        def solve(name: str, hessian: Hessian) -> Tensor:
            return block_update(hessian, torch.from_numpy(live[name]).to(hessian.damped.device))

        def shape(name: str) -> tuple[int, int]:
            return len(live[name]), kept.features(name) + 2 * len(live[name])

        for name, solution in solve_on_owners(kept, model, names, self._damping, solve, shape):
            if not bool(torch.isfinite(solution).all()):
                logger.warning("%s: its inputs are not finite; removed without a second-order update", name)
                continue
            errors += self._apply(name, solution, group, editor)
        all_reduce_sum(errors, model.mesh.over("model"))
        return LayerErrors(*errors.tolist())

    def _apply(self, name: str, solution: Tensor, group: Group, editor: WeightEditor) -> Tensor:
        """Make one weight's update; returns this rank's part of (error without it, error with it)."""
        row, mesh, layout = self._kept.rows[name], self._model.mesh, self._model.layout
        gone = self._columns(name, group, editor, layout)
        size = gone.shape[1]
        m, removed, compensated = solution.split([solution.shape[1] - 2 * size, size, size], dim=1)
        editor.add_product(name, -gone, local_columns(m, self._model, name, empty=0.0))
        both = torch.stack([((gone @ matrix) * gone).sum() for matrix in (removed, compensated)])
        is_copy = row.dims[1].is_sharded and mesh.tp_rank != 0  # every TP rank has the same rows then
        return torch.zeros_like(both) if is_copy else both

    def _columns(self, name: str, group: Group, editor: WeightEditor, layout: ShardLayout) -> Tensor:
        """W_p, fp64 [local rows, p]: gathered from the tensor-parallel ranks that hold the group's units."""
        row, mesh = self._kept.rows[name], self._model.mesh
        local = row.group_positions(group, layout, mesh.tp_rank)[1]
        own = editor.columns(name, local)
        if not row.dims[1].is_sharded:
            return own
        wanted = source_columns(row, group)
        gone = own.new_zeros(len(own), len(wanted))
        at = np.searchsorted(wanted, row.element_ids(1, layout, mesh.tp_rank)[local])
        gone[:, torch.from_numpy(at).to(own.device)] = own
        return all_reduce_sum(gone, mesh.over("tp"))

    def _live_columns(self, name: str, group: Group) -> np.ndarray:
        """Positions of the group's columns among the live columns of weight `name`."""
        row = self._kept.rows[name]
        dim = row.dims[1]
        canonical = positions(self._model.architecture.ids(dim.kind, row.site), dim.size)
        return np.searchsorted(canonical, source_columns(row, group))


class WeightEditor:
    """Changes local weights of `model` between steps, outside the optimizer; it brings them in step over DP first.

    In fp32 training the model weight is the main weight. In bf16 the fp32 main weight is changed and the model weight
    becomes its rounding, exactly as after an optimizer step; with the distributed optimizer each data-parallel rank
    holds a part of the main weights, so both methods are collectives over DP then. Moments stay as they are.
    """

    def __init__(self, model: WrappedModel) -> None:
        model.synchronise()
        self._owners = model.mesh.over("owners")
        self._weights = {name: parameter for name, parameter, _ in model.rows()}
        self._shards = {shard.name: shard for shard in model.owned()}
        self._is_split = model.options.use_distributed_optimizer and self._owners.size > 1

    @torch.no_grad()
    def columns(self, name: str, positions: np.ndarray) -> Tensor:
        """Main weights of the local columns `positions` (ascending) of weight `name`, fp64 [rows, columns]."""
        weight = self._weights[name]
        index = torch.from_numpy(positions).to(weight.device)
        if weight.dtype == torch.float32:
            return weight.data.index_select(1, index).double()
        found = torch.zeros(len(weight), len(positions), dtype=torch.float64, device=weight.device)
        for rows, span, block in self._main_blocks(name):
            at = np.flatnonzero((positions >= span.start) & (positions < span.stop))
            here = torch.from_numpy(positions[at] - span.start).to(weight.device)
            found[rows, torch.from_numpy(at).to(weight.device)] = block.index_select(1, here).double()
        if self._is_split:
            dist.all_reduce(found, group=self._owners.group)  # every element has one owner: an exact sum
        return found

    @torch.no_grad()
    def add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Weight `name` += left @ right, fp64 [rows, r] and [r, columns], the same on all data-parallel ranks."""
        weight = self._weights[name]
        if weight.dtype == torch.float32:
            weight.data.copy_(torch.addmm(weight.data.double(), left, right))
            return
        rounded = torch.zeros_like(weight)
        for rows, span, block in self._main_blocks(name):
            block.copy_(torch.addmm(block.double(), left[rows], right[:, span]))
            rounded[rows, span] = block.to(weight.dtype)
        if self._is_split:
            dist.all_reduce(rounded, group=self._owners.group)
        weight.data.copy_(rounded)

    def _main_blocks(self, name: str) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, view of the main weight) of the rectangles that this rank owns."""
        shard = self._shards.get(name)
        if shard is None:
            return
        for offset, length, rows, columns in shard.blocks():
            block = shard.main[offset : offset + length].view(rows.stop - rows.start, columns.stop - columns.start)
            yield rows, columns, block
