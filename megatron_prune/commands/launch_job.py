"""Run a whole job: prune, train on, export, evaluate; the same command goes on where a job stopped.

    megatron-prune launch CONFIG [--stage NAMES] [-- training flags]
    torchrun --nproc-per-node 8 -m megatron_prune launch CONFIG

docs/launching.md explains it; examples/pretrain_efficientllm.sh is the same as a script.
"""

import sys
from collections.abc import Sequence

from megatron_prune.launch.jobs import job
from megatron_prune.pretrain import main as train


def main(argv: Sequence[str] | None = None) -> int:
    """Run this process's part of a job; returns the exit status."""
    return job.main(sys.argv[1:] if argv is None else argv, train)
