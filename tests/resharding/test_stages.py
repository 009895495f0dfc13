"""A layer that changes its pipeline stage keeps every bit of its state, and only what changes its owner is sent."""

import pytest
import torch

from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.launch.estimate.dry_run import estimate
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.classes import AUTO, HYBRID, engine_of
from megatron_prune.model.kinds import FFN, STEM
from megatron_prune.pruning.groups.layer import group_of
from megatron_prune.testing.helpers.meters import BytesSent
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, run_config
from megatron_prune.testing.reference.oracle import OracleSettings
from tests.resharding.live_run import GQA, MICRO_BATCH, MICRO_BATCHES, SEQUENCE, canonical, start

pytestmark = pytest.mark.skipif(engine_of(AUTO) == HYBRID, reason="a HybridModel keeps its layers, so far")
MODEL = {**GQA, "num_hidden_layers": 4}
NARROWER = (*(Group.of(FFN, ((unit,),) * 4) for unit in range(7)), Group.of(STEM, ((3,),)))
PP2_DP2 = Case(pp=2, dp=2, distributed_optimizer=True)


def owners_of(model):
    """By parameter, the global rank that owns each element, as far as this stage has it."""
    owners, found = model.mesh.over("owners"), {}
    spans = model.owned_spans()
    for name, parameter, _ in model.rows():
        found[name] = torch.full((parameter.numel(),), -1)
        for number, (first, last) in spans[name].items():
            found[name][first:last] = owners.global_rank(number)
    return model.mesh.pp_rank, found


def drop_the_first(_rank, _world_size, case, also=()):
    """Layer 0, and what else is given, leaves, so that one of the second stage comes to the first."""
    trainer = start(case, MODEL, OracleSettings())
    trainer.iterate()
    model = trainer.model
    model.synchronise()
    for group in also:
        model.retire(group)
    model.retire(group_of(model.architecture, 0))
    before, old = canonical(model), owners_of(model)
    with BytesSent() as traffic:
        assert model.compact()
    return before, canonical(model), old, owners_of(model), dict(traffic.by_operator)


def test_state_goes_from_old_owners_to_new_ones_and_weights_to_counterparts():
    results = run_ranks(drop_the_first, 4, PP2_DP2)
    before, after = results[0][:2]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    owned = [{}, {}]  # before and after: where each element of each parameter is owned
    for result in results:
        for kept, (stage, found) in zip(owned, result[2:4], strict=True):
            kept.update({(name, stage): ranks for name, ranks in found.items()})
    goes = {name for name, stage in owned[0] if stage == 1 and (name, 0) in owned[1]} - {"output_layer.weight"}
    assert {name.split(".")[2] for name in goes} == {"2"}
    weights = sum(len(owned[0][name, 1]) for name in goes)
    handed_on = torch.zeros(4, dtype=torch.int64)
    for (name, stage), ranks in owned[0].items():
        later = owned[1].get((name, 0 if name in goes else stage))
        if later is not None:  # else it belongs to the layer that left
            handed_on += torch.bincount(ranks[ranks != later], minlength=4)
    for rank, (*_, traffic) in enumerate(results):
        stage = results[rank][2][0]
        assert traffic.pop("allreduce_", 0) <= 64, "the step count"
        assert traffic.pop("allgather_", 0) <= 5000, "ranges, and what megatron-core's optimizers agree on"
        moments, carried = 2 * 4 * int(handed_on[rank]), 4 * weights if stage == 1 else 0
        assert traffic.pop("send", 0) == moments + carried and not traffic


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, dp=2, distributed_optimizer=True, bf16=True, overlap=True),
        Case(tp=2, pp=2, dp=2, distributed_optimizer=True),  # units change their tensor-parallel rank on the way
        Case(tp=2, pp=2, sequence_parallel=True),
    ],
    ids=lambda case: case.name,
)
def test_not_a_bit_is_lost_on_other_layouts(case):
    before, after, *_ = run_ranks(drop_the_first, case.world_size, case, NARROWER)[0]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def drop_the_last_two(_rank, _world_size, case):
    """Bytes that this rank sends point to point while first the last layer leaves, then the one before it."""
    trainer = start(case, MODEL, OracleSettings())
    trainer.iterate()
    model, sent = trainer.model, 0
    for layer in (3, 2):
        model.synchronise()
        model.retire(group_of(model.architecture, layer))
        with BytesSent() as traffic:
            assert model.compact()
        sent += traffic.by_operator.get("send", 0)
    return sent


@pytest.mark.parametrize("bf16", [False, True])
def test_the_dry_run_knows_what_is_sent(bf16):
    case = Case(pp=2, bf16=bf16)
    architecture = Architecture.full(shape_from_config(MODEL))
    target = architecture.parameters - 2 * architecture.cost(group_of(architecture, 3))
    settings = OracleSettings(target_params=target, types=("layer",), balance=0)
    config = case.applied(run_config(settings, MICRO_BATCHES, MICRO_BATCH, SEQUENCE))
    moves = estimate(config, architecture, case.world_size).stage_moves
    assert moves.bytes == max(run_ranks(drop_the_last_two, case.world_size, case)) > 0
