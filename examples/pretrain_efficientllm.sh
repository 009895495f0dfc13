#!/usr/bin/env bash
""":"
# Prune while pretraining, train on, export, evaluate. This file is a shell script and a Python program: torchrun runs it
# with Python, bash runs the few lines here, which hand over to Python. docs/launching.md explains all of it.
#
#   torchrun --nproc-per-node 8 examples/pretrain_efficientllm.sh CONFIG
#   bash examples/pretrain_efficientllm.sh CONFIG --stage prune -- --train-iters 100
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC_PER_NODE=8 bash examples/pretrain_efficientllm.sh CONFIG
#   sbatch --nodes 8 examples/slurm/pretrain_efficientllm.sbatch CONFIG
#   srun --ntasks-per-node 8 bash examples/pretrain_efficientllm.sh CONFIG
#
# Each stage (prune, continue, export, evaluate) is skipped when it is done, so the same command resumes a job.

here=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# PYTHON names the interpreter; else the repository's .venv, if make install has made one; else what is on the path.
if [ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ]; then PYTHON="$here/../.venv/bin/python"; fi
exec "${PYTHON:-python3}" "$here/pretrain_efficientllm.sh" "$@"
: << '# end of the Python part'
"""

import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))  # the repository's packages, wherever the job was started

if __name__ == "__main__":
    from megatron_prune.launch.jobs.job import main
    from megatron_prune.pretrain import main as train

    sys.exit(main(sys.argv[1:], train))
# end of the Python part
