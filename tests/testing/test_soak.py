"""Ten kills at named moments, in chains: each resumed run is the next victim. `make soak` draws hundreds at random."""

from importlib import import_module
from operator import attrgetter

import pytest

from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks import soak as soak_module
from megatron_prune.testing.benchmarks.kills import MOMENTS, Kill
from megatron_prune.testing.benchmarks.soak import VARIANTS, SecondStarter, Soak

BY_NAME = {variant.name: variant for variant in VARIANTS}
CHAINS = {
    "tp2-sp": [
        Kill(0, "while tensors are written", 5),  # before the first checkpoint
        Kill(1, "between decision and commit", 4),
        Kill(0, "between the two renames", 2),
        Kill(1, "while loading", 2),
        Kill(1, "while a compaction moves optimizer state", 11),
    ],
    "dp2-distributed-overlap-async": [
        Kill(1, "in a collective", 45),
        Kill(0, "when a rank has written its files", 2),
        Kill(0, "after the commit", 2),
        Kill(0, "while old checkpoints are deleted", 1),
        Kill(1, "while a compaction moves weights", 7),
    ],
    "pp2-layers": [
        Kill(1, "between decision and commit", 9),  # the first layer is about to leave
        Kill(0, "after the commit", 2),  # two layers have left, and are stored still
        Kill(1, "while a layer changes its stage", 3),  # weights have gone
        Kill(0, "while a layer changes its stage", 12),  # a part of the optimizer's state, too
    ],
}
FULL = {"pp2-layers"}
REST = [Kill(index % 2, moment, 1) for index, moment in enumerate(sorted(MOMENTS))]


def run_chain(folder, name, kills):
    """All of `kills`, then to the end; every one must have struck."""
    soak = Soak(folder, BY_NAME[name], main)
    for kill in kills:
        attempt = soak.attempt(kill)
        assert attempt.was_killed, f"{kill}: the run went on to iteration {attempt.iteration}"
    assert soak.attempt(None).is_finished
    soak.close_chain()


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_every_moment_is_a_function_of_the_code(moment):
    module, dotted, _ = MOMENTS[moment]
    assert callable(attrgetter(dotted)(import_module(module)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] if n in FULL else []) for n in CHAINS])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, name):
    run_chain(tmp_path, name, CHAINS[name])


def test_a_second_starter_that_finds_the_first_dead_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """On one rank, as it once did, it would add gradients in another order."""
    soak = Soak(tmp_path, BY_NAME["dp2-distributed-overlap-async"], main)
    assert soak.attempt(Kill(0, "before a save", 2)).iteration == 3
    monkeypatch.setattr(soak_module, "live_owner", lambda folder: "the first, which is dead when the second looks")
    second = SecondStarter(soak, 0.0, 2, soak.variant.flags)
    second.thread.join()
    assert not second.outcome()
    assert soak.iteration() == 14
    assert soak.attempt(None).is_finished
    soak.close_chain()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_pipeline_in_bf16_survives_every_moment(tmp_path):
    soak = Soak(tmp_path, BY_NAME["pp2-bf16"], main)
    killed = 0
    for kill in REST:
        attempt = soak.attempt(kill)
        killed += attempt.was_killed
        if attempt.is_finished:  # a moment that this variant does not pass
            soak.close_chain()
    assert killed >= len(MOMENTS) - 7
    assert soak.attempt(None).is_finished
    soak.close_chain()
