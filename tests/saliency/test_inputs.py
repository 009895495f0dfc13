"""Statistics of the layers' inputs, on one rank: each token once, empty slots are zero, nothing that was not asked for.

Their comparison with the oracle on every layout is in test_reducer.py.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_prune.model.architecture import Group
from megatron_prune.model.kinds import FFN
from megatron_prune.model.llama import inner_model
from megatron_prune.saliency.criteria import find_criterion
from megatron_prune.saliency.hessian import DiagonalCache, Hessian, inverse_diagonals
from megatron_prune.saliency.inputs import InputNeeds, InputWatcher, Moments
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from megatron_prune.training import pruner
from megatron_prune.training.state import RunState
from megatron_prune.training.step import evaluate, forward_backward, open_stream
from tests.resharding.live_run import GQA, MICRO_BATCH, QWEN2, SEQUENCE, start

TOKENS = MICRO_BATCH * SEQUENCE
EVERYTHING = InputNeeds(moments=True, stem_moments=True, kept=3, keep_stem=True)


def watched(trainer, needs, passes):
    watcher = InputWatcher(trainer.model, needs)
    watcher.arm()
    passes(trainer.model, trainer.batches, trainer.num_microbatches, MICRO_BATCH, SEQUENCE)
    return watcher.finish()


def one_rank(_rank, _world_size, config, recompute):
    trainer = start(Case(recompute=recompute), config, OracleSettings())
    model, count = trainer.model, trainer.num_microbatches
    model.retire(Group.of(FFN, ((5,), (6,))))
    trained = watched(trainer, EVERYTHING, forward_backward)
    names = [name for name, _, _ in model.linears()]
    assert list(trained.kept.rows) == names
    for name in names:
        x = trained.kept.gather(name)
        assert x.shape == (3 * TOKENS, trained.kept.features(name)), "the first three micro-batches, each once"
        assert not x.requires_grad
    moments = trained.moments["decoder.layers.0.mlp.linear_fc2.weight"]
    assert moments.mean_square[5] == moments.magnitude[5] == moments.variance[5] == 0, "an empty slot"
    assert int((moments.magnitude > 0).sum()) == 29
    # The same samples again, without gradients: the same tokens are seen.
    trainer.batches = open_stream(trainer.datasets.train, trainer.config, trainer.model.mesh)
    evaluated = watched(trainer, EVERYTHING, evaluate)
    assert evaluated.moments.keys() == trained.moments.keys() == {n for n in names if n != "output_layer.weight"}
    for name, found in trained.moments.items():
        torch.testing.assert_close(evaluated.moments[name].mean_square, found.mean_square, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(evaluated.kept.gather(name), trained.kept.gather(name), rtol=1e-5, atol=1e-6)
    linears = [module for _, module, _ in model.linears()]
    assert not any(module._forward_pre_hooks for module in linears), "unhooked"
    kept = watched(trainer, InputNeeds(kept=count + 5), forward_backward)
    assert not kept.moments and all(row.is_output for row in kept.kept.rows.values())
    assert len(kept.kept.gather(next(iter(kept.kept.rows)))) == count * TOKENS
    # Hessians kept over a removal: the same numbers for the columns that are left.
    diagonals = inverse_diagonals(kept.kept, model, 0.01)
    cache = DiagonalCache.of_stages(diagonals, model, removals=1)
    again = DiagonalCache(**vars(cache)).of_stage(model)
    assert all(torch.equal(again[name], values) for name, values in diagonals.items())
    model.retire(Group.of(FFN, ((0,), (29,))))
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(cache.of_stage(model)[name], diagonals[name][:-1])


@pytest.mark.parametrize(("config", "recompute"), [(QWEN2, "full"), (GQA, None)], ids=["recompute", "plain"])
def test_every_token_counts_once(config, recompute):
    run_ranks(one_rank, 1, config, recompute)


def test_moments_are_those_of_the_definition():
    generator = np.random.default_rng(0)
    x = generator.normal(loc=[0, 1, 100, -1e-4], scale=[1, 2, 0.5, 1e-6], size=(1000, 4)).astype(np.float32)
    wide = torch.from_numpy(x.astype(np.float64))
    found = Moments.of_sums(torch.stack([wide.square().sum(0), wide.sum(0), wide.abs().sum(0)]), len(x))
    np.testing.assert_allclose(found.variance, x.astype(np.float64).var(axis=0), rtol=1e-8)
    np.testing.assert_allclose(found.magnitude, np.abs(x.astype(np.float64)).mean(axis=0), rtol=1e-12)


def test_a_hessian_is_damped_and_says_when_it_is_none():
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2], x[:, 4] = 0, x[:, 1]  # never active; a twin
    gram = x.T @ x / 50
    hessian = Hessian.of_gram(gram.clone(), 0.01)
    expected = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(hessian.inverse_diagonal(), expected.diagonal(), rtol=1e-10, atol=0)
    torch.testing.assert_close(hessian.inverse_columns(torch.tensor([3, 1])), expected[:, [3, 1]])
    dead = Hessian.of_gram(torch.zeros(3, 3, dtype=torch.float64), 0.01)
    assert dead.inverse_diagonal().tolist() == [1, 1, 1]
    gram[0, 0] = math.nan
    assert bool(Hessian.of_gram(gram, 0.01).inverse_diagonal().isnan().all())


def poisoned(_rank, _world_size, metric):
    """Inputs that are not finite in a step that goes on (as after a loss mask hid them)."""
    trainer = start(Case(), GQA, OracleSettings(criterion=metric, target_params=100, group_cost={"head": 1}))
    model = trainer.model
    layer = inner_model(model.module).decoder.layers[1].mlp.linear_fc2

    def poison(_module, args):
        return (torch.where(args[0] == args[0].max(), torch.nan, args[0]),)

    before = model.layout.fingerprint()
    scoring = trainer.pruner.begin()
    handle = layer.register_forward_pre_hook(poison, prepend=True)
    evaluate(model, trainer.batches, trainer.num_microbatches, MICRO_BATCH, SEQUENCE)
    handle.remove()
    scored = scoring.finish()
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(pruner.logger, "warning", lambda text, *values: said.append(text % values))
        assert trainer.pruner.prune(scored, stepped=True) == []
    assert any(f"pruning.metric {metric}" in line and "in layer 1" in line for line in said), said
    assert model.layout.fingerprint() == before and not trainer.state.history


@pytest.mark.parametrize("metric", ["wanda", "obc"])
def test_an_input_that_is_not_finite_removes_nothing(metric):
    run_ranks(poisoned, 1, metric)


def test_nothing_is_watched_that_nobody_asked_for():
    assert not InputNeeds()
    assert not InputNeeds.of_criterion(find_criterion("taylor_mix").needs, kept=3)
    assert InputNeeds.of_criterion(find_criterion("wanda").needs, kept=3) == InputNeeds(moments=True)
    assert InputNeeds.of_criterion(find_criterion("minitron").needs, 3) == InputNeeds(moments=True, stem_moments=True)
    assert InputNeeds.of_criterion(find_criterion("obc").needs, kept=3) == InputNeeds(kept=3)


def refreshing(_rank, _world_size, refresh):
    """Which iterations compute Hessians anew, and the removals, over 5 iterations that remove a group each."""
    settings = OracleSettings(criterion="obc", target_params=100, types=("ffn",))
    trainer = start(Case(), GQA, settings)
    trainer.pruner.settings = dataclasses.replace(trainer.pruner.settings, refresh=refresh)
    fresh = []
    for _ in range(5):
        before = trainer.state.diagonals
        trainer.iterate()
        fresh.append(trainer.state.diagonals is not before)
        state = trainer.state.to_state()  # as a checkpoint stores it, and back
        again = RunState.from_state(state, trainer.architecture)
        if refresh > 1:
            assert np.array_equal(again.diagonals.values, trainer.state.diagonals.values)
            assert again.diagonals.removals == trainer.state.diagonals.removals
    return fresh, [removal.group for removal in trainer.state.history]


def test_hessians_are_kept_for_as_many_removals_as_asked_for():
    ((fresh, removed),) = run_ranks(refreshing, 1, 2)
    assert fresh == [True, False, True, False, True] and len(removed) == 5
    ((never_kept, others),) = run_ranks(refreshing, 1, 1)
    assert not any(never_kept) and len(others) == 5
    assert others[0] == removed[0]
