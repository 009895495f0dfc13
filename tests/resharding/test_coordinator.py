"""Ranks that disagree stop before a weight is touched and say who differs; out of memory says what is safe."""

import dataclasses

import pytest
import torch

from megatron_prune.errors import DisagreementError
from megatron_prune.model.architecture import Group
from megatron_prune.model.kinds import FFN, STEM
from megatron_prune.pruning.selector import Decision
from megatron_prune.resharding import coordinator as room
from megatron_prune.resharding.coordinator import verify
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from tests.resharding.live_run import GQA, canonical, start

RULES = OracleSettings(lr=5e-3)
GROUP = Group.of(FFN, ((4,), (29,)))
DECISION = Decision(GROUP, {"ffn": 1.0}, 0.5, 1)


def other_layout(trainer):
    layout = trainer.model.layout
    trainer.model._layout = dataclasses.replace(layout, placed={**layout.placed, STEM: layout.placed[STEM][..., ::-1]})


def other_decision(_trainer):
    """A broadcast that arrives damaged."""
    broadcast = room.broadcast_object

    def damaged(mesh, decision):
        return dataclasses.replace(broadcast(mesh, decision), group=Group.of(FFN, ((5,), (29,))))

    room.broadcast_object = damaged


def disagree(rank, _world_size, case, tamper, odd_one):
    trainer = start(case, GQA, RULES)
    trainer.iterate()
    before, layout = canonical(trainer.model), trainer.model.layout
    if rank == odd_one:
        tamper(trainer)
    decision = DECISION if rank == 0 else None
    with pytest.raises(DisagreementError) as caught:
        decision = trainer.coordinator.prepare(decision)
        trainer.coordinator.commit(decision.group)
    trainer.model._layout = layout
    after = canonical(trainer.model)
    verify(trainer.model, thorough=True)
    return str(caught.value), all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("case", "tamper", "odd_one"),
    [
        (Case(tp=3), other_layout, 1),
        (Case(tp=2, dp=2, distributed_optimizer=True), other_decision, 3),
    ],
    ids=["layout", "decision"],
)
def test_a_rank_that_disagrees_stops_all_and_is_named(case, tamper, odd_one):
    for message, untouched in run_ranks(disagree, case.world_size, case, tamper, odd_one):
        assert message.startswith(f"ranks [{odd_one}] disagree with the other {case.world_size - 1}")
        assert untouched and "\n" not in message


def agree_and_commit(_rank, _world_size):
    trainer = start(Case(tp=2), GQA, RULES)
    decision = trainer.coordinator.prepare(DECISION if trainer.model.mesh.rank == 0 else None)
    assert decision == DECISION
    assert trainer.coordinator.prepare(None) is None, "nothing to remove is agreed on, too"
    trainer.coordinator.commit(decision.group)
    assert not trainer.coordinator.compact_if_due() and trainer.coordinator.compactions == 0
    trainer.coordinator.commit(Group.of(FFN, ((3,), (3,))))
    assert trainer.coordinator.compact_if_due(), "two channels less are one slot less per rank"
    assert not trainer.coordinator.compact_if_due(), "it is compact already"
    return trainer.coordinator.compactions, trainer.model.architecture.ffn_hidden_size


def test_decisions_are_committed_and_compaction_waits_for_a_free_quantum():
    assert run_ranks(agree_and_commit, 2) == [(1, 28)] * 2


def run_out_of_memory(_rank, _world_size, iteration):
    trainer = start(Case(), GQA, RULES)
    trainer.coordinator.last_checkpoint = iteration
    trainer.coordinator.commit(GROUP)
    trainer.model.compact = lambda: torch.empty(1 << 50)  # no machine has that much
    with pytest.raises(MemoryError) as caught:
        trainer.coordinator.compact_if_due()
    assert isinstance(caught.value.__cause__, RuntimeError), "the allocator's own words stay in the traceback"
    return str(caught.value)


@pytest.mark.parametrize(
    ("iteration", "advice"),
    [
        (40, "the checkpoint of iteration 40 is untouched, resume from it"),
        (None, "no checkpoint was written yet, start again"),
    ],
)
def test_out_of_memory_says_what_is_safe(iteration, advice):
    (message,) = run_ranks(run_out_of_memory, 1, iteration)
    assert message.startswith("out of memory while compacting") and advice in message


def fail_otherwise(_rank, _world_size):
    trainer = start(Case(), GQA, RULES)
    trainer.coordinator.commit(GROUP)

    def broken():
        raise RuntimeError("shapes differ")

    trainer.model.compact = broken
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        trainer.coordinator.compact_if_due()


def test_other_errors_are_not_called_out_of_memory():
    run_ranks(fail_otherwise, 1)
