"""The second-order update in the model: main and model weights, on any layout, equal the dense least-squares answer."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.tensors import optimizer_key, weight_key
from megatron_prune.config import SecondOrder
from megatron_prune.launch.estimate.activations import hessian_memory
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.model.architecture import Group
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.second_order import SecondOrderUpdate
from megatron_prune.resharding.coordinator import verify
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import agree, init_mesh
from megatron_prune.saliency.inputs import InputNeeds, InputWatcher
from megatron_prune.testing.benchmarks.costs import FORWARD, KEEPING, time_second_order
from megatron_prune.testing.helpers.meters import BytesSent, Stopwatch
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun
from megatron_prune.testing.reference import oracle_second_order
from megatron_prune.testing.reference.oracle import OracleSettings
from megatron_prune.training.step import forward_backward
from tests.model.random_models import the_one
from tests.resharding.live_run import GQA, MICRO_BATCH, QWEN2, SEQUENCE, canonical, oracle_of, start

RULES = OracleSettings(lr=1e-3)
GROUPS = [
    Group.of(HEAD, ((1,), (4,))),  # one query head (cluster)
    Group.of(FFN, ((4,), (29,))),
    Group.of(STEM, ((7,),)),
    Group.of(HEAD, ((4, 5), (0, 1))),  # a KV head with its queries
    Group.of(HEAD, ((0, 2), (2, 5))),  # queries of several KV heads: on TP 2 of several ranks
]


def compensate(_rank, _world_size, case, config):
    """Every group in turn: (main weights before, after; model weights after; X of all ranks; errors)."""
    trainer = start(case, config, RULES)
    model, mesh = trainer.model, trainer.model.mesh
    trainer.iterate()
    model.synchronise()
    watcher = InputWatcher(model, InputNeeds(kept=trainer.num_microbatches, keep_stem=True))
    watcher.arm()
    forward_backward(model, trainer.batches, trainer.num_microbatches, MICRO_BATCH, SEQUENCE)
    kept = watcher.finish().kept
    assert_memory_as_estimated(trainer, case, kept)
    update, seen = SecondOrderUpdate(model, kept, 0.01), []
    for group in GROUPS:
        inputs = {row.parts[0].hf_name: kept.gather(name) for name, row in kept.rows.items()}
        inputs = agree(mesh, inputs if mesh.tp_rank == 0 else {})
        before = canonical(model)
        with BytesSent() as traffic:
            errors = update.compensate(group)
        if FFN in group.gone:
            assert_traffic_of_ffn(traffic.by_operator, model, kept)
        after = canonical(model)
        copies = agree(mesh, {name: p.double().sum().item() for name, p in model.module.named_parameters()})
        mine = range(mesh.rank % mesh.tp_size, mesh.world_size, mesh.tp_size)
        if mesh.pp_size == 1:
            assert all(copies[r] == copies[mesh.rank] for r in mine), "data-parallel copies are alike"
        model.retire(group)
        verify(model, thorough=True)
        seen.append((before, after, inputs, dataclasses.astuple(errors)))
    return seen if mesh.rank == 0 else None


def assert_traffic_of_ffn(sent, model, kept):
    """Per layer: X once over TP, X^T X once over DP from the owner's TP rank, and no weight is gathered."""
    mesh, features = model.mesh, model.architecture.ffn_hidden_size
    layers = [name for name, row in kept.rows.items() if row.is_output and "mlp" in name]
    inputs = sum(x.numel() * x.element_size() for name in layers for x in kept._pieces[name])
    assert sent["allgather_"] == (inputs if mesh.tp_size > 1 else 0)
    reduced = sum(number % mesh.tp_size == mesh.tp_rank for number in range(len(layers)))
    assert sent["reduce_"] == (4 * features**2 * reduced if mesh.dp_size > 1 else 0)


def assert_memory_as_estimated(trainer, case, kept):
    """The dry run's bytes of kept inputs are those that this rank holds."""
    config, mesh = trainer.config, trainer.model.mesh
    pruning = dataclasses.replace(config.pruning, target_params=1, second_order=SecondOrder(enabled=True))
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        sequence_parallel=case.sequence_parallel,
    )
    training = dataclasses.replace(config.training, bf16=case.bf16)
    config = dataclasses.replace(config, pruning=pruning, parallel=parallel, training=training)
    placement = Placement.plan(config, mesh.world_size, trainer.architecture.shape.num_layers)
    held = sum(x.numel() * x.element_size() for pieces in kept._pieces.values() for x in pieces)
    assert hessian_memory(config, trainer.model.layout, placement, mesh.pp_rank)[0] == held


def joined(inputs):
    """X over all data-parallel ranks by name, under the names of all weights that read it."""
    names = {name for part in inputs for name in part}
    x = {name: torch.cat([part[name] for part in inputs if name in part]) for name in names}
    for name in names:
        for one, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if one in name:
                x |= {name.replace(one, other): x[name] for other in others}
    return x


def main_of(tensors, name):
    return tensors.get(optimizer_key("main", name), tensors[weight_key(name)])


def check(case, config):
    results = run_ranks(compensate, case.world_size, case, config)
    oracle, batches = oracle_of(config, RULES)
    oracle.train_step(batches[0])
    if not case.bf16:
        dense = oracle.inputs(batches[1])
        for name, x in joined(results[0][0][2]).items():
            assert sorted(x.square().sum(1).tolist()) == pytest.approx(
                sorted(dense[name].square().sum(1).tolist()), rel=1e-5
            )
    live = oracle.live
    for group, (before, after, inputs, errors) in zip(GROUPS, results[0], strict=True):
        left, (kind, _) = live.without(*the_one(group)), the_one(group)
        readers = dict(oracle_second_order.readers(oracle.geometry, kind, live, left))
        weights = {name: main_of(before, name) for name in oracle.weights}
        expected, predicted = oracle_second_order.compensated(
            weights, joined(inputs), oracle.geometry, live, left, kind, 0.01
        )
        assert expected.keys() == readers.keys()
        for name, kept in readers.items():
            found = main_of(after, name)
            # Normal equations of 64 tokens amplify the fp32 rounding of X^T X some hundred times.
            atol = 5e-5 * float(expected[name].abs().max())
            torch.testing.assert_close(found[:, kept], expected[name][:, kept], rtol=1e-5, atol=atol)
            gone = np.setdiff1d(np.arange(found.shape[1]), kept.numpy())
            assert float(found[:, gone].abs().max()) < 1e-12, "the removed columns vanish by themselves"
            if case.bf16:
                assert torch.equal(after[weight_key(name)], found.bfloat16()), "the model weight is the main's rounding"
        assert errors == pytest.approx(predicted, rel=1e-4) and errors[1] < errors[0]
        touched = {key for name in readers for key in (weight_key(name), optimizer_key("main", name))}
        for key, tensor in before.items():
            assert key in touched or torch.equal(after[key], tensor), f"{key} is none of the update's business"
        live = left


CASES = {
    "tp2-dp2": (Case(tp=2, dp=2), QWEN2),
    "tp2-dp2-bf16": (Case(tp=2, dp=2, bf16=True, distributed_optimizer=True, overlap=True), GQA),
    "pp2-dp2": (Case(pp=2, dp=2, distributed_optimizer=True, recompute="full"), QWEN2),
    "tp2-sp": (Case(tp=2, sequence_parallel=True), QWEN2),
    "tp3-bf16": (Case(tp=3, bf16=True), QWEN2),
}


@pytest.mark.parametrize("name", ["tp2-dp2", "tp2-dp2-bf16", "tp2-sp"])
def test_any_layout_gives_the_dense_answer(name):
    check(*CASES[name])


@pytest.mark.full
@pytest.mark.parametrize("name", sorted({*CASES} - {"tp2-dp2", "tp2-dp2-bf16", "tp2-sp"}))
def test_more_layouts(name):
    check(*CASES[name])


def timed(_rank, _world_size):
    shape = LlamaShape(2, 32, 48, 4, 4, 8, 64, 16, tie_word_embeddings=True)
    mesh = init_mesh(choose_device("cpu"), 1, 1)
    run = SteppedRun(Setup(shape, Case(), 16, 1, 2), mesh)
    before = run.architecture
    spent = time_second_order(run, Stopwatch(mesh).time)
    after = run.architecture
    verify(run.model, thorough=True)
    lost = before.num_attention_heads - after.num_attention_heads, before.hidden_size - after.hidden_size
    return list(spent), min(seconds.wall for seconds in spent.values()), lost


def test_what_it_costs_can_be_timed_piece_by_piece():
    ((names, least, lost),) = run_ranks(timed, 1)
    assert names == [FORWARD, KEEPING, "head", "ffn", "stem"] and least > 0 and lost == (1, 1)
