"""One rank of a run on hundreds, alone in a process: what it plans, lays out and would send is real, weights are not.

    one_of        this rank's mesh, over torch's fake process group; while entered, tensors hold no memory
    Sent          what the rank would send point to point
    wide_model    the rank's part of a model in bf16 after a step, with the distributed optimizer
    elements_handed_on   where elements that a rank owns go in a compaction, by their numbers in the source

Tensors are on torch's meta device, but for those made of numbers of the host (steps, marks), which are read again. What
would be gathered from other ranks is this rank's own.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch.overrides import TorchFunctionMode

from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import ModelOptions, NamedRow
from megatron_prune.model.table import EMPTY, Param
from megatron_prune.optimizer.owned import MOMENTS, NOTHING, Spans, blocks, set_moments
from megatron_prune.optimizer.wrapped import OptimizerOptions
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.device import DeviceRuntime, choose_device
from megatron_prune.runtime.mesh import Mesh, close_mesh, init_mesh

_ABSENT = torch.device("meta")


class Sent:
    """Stands in for `dist.batch_isend_irecv`.

    Attributes:
        messages, bytes: by receiving global rank.
    """

    def __init__(self) -> None:
        self.messages, self.bytes = Counter[int](), Counter[int]()

    def __call__(self, operations: list[dist.P2POp]) -> list[Any]:
        for operation in operations:
            if operation.op is dist.isend:
                self.messages[operation.peer] += 1
                self.bytes[operation.peer] += operation.tensor.numel() * operation.tensor.element_size()
        return []


class _Absent(TorchFunctionMode):
    """Puts what is asked for on a device on none, and lets megatron-core take it for what it expects."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor:
            kwargs["device"] = "cpu"
        elif kwargs.get("device") is not None:
            kwargs["device"] = _ABSENT
        result = func(*args, **kwargs)
        return result.replace("meta.", "") if func is torch.Tensor.type and isinstance(result, str) else result


@contextlib.contextmanager
def one_of(world_size: int, rank: int, tp: int, pp: int) -> Iterator[tuple[Mesh, Sent]]:
    """The mesh of rank `rank` of so many, and what it sends; nothing else in this process may communicate meanwhile."""
    choose_device("cpu")
    close_mesh()
    dist.init_process_group(dist.Backend.FAKE, rank=rank, world_size=world_size)
    sent = Sent()
    try:
        mesh = init_mesh(DeviceRuntime("cpu", dist.Backend.FAKE, _ABSENT), tp, pp)
        with (
            mock.patch.object(dist, "batch_isend_irecv", sent),
            mock.patch.object(dist, "all_gather_object", _gather),
            _ABSENT,
            _Absent(),
        ):
            yield mesh, sent
    finally:
        close_mesh()


def _gather(found: list[Any], value: Any, group: Any = None) -> None:
    found[:] = [value] * len(found)


def wide_model(mesh: Mesh, layout: ShardLayout, overlap: bool = False) -> LiveModel:
    """This rank's part of a model in `layout`, with moments."""
    options = OptimizerOptions(
        1e-4, use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    context = layout.architecture.shape.max_position_embeddings
    model = LiveModel.build(layout, mesh, ModelOptions(context, torch.bfloat16), options)
    for shard in model.owned():
        set_moments(shard, {name: torch.zeros(shard.end - shard.start) for name in MOMENTS})
    model.set_adam_step(1)
    return model


# Counting, by no plan ---------------------------------------------------------------------------------------------


def elements_handed_on(
    rows: list[NamedRow], mesh: Mesh, layouts: tuple[ShardLayout, ShardLayout], spans: tuple[dict[str, Spans], ...]
) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """Live elements that go from this rank to others in a compaction from the first layout to the second, by parameter
    and global rank: (of optimizer state, to another owner; of weights, to another tensor-parallel rank).

    Args:
        spans: `owned_spans` in either layout.
    """
    states, weights = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    owners, tp, here = mesh.over("owners"), mesh.over("tp"), mesh.tp_rank
    for name, _, row in rows:
        width, shape = (*row.local_shape(layouts[1], here), 1)[1], row.local_shape(layouts[0], here)
        rectangles = [where for _, _, *where in blocks(*spans[0][name].get(owners.rank, NOTHING), shape)]
        for there in range(tp.size) if row.is_sharded else (here,):
            places = [_places(row, dim, layouts, here, there) for dim in range(len(shape))]
            places += [np.zeros(1, np.int64)] * (2 - len(shape))
            weights[name, tp.global_rank(there)] += math.prod(int((positions != EMPTY).sum()) for positions in places)
            for where in rectangles:
                parts = [positions[at] for positions, at in zip(places, where, strict=True)]
                live = [part[part != EMPTY] for part in parts]
                for owner, (first, last) in spans[1][name].items():
                    count = _below(last, live, width) - _below(first, live, width)
                    states[name, mesh.owner_at(mesh.pp_rank, there, owner)] += count
        del states[name, mesh.rank], weights[name, mesh.rank]
    return +states, +weights


def _below(position: int, live: list[np.ndarray], width: int) -> int:
    """How many elements at these rows and columns lie before a flat position."""
    row, column = divmod(position, width)
    return int((live[0] < row).sum() * len(live[1]) + (live[0] == row).sum() * (live[1] < column).sum())


def _places(row: Param, dim: int, layouts: tuple[ShardLayout, ShardLayout], here: int, there: int) -> np.ndarray:
    """Per position along a dim on rank `here`: where its element will be on rank `there`; -1: nowhere there."""
    before, after = (_named(row, dim, layout, rank) for layout, rank in zip(layouts, (here, there), strict=True))
    order = np.argsort(after)
    found = order[np.searchsorted(after, before, sorter=order).clip(max=len(order) - 1)]
    return np.where((after[found] == before) & (before >= 0), found, EMPTY)


def _named(row: Param, dim: int, layout: ShardLayout, rank: int) -> np.ndarray:
    """Per position along a dim: the part and the place in the source of its element, as one number; below 0: empty."""
    ids = row.element_ids(dim, layout, rank).astype(np.int64)
    if dim == 0:
        for number, (_, first, last) in enumerate(row.part_rows(layout, rank)):
            ids[first:last][ids[first:last] != EMPTY] += number << 40
    return ids
