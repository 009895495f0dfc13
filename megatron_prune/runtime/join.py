"""From a process to a rank of a mesh: find the others, see that they are alike, join.

Until ranks have met, a mistake of one of them (a configuration it cannot read, no GPU where the others have one) would
leave the others waiting for it: so it is told over the store, and all stop with the same words.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_prune.config import Config, dump
from megatron_prune.errors import UserError
from megatron_prune.runtime.agreement import RankFacts, consult, insist, own_facts
from megatron_prune.runtime.device import DeviceRuntime, choose_device
from megatron_prune.runtime.failures import lost_contact
from megatron_prune.runtime.mesh import Mesh, close_mesh, init_mesh
from megatron_prune.runtime.places import Rank, find_rank
from megatron_prune.runtime.rendezvous import keeps_store
from megatron_prune.runtime.voice import Voice, connections

_MINUTES = 10.0  # to wait for the others where the configuration could not be read


@dataclass(frozen=True)
class Meeting:
    """What a rank knows once all have met. `store` is None for one rank, and where there is a process group already."""

    config: Config
    device: DeviceRuntime
    store: Any

    @contextlib.contextmanager
    def joined(self) -> Iterator[Mesh]:
        """The mesh, torn down at the end (collective). Raises UserError as `init_mesh` does, and SilentError in the
        place of an error that another rank tells."""
        before = connections(os.environ)
        mesh = self.join()
        to_ranks = connections(os.environ) - before
        voice = Voice(self.store, mesh.rank, mesh.world_size, keeps_store(mesh.rank, os.environ), to_ranks)
        try:
            yield mesh
        except BaseException as error:
            is_alone = lost_contact(error) is not None  # nobody is left to tear the mesh down with
            try:
                voice.settle(error)
                raise
            finally:
                if not is_alone:
                    close_mesh()
                if isinstance(error, Exception):
                    voice.leave()
        close_mesh()

    def join(self) -> Mesh:
        """Build the mesh (collective). Raises UserError as `init_mesh` does."""
        parallel = self.config.parallel
        mesh = init_mesh(
            self.device,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.distributed_timeout_minutes,
            self.store,
        )
        if self.store is None:
            try:
                insist(mesh, self.config)
            except UserError:
                close_mesh()
                raise
        return mesh


def own_place() -> Rank:
    """This process's rank, with the variables set that go with it. Raises UserError as `find_rank` does."""
    if dist.is_initialized():
        return Rank(dist.get_rank(), dist.get_world_size(), {})
    place = find_rank(os.environ)
    os.environ.update(place.environment)
    return place


def meet(read: Callable[[int], Config]) -> Meeting:
    """Find this rank's place, set the variables that go with it, and compare with the other ranks.

    Args:
        read: world size -> the checked configuration; may raise UserError.

    Raises:
        UserError: on all ranks, with the same words: what a rank complains of, or how ranks differ.
        NotMetError: the others could not be reached.
    """
    place = own_place()
    config: Config | None = None
    device: DeviceRuntime | None = None

    def own() -> str:
        nonlocal config, device
        config = read(place.world_size)
        device = choose_device(config.parallel.device)
        return dump(config)

    facts, store = own_facts(own), None
    if place.world_size > 1 and not dist.is_initialized():
        minutes = _MINUTES if config is None else config.parallel.distributed_timeout_minutes
        facts = dataclasses.replace(facts, device=_words(device))
        _, store = consult(place.rank, place.world_size, facts, lambda: None, os.environ, minutes, "training")
    elif facts.complaint is not None:
        raise UserError(facts.complaint)
    assert config is not None and device is not None
    return Meeting(config, device, store)


def _words(device: DeviceRuntime | None) -> str:
    return RankFacts.device if device is None else f"{device.kind} ({device.backend})"
