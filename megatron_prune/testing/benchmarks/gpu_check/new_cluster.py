"""First thing to run on a new cluster: do all ranks meet, how fast do they talk, do they compute what one process does.

The tiny prune runs on the layout that is asked for, with every collective that training uses, and is held against the
dense oracle, which rank 0 computes beside it: the reference cannot get lost or old.
"""

import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_prune.errors import UserError
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import Axis, Mesh, Ranks, agree, broadcast_object, close_mesh, init_mesh
from megatron_prune.testing.benchmarks.gpu_check.rows import Row
from megatron_prune.testing.benchmarks.gpu_check.smoke import FP32_ERROR
from megatron_prune.testing.helpers.comparison import MICRO_BATCH, SEQUENCE, hold_together, oracle_run, oracle_settings
from megatron_prune.testing.helpers.sharded import Case, rounded, train_case
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config

ITERATIONS = 12
REPEATS = 5
GIGA = 1e9


def check_cluster(device: str, tp: int, pp: int) -> int:
    """Run the checks on this rank; the number of those that failed (the same on all ranks).

    Args:
        device: `auto`, `cuda` or `cpu`. tp, pp: the layout; the other ranks are data-parallel copies.

    Raises:
        UserError: the ranks do not divide by tp x pp, or a rank has no GPU of its own.
    """
    rows = []
    for row in _rows(device, tp, pp):
        rows.append(row)
        if os.environ.get("RANK", "0") == "0":
            goal = f" (goal: {row.goal})" if row.goal else ""
            sys.stdout.write(f"{row.verdict or '-':5}  {row.name}: {row.measured}{goal}\n")
            sys.stdout.flush()
    return sum(row.passed is False for row in rows)


def _rows(device: str, tp: int, pp: int) -> Iterator[Row]:
    mesh = init_mesh(choose_device(device), tp, pp)
    yield Row("layout", mesh.describe())
    yield from _hosts(mesh)
    size = 1 << 28 if mesh.device.kind == "cuda" else 1 << 22
    axes: dict[str, Axis] = {"all ranks": "world", "tensor-parallel": "tp", "data-parallel": "tokens"}
    for name, axis in axes.items():
        if mesh.over(axis).size > 1:
            yield _bandwidth(mesh, name, mesh.over(axis), size)
    case = Case(
        tp,
        pp,
        mesh.dp_size,
        sequence_parallel=tp > 1,
        distributed_optimizer=True,
        quanta=rounded(ffn=4, stem=4, vocab=8),
        device=mesh.device.kind,
    )
    yield from _prune(mesh, case)
    close_mesh()


def _hosts(mesh: Mesh) -> Iterator[Row]:
    """What every node brings; they should be alike."""
    name = torch.cuda.get_device_name() if mesh.device.kind == "cuda" else "CPU"
    facts = agree(mesh, (os.uname().nodename, name, torch.__version__))
    kinds = {fact[1:] for fact in facts}
    alike = len(kinds) == 1
    nodes = len({host for host, _, _ in facts})
    text = "; ".join(sorted(f"{device}, torch {version}" for device, version in kinds))
    yield Row(f"{nodes} hosts", text, "all alike", alike)


def _bandwidth(mesh: Mesh, name: str, ranks: Ranks, size: int) -> Row:
    """Bus bandwidth of an all-reduce, 2 (n - 1) / n bytes per byte, of the slowest rank; the sum is checked."""
    x = torch.ones(size // 4, device=mesh.device.device)
    dist.all_reduce(x, group=ranks.group)
    is_right = bool((x == ranks.size).all())
    mesh.device.synchronize()
    dist.barrier(group=mesh.over("world").group)
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(x, group=ranks.group)
    mesh.device.synchronize()
    spent = max(agree(mesh, time.perf_counter() - started)) / REPEATS
    right = all(agree(mesh, is_right))
    speed = 2 * (ranks.size - 1) / ranks.size * size / spent / GIGA
    text = f"{speed:.2f} GB/s ({size >> 20} MiB, {ranks.size} ranks){'' if right else '; the SUM IS WRONG'}"
    return Row(f"all-reduce, {name}", text, "the sum is right", right, speed)


def _prune(mesh: Mesh, case: Case) -> Iterator[Row]:
    """The tiny prune on the layout `case`, against the oracle."""
    heads = 2 * case.tp if case.tp > 2 else 4
    layers = case.pp * max(1, 4 // case.pp)
    config = tiny_config(
        num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=layers, intermediate_size=16 * case.tp
    )
    weights, settings = random_llama_weights(config, seed=3), oracle_settings(config)
    micro_batches = case.dp * max(1, 2 // case.dp)
    job = (config, weights, settings, ITERATIONS, micro_batches, MICRO_BATCH, SEQUENCE)
    outcome = train_case(mesh, case, *job)
    row = None
    if mesh.rank == 0:
        agreement = hold_together(*oracle_run(config, weights, settings, ITERATIONS, micro_batches), outcome)
        error = max(agreement.loss_errors)
        passed = not agreement.faults and error < FP32_ERROR and agreement.compared > 0
        text = f"{agreement.compared} of {agreement.of} removals, losses within {error:.1e}"
        text = "; ".join((text, *agreement.faults))
        row = Row(f"tiny prune on {case.name} against the oracle", text, f"<= {FP32_ERROR:g}", passed)
    row = broadcast_object(mesh, row)
    alike = len({repr((o.removals, o.losses)) for o in agree(mesh, outcome)}) == 1
    yield row
    yield Row("all ranks saw the same", "yes" if alike else "NO", "yes", alike)


def place_this_rank(environment: dict[str, str]) -> None:
    """Set RANK and the rest in os.environ from the scheduler's variables; nothing when torchrun has done so. Raises
    UserError: this process is not one rank of several, nor the only one."""
    from megatron_prune.runtime.places import Rank, find_place

    if "RANK" in environment:
        return
    place = find_place(environment)
    if isinstance(place, Rank):
        os.environ.update(place.environment)
    elif place.nnodes > 1:
        raise UserError("--cluster: start it by torchrun, or by srun with one task per rank")
