"""Block influence of the layers on layouts against the dense oracle's, number by number."""

import pytest

from megatron_prune.model.architecture import Group
from megatron_prune.model.kinds import LAYER, STEM
from megatron_prune.saliency.inputs import InfluenceWatcher
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from megatron_prune.training.step import forward_backward
from tests.resharding.live_run import GQA, MICRO_BATCH, SEQUENCE, oracle_of, start

MODEL = {**GQA, "num_hidden_layers": 4}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def influences(_rank, _world_size, case):
    trainer = start(case, MODEL, OracleSettings())
    model = trainer.model
    model.retire(Group.of(STEM, ((3,),)))  # an empty slot is in no cosine
    watcher, before = InfluenceWatcher(model), hooks(model)
    watcher.arm()
    assert hooks(model) > before
    forward_backward(model, trainer.batches, trainer.num_microbatches, MICRO_BATCH, SEQUENCE)
    found = watcher.finish()
    assert hooks(model) == before, "unhooked"
    return found[LAYER][0].tolist()


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, pp=2, sequence_parallel=True, recompute="full"),
        pytest.param(Case(pp=2, dp=2, first_stage_layers=1), marks=pytest.mark.full),
        pytest.param(Case(tp=2, dp=2, distributed_optimizer=True, recompute="selective"), marks=pytest.mark.full),
    ],
    ids=lambda case: case.name,
)
def test_it_is_the_oracles_on_every_rank(case):
    oracle, batches = oracle_of(MODEL, OracleSettings())
    oracle.remove("stem", ((3,),))
    expected = list(oracle.block_influence(batches[0]).values())
    assert len(set(expected)) == 4 and min(expected) > 1e-3
    for found in run_ranks(influences, case.world_size, case):
        assert found == pytest.approx(expected, rel=1e-5)
