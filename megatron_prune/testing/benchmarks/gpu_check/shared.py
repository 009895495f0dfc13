"""Two ranks on one card: NCCL refuses that; gloo takes CUDA tensors for some operations. Tried, and told as it is."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.runtime.places import search_path
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row
from megatron_prune.testing.helpers.ranks import free_port

CASES = {
    "TP 2, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "PP 2": {"pp": 2},
    "DP 2, distributed optimizer": {"dp": 2, "distributed_optimizer": True},
}
ITERATIONS = 12


def check(context: Context) -> Iterator[Row]:
    """A row per operation and per layout; each pair of ranks may crash by itself."""
    with ThreadPoolExecutor(len(OPERATIONS) + len(CASES) if context.is_cuda else 1) as pool:
        yield from pool.map(partial(_pair, context), (*OPERATIONS, *CASES))


def _pair(context: Context, name: str) -> Row:
    """What two ranks found, each a process of its own."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        environment = os.environ | {"PYTHONPATH": search_path(), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        module = "megatron_prune.testing.benchmarks.gpu_check.shared"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, name, context.device, folder],
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        words = ""
        for rank in ranks:
            try:
                _, told = rank.communicate(timeout=30 if context.is_cuda else 90)
            except subprocess.TimeoutExpired:
                rank.kill()
                told = "hangs"
            sys.stdout.write(told)
            if rank.returncode != 0 and not words:
                words = (told.strip().splitlines() or [f"status {rank.returncode}"])[-1][:160]
        found = Path(folder) / "found.json"
        measured = words or json.loads(found.read_text())
    return Row(f"two ranks on one device over gloo: {name}", measured)


def _pass_on(x: Tensor) -> None:
    if dist.get_rank() == 0:
        dist.send(x, 1)
    else:
        dist.recv(x, 0)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "all_reduce": dist.all_reduce,
    "broadcast": lambda x: dist.broadcast(x, 0),
    "all_gather": lambda x: dist.all_gather_into_tensor(x.new_empty(8), x),
    "reduce_scatter": lambda x: dist.reduce_scatter_tensor(x.new_empty(2), x),
    "send and receive": _pass_on,
}


def _rank(name: str, device: str, folder: str) -> None:
    """One of the two ranks."""
    if name in OPERATIONS:
        dist.init_process_group("gloo")
        OPERATIONS[name](torch.ones(4, device=torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")))
        dist.destroy_process_group()
        text = "runs"
    else:
        text = _train(CASES[name], device)
    if os.environ["RANK"] == "0":
        (Path(folder) / "found.json").write_text(json.dumps(text))


def _train(layout: dict[str, Any], device: str) -> str:
    """A small run on this layout, compared with the oracle's."""
    # Here, since the ranks of an operation start in a third of the time without them.
    from megatron_prune.testing.benchmarks.gpu_check.smoke import FP32_ERROR
    from megatron_prune.testing.helpers import comparison
    from megatron_prune.testing.helpers.oracle_cases import MODELS
    from megatron_prune.testing.helpers.sharded import SHARED_GPU, Case, rounded, run_case
    from megatron_prune.testing.helpers.tiny_models import random_llama_weights

    kind = SHARED_GPU if device == "cuda" else "cpu"
    case = Case(**layout, quanta=rounded(ffn=4, stem=4, vocab=8), device=kind)
    model = MODELS["gqa-tied"]
    weights, settings = random_llama_weights(model, seed=3), comparison.oracle_settings(model)
    batches = (comparison.MICRO_BATCHES, comparison.MICRO_BATCH, comparison.SEQUENCE)
    outcome = run_case(int(os.environ["RANK"]), 2, case, model, weights, settings, ITERATIONS, *batches)
    agreement = comparison.hold_together(*comparison.oracle_run(model, weights, settings, ITERATIONS), outcome)
    agrees = not agreement.faults and max(agreement.loss_errors) < FP32_ERROR
    return (
        f"{agreement.compared} of {agreement.of} removals as the oracle's, losses within "
        f"{max(agreement.loss_errors):.1e}: {'agrees' if agrees else 'DIFFERS'}"
    )


if __name__ == "__main__":
    _rank(*sys.argv[1:])
