"""The guard against loss spikes: when it pauses, when it ends, and that the loop obeys it."""

import dataclasses
import math

from megatron_prune.config import parse_command
from megatron_prune.config.pruning import SpikeGuardConfig
from megatron_prune.pruning.spike_guard import GuardState, SpikeGuard
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from megatron_prune.training.state import RunState
from tests.resharding.live_run import GQA, start

GUARD = SpikeGuard(factor=1.5, window=4)


def pauses(losses, guard=GUARD, state=None):
    """Per loss whether the guard pauses after it; and the state at the end."""
    state, found = state or GuardState(), []
    for iteration, loss in enumerate(losses, start=1):
        state = guard.observe(state, loss, guard.is_above(state, loss), iteration)
        found.append(state.is_pausing)
    return found, state


def test_a_spike_pauses_until_the_loss_is_back():
    # median 2.0: a spike is above 3.0, back is at or below 2.5
    found, state = pauses([2.0, 1.9, 2.1, 2.0, 3.1, 9.0, 2.9, 2.6, 2.5, 2.9])
    assert found == [False] * 4 + [True] * 4 + [False] * 2
    assert state.pauses == 1 and state.recent == (2.1, 2.0, 2.5, 2.9)


def test_a_slow_rise_is_no_spike_and_the_first_losses_are_none():
    assert not any(pauses([2.0 * 1.1**i for i in range(40)])[0])
    assert not any(pauses([1.0, 100.0, 1.0])[0]), "less than a window"


def test_a_loss_that_is_not_a_number_keeps_the_pause():
    assert pauses([2.0, 2.0, 2.0, 2.0, math.nan, math.inf, 2.0])[0] == [False] * 4 + [True, True, False]


def test_its_memory_survives_a_checkpoint_in_a_pause():
    _, state = pauses([2.0, 2.0, 2.0, 2.0, 5.0])
    again = GuardState.from_state(state.to_state())
    assert again == state and again.is_pausing and again.since == 5
    assert GuardState.from_state(None) == GuardState()
    assert RunState.from_state({**RunState(guard=state).to_state()}, None).guard == state


def train_through_a_spike(rank, world_size):
    """Every step prunes; on rank 1 only, the fifth loss looks ten times as large."""
    trainer = start(Case(tp=2), GQA, OracleSettings(lr=1e-4, group_cost={"head": 1}, target_params=5_000))
    trainer.pruner.settings = dataclasses.replace(trainer.pruner.settings, guard=SpikeGuard(1.5, 3))
    prune, removed, paused = trainer.pruner.prune, [], []
    trainer.pruner.prune = lambda scored, stepped, loss: prune(
        scored, stepped, loss * (10 if rank == 1 and trainer.state.iteration in (5, 6) else 1)
    )
    for _ in range(8):
        before = len(trainer.state.history), trainer.state.credits
        trainer.iterate()
        removed.append(len(trainer.state.history) - before[0])
        paused.append(trainer.state.guard.is_pausing)
    return removed, paused, trainer.state.guard.pauses


def test_what_one_rank_sees_pauses_pruning_on_all():
    first, second = run_ranks(train_through_a_spike, 2)
    assert first == second
    assert first[0] == [1, 1, 1, 1, 0, 0, 1, 1], "and no debt is paid back at once afterwards"
    assert first[1] == [False] * 4 + [True, True, False, False] and first[2] == 1


def test_the_command_line_turns_it_on():
    pruning = parse_command(["--prune-spike-guard", "factor=1.3", "window=10"]).config.pruning
    assert pruning.spike_guard == SpikeGuardConfig(factor=1.3, window=10)
    assert parse_command([]).config.pruning.spike_guard.factor is None
