"""What a checkpoint costs, beside writing the same bytes raw: `megatron-prune bench-save [--tiny] [--dir DIR]`.

In turn, so that whatever else the machine does hits both: a save, and *raw*: the same ranks write as many bytes as
their tensor files have, into as many files by as many threads, from memory that is there already, and flush them. A
save also plans, picks live elements from between empty slots, sums up, flushes small files and publishes. Then saves
beside the training: how long they hold it up, as a fraction of a step. Medians.

    Layout     a row of the output
    measure    its numbers, on one rank
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.checkpoint.save import AsyncSaver, save_checkpoint
from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import default_names, find_group
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import close_mesh, init_mesh
from megatron_prune.testing.helpers.meters import Stopwatch
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun

MIB = 1 << 20
STATE = {"tokens": 0}


@dataclass(frozen=True)
class Layout:
    """A row: a name, the case, and whether groups of all kinds have left empty slots everywhere."""

    name: str
    case: Case
    is_pruned: bool


LAYOUTS = (
    Layout("1 rank", Case(), False),
    Layout("1 rank, empty slots", Case(), True),
    Layout("TP 2", Case(tp=2), False),
    Layout("TP 2, empty slots", Case(tp=2), True),
    Layout("DP 2, distributed optimizer", Case(dp=2, distributed_optimizer=True), True),
)


def setup_of(case: Case, tiny: bool) -> Setup:
    """About 600 MB of weights and optimizer state in fp32; a step of 256 tokens."""
    shape = LlamaShape(6, 768, 2304, 12, 12, 64, 4096, 256) if not tiny else LlamaShape(2, 64, 160, 4, 4, 16, 512, 256)
    return Setup(shape, case, seq_length=128, micro_batch_size=1, micro_batches=2)


def write_raw(folder: Path, rank: int, sizes: Sequence[int], content: memoryview) -> None:
    """Files of `sizes` bytes, each by a thread of its own, flushed."""

    def write(number: int) -> None:
        with (folder / f"raw_{rank}_{number}").open("wb", buffering=0) as file:
            done = 0
            while done < sizes[number]:
                done += file.write(content[done : sizes[number]])
            os.fsync(file.fileno())

    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(write, range(len(sizes))))


def measure(rank: int, _world_size: int, setup: Setup, is_pruned: bool, pairs: int, folder: str) -> dict[str, float]:
    """Medians over `pairs`; run by every rank."""
    case, place, saves = setup.case, Path(folder), Path(folder) / "saves"
    mesh = init_mesh(choose_device(case.device), case.tp, case.pp)
    run, saver = SteppedRun(setup, mesh), AsyncSaver()
    clock = Stopwatch(mesh)
    run.plain_step()
    for name in default_names() if is_pruned else ():
        for _ in range(1 if find_group(name).default_cost(setup.shape) > 1 else 3):
            run.model.retire(run.group(name))
    path = save_checkpoint(run.model, saves, 1, STATE)
    assert path is not None
    sizes = [file.stat().st_size for file in sorted(path.glob(f"__{rank}_*.distcp"))]
    total = RunRecord.read(path).stored_bytes
    content = torch.randint(0, 255, (max(sizes),), dtype=torch.uint8).numpy().data
    times: dict[str, list[float]] = {name: [] for name in ("save", "raw", "step", "stall", "publish", "beside")}

    def clear() -> None:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(place)
            place.mkdir()
        dist.barrier()

    def timed(name: str, job: Callable[[], Any]) -> None:
        times[name].append(clock.time(job)[1].wall)

    jobs: list[tuple[str, Callable[[], Any]]] = [
        ("save", lambda: save_checkpoint(run.model, saves, 1, STATE)),
        ("raw", lambda: write_raw(place, rank, sizes, content)),
    ]
    for pair in range(pairs):
        for name, job in jobs if pair % 2 else reversed(jobs):
            clear()
            timed(name, job)
    for number in range(1 + max(2, pairs // 2)):
        clear()
        timed("step", run.plain_step)
        timed("stall", lambda: save_checkpoint(run.model, saves, 1, STATE, saver=saver))
        timed("beside", run.plain_step)
        if number == 0:
            first = times["stall"].pop()  # the memory to copy to is made
        while saver.is_writing:
            time.sleep(0.01)
        timed("publish", lambda: saver.finalize(blocking=True))
    close_mesh()
    found = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["save"], times["raw"], strict=True))
    return found | {
        "MB": total / 1e6,
        "save / raw": ratio,
        "first stall": first,
        "stall / step": found["stall"] / found["step"],
    }


@dataclass(frozen=True)
class BenchSaveOptions:
    """The command's options."""

    tiny: bool = option(False, "seconds instead of a minute or two; the numbers mean nothing")
    pairs: int = option(7, "saves of each kind", at_least=1)
    dir: str | None = option(None, "where to write (a new folder beneath it); temporary unless given", metavar="DIR")


def measure_all(arguments: BenchSaveOptions) -> int:
    """Measure and print; the exit status."""
    columns = ("MB", "save", "raw", "save / raw", "first stall", "stall", "publish", "step", "stall / step", "beside")
    print("| | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for layout in LAYOUTS:
        folder = tempfile.mkdtemp(prefix="bench_save_", dir=arguments.dir)
        try:
            job = setup_of(layout.case, arguments.tiny), layout.is_pruned, arguments.pairs, folder
            found = run_ranks(measure, layout.case.world_size, *job, timeout=600)[0]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"| {layout.name} | " + " | ".join(f"{found[name]:.3g}" for name in columns) + " |", flush=True)
    print(f"seconds; load average at the end {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0


main = partial(run_command, "bench-save", BenchSaveOptions, measure_all)
