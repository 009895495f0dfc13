"""A compaction needs no more memory than a training step: state moves tensor by tensor, the old freed as it goes."""

import pytest

from megatron_prune.model.architecture import Group
from megatron_prune.model.kinds import FFN
from megatron_prune.testing.helpers.meters import PeakMemory
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.helpers.tiny_models import tiny_config
from megatron_prune.testing.reference.oracle import OracleSettings
from tests.resharding import live_run

LAYERS = 8
MODEL = tiny_config(  # 2 million parameters, so that weights and not the interpreter are what is measured
    hidden_size=128, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4
)


def peaks(_rank, _world_size, case):
    live_run.SEQUENCE = 64
    trainer = live_run.start(case, MODEL, OracleSettings())
    model = trainer.model
    meter = PeakMemory(model.mesh.device)
    if not meter.is_available:
        return None
    trainer.iterate()  # makes Adam's moments
    meter.start()
    trainer.iterate()
    step = meter.peak()
    model.synchronise()
    for unit in range(16):
        model.retire(Group.of(FFN, ((unit,),) * LAYERS))
    meter.start()
    before = meter.peak()
    model.compact()
    compaction = meter.peak()
    trainer.scheduler.optimizer = model.optimizer
    meter.start()
    return step, compaction, before, meter.peak()


@pytest.mark.parametrize(
    "case",
    [Case(bf16=True), Case(dp=2, distributed_optimizer=True), Case(tp=2)],
    ids=lambda case: case.name,
)
def test_a_compaction_stays_below_a_training_step(case):
    for measured in run_ranks(peaks, case.world_size, case):
        if measured is None:
            pytest.skip("this system does not tell the highest resident memory")
        step, compaction, before, after = measured
        assert compaction <= step
        assert after < 1.1 * before, "old state left behind would be half of it"
