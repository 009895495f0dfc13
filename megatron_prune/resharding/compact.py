"""Compact: rebuild weights, gradient buffers and optimizer state without the empty slots, balanced over TP ranks.

Order, chosen so that no more memory is needed than a training step holds anyway:

    1. take the old optimizer's state aside, free the gradient buffers
    2. move the model weights, parameter by parameter (units at range borders travel point to point over TP)
    3. free the old parameter buffers, build DDP anew, free its gradient buffers for the moment, build the optimizer
    4. move the optimizer's state, tensor by tensor, freeing the old as it goes; with the distributed optimizer one
       parameter's flat ranges are put together over DP first, since old and new ranges cut it at different places
    5. get the gradient buffers back

Losses and graphs from before the compaction must be dropped first: they would keep the old memory alive.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_prune.model.llama import bind_layout, named_rows, replace_parameters
from megatron_prune.optimizer.build import ShardedModel, wrap
from megatron_prune.optimizer.owned import MOMENTS, OwnedShard, adam_step, owned_shards, set_adam_step, set_moments
from megatron_prune.resharding.plan import TransferPlan, plan_transfer
from megatron_prune.runtime.mesh import Mesh, all_reduce_sum

logger = logging.getLogger(__name__)


@dataclass
class _OldState:
    """One owned range of the old optimizer; `tensors` (main weight, moments) are dropped as they are moved."""

    start: int
    end: int
    tensors: dict[str, Tensor]


@torch.no_grad()
def compact(model: ShardedModel) -> None:
    """Bring `model` to the compact layout of its live units; does nothing when it is there already.

    Raises:
        MemoryError-like torch errors unchanged; the last checkpoint stays good since none is touched here.
    """
    old_layout, new_layout, mesh = model.layout, model.layout.compacted(), model.mesh
    if old_layout.fingerprint() == new_layout.fingerprint():
        return
    step = adam_step(model)
    groups = [dict(group, params=None) for group in model.optimizer.param_groups]
    old = {shard.name: _set_aside(shard) for shard in owned_shards(model)}
    names = sorted({key for state in old.values() for key in state.tensors} | set(_state_names(model, step)))
    shapes = {name: tuple(p.shape) for name, p, _ in named_rows(model.module, model.table)}
    plans: dict[str, TransferPlan] = {}

    _free_gradients(model)
    for name, _, row in named_rows(model.module, model.table):
        plans[name] = plan_transfer(row, old_layout, new_layout, mesh.tp_rank)

    def resized(name: str, data: Tensor) -> Tensor:
        moved = move(data, plans[name], mesh)
        return moved.clone() if moved is data else moved  # the old memory goes with the old parameter

    replace_parameters(model.module, model.table, resized)
    _free_parameter_buffers(model)
    model.layout = new_layout
    bind_layout(model.module, new_layout, mesh)
    gradients = _GradientMemory()
    with torch.enable_grad():  # DDP finds the gradient accumulators through a graph
        model.ddp, model.optimizer = wrap(model.module, model.options, model.dtype, before_optimizer=gradients.free)
    for group, previous in zip(model.optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in previous.items() if key not in ("params", "step")})

    new = {shard.name: shard for shard in owned_shards(model)}
    for name, _, _ in named_rows(model.module, model.table):
        for key in names:
            _move_state(key, shapes[name], old.get(name), new.get(name), plans[name], model)
    gradients.restore()
    set_adam_step(model, step)


def move(tensor: Tensor, plan: TransferPlan, mesh: Mesh) -> Tensor:
    """The new local tensor (new memory unless nothing changes): own elements kept, border units exchanged over TP.

    Every rank of a tensor-parallel group must call it for the same parameters in the same order.
    """
    if plan.is_identity:
        return tensor
    kept, shard = tensor, plan.sharded_dim
    stays = [
        size == new_size and np.array_equal(old, new)
        for size, new_size, (old, new) in zip(plan.old_shape, plan.new_shape, plan.local, strict=True)
    ]
    for dim, (old, new) in enumerate(plan.local):
        if dim != shard and not stays[dim]:
            kept = _select(kept, dim, old, new, plan.new_shape[dim])
    if shard is None or (stays[shard] and not plan.sends and not plan.recvs):
        return kept
    device = tensor.device
    outgoing = {
        rank: kept.index_select(shard, torch.from_numpy(at).to(device)).contiguous() for rank, at in plan.sends.items()
    }
    incoming = {
        rank: kept.new_empty([len(at) if dim == shard else size for dim, size in enumerate(plan.new_shape)])
        for rank, at in plan.recvs.items()
    }
    works = []
    if outgoing or incoming:
        tp = mesh.over("tp")
        operations = [dist.P2POp(dist.isend, t, tp.global_rank(rank), tp.group) for rank, t in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, t, tp.global_rank(rank), tp.group) for rank, t in incoming.items()]
        works = dist.batch_isend_irecv(operations)
    result = _select(kept, shard, *plan.local[shard], plan.new_shape[shard])
    for work in works:
        work.wait()
    for rank, received in incoming.items():
        result.index_copy_(shard, torch.from_numpy(plan.recvs[rank]).to(device), received)
    return result


def _select(tensor: Tensor, dim: int, old: np.ndarray, new: np.ndarray, length: int) -> Tensor:
    """New tensor with `length` along `dim`: elements `old` of `tensor` at positions `new`, zeros elsewhere."""
    picked = tensor.index_select(dim, torch.from_numpy(old).to(tensor.device))
    if len(new) == length:
        return picked
    shape = list(tensor.shape)
    shape[dim] = length
    return tensor.new_zeros(shape).index_copy_(dim, torch.from_numpy(new).to(tensor.device), picked)


def _state_names(model: ShardedModel, step: int) -> list[str]:
    """Which tensors every owned shard has, known on ranks that own nothing too."""
    return [*(MOMENTS if step else ()), *(["main"] if model.dtype != torch.float32 else [])]


def _set_aside(shard: OwnedShard) -> _OldState:
    """Take the shard's state out of its optimizer, which may live on for a while (others refer to it)."""
    tensors = dict(shard.moments)
    shard.state.clear()
    if shard.has_separate_main:
        tensors["main"] = shard.main
        shard.key.data = shard.main.new_empty(0)
    return _OldState(shard.start, shard.end, tensors)


def _move_state(
    key: str,
    shape: tuple[int, ...],
    old: _OldState | None,
    new: OwnedShard | None,
    plan: TransferPlan,
    model: ShardedModel,
) -> None:
    """Carry one state tensor of one parameter over to its new owners; ranks that own nothing of it take part too."""
    mesh = model.mesh
    numel = 1
    for size in shape:
        numel *= size
    source = old.tensors.pop(key) if old is not None else None
    if model.options.use_distributed_optimizer and mesh.over("owners").size > 1:
        full = torch.zeros(numel, dtype=torch.float32, device=mesh.device.device)
        if source is not None and old is not None:
            full[old.start : old.end] = source
        all_reduce_sum(full, mesh.over("owners"))
    else:
        assert source is not None
        full = source
    moved = move(full.view(shape), plan, mesh).reshape(-1)
    if new is None:
        return
    piece = moved[new.start : new.end]
    if key == "main":
        new.main.copy_(piece)
    else:
        set_moments(new, {key: piece.clone() if piece.numel() < moved.numel() else piece})


def _free_gradients(model: ShardedModel) -> None:
    for inner in model.optimizer.chained_optimizers:
        for tensor in inner.get_parameters():
            tensor.grad = None
    for buffer in model.ddp.buffers:
        buffer.grad_data.untyped_storage().resize_(0)


def _free_parameter_buffers(model: ShardedModel) -> None:
    """Free the storage of the old parameter buffers and unhook the old DDP; the weights live outside of it by now."""
    for buffer in model.ddp.buffers:
        if buffer.param_data is not None:
            buffer.param_data.untyped_storage().resize_(0)
    if model.ddp.use_forward_hook:
        model.ddp.disable_forward_pre_hook(param_sync=False)


class _GradientMemory:
    """Frees the gradient buffers of a DDP for a while; views into them stay valid."""

    def free(self, ddp: DistributedDataParallel) -> None:
        """Give the memory back; there are no gradients until `restore`."""
        self._buffers = list(ddp.buffers)
        self._sizes = [buffer.grad_data.untyped_storage().size() for buffer in self._buffers]
        for buffer in self._buffers:
            buffer.grad_data.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Zeroed gradients again."""
        for buffer, size in zip(self._buffers, self._sizes, strict=True):
            buffer.grad_data.untyped_storage().resize_(size)
            buffer.grad_data.zero_()
