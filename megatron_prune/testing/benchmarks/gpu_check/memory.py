"""How much memory: peaks of plain, pruning and compacting iterations, a save beside the training, the estimate.

The model has a third of the source's layers, so that a checkpoint is written within the step's seconds.
"""

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_prune.checkpoint.save import AsyncSaver, save_checkpoint
from megatron_prune.config import ParallelConfig
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.launch.estimate.rank_memory import fullest_rank
from megatron_prune.pruning.groups import default_names
from megatron_prune.runtime.mesh import meshed
from megatron_prune.testing.benchmarks.costs import Clock
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row, at_most
from megatron_prune.testing.benchmarks.gpu_check.shapes import Shapes, start
from megatron_prune.testing.helpers.meters import PeakMemory
from megatron_prune.testing.helpers.stepped_run import SteppedRun

GIB = 1 << 30
GOAL_PEAK, GOAL_STALL, GOAL_ESTIMATE = 1.05, 1.0, 0.1
STATE = {"tokens": 0}


def check(context: Context) -> Iterator[Row]:
    """Rows of peaks, then of a save beside the training."""
    shapes = Shapes.of(context)
    shape = dataclasses.replace(shapes.source, num_layers=max(2, shapes.source.num_layers // 3))
    with meshed(context.device) as mesh:
        meter = PeakMemory(mesh.device)
        meter.set_rest()
        run = start(context, shapes, shape, mesh)
        if meter.is_available:
            yield from _peaks(context, run, meter)
        yield from _saves(context, run)


def _peaks(context: Context, run: SteppedRun, meter: PeakMemory) -> Iterator[Row]:
    peaks = {}
    for name in ("warm-up", "plain", "pruning", "compaction"):
        meter.start()
        if name == "compaction":
            run.compact()
        elif name == "pruning":
            run.pruning_step()
        else:
            run.plain_step()
        peaks[name] = meter.peak()
        if name == "pruning":
            for kind in default_names():
                run.retire_quantum(kind)
    plain = peaks["plain"]
    goal = GOAL_PEAK if context.is_cuda else float("inf")  # a CPU's allocator tells little of so small a model
    yield Row("peak of a plain step", f"{plain / GIB:.2f} GiB", value=plain / GIB)
    yield at_most("peak of a pruning step / of a plain step", peaks["pruning"] / plain, goal)
    yield at_most("peak of a compaction / of a plain step", peaks["compaction"] / plain, goal)
    yield from _estimates(context, run, peaks)


def _estimates(context: Context, run: SteppedRun, peaks: dict[str, int]) -> Iterator[Row]:
    """The dry run's numbers for the same run."""
    config = dataclasses.replace(run.config, parallel=ParallelConfig(use_distributed_optimizer=True))
    layout = run.model.layout
    placement = Placement.plan(config, 1, layout.architecture.shape.num_layers)
    fullest = fullest_rank(config, layout, placement, needs_fisher=True)
    for name, estimate in (("plain", fullest.training), ("pruning", fullest.peak)):
        error = estimate / peaks[name] - 1
        passed = abs(error) <= GOAL_ESTIMATE if context.is_cuda else None
        measured = f"{estimate / GIB:.2f} GiB, {error:+.1%}"
        yield Row(f"the dry run's estimate of a {name} step / measured", measured, "within 10 %", passed, error)


def _saves(context: Context, run: SteppedRun) -> Iterator[Row]:
    """How long a save in the background holds up the training, and the step beside it."""
    clock, saver, stalls, beside, whole = Clock(run.mesh), AsyncSaver(), [], [], []
    step = clock.median(run.plain_step, 2).wall
    size = 0
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        for number in range(1, 4):
            started = time.perf_counter()
            save = partial(save_checkpoint, run.model, folder, number, STATE, saver=saver)
            stalls.append(clock.time(save)[1].wall)
            beside.append(clock.time(run.plain_step)[1].wall)
            path = saver.finalize(blocking=True)
            whole.append(time.perf_counter() - started)
            assert path is not None
            size = sum(file.stat().st_size for file in Path(path).iterdir())
            shutil.rmtree(path)
    text = f"{stalls[-1]:.2f} s for {size / 1e9:.1f} GB (the first {stalls[0]:.2f} s: host memory is made)"
    yield Row("a save in the background holds up the training", text, "< 1 s", stalls[-1] < GOAL_STALL, stalls[-1])
    extra = statistics.median(beside[1:]) / step
    yield Row("step beside the writing / plain step", f"{extra:.2f}, written after {whole[-1]:.1f} s", value=extra)
