"""From the target on, passes of another shape: micro-batches and recomputation of their own, the same losses."""

import re

import pytest

from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare
from megatron_prune.training import trainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def spied(*words):
    """The run; each pass says how many micro-batches of how many sequences it takes, and what is recomputed."""
    inner = trainer.forward_backward

    def forward_backward(model, batches, count, size, *more):
        print(f"pass: {count} x {size} {model.module.config.recompute_granularity}")
        return inner(model, batches, count, size, *more)

    trainer.forward_backward = forward_backward
    return main(*words)


def run(words, ranks, job=spied):
    fates = watch_ranks(victim, ranks, job, words)
    assert [fate.exit_code for fate in fates] == [0] * ranks, fates[0].output
    output = fates[0].output
    losses = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", output)]
    target = int(re.search(r"target reached at iteration (\d+)", output)[1])
    return re.findall(r"pass: (.*)", output), losses, target


@pytest.mark.parametrize("layout", [(), ("--pipeline-model-parallel-size", 2)])
def test_the_small_model_takes_larger_micro_batches(tiny, tmp_path, layout):
    ranks = 2 if layout else 1
    wide = ("--continue-micro-batch-size", 2, "--continue-recompute-granularity", "none")
    common = (*layout, "--recompute-granularity", "selective")
    _, expected, target = run(tiny.arguments(tmp_path / "plain", *common), ranks)
    words = tiny.arguments(tmp_path / "wide", *common, *wide)
    passes, losses, reached = run([*words, "--exit-interval", str(target + 2)], ranks)
    assert reached == target and passes == ["2 x 1 selective"] * target + ["1 x 2 None"] * 2
    fates = watch_ranks(victim, ranks, spied, words)
    assert set(re.findall(r"pass: (.*)", fates[0].output)) == {"1 x 2 None"}, "a resumed run goes on so"
    losses += [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", fates[0].output)]
    assert losses == pytest.approx(expected, rel=1e-5)
    plain, other = (Traces.read(tmp_path / name) for name in ("plain", "wide"))
    assert plain.history == other.history


def test_a_size_that_does_not_divide_the_batch_is_named(tiny, tmp_path, capfd):
    assert main(tiny.arguments(tmp_path / "run", "--continue-micro-batch-size", 3)) == 2
    assert "is not a multiple of continued.continue_micro_batch_size 3 x" in capfd.readouterr().err
