"""Compact: rebuild weights, gradient buffers and optimizer state at the least stored widths.

Order, chosen so that no more memory is needed than a training step holds anyway:

    1. take the old optimizer's state aside, free the gradient buffers; layers that are gone leave the module
    2. move the model weights, parameter by parameter (units at range borders travel point to point over TP; where
       layers have left, others go to the next pipeline stage, from each rank to its counterpart)
    3. free the old parameter buffers, build DDP anew, free its gradient buffers for the moment, build the optimizer
    4. move the optimizer's state, tensor by tensor, freeing the old as it goes; with the distributed optimizer old and
       new ranges cut a parameter at different places, and what changes its owner goes there directly, to another stage,
       too (`ranges`)
    5. get the gradient buffers back

Losses and graphs from before the compaction must be dropped first: they would keep the old memory alive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import Param
from megatron_prune.optimizer.owned import MOMENTS, OwnedShard, Spans, set_moments
from megatron_prune.optimizer.wrapped import WrappedModel
from megatron_prune.resharding.plan import TransferPlan, plan_transfer
from megatron_prune.resharding.ranges import Exchange
from megatron_prune.runtime.mesh import Mesh

MAIN = "main"  # main weights, among the names of an optimizer's state

Stage = tuple[int, ...]  # original numbers of a pipeline stage's layers
Ranges = tuple[Spans, Spans]  # of a parameter, what each owner had, and what each will have


@dataclass(frozen=True)
class _Journey:
    """A parameter whose layer goes from one pipeline stage to another."""

    row: Param
    start: int
    end: int


@dataclass
class _OldState:
    """One owned range of the old optimizer; `tensors` (main weight, moments) are dropped as they are moved."""

    tensors: dict[str, Tensor]


class Compaction:
    """Brings `model` from one layout to another; `move_weights`, then (with the new layout bound) `move_optimizer`.

    Args:
        before, after: layers of each pipeline stage under the old and the new layout.

    Attributes:
        plans: per parameter that this rank has and that stays somewhere, how its old tensor becomes the new one.
    """

    def __init__(
        self, model: WrappedModel, old: ShardLayout, new: ShardLayout, before: Sequence[Stage], after: Sequence[Stage]
    ) -> None:
        self._model, self._old_layout, self._new_layout = model, old, new
        self._step = model.adam_step()
        self._groups = [dict(group, params=None) for group in model.optimizer.param_groups]
        self._exchange = None
        if model.options.use_distributed_optimizer and model.mesh.over("owners").size > 1:
            self._exchange, self._spans = Exchange(model.mesh), model.owned_spans()
        rank, stays = model.mesh.tp_rank, {name for name, _, row in model.rows() if row.lives_in(new.architecture)}
        aside = [(shard.name, _set_aside(shard)) for shard in model.owned()]
        self._old = {name: state for name, state in aside if name in stays}
        self._shapes = {name: tuple(parameter.shape) for name, parameter, _ in model.rows()}
        self.plans = {name: plan_transfer(row, old, new, rank) for name, _, row in model.rows() if name in stays}
        homes = [{layer: stage for stage, own in enumerate(stages) for layer in own} for stages in (before, after)]
        places = ((row, homes[0][row.layer], homes[1][row.layer]) for row in model.table.rows if row.layer in homes[1])
        self._journeys = [_Journey(row, start, end) for row, start, end in places if start != end]

    def move_weights(self, hold_layers: Callable[[], None]) -> None:
        """Steps 1 and 2 of the module: gradients are gone afterwards, and the module has its new parameters.

        Args:
            hold_layers: lets the module have the layers of the new layout.
        """
        model = self._model
        _free_gradients(model)
        if model.ddp.use_forward_hook:  # the old DDP lets go of its modules while it still knows all of them
            model.ddp.disable_forward_pre_hook(param_sync=False)
        weights = {name: parameter.data for name, parameter, _ in model.rows()}
        arrived = {
            journey.row.name: tensor
            for journey in self._journeys
            if (tensor := self._carried(journey, weights.get(journey.row.name), model.dtype)) is not None
        }
        del weights
        hold_layers()

        def resized(name: str, data: Tensor) -> Tensor:
            if name in arrived:
                return arrived.pop(name)
            moved = move(data, self.plans[name], model.mesh)
            return moved.clone() if moved is data else moved  # the old memory goes with the old parameter

        model.replace_parameters(resized)
        _free_parameter_buffers(model)

    def move_optimizer(self) -> None:
        """Steps 3 to 5 of the module: new DDP and optimizer around the moved weights, with the old one's state."""
        model, gradients = self._model, _GradientMemory()
        names = sorted(
            {key for state in self._old.values() for key in state.tensors} | set(_state_names(model, self._step))
        )
        model.rewrap(before_optimizer=gradients.free)
        for group, previous in zip(model.optimizer.param_groups, self._groups, strict=True):
            group.update({key: value for key, value in previous.items() if key not in ("params", "step")})
        new, leaves = {shard.name: shard for shard in model.owned()}, {journey.row.name for journey in self._journeys}
        staying = {name: plan for name, plan in self.plans.items() if name not in leaves}
        if self._exchange is not None:
            self._exchange_state(self._exchange, names, new, staying)
        else:
            self._move_state(names, new, staying)
        gradients.restore()
        model.set_adam_step(self._step)

    def _move_state(self, names: list[str], new: dict[str, OwnedShard], staying: dict[str, TransferPlan]) -> None:
        """Of optimizers that own whole parameters: as weights move."""
        for name, plan in staying.items():
            for key in names:
                _set_state(new.get(name), {key: move(self._whole_state(name, key), plan, self._model.mesh)})
        for journey in self._journeys:
            for key in names:
                is_here = journey.start == self._model.mesh.pp_rank
                source = self._whole_state(journey.row.name, key) if is_here else None
                arrived = self._carried(journey, source, torch.float32)
                if arrived is not None:
                    _set_state(new[journey.row.name], {key: arrived.view(-1)})

    def _exchange_state(
        self, exchange: Exchange, names: list[str], new: dict[str, OwnedShard], staying: dict[str, TransferPlan]
    ) -> None:
        """Of the owners of a distributed optimizer: from old ones to new ones directly."""
        mesh, spans = self._model.mesh, self._model.owned_spans()
        nothing = torch.empty(0, dtype=torch.float32, device=mesh.device.device)

        def exchanged(name: str, plan: TransferPlan, ranges: Ranges, *stages: int) -> None:
            old = self._old.pop(name, _OldState({}))
            tensors = [old.tensors.pop(key, nothing) for key in names]
            moved = exchange.move(tensors, plan, *ranges, *stages)
            if moved:
                _set_state(new.get(name), dict(zip(names, moved, strict=True)))

        for name, plan in staying.items():
            exchanged(name, plan, (self._spans[name], spans[name]))
        leaving = self._told_ranges(spans) if self._journeys else {}
        for journey in self._journeys:
            if mesh.pp_rank in (journey.start, journey.end):
                plan = plan_transfer(journey.row, self._old_layout, self._new_layout, mesh.tp_rank)
                exchanged(journey.row.name, plan, leaving[journey.row.name], journey.start, journey.end)

    def _told_ranges(self, spans: dict[str, Spans]) -> dict[str, Ranges]:
        """Of what changes its stage, by name: each stage tells the others its own (some numbers per parameter)."""
        names, pp = {journey.row.name for journey in self._journeys}, self._model.mesh.over("pp")
        told: list[Any] = [None] * pp.size
        dist.all_gather_object(
            told, [{n: own[n] for n in names & own.keys()} for own in (self._spans, spans)], pp.group
        )
        return {j.row.name: (told[j.start][0][j.row.name], told[j.end][1][j.row.name]) for j in self._journeys}

    def _carried(self, journey: _Journey, source: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The new local tensor where `journey` ends, None elsewhere; every rank calls it for the same journeys in the
        same order, with the old local tensor `source` where it starts."""
        mesh, row = self._model.mesh, journey.row
        pp = mesh.over("pp")
        if mesh.pp_rank == journey.start:
            assert source is not None
            moved = move(source, self.plans[row.name], mesh).contiguous()
            dist.send(moved, pp.global_rank(journey.end), pp.group)
        elif mesh.pp_rank == journey.end:
            shape = row.local_shape(self._new_layout, mesh.tp_rank)
            received = torch.empty(shape, dtype=dtype, device=mesh.device.device)
            dist.recv(received, pp.global_rank(journey.start), pp.group)
            return received
        return None

    def _whole_state(self, name: str, key: str) -> Tensor:
        """One state tensor of one parameter, all of which is owned here, in its old local shape."""
        return self._old[name].tensors.pop(key).view(self._shapes[name])


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


def _state_names(model: WrappedModel, step: int) -> list[str]:
    """Which tensors every owned shard has, known on ranks that own nothing too."""
    return [*(MOMENTS if step else ()), *([MAIN] if model.dtype != torch.float32 else [])]


def _set_aside(shard: OwnedShard) -> _OldState:
    """Take the shard's state out of its optimizer, which may live on for a while (others refer to it)."""
    tensors = dict(shard.moments)
    shard.state.clear()
    if shard.has_separate_main:
        tensors[MAIN] = shard.main
        shard.key.data = shard.main.new_empty(0)
    return _OldState(tensors)


def _set_state(new: OwnedShard | None, moved: dict[str, Tensor]) -> None:
    """Give `moved` to its new owner; a rank that owns nothing of the parameter has nothing of it."""
    if new is None:
        return
    for key, value in moved.items():
        if key == MAIN:
            new.main.copy_(value.view(-1))
        else:
            set_moments(new, {key: value})


def _free_gradients(model: WrappedModel) -> None:
    for inner in model.optimizer.chained_optimizers:
        for tensor in inner.get_parameters():
            tensor.grad = None
    for buffer in model.ddp.buffers:
        buffer.grad_data.untyped_storage().resize_(0)


def _free_parameter_buffers(model: WrappedModel) -> None:
    """Free the storage of the old parameter buffers; the weights live outside of them by now."""
    for buffer in model.ddp.buffers:
        if buffer.param_data is not None:
            buffer.param_data.untyped_storage().resize_(0)


class _GradientMemory:
    """Frees the gradient buffers of a DDP for a while; views into them stay valid."""

    def free(self, ddp: DistributedDataParallel) -> None:
        """Give the memory back; there are no gradients until `restore`."""
        self._buffers = list(ddp.buffers)
        self._sizes = [buffer.grad_data.untyped_storage().size() for buffer in self._buffers]
        for buffer in self._buffers:
            buffer.grad_data.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Allocate the gradient buffers again, zeroed."""
        for buffer, size in zip(self._buffers, self._sizes, strict=True):
            buffer.grad_data.untyped_storage().resize_(size)
            buffer.grad_data.zero_()
