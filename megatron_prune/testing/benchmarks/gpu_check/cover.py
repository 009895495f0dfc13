"""The oracle's cases that need one rank, on the device: fp32 and bf16, each with compactions; then `pytest -m gpu`.

Cases that have more ranks in the tests run here as one. fp32 losses are held to 1e-4 (the tests' 1e-5 is for sums in
the CPU's own order), bf16 ones to 2 %. The oracle computes on the CPU in fp32.
"""

import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from megatron_prune.runtime.signals import begin_worker
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row
from megatron_prune.testing.benchmarks.gpu_check.smoke import BF16_ERROR, FP32_ERROR
from megatron_prune.testing.helpers.comparison import (
    ITERATIONS,
    MICRO_BATCH,
    MICRO_BATCHES,
    SEQUENCE,
    hold_together,
    iterations_of,
    oracle_run,
    oracle_settings,
)
from megatron_prune.testing.helpers.oracle_cases import COARSE, MODELS, PAIRWISE, SPECIAL, case_of, name_of
from megatron_prune.testing.helpers.ranks import ROOT
from megatron_prune.testing.helpers.sharded import Case, run_case
from megatron_prune.testing.helpers.tiny_models import random_llama_weights

_ONE_RANK: dict[str, Any] = {
    "tp": 1,
    "pp": 1,
    "dp": 1,
    "sequence_parallel": False,
    "overlap": False,
    "first_stage_layers": None,
    "distributed_optimizer": True,
}


def single_rank_cases() -> dict[str, tuple[Case, dict[str, Any], dict[str, Any]]]:
    """Name -> (case, model, settings) as the oracle tests have them, for one rank; bf16 ones with main weights."""
    cases = {
        name_of(factors): case_of(factors, COARSE)
        for factors in PAIRWISE
        if factors["tp"] * factors["pp"] * factors["dp"] == 1
    }
    for name, (case, model, changes) in SPECIAL.items():
        cases[name] = dataclasses.replace(case, **_ONE_RANK), model, changes
    for name in ("gqa-tied", "qwen3"):
        cases[f"bf16-{name}"] = Case(bf16=True, distributed_optimizer=True, quanta=COARSE), MODELS[name], {}
    cases["bf16-plain-optimizer"] = Case(bf16=True, quanta=COARSE), MODELS["mha"], {"ratio": (2, 1)}
    return cases


def check(context: Context) -> Iterator[Row]:
    """A row per case, as they finish."""
    names = list(single_rank_cases())
    if context.tiny:
        names = [names[0], names[-1]]
    workers = min(len(names), 8 if context.is_cuda else 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    tests = _start_marked_tests()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker) as pool:
        jobs = {pool.submit(compare_one, name, context.device, context.tiny): name for name in names}
        for job in as_completed(jobs):
            yield job.result() if job.exception() is None else _failed(jobs[job], job.exception())
    yield _marked_tests(tests)


def _failed(name: str, error: BaseException | None) -> Row:
    words = " ".join(str(error).split())[:160]
    return Row(f"oracle, {name}", f"{type(error).__name__}: {words}", "agrees", False)


def compare_one(name: str, device: str, tiny: bool) -> Row:
    """One case on the device against the oracle on the CPU."""
    case, model, changes = single_rank_cases()[name]
    case = dataclasses.replace(case, device=device)
    settings, weights = oracle_settings(model, **changes), random_llama_weights(model, seed=3)
    torch.set_num_threads(1)  # there are as many workers as cores, and the oracle's tensors are small
    oracle, expected = oracle_run(model, weights, settings, 8 if tiny else ITERATIONS // 2)
    count = iterations_of(oracle, len(expected))
    outcome = run_case(0, 1, case, model, weights, settings, count, MICRO_BATCHES, MICRO_BATCH, SEQUENCE)
    if case.bf16:
        pairs = zip(outcome.losses, expected, strict=False)
        errors, limit = [abs(mine / own.loss - 1) for mine, own in pairs], BF16_ERROR
        agrees = max(errors) < limit and len(outcome.removals) > 0
        removals = f"{len(outcome.removals)} removals"
    else:
        agreement = hold_together(oracle, expected, outcome)
        errors, limit = list(agreement.loss_errors), FP32_ERROR
        agrees = not agreement.faults and max(errors) < limit and agreement.compared > 0
        removals = "; ".join((f"{agreement.compared} of {agreement.of} removals", *agreement.faults))
    measured = f"{removals}, losses within {max(errors):.1e}, {outcome.compactions} compactions"
    return Row(f"oracle, {name}", measured, f"agrees, losses <= {limit:g}", agrees, max(errors))


def _start_marked_tests() -> subprocess.Popen[str] | None:
    """`pytest -m gpu` of the repository this package lies in, started."""
    if not (ROOT / "tests").is_dir():
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _marked_tests(tests: subprocess.Popen[str] | None) -> Row:
    """A row on how the marked tests ended."""
    name = "pytest -m gpu"
    if tests is None:
        return Row(name, "no tests beside the package")
    out, _ = tests.communicate()
    sys.stdout.write(out)
    last = re.sub(r"[=\s]+", " ", (out.strip().splitlines() or ["no output"])[-1]).strip()
    return Row(name, last, "all pass", tests.returncode == 0)
