"""A gradient that is not finite at a pruning step: the step is skipped and counted, nothing leaves, the run goes on."""

import dataclasses

import pytest
import torch

from megatron_prune.errors import UserError
from megatron_prune.resharding.coordinator import verify
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from tests.model.random_models import the_one
from tests.resharding.live_run import GQA, canonical, oracle_of, start

POISONED, LAST = 3, 6
RULES = OracleSettings(lr=2e-3, group_cost={"head": 1}, target_params=8_000)  # a group is due at every step


def poison(model):
    """Make one gradient element of this rank NaN in the next backward pass; returns the hook's handle."""
    parameter = next(p for name, p in model.module.named_parameters() if "linear_fc2" in name)

    def spoil(gradient):
        spoilt = gradient.clone()
        spoilt[0, 0] = torch.nan
        return spoilt

    return parameter.register_hook(spoil)


def run_with_a_poisoned_step(rank, world_size, case):
    trainer = start(case, GQA, RULES)
    state, losses, untouched = trainer.state, [], None
    trainer.reporter.iteration = lambda report, _: losses.append(report.loss)
    for iteration in range(1, LAST + 1):
        if iteration != POISONED:
            trainer.iterate()
            continue
        trainer.model.synchronise()
        before, layout = canonical(trainer.model), trainer.model.layout.fingerprint()
        removed, credits, smoothed = len(state.history), state.credits, state.smoothed
        handle = poison(trainer.model) if rank == world_size - 1 else None
        trainer.iterate()
        if handle is not None:
            handle.remove()
        after = canonical(trainer.model)
        untouched = (
            all(torch.equal(before[key], after[key]) for key in before)
            and trainer.model.layout.fingerprint() == layout
            and (len(state.history), state.credits) == (removed, credits)
            and state.smoothed is smoothed
        )
    verify(trainer.model, thorough=True)
    facts = (state.skipped_iterations, state.nonfinite_in_a_row, state.iteration, trainer.model.adam_step())
    return untouched, facts, losses, [the_one(r.group) for r in state.history]


@pytest.mark.parametrize(
    "case",
    [Case(tp=2), Case(dp=2, distributed_optimizer=True, overlap=True), Case(pp=2)],
    ids=lambda case: case.name,
)
def test_the_step_is_skipped_and_counted_and_nothing_leaves(case):
    results = run_ranks(run_with_a_poisoned_step, case.world_size, case)
    oracle, batches = oracle_of(GQA, RULES)
    clean = [oracle.train_step(batches[i - 1]) for i in range(1, LAST + 1) if i != POISONED]
    for untouched, facts, losses, removed in results:
        assert untouched
        assert facts == (1, 0, LAST, LAST - 1)
        assert removed == [(removal.kind, removal.units) for step in clean for removal in step.removed]
        assert len(removed) == LAST - 1
        kept = [loss for i, loss in enumerate(losses, start=1) if i != POISONED]
        assert kept == pytest.approx([step.loss for step in clean], rel=1e-5)


def run_into_the_limit(_rank, _world_size):
    trainer = start(Case(), GQA, RULES)
    training = dataclasses.replace(trainer.config.training, max_nonfinite_steps=2)
    trainer.config = dataclasses.replace(trainer.config, training=training)
    handle = poison(trainer.model)
    trainer.iterate()
    handle.remove()
    trainer.iterate()
    assert trainer.state.nonfinite_in_a_row == 0, "a good step in between starts the count again"
    poison(trainer.model)
    trainer.iterate()
    with pytest.raises(UserError, match="max_nonfinite_steps: 2 steps in a row"):
        trainer.iterate()
    return trainer.state.skipped_iterations


def test_too_many_in_a_row_stop_the_run():
    assert run_ranks(run_into_the_limit, 1) == [3]
