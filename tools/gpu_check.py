"""Check a machine with a GPU: the same numbers as on the CPU, speed, memory: `make gpu-check`, at most 8 minutes.

    python tools/gpu_check.py [--only smoke,speed] [--out build/gpu_check]
    python tools/gpu_check.py --device cpu --tiny        a rehearsal anywhere; its numbers mean nothing
    python tools/gpu_check.py --only science --minutes 7 --state DIR     goes on with the run in DIR
    torchrun --nproc-per-node 8 tools/gpu_check.py --cluster --tensor-model-parallel-size 4
                                                         many ranks: see examples/slurm/gpu_check.sbatch

Results are written as they come (`results.jsonl`, `log.txt`) and end in a table: row, goal, measured. Exit status 1
when a row misses its goal. What the rows mean: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.runtime.failures import exit_status
from megatron_prune.testing.benchmarks.gpu_check.record import RESULTS, Context
from megatron_prune.testing.benchmarks.gpu_check.runner import LOG, STEPS, run_steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what to check (default: cuda)")
    add("--tiny", action="store_true", help="small shapes: tries the script, not the machine")
    add("--only", default=",".join(names), metavar="STEPS", help=f"some of {', '.join(names)}, separated by commas")
    add("--out", type=Path, default=Path("build/gpu_check"), metavar="DIR", help="results (default: build/gpu_check)")
    add("--data", type=Path, metavar="DIR", help="real inputs (default: $MEGATRON_PRUNE_DATA)")
    add("--model", type=Path, metavar="DIR", help="Hugging Face folder for the step science (default: a small one)")
    add("--state", type=Path, metavar="DIR", help="run of the step science; goes on from what is there")
    add("--minutes", type=float, default=1.0, metavar="M", help="of the step science (default: 1)")
    add("--cluster", action="store_true", help="be one of many ranks: bandwidth, a tiny prune on their layout")
    add("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="with --cluster (default: 1)")
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="with --cluster (default: 1)")
    arguments = parser.parse_args(argv)
    if arguments.cluster:
        return exit_status(lambda: _cluster(arguments))
    wanted = arguments.only.split(",")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"--only: unknown step {unknown[0]}; there are {', '.join(names)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = arguments.out.resolve()
    for name in (RESULTS, LOG):
        (out / name).unlink(missing_ok=True)
    data = arguments.data or (Path(os.environ["MEGATRON_PRUNE_DATA"]) if "MEGATRON_PRUNE_DATA" in os.environ else None)
    paths = [path.resolve() if path is not None else None for path in (data, arguments.model, arguments.state)]
    context = Context(arguments.device, arguments.tiny, out, *paths, arguments.minutes)
    failed = run_steps(context, wanted, slowness=3.0 if arguments.device == "cpu" else 1.0)
    return 1 if failed else 0


def _cluster(arguments: argparse.Namespace) -> int:
    from megatron_prune.testing.benchmarks.gpu_check.cluster import check_cluster, place_this_rank

    place_this_rank(dict(os.environ))
    layout = (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
    return 1 if check_cluster(arguments.device, *layout) else 0


if __name__ == "__main__":
    sys.exit(main())
