"""megatron-prune bench: the bytes of a pruning step are exactly what the formulas say, and every row is printed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prune.commands import bench
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import default_names
from megatron_prune.resharding.plan import plan_transfer
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import agree, close_mesh, init_mesh
from megatron_prune.testing.benchmarks import costs
from megatron_prune.testing.helpers.meters import BytesSent
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, rounded
from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun

FP32, INT64 = 4, 8
LAYERS, SHAPE = 2, LlamaShape(2, 32, 48, 8, 4, 4, 60, 16)
QUANTA = rounded(head=1, ffn=4, stem=4, vocab=4)
TP2, DP2 = Case(tp=2, quanta=QUANTA), Case(dp=2, quanta=QUANTA)
SHARDED_DP2 = Case(dp=2, distributed_optimizer=True, quanta=QUANTA)
TP2_DP2 = Case(tp=2, dp=2, distributed_optimizer=True, quanta=QUANTA)


def bytes_of_a_pruning_step(_rank: int, _world: int, case: Case) -> list[tuple[str, int, int]]:
    """(what, bytes measured, bytes by formula) on this rank, after two steps and one removal of each kind."""
    mesh = init_mesh(choose_device("cpu"), case.tp, case.pp)
    run = SteppedRun(Setup(SHAPE, case, 16, 1, 4), mesh)
    run.plain_step()
    run.pruning_step()
    for kind in default_names():
        run.retire(kind)
    a, model, found = run.architecture, run.model, []

    fisher = run.watched_gradients()
    owned = sum(s.end - s.start for s in model.owned() if s.row.is_output)
    whole = sum(p.numel() for _, p, row in model.rows() if row.is_output)
    with BytesSent() as meter:
        squares = fisher.reduce()
    shares = agree(mesh, (mesh.tp_rank, owned))
    everywhere = [n for tp_rank, n in shares if tp_rank == mesh.tp_rank]
    share = -(-sum(everywhere) // case.dp)
    scattered = case.dp * share if case.distributed_optimizer else 0
    summed = whole if case.dp > 1 and not case.distributed_optimizer else 0
    found.append(("squares, reduce-scatter", meter.by_operator["_reduce_scatter_base_"], FP32 * scattered))
    first = sum(everywhere[: mesh.over("owners").rank])  # where this rank's own lie among all, owner after owner
    place = mesh.over("owners").rank * share
    here = min(share, sum(everywhere) - place)
    own = max(min(first + owned, place + share) - max(first, place), 0)
    handed = (here - own) * case.distributed_optimizer
    found.append(("squares, shares to their owners", meter.by_operator["send"], FP32 * handed))
    found.append(("squares, all-reduce", meter.by_operator["allreduce_"], FP32 * summed))

    elements = run.score(squares)
    with BytesSent() as meter:
        sums = elements.reduce()
    reductions = (case.tp > 1) + (case.dp > 1 and case.distributed_optimizer)
    numbers = LAYERS * (a.num_attention_heads + a.ffn_hidden_size) + a.hidden_size
    found.append(("scores", meter.total, FP32 * numbers * reductions))

    with BytesSent() as meter:
        run.decide(sums)
    found.append(("decision is small", int(meter.total < 1000), 1))
    with BytesSent() as meter:
        for kind in default_names():
            run.retire(kind)
    found.append(("retirement", meter.total, 0))
    return [*found, *bytes_of_a_compaction(run)]


def bytes_of_a_compaction(run: SteppedRun) -> list[tuple[str, int, int]]:
    """Each weight of a unit that changes its rank is sent once, and each moment that changes its owner."""
    run.retire("ffn", 8)
    run.retire("stem", 3)
    model, layout, rank = run.model, run.model.layout, run.mesh.tp_rank
    moved = 0
    for _, _, row in model.rows():
        plan = plan_transfer(row, layout, layout.compacted(), rank)
        for positions in plan.sends.values():
            across = [size for dim, size in enumerate(plan.new_shape) if dim != plan.sharded_dim]
            moved += len(positions) * int(np.prod(across))
    moments, before = 2, owned_elements(run)
    with BytesSent() as meter:
        run.compact()
    is_split = run.setup.case.dp > 1 and run.setup.case.distributed_optimizer
    handed_on = len(before - owned_elements(run)) if is_split else moved
    rest = {name: size for name, size in meter.by_operator.items() if name not in ("send", "allreduce_")}
    checks = 2 * INT64  # Adam's step, and the count of live parameters
    found = [
        ("compaction, sends", meter.by_operator["send"], FP32 * (moved + moments * handed_on)),
        ("compaction, all-reduce", meter.by_operator["allreduce_"], checks),
        ("what megatron-core's optimizers agree on is small", int(sum(rest.values()) < 1000), 1),
    ]
    close_mesh()
    return found


def owned_elements(run: SteppedRun) -> set[tuple[str, int, int]]:
    """(parameter, row, column) in canonical numbers of every live element that this rank's optimizer steps."""
    model, found = run.model, set[tuple[str, int, int]]()
    for shard in model.owned():
        rows, columns = (
            *(shard.row.element_ids(dim, model.layout, run.mesh.tp_rank) for dim in range(len(shard.row.dims))),
            np.zeros(1, int),
        )[:2]
        parts = np.repeat(
            np.arange(len(shard.row.parts)), [b - a for _, a, b in shard.row.part_rows(model.layout, run.mesh.tp_rank)]
        )
        for at in range(shard.start, shard.end):
            row, column = divmod(at, len(columns))
            if rows[row] >= 0 and columns[column] >= 0:
                found.add((f"{shard.name} {parts[row]}", int(rows[row]), int(columns[column])))
    return found


@pytest.mark.parametrize("case", [TP2, DP2, SHARDED_DP2, TP2_DP2], ids=lambda case: case.name)
def test_bytes_are_the_formulas(case):
    per_rank = run_ranks(bytes_of_a_pruning_step, case.world_size, case, timeout=110)
    for rank, found in enumerate(per_rank):
        wrong = [(what, measured, formula) for what, measured, formula in found if measured != formula]
        assert not wrong, f"rank {rank}"
    if case.tp > 1:
        sent = sum(measured for found in per_rank for what, measured, _ in found if what == "compaction, sends")
        assert sent > 0, "no unit changed its rank: the case shows nothing"


def test_tiny_run_prints_every_row(capsys):
    assert bench.main(["--tiny"]) == 0
    out = capsys.readouterr().out
    cpu, gpu, plans = (
        [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
        for table in out.split("### ")[1:]
    )
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in cpu}
    wanted = [*costs.SCORING.values(), costs.DECISION, "scoring, all of it / step", "bytes: scores"]
    wanted += [f"compaction after a quantum, {kind} / step" for kind in default_names()]
    wanted += [f"retirement of a group, {kind} / step" for kind in default_names()]
    wanted += [f"second order: update before a removal, {kind} / step" for kind in default_names()]
    wanted += [f"{costs.THROUGHPUT} A B A B, a compaction per 64 removals"]
    wanted += ["peak memory of a compaction / of a plain step"] if torch.version.cuda is None else []
    for name in wanted:
        cells = [cell.strip() for cell in rows[name].split(" | ")[1:]]
        assert cells[0] and cells[2] and bench.NOT_MEASURED not in cells, name
    assert rows["bytes: scores"].split(" | ")[1] == rows[costs.FORMULA].split(" | ")[1]
    shared = {row.split(" | ")[0].removeprefix("| "): float(row.split(" | ")[1]) for row in plans if "owner" in row}
    assert len(shared) == len(default_names()) and all(ratio <= 1.1 for ratio in shared.values()), shared
    if not torch.cuda.is_available():
        assert len(gpu) == len(cpu)
        assert all(line.count(bench.NOT_MEASURED) == 3 for line in gpu[1:]), "no GPU here, yet something was measured"
