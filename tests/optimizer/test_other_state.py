"""Whatever an optimizer keeps in the weight's shape follows removals and compactions: shown with SGD's momentum.

Runs offer Adam alone; megatron-core's SGD is put in its place here.
"""

import dataclasses

import pytest
import torch

from megatron_prune.optimizer import wrapped
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import Kind, build, remove, train

STEPS = (("ffn", 2), ("head", 1), ("stem", 4), ("ffn", 5))


def momenta(model):
    """Live elements of each parameter's momentum on this rank, by name, in the order of the slots."""
    found = {}
    for shard in model.owned():
        assert set(shard.moments) == {"momentum_buffer"}
        kept = shard.moments["momentum_buffer"].view(shard.parameter.shape)
        for dim in range(kept.dim()):
            live = shard.row.element_ids(dim, model.layout, model.mesh.tp_rank) >= 0
            others = kept.index_select(dim, torch.from_numpy(~live).nonzero()[:, 0])
            assert not others.any(), f"{shard.name}: momentum in an empty slot"
            kept = kept.index_select(dim, torch.from_numpy(live).nonzero()[:, 0])
        found[shard.name] = kept.clone()
    return found


def run(rank, world, kind, compacts):
    """Losses, and whether a compaction left every live element of the momentum as it was."""
    adam = wrapped.get_megatron_optimizer

    def sgd(config, *arguments, **more):
        return adam(dataclasses.replace(config, optimizer="sgd", sgd_momentum=0.9, lr=0.05), *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapped, "get_megatron_optimizer", sgd)
        model = build(kind)
        losses, kept = [], []
        for step, (group, which) in enumerate(STEPS):
            losses.append(train(model, step))
            remove(model, group, which)
            before = momenta(model)
            if compacts:
                assert model.compact() or world > 1  # where one unit less need not be a slot less on each rank
                after = momenta(model)
                assert before.keys() == after.keys() and all(before[name].any() for name in before)
                kept.append(all(torch.equal(before[name], after[name]) for name in before if world == 1))
        return [*losses, train(model, len(STEPS)), train(model, len(STEPS) + 1)], kept


def test_momentum_follows_removals_and_compactions():
    ((expected, _),) = run_ranks(run, 1, Kind(), False)
    ((compacted, kept),) = run_ranks(run, 1, Kind(), True)
    assert kept == [True] * len(STEPS)
    assert compacted == pytest.approx(expected, rel=1e-5)
    for kind in (Kind(tp=2), Kind(tp=2, sp=True), Kind(pp=2)):
        for losses, _ in run_ranks(run, 2, kind, True):
            assert losses == pytest.approx(expected, rel=1e-5)
