"""A removal touches its group only, sends nothing, and leaves zeros that training keeps at zero."""

import pytest
import torch

from megatron_prune.model.architecture import Group
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.resharding.coordinator import verify
from megatron_prune.resharding.plan import plan_transfer
from megatron_prune.testing.helpers.meters import BytesSent
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits, shrink
from tests.model.random_models import the_one
from tests.resharding.live_run import GQA, QWEN2, canonical, start

RULES = OracleSettings(lr=5e-3, weight_decay=0.1)
GROUPS = [
    Group.of(FFN, ((4,), (29,))),
    Group.of(STEM, ((7,),)),
    Group.of(HEAD, ((1,), (4,))),
    Group.of(HEAD, ((0,), (2,))),  # the last query head of a KV head, in the first layer only
    Group.of(FFN, ((0,), (0,))),
    Group.of(FFN, ((1,), (1,))),
    Group.of(FFN, ((2,), (3,))),
]


def retire_all(_rank, _world_size, case, config):
    trainer = start(case, config, RULES)
    trainer.iterate()
    model, states, sent = trainer.model, [], []
    model.synchronise()
    states.append(canonical(model))
    for group in GROUPS:
        with BytesSent() as traffic:
            model.retire(group)
        sent.append(dict(traffic.by_operator))
        verify(model, thorough=True)
        states.append(canonical(model))
    trainer.iterate()
    verify(model, thorough=True)
    with BytesSent() as traffic:  # after a step: with overlapped gathers, ranks hold old values of what others own
        for unit in (5, 7, 9):
            model.retire(Group.of(FFN, ((unit,), (unit + 1,))))
    sent.append(dict(traffic.by_operator))
    model.synchronise()
    verify(model, thorough=True)
    planned = 0
    new, rank = model.layout.compacted(), model.mesh.tp_rank
    for row in model.table.rows:
        plan = plan_transfer(row, model.layout, new, rank)
        other = [n for dim, n in enumerate(plan.new_shape) if dim != plan.sharded_dim]
        planned += 3 * 4 * sum(len(at) for at in plan.sends.values()) * (other[0] if other else 1)
    with BytesSent() as traffic:
        model.compact()
    return states, sent, planned, dict(traffic.by_operator)


@pytest.mark.parametrize(
    ("case", "config"),
    [(Case(tp=2), GQA), (Case(tp=2, dp=2, distributed_optimizer=True, overlap=True), QWEN2)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_survivors_keep_every_bit_of_their_state(case, config):
    results = run_ranks(retire_all, case.world_size, case, config)
    states = results[0][0]
    geometry = Geometry.from_hf(config)
    live = LiveUnits.full(geometry)
    for group, before, after in zip(GROUPS, states, states[1:], strict=False):
        left = live.without(*the_one(group))
        for prefix in ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/"):
            named = {key.removeprefix(prefix): value for key, value in before.items() if key.startswith(prefix)}
            for name, expected in shrink(geometry, named, live, left).items():
                assert torch.equal(after[prefix + name], expected), (group, prefix + name)
        live = left
    assert all(traffic == {} for _, sent, _, _ in results for traffic in sent), "retirement communicates nothing"


def test_a_compaction_sends_the_border_units_and_nothing_else():
    """Without a distributed optimizer: weights and both moments of units that change their rank, and one number."""
    results = run_ranks(retire_all, 2, Case(tp=2), GQA)
    assert any(planned for _, _, planned, _ in results), "no unit changes its rank: nothing is shown"
    for _, _, planned, traffic in results:
        assert traffic.pop("allreduce_", 0) <= 64, "the step count"
        assert traffic.pop("allgather_", 0) <= 1000, "what megatron-core's optimizers agree on"
        assert sum(traffic.values()) == planned and set(traffic) <= {"send"}
