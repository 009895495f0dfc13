"""Kernels made by torch.compile compute what the oracle computes, and removals and compactions make few new ones."""

import os
import shutil

import pytest

from megatron_prune.errors import UserError
from megatron_prune.model.elementwise import NONE, kernels_for
from megatron_prune.testing.helpers.comparison import (
    MICRO_BATCH,
    MICRO_BATCHES,
    SEQUENCE,
    hold_together,
    iterations_of,
    oracle_run,
    oracle_settings,
)
from megatron_prune.testing.helpers.oracle_cases import COARSE, MODELS
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, run_case
from megatron_prune.testing.helpers.tiny_models import random_llama_weights

# Norm, rotation, SwiGLU forward and backward: one graph each for the first shapes, and one or two until what changes is
# known to. 8 were seen, with 9 compactions and 40 removals.
MOST_GRAPHS = 10


def counted_run(rank, world_size, cache, *arguments):
    """(what `run_case` gives, graphs that were compiled on this rank)."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/{rank}", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    outcome = run_case(rank, world_size, *arguments)
    return outcome, counters["stats"]["unique_graphs"] - before


def check(case, tmp_path, iterations):
    config = MODELS["qwen3"]
    rules = oracle_settings(config, 0.5)
    weights = random_llama_weights(config, seed=3)
    oracle, expected = oracle_run(config, weights, rules, iterations, MICRO_BATCHES)
    iterations = iterations_of(oracle, iterations)
    given = (str(tmp_path), case, config, weights, rules, iterations, MICRO_BATCHES, MICRO_BATCH, SEQUENCE)
    outcomes = run_ranks(counted_run, case.world_size, *given, timeout=280)
    for outcome, graphs in outcomes:
        agreement = hold_together(oracle, expected, outcome)
        assert not agreement.faults and max(agreement.loss_errors) < 1e-5
        assert agreement.compared >= 10 and outcome.compactions >= 5
        assert 0 < graphs <= MOST_GRAPHS


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ["g++", "clang++"])), reason="no C++ compiler is here")


@needs_compiler
@pytest.mark.timeout(300)
def test_compiled_kernels_agree_with_the_oracle(tmp_path):
    check(Case(compile="on", quanta=COARSE), tmp_path, 40)


@needs_compiler
@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", [Case(tp=2, sequence_parallel=True), Case(pp=2, dp=2, distributed_optimizer=True)])
def test_compiled_kernels_on_layouts(case, tmp_path):
    check(Case(**{**vars(case), "compile": "on", "quanta": COARSE}), tmp_path, 40)


def test_where_kernels_are_made(monkeypatch):
    assert kernels_for("auto", "cpu") == kernels_for("off", "cuda") == kernels_for("on", None) == NONE
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"model.compile: on needs a C\+\+ compiler"):
        kernels_for("on", "cpu")
