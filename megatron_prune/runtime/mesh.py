"""The device mesh: megatron-core's process groups, as one frozen value that is passed to whoever communicates.

    Mesh          this rank's place on the axes tp, pp, dp, and `over`, the ranks it communicates with for a purpose
    Ranks         one set of ranks that communicate: its group, its size, this rank's number in it
    init_mesh     torch.distributed + megatron-core's parallel state -> Mesh
    close_mesh    tear both down again

Code says *why* it communicates, `mesh.over("tokens")`, and only this module knows which of megatron-core's groups that
is: several axes are the same ranks today and differ once context parallelism (cp) or replicated optimizer shards come.

    axis        ranks       split over them
    tp          tp          the units of a layer
    pp          pp          the layers
    model       tp x pp     one copy of the weights
    samples     dp          the sequences of a global batch: who reads which
    tokens      dp x cp     its tokens: losses, gradients and activations of each rank are of other ones
    replicas    dp x cp     nothing, all hold the same weights: work on them can be dealt out
    owners      dp x cp     the state of a distributed optimizer, range by range
    world       all         the run

A run without torchrun is a mesh of one rank.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_prune.errors import UserError
from megatron_prune.runtime.device import DeviceRuntime, choose_device

Groups = Any  # torch.distributed.ProcessGroup; its type is private in some builds
Axis = Literal["tp", "pp", "model", "samples", "tokens", "replicas", "owners", "world"]


@dataclass(frozen=True)
class Ranks:
    """Ranks that communicate with each other, this one among them.

    Args:
        group: to hand to torch.distributed.
        size: how many they are.
        rank: this rank's number among them.
    """

    group: Groups
    size: int
    rank: int

    def global_rank(self, rank: int) -> int:
        """Global rank of the one numbered `rank` here."""
        return dist.get_global_rank(self.group, rank)


@dataclass(frozen=True)
class Mesh:
    """Process groups and coordinates of this rank.

    Args:
        axes: what `over` answers (see the table above).
        device: what the tensors live on.
    """

    axes: Mapping[Axis, Ranks]
    device: DeviceRuntime

    def over(self, axis: Axis) -> Ranks:
        """The ranks that this one communicates with along `axis` (see the table above), itself among them."""
        return self.axes[axis]

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.over("world").rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.over("world").size

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return self.over("tp").size

    @property
    def tp_rank(self) -> int:
        """Position on the tensor-parallel axis."""
        return self.over("tp").rank

    @property
    def pp_size(self) -> int:
        """Pipeline-parallel size."""
        return self.over("pp").size

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.over("pp").rank

    @property
    def dp_size(self) -> int:
        """Data-parallel size: how many ranks share the sequences of a global batch."""
        return self.over("samples").size

    @property
    def is_first_stage(self) -> bool:
        """True on the stage that embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the stage that computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def owner_at(self, stage: int, tp_rank: int, number: int) -> int:
        """Global rank of the owner numbered `number` among those of a pipeline stage and tensor-parallel rank: ranks
        are a regular grid, so it is as far from this stage's own as this rank's counterpart there is from this rank."""
        counterpart = self.over("model").global_rank(stage * self.tp_size + tp_rank)
        return self.over("owners").global_rank(number) + counterpart - self.rank

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
    with_context = parallel_state.get_data_parallel_group(with_context_parallel=True)
    groups: dict[Axis, Groups] = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "model": parallel_state.get_model_parallel_group(),
        "samples": parallel_state.get_data_parallel_group(),
        "tokens": with_context,
        "replicas": with_context,
        "owners": parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
        "world": dist.group.WORLD,
    }
    axes = {axis: Ranks(group, dist.get_world_size(group), dist.get_rank(group)) for axis, group in groups.items()}
    return Mesh(axes, device)


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


@contextlib.contextmanager
def meshed(device: str = "cpu", tp: int = 1, pp: int = 1) -> Iterator[Mesh]:
    """A mesh on `device` (see `choose_device`), closed at the end."""
    try:
        yield init_mesh(choose_device(device), tp, pp)
    finally:
        close_mesh()


def agree(mesh: Mesh, value: Any) -> list[Any]:
    """All ranks' `value`s (small picklable objects), in rank order."""
    if mesh.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, value, group=mesh.over("world").group)
    return gathered


def is_common(mesh: Mesh, mark: int) -> bool:
    """Whether all ranks have the same `mark` (of less than 63 bits); two numbers travel."""
    if mesh.world_size == 1:
        return True
    ends = torch.tensor([mark, -mark], device=mesh.device.device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=mesh.over("world").group)
    largest, smallest = ends.tolist()
    return bool(largest == -smallest)


def broadcast_object(mesh: Mesh, value: Any, source: int = 0) -> Any:
    """`value` of rank `source` (a small picklable object), on every rank."""
    if mesh.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=mesh.over("world").group, device=mesh.device.device)
    return box[0]


def all_reduce_sum(tensor: torch.Tensor, *over: Ranks) -> torch.Tensor:
    """`tensor` summed in place over each set of ranks in turn; one rank alone costs nothing."""
    for ranks in over:
        if ranks.size > 1:
            dist.all_reduce(tensor, group=ranks.group)
    return tensor
