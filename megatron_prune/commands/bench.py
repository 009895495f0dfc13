"""What pruning costs, as fractions of a training step: `make bench`, or `megatron-prune bench [--tiny]`.

One run prints beside each other:

    cost of scoring, of the decision, of one retirement of each kind and of a compaction, over a plain step's
    throughput with pruning at 1:1 over throughput without: steps of both kinds in turn (A B A B), median of pairs
    bytes that a rank puts into collectives per pruning step, beside the formula
    peak memory of a compaction over the peak of a plain step
    what single ranks of 512 plan and send, for shapes of 1.7 B, 7 B and 70 B parameters, without weights

Fractions, not seconds: the machine's speed cancels. On the CPU the layouts are two gloo ranks of one thread each: TP 2,
and DP 2 with the distributed optimizer. On a GPU it is one rank in bf16 with quantum 1, 64 and 128; without one these
columns read "not measured". docs/benchmarks.md explains the rows and keeps the numbers of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import known_groups
from megatron_prune.testing.benchmarks.costs import CostRow, Preset, measure, measure_memory, tied_shape
from megatron_prune.testing.benchmarks.planning import SHAPES, WORLD, measure_plans
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, rounded
from megatron_prune.testing.helpers.stepped_run import Setup

NOT_MEASURED = "not measured"


def cpu_presets(tiny: bool) -> list[Preset]:
    """Two gloo ranks. `tiny` is for the tool's own test: its fractions mean nothing."""
    shape = tied_shape(32, 48, 8, 2, 64, 16) if tiny else tied_shape(256, 1024, 16, 4, 2048, 512)
    counts = (2, 1) if tiny else (20, 3)
    quanta = rounded(ffn=4, stem=4, vocab=64)
    cases = {
        "TP 2": Case(tp=2, quanta=quanta),
        "DP 2, distributed optimizer": Case(dp=2, distributed_optimizer=True, quanta=quanta),
    }
    return [
        Preset(
            title,
            Setup(shape, case, shape.max_position_embeddings, 1, 8),
            "cpu",
            _thinned(shape, 6 if tiny else 10),
            *counts,
        )
        for title, case in cases.items()
    ]


def _thinned(shape: LlamaShape, groups: int) -> dict[str, int]:
    """So many groups of every kind that costs one pruning step."""
    return {kind.name: groups for kind in known_groups() if kind.is_default and kind.default_cost(shape) == 1}


def gpu_presets(tiny: bool) -> list[Preset]:
    """One GPU, hidden 2048, FFN 8192, 32 heads."""
    shape = tied_shape(256, 1024, 8, 2, 1024, 128) if tiny else tied_shape(2048, 8192, 32, 8, 49152, 2048)
    counts = (3, 1) if tiny else (20, 5)
    presets = []
    for quantum in (1, 64, 128):
        case = Case(bf16=True, distributed_optimizer=True, quanta=rounded(ffn=quantum, stem=quantum))
        setup = Setup(shape, case, shape.max_position_embeddings, micro_batch_size=1, micro_batches=8)
        presets.append(Preset(f"quantum {quantum}", setup, "cuda", _thinned(shape, 100), *counts))
    return presets


# Output ---------------------------------------------------------------------------------------------------------------


def columns(preset: Preset) -> dict[str, CostRow]:
    """Measure the column of `preset`; its rows by name."""
    world = preset.setup.case.world_size
    rows: list[CostRow] = []
    for part in (measure, measure_memory):
        rows += part(0, 1, preset) if preset.device == "cuda" else run_ranks(part, world, preset, timeout=1800)[0]
    return {row.name: row for row in rows}


def plans_of(title: str, tiny: bool) -> dict[str, CostRow]:
    """The column of a shape of `SHAPES` on 512 ranks; its rows by name."""
    ranks, times = ((0,), 1) if tiny else ((0, 130, 300, WORLD - 1), 5)
    (rows,) = run_ranks(measure_plans, 1, SHAPES[title], ranks, times, timeout=600)
    return {row.name: row for row in rows}


def show(
    title: str, found: dict[str, dict[str, CostRow]], names: Sequence[str], goals: dict[str, str], cpu: bool
) -> None:
    """Print a table: a line per name, a column (or two) per title in `found`."""
    heads = [head for column in found for head in ((column, "by CPU time") if cpu else (column,))]
    print(f"\n### {title}\n\n| | {' | '.join(heads)} | goal |\n|{' --- |' * (len(heads) + 2)}")
    for name in names:
        cells = []
        for rows in found.values():
            row = rows.get(name, CostRow(name, NOT_MEASURED))
            cells += [row.value, row.cpu] if cpu else [row.value]
        print(f"| {name} | {' | '.join(cells)} | {goals[name]} |")


@dataclass(frozen=True)
class BenchOptions:
    """The command's options."""

    tiny: bool = option(False, "seconds instead of minutes; the numbers mean nothing")


def measure_all(arguments: BenchOptions) -> int:
    """Measure and print; the exit status."""
    tiny = arguments.tiny
    found = {preset.title: columns(preset) for preset in cpu_presets(tiny)}
    every = {name: row for rows in found.values() for name, row in rows.items()}
    names, goals = list(every), {name: row.goal for name, row in every.items()}
    show("CPU: two ranks, one thread each, fp32", found, names, goals, cpu=True)
    has_gpu = torch.cuda.is_available()
    found = {preset.title: columns(preset) if has_gpu else {} for preset in gpu_presets(tiny)}
    show("GPU: one rank, bf16, hidden 2048, FFN 8192, 32 heads", found, names, goals, cpu=False)
    plans = {title: plans_of(title, tiny) for title in list(SHAPES)[: 1 if tiny else None]}
    goals = {name: row.goal for rows in plans.values() for name, row in rows.items()}
    show(f"Plans on {WORLD} ranks that are not there", plans, list(goals), goals, cpu=False)
    return 0


main = partial(run_command, "bench", BenchOptions, measure_all)
