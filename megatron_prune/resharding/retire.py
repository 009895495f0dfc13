"""Retire: make the slots of one group empty, at once and exactly.

All coupled weights, their fp32 main weights and Adam moments become zero. Zero is a fixed point of training from
there on (gradients of a retired unit are exactly zero, weight decay keeps zero, and where a silenced query head could
still get a gradient the attention masks its output), so training with empty slots is training the smaller model.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_prune.model.architecture import Group
from megatron_prune.model.layout import ShardLayout
from megatron_prune.optimizer.wrapped import WrappedModel


@torch.no_grad()
def zero_units(model: WrappedModel, group: Group, layout: ShardLayout) -> None:
    """Zero the units of `group` in weights, main weights and moments of `model`, which are in `layout` and in step on
    all ranks. No communication."""
    rank, gone = model.mesh.tp_rank, dict[str, tuple[np.ndarray, ...]]()
    for name, parameter, row in model.rows():
        gone[name] = row.group_positions(group, layout, rank)
        for dim, positions in enumerate(gone[name]):
            if len(positions):
                parameter.data.index_fill_(dim, torch.from_numpy(positions).to(parameter.device), 0)
    for shard in model.owned():
        tensors = [*shard.moments.values(), *([shard.main] if shard.has_separate_main else [])]
        shard.zero(tensors, gone[shard.name])
