"""Check a machine with a GPU: the same numbers as on the CPU, speed, memory: `make gpu-check`, at most 8 minutes.

    megatron-prune gpu-check [--only smoke,speed] [--out build/gpu_check]
    megatron-prune gpu-check --device cpu --tiny        a rehearsal anywhere; its numbers mean nothing
    megatron-prune gpu-check --only science --minutes 7 --state DIR     goes on with the run in DIR
    torchrun --nproc-per-node 8 -m megatron_prune gpu-check --cluster --tensor-model-parallel-size 4
                                                        many ranks: see examples/slurm/gpu_check.sbatch

Results are written as they come (`results.jsonl`, `log.txt`) and end in a table: row, goal, measured. Exit status 1
when a row misses its goal. What the rows mean: docs/gpu.md.
"""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_prune.commands.running import run_on_ranks
from megatron_prune.config import Given
from megatron_prune.config.options import option
from megatron_prune.errors import UserError
from megatron_prune.runtime.folders import probe_folder
from megatron_prune.testing.benchmarks.gpu_check.rows import RESULTS, Context
from megatron_prune.testing.benchmarks.gpu_check.runner import LOG, STEPS, run_steps

NAMES = tuple(step.name for step in STEPS)


@dataclass(frozen=True)
class GpuCheckOptions:
    """The command's options."""

    device: Literal["cuda", "cpu"] = option("cuda", "what to check")
    tiny: bool = option(False, "small shapes: tries the script, not the machine")
    only: str = option(",".join(NAMES), f"some of {', '.join(NAMES)}, separated by commas", metavar="STEPS")
    out: str = option("build/gpu_check", "results", metavar="DIR")
    data: str | None = option(None, "real inputs; $MEGATRON_PRUNE_DATA unless given", metavar="DIR")
    model: str | None = option(
        None, "Hugging Face folder for the step science; a small one unless given", metavar="DIR"
    )
    state: str | None = option(None, "run of the step science; goes on from what is there", metavar="DIR")
    minutes: float = option(1.0, "of the step science", above=0)
    cluster: bool = option(False, "be one of many ranks: bandwidth, a tiny prune on their layout")
    tensor_model_parallel_size: int = option(1, "with --cluster", at_least=1)
    pipeline_model_parallel_size: int = option(1, "with --cluster", at_least=1)


def check(given: Given) -> int:
    """Check this machine, or this rank; the exit status. Raises UserError."""
    arguments: GpuCheckOptions = given.own()
    if arguments.cluster:
        return _cluster(arguments)
    wanted = arguments.only.split(",")
    unknown = sorted(set(wanted) - set(NAMES))
    if unknown:
        raise UserError(f"--only: unknown step {unknown[0]}; there are {', '.join(NAMES)}")
    real = arguments.data or os.environ.get("MEGATRON_PRUNE_DATA")
    for flag, folder in (("--data", real), ("--model", arguments.model)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{flag} {folder}: is no folder")
    out = Path(arguments.out).resolve()
    probe_folder(out, "--out")
    for name in (RESULTS, LOG):
        (out / name).unlink(missing_ok=True)
    data, model, state = (Path(path).resolve() if path else None for path in (real, arguments.model, arguments.state))
    context = Context(arguments.device, arguments.tiny, out, data, model, state, arguments.minutes)
    failed = run_steps(context, wanted, slowness=6.0 if arguments.device == "cpu" else 1.0)
    return 1 if failed else 0


def _cluster(arguments: GpuCheckOptions) -> int:
    from megatron_prune.testing.benchmarks.gpu_check.new_cluster import check_cluster, place_this_rank

    place_this_rank(dict(os.environ))
    layout = (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
    return 1 if check_cluster(arguments.device, *layout) else 0


main = partial(run_on_ranks, "gpu-check", GpuCheckOptions, check, level=logging.INFO)
