"""The device mesh: megatron-core's process groups, as one frozen value that is passed to whoever communicates.

    Mesh          groups, sizes and coordinates of this rank on the axes tp, pp, dp
    init_mesh     torch.distributed + megatron-core's parallel state -> Mesh
    close_mesh    tear both down again

A run without torchrun is a mesh of one rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_prune.errors import UserError
from megatron_prune.runtime.device import DeviceRuntime

Groups = Any  # torch.distributed.ProcessGroup; its type is private in some builds


@dataclass(frozen=True)
class Mesh:
    """Process groups and coordinates of this rank.

    Args:
        tp, pp, dp: groups of the tensor-, pipeline- and data-parallel axis.
        mp: all ranks that together hold one copy of the model (tp x pp).
        world: all ranks, as a group of its own.
        device: what the tensors live on.
    """

    tp: Groups
    pp: Groups
    dp: Groups
    mp: Groups
    world: Groups
    device: DeviceRuntime

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return dist.get_world_size(self.tp)

    @property
    def tp_rank(self) -> int:
        """Position on the tensor-parallel axis."""
        return dist.get_rank(self.tp)

    @property
    def pp_size(self) -> int:
        """Pipeline-parallel size."""
        return dist.get_world_size(self.pp)

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return dist.get_rank(self.pp)

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return dist.get_world_size(self.dp)

    @property
    def dp_rank(self) -> int:
        """Position on the data-parallel axis."""
        return dist.get_rank(self.dp)

    @property
    def is_first_stage(self) -> bool:
        """True on the stage that embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the stage that computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def describe(self) -> str:
        """One line for logs."""
        return (
            f"{self.world_size} ranks: TP {self.tp_size} x PP {self.pp_size} x DP {self.dp_size} "
            f"on {self.device.kind}/{self.device.backend}"
        )


def init_mesh(device: DeviceRuntime, tp: int, pp: int, timeout_minutes: float = 10, store: Any = None) -> Mesh:
    """Join the process group (torchrun's variables, else one rank) and build megatron-core's groups.

    Args:
        store: where the ranks have met already (torch.distributed's); None: they meet at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the world size is no multiple of tp x pp.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        _join(device, timeout_minutes, store)
    world_size = dist.get_world_size()
    if world_size % (tp * pp):
        raise UserError(
            f"tensor_model_parallel_size ({tp}) x pipeline_model_parallel_size ({pp}) = {tp * pp} does not divide "
            f"the {world_size} launched ranks; launch a multiple of {tp * pp}"
        )
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        create_gloo_process_groups=False,  # only megatron-core's own optimizer checkpoints want them
        distributed_timeout_minutes=timeout_minutes,  # of the groups it makes; the default is its own
    )
    return Mesh(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        mp=parallel_state.get_model_parallel_group(),
        world=dist.group.WORLD,
        device=device,
    )


def _join(device: DeviceRuntime, timeout_minutes: float, store: Any) -> None:
    timeout = timedelta(minutes=timeout_minutes)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:  # needs no port
        store = dist.HashStore()
    elif store is not None:
        store = dist.PrefixStore("process_group", store)
    else:
        dist.init_process_group(device.backend, timeout=timeout)
        return
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def close_mesh() -> None:
    """Destroy megatron-core's groups and the process group, if they are there."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(mesh: Mesh, value: Any) -> list[Any]:
    """All ranks' `value`s (small picklable objects), in rank order."""
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, value, group=mesh.world)
    return gathered


def broadcast_object(mesh: Mesh, value: Any, source: int = 0) -> Any:
    """`value` of rank `source` (a small picklable object), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=mesh.world, device=mesh.device.device)
    return box[0]


def all_reduce_sum(tensor: torch.Tensor, *groups: Groups) -> torch.Tensor:
    """`tensor` summed in place over each group in turn; groups of one rank cost nothing."""
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(tensor, group=group)
    return tensor
