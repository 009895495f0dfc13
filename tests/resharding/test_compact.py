"""Adam continues: a compaction changes no live element of any state, and the steps after it are the oracle's."""

from dataclasses import dataclass

import pytest
import torch

from megatron_prune.model.kinds import FFN, HEAD
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from tests.model.random_models import the_one
from tests.resharding.live_run import GQA, QWEN2, SCRIPT, canonical, oracle_of, oracle_tensors, start

LAST = 8
RULES = OracleSettings(lr=5e-3, weight_decay=0.1, gqa="cluster")


@dataclass(frozen=True)
class Story:
    """What rank 0 saw: per compaction all state before and after, and how many units changed their rank."""

    losses: list
    compactions: list
    travelled: list
    steps: list
    end: dict


def travelled(old, new):
    """Live FFN channels and heads that sit on another rank than before."""
    return sum(
        len(set(new.slots(kind, layer, rank).tolist()) - set(old.slots(kind, layer, rank).tolist()) - {-1})
        for kind in (FFN, HEAD)
        for layer in range(old.architecture.shape.num_layers)
        for rank in range(old.tp)
    )


def run(rank, _world_size, case, config):
    trainer = start(case, config, RULES)
    model, losses, compactions, moved, steps = trainer.model, [], [], [], []
    trainer.reporter.iteration = lambda report, _: losses.append(report.loss)
    for iteration in range(1, LAST + 1):
        trainer.iterate()
        if iteration not in SCRIPT:
            continue
        model.synchronise()
        for group in SCRIPT[iteration]:
            trainer.coordinator.commit(group)
        before, layout = canonical(model), model.layout
        assert trainer.coordinator.compact_if_due()
        trainer.scheduler.optimizer = model.optimizer
        assert model.layout.fingerprint() == layout.compacted().fingerprint()
        compactions.append((before, canonical(model)))
        moved.append(travelled(layout, model.layout))
        steps.append({model.adam_step(), *(int(shard.state["step"]) for shard in model.owned())})
    model.synchronise()
    end = canonical(model)
    return Story(losses, compactions, moved, steps, end) if rank == 0 else None


CASES = [
    (Case(tp=2), QWEN2),
    (Case(tp=3), GQA),
    (Case(tp=2, dp=2, distributed_optimizer=True), GQA),
    (Case(tp=2, dp=2, distributed_optimizer=True, overlap=True, sequence_parallel=True), QWEN2),
    (Case(tp=2, dp=2, distributed_optimizer=True, bf16=True), QWEN2),
    (Case(tp=2, bf16=True), GQA),
]


@pytest.mark.parametrize(("case", "config"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_adam_continues_after_units_moved_between_ranks(case, config):
    story = run_ranks(run, case.world_size, case, config, timeout=100)[0]
    assert any(story.travelled), "the script must move units"
    for before, after in story.compactions:
        kinds = {"model", "optimizer/exp_avg", "optimizer/exp_avg_sq"} | ({"optimizer/main"} if case.bf16 else set())
        assert {key.rsplit("/", 1)[0] for key in before} == kinds
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), "bit for bit"
    assert story.steps == [{iteration} for iteration in SCRIPT]
    if case.bf16:
        return
    oracle, batches = oracle_of(config, RULES)
    for iteration in range(1, LAST + 1):
        loss = oracle.train_step(batches[iteration - 1]).loss
        assert story.losses[iteration - 1] == pytest.approx(loss, rel=1e-5), iteration
        for group in SCRIPT.get(iteration, ()):
            oracle.remove(*the_one(group))
    for key, expected in oracle_tensors(oracle).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            story.end[key], expected, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, k=key: f"{k} {m}"
        )
