"""Checks after a removal or compaction, each over all ranks.

live_parameters   live elements held by the optimizer, each counted once over all ranks
verify            they equal the architecture's count; with `thorough`, every empty slot is exactly zero everywhere
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_prune.model.table import EMPTY
from megatron_prune.optimizer.owned import OwnedShard
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import all_reduce_sum


def live_parameters(model: LiveModel) -> int:
    """Live elements in this model's optimizers, over all ranks, copies not counted (a collective)."""
    mesh, total = model.mesh, 0
    names = {row.name for row in model.table.rows}
    for shard in model.owned():
        is_tied_copy = shard.name not in names
        is_tp_copy = not shard.row.is_sharded and mesh.tp_rank != 0
        is_dp_copy = not model.options.use_distributed_optimizer and mesh.over("replicas").rank != 0
        if not (is_tied_copy or is_tp_copy or is_dp_copy):
            total += _live_elements(shard, model)
    count = torch.tensor([total], dtype=torch.int64, device=mesh.device.device)
    return int(all_reduce_sum(count, mesh.over("world")))


def _live_elements(shard: OwnedShard, model: LiveModel) -> int:
    masks = _live_masks(shard, model)
    columns = masks[1] if len(masks) > 1 else np.ones(1, dtype=bool)
    return sum(int(masks[0][rows].sum()) * int(columns[cols].sum()) for _, _, rows, cols in shard.blocks())


def _live_masks(shard: OwnedShard, model: LiveModel) -> list[np.ndarray]:
    rank = model.mesh.tp_rank
    return [shard.row.element_ids(dim, model.layout, rank) != EMPTY for dim in range(shard.parameter.dim())]


@torch.no_grad()
def verify(model: LiveModel, thorough: bool = False) -> None:
    """Raise AssertionError, on all ranks, when the model is not what its architecture says (a collective).

    Args:
        thorough: also look at every weight, main weight and moment; meant for debugging and tests.
    """
    counted, stated = live_parameters(model), model.architecture.parameters
    if counted != stated:  # raised, not asserted: a run that asks for these checks keeps them under python -O
        raise AssertionError(f"the optimizer holds {counted} live parameters, the architecture has {stated}")
    if not thorough:
        return
    dirty = [f"weight {name}" for name in _dirty_weights(model)] + _dirty_state(model)
    found = torch.tensor([len(dirty)], dtype=torch.int64, device=model.mesh.device.device)
    total = int(all_reduce_sum(found, model.mesh.over("world")))
    if total:
        raise AssertionError(f"{total} tensors have non-zero elements in empty slots, on this rank: {dirty}")


def _dirty_weights(model: LiveModel) -> list[str]:
    names = []
    for name, parameter, row in model.rows():
        for dim in range(parameter.dim()):
            empty = np.flatnonzero(row.element_ids(dim, model.layout, model.mesh.tp_rank) == EMPTY)
            index = torch.from_numpy(empty).to(parameter.device)
            if len(empty) and bool(parameter.data.index_select(dim, index).any()):
                names.append(name)
    return names


def _dirty_state(model: LiveModel) -> list[str]:
    names = []
    for shard in model.owned():
        masks = [~torch.from_numpy(mask).to(shard.key.device) for mask in _live_masks(shard, model)]
        for key, tensor in {**shard.moments, "main": shard.main}.items():
            for offset, length, rows, cols in shard.blocks():
                block = tensor[offset : offset + length].view(rows.stop - rows.start, cols.stop - cols.start)
                in_columns = len(masks) > 1 and bool(block[:, masks[1][cols]].any())
                if in_columns or bool(block[masks[0][rows]].any()):
                    names.append(f"{key} {shard.name}")
                    break
    return names
