"""The axes of a mesh: which ranks communicate for which purpose; only the mesh knows megatron-core's groups."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import megatron_prune
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import all_reduce_sum, close_mesh, init_mesh
from megatron_prune.testing.helpers.ranks import run_ranks


def _axes(rank: int, world_size: int, tp: int, pp: int) -> dict[str, list[int]]:
    mesh = init_mesh(choose_device("cpu"), tp, pp)
    found = {axis: dist.get_process_group_ranks(ranks.group) for axis, ranks in mesh.axes.items()}
    for ranks in mesh.axes.values():
        assert ranks.global_rank(ranks.rank) == rank == mesh.rank
    both = all_reduce_sum(torch.tensor([10.0**rank]), mesh.over("model"), mesh.over("tokens"))
    assert both == sum(10.0**other for other in range(world_size))  # tp x pp x dp x cp: every rank once
    assert (mesh.tp_size, mesh.pp_size, mesh.dp_size) == (tp, pp, world_size // tp // pp)
    close_mesh()
    return found


def _expected(tp: list[int], pp: list[int], model: list[int], data: list[int]) -> dict[str, list[int]]:
    alike = dict.fromkeys(("samples", "tokens", "replicas", "owners"), data)
    return {"tp": tp, "pp": pp, "model": model, **alike, "world": [0, 1, 2, 3]}


def test_every_axis_names_the_ranks_that_communicate_for_it():
    split = run_ranks(_axes, 4, 2, 1)
    assert split[0] == _expected([0, 1], [0], [0, 1], [0, 2])
    assert split[3] == _expected([2, 3], [3], [2, 3], [1, 3])
    assert run_ranks(_axes, 4, 1, 2)[0] == _expected([0], [0, 2], [0, 2], [0, 1])


def test_only_the_mesh_asks_for_groups():
    """A new axis is a change in one module."""
    package = Path(megatron_prune.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(f"parallel_state.{verb}" in path.read_text() for verb in ("get_", "initialize_"))
    }
    assert found == {"runtime/mesh.py"}
