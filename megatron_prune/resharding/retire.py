"""Retire: make the slots of one group empty, at once and exactly.

All coupled weights, their fp32 main weights and Adam moments become zero. Zero is a fixed point of training from
there on (gradients of a retired unit are exactly zero, weight decay keeps zero, and where a silenced query head could
still get a gradient the attention masks its output), so training with empty slots is training the smaller model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.model.architecture import Group
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import Runs
from megatron_prune.optimizer.wrapped import WrappedModel


@torch.no_grad()
def zero_units(model: WrappedModel, group: Group, layout: ShardLayout) -> None:
    """Zero the units of `group` in weights, main weights and moments of `model`, which are in `layout`. No
    communication: old values of what others own become zero here and now, and what comes of the owners later."""
    slots, gone = layout.group_slots(group, model.mesh.tp_rank), dict[str, tuple[Runs, ...]]()
    weights = list[Tensor]()
    for name, parameter, row in model.rows():
        gone[name] = row.group_runs(slots)
        for dim, runs in enumerate(gone[name]):
            weights += [parameter.narrow(dim, first, last - first) for first, last in runs]
    states = [view for shard in model.owned() for view in shard.views(gone[shard.name])]
    for views in filter(None, (weights, states)):
        torch._foreach_zero_(views)
