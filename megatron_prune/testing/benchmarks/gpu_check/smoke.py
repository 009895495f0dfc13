"""Does anything work at all: device, collectives, a tiny prune against the CPU's.

The CPU's side runs in processes that see no GPU. In fp32 the two differ by the order of sums only; in bf16 (8 bits of
mantissa, 0.4 % apart) losses are held to 2 %, as everywhere in this project, and the removals that are the same are
counted until rounding decides one.
"""

import dataclasses
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import close_mesh, init_mesh
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row, at_most
from megatron_prune.testing.helpers.comparison import MARGIN, MICRO_BATCH, MICRO_BATCHES, SEQUENCE, oracle_settings
from megatron_prune.testing.helpers.oracle_cases import MODELS
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, Outcome, rounded, run_case
from megatron_prune.testing.helpers.tiny_models import random_llama_weights

ITERATIONS = 24
FP32_ERROR, BF16_ERROR = 1e-4, 0.02


def check(context: Context) -> Iterator[Row]:
    """Rows in the order of the module's docstring."""
    yield Row("versions", ", ".join(_versions()))
    if context.is_cuda:
        facts = torch.cuda.get_device_properties(0)
        yield Row("device", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} SMs")
    yield from _collectives(context)
    yield from _prunes(context)


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    yield f"torch {torch.__version__}"
    for name in ("megatron-core", "transformers", "triton", "transformer-engine", "apex"):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} absent"


def _collectives(context: Context) -> Iterator[Row]:
    """Each kind that training uses, over a group of one rank."""
    mesh = init_mesh(choose_device(context.device), 1, 1)
    x = torch.arange(8.0, device=mesh.device.device)
    summed, scattered, gathered = x.clone(), torch.empty_like(x), torch.empty_like(x)
    world, owners, tp = (mesh.over(axis).group for axis in ("world", "owners", "tp"))
    dist.all_reduce(summed, group=world)
    dist.reduce_scatter_tensor(scattered, x, group=owners)
    dist.all_gather_into_tensor(gathered, x, group=owners)
    dist.broadcast(gathered, 0, group=tp)
    dist.barrier(group=world)
    agrees = all(torch.equal(x, y) for y in (summed, scattered, gathered))
    close_mesh()
    yield Row(f"collectives of {mesh.device.backend}, one rank", "right" if agrees else "wrong", "right", agrees)


def _prunes(context: Context) -> Iterator[Row]:
    config = MODELS["gqa-tied"]
    weights, settings = random_llama_weights(config, seed=3), oracle_settings(config)
    count = 6 if context.tiny else ITERATIONS
    for bf16 in (False, True):
        case = Case(bf16=bf16, distributed_optimizer=bf16, quanta=rounded(ffn=4, stem=4, vocab=8))
        job = (config, weights, settings, count, MICRO_BATCHES, MICRO_BATCH, SEQUENCE)
        (expected,) = run_ranks(run_case, 1, case, *job, timeout=120)
        mine = run_case(0, 1, dataclasses.replace(case, device=context.device), *job)
        yield from _compared("bf16" if bf16 else "fp32", expected, mine, BF16_ERROR if bf16 else FP32_ERROR)


def _compared(dtype: str, expected: Outcome, mine: Outcome, limit: float) -> Iterator[Row]:
    pairs = list(zip(expected.removals, mine.removals, strict=False))
    same = [a["gone"] == b["gone"] for a, b in pairs]
    alike = same.index(False) if False in same else len(same)
    margins = [removal["margin"] for removal in expected.removals]
    decided = alike < len(pairs) and (dtype == "bf16" or (margins[alike] or 0.0) < MARGIN)
    passed = bool(pairs) and (decided or (alike == len(pairs) and len(expected.removals) == len(mine.removals)))
    note = f", then margin {margins[alike]:.1e}" if alike < len(pairs) else ""
    yield Row(
        f"tiny prune, {dtype}: removals as on the CPU", f"{alike} of {len(expected.removals)}{note}", "all", passed
    )
    last = expected.removals[alike]["iteration"] if alike < len(pairs) else len(mine.losses)
    errors = [abs(b / a - 1) for a, b in zip(expected.losses[:last], mine.losses[:last], strict=True)]
    yield at_most(f"tiny prune, {dtype}: losses against the CPU's, relative", max(errors), limit, "{:.1e}")
