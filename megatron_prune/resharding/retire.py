"""Retire: make the slots of one group empty, at once and exactly.

All coupled weights, their fp32 main weights and Adam moments become zero. Zero is a fixed point of training from
there on (gradients of a retired unit are exactly zero, weight decay keeps zero, and where a silenced query head could
still get a gradient the attention masks its output), so training with empty slots is training the smaller model.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_prune.model.architecture import Group
from megatron_prune.model.llama import bind_layout, named_rows
from megatron_prune.optimizer.build import ShardedModel
from megatron_prune.optimizer.owned import owned_shards


@torch.no_grad()
def retire(model: ShardedModel, group: Group) -> None:
    """Empty the slots of `group` in weights, main weights and moments, and bind the new layout. No communication.

    Weights must be in step on all ranks (`force_param_sync`).
    """
    before, rank = model.layout, model.mesh.tp_rank
    gone: dict[str, tuple[np.ndarray, ...]] = {}
    for name, parameter, row in named_rows(model.module, model.table):
        gone[name] = row.group_positions(group, before, rank)
        for dim, positions in enumerate(gone[name]):
            if len(positions):
                parameter.data.index_fill_(dim, torch.from_numpy(positions).to(parameter.device), 0)
    for shard in owned_shards(model):
        tensors = [*shard.moments.values(), *([shard.main] if shard.has_separate_main else [])]
        shard.zero(tensors, gone[shard.name])
    model.layout = before.without(group)
    bind_layout(model.module, model.layout, model.mesh)
