"""Scores summed over all ranks are the oracle's, on any layout, and only sums travel.

One run per layout: two iterations, some removals whose slots stay empty, then the gradients and inputs of one more
batch, scored by every registered criterion with every Fisher estimate.
"""

import functools
import itertools

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.pieces import pieces
from megatron_prune.checkpoint.streams import Scratch
from megatron_prune.model.architecture import Group
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.saliency.collector import Collector, CollectorSettings, MicrobatchFisher
from megatron_prune.saliency.criteria import find_criterion, known_criteria
from megatron_prune.saliency.reducer import score_elements
from megatron_prune.saliency.scores import score_length
from megatron_prune.testing.helpers.meters import BytesSent
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference import oracle_scores
from megatron_prune.testing.reference.oracle import DenseOracle, OracleSettings
from megatron_prune.training.step import forward_backward
from tests.model.random_models import the_one
from tests.resharding.live_run import GQA, MICRO_BATCH, QWEN2, SEQUENCE, assembled, oracle_of, start

RULES = OracleSettings(lr=1e-5)  # small steps: weights are compared elsewhere
CONFIGS = {"gqa": GQA, "qwen2": QWEN2}
GROUPS = [
    Group.of(FFN, ((4,), (29,))),
    Group.of(STEM, ((7,),)),
    Group.of(HEAD, ((1,), (4,))),
    Group.of(HEAD, ((0,), (2,))),
]
SCALES = {"sequence": MICRO_BATCH, "token": MICRO_BATCH * SEQUENCE}
ESTIMATES = [("microbatch", "sequence"), ("microbatch", "token"), ("adam", "sequence"), ("batch", "sequence")]


def whole(model, squares):
    """Fisher values of the ranges that all ranks own, as canonical tensors."""
    owners, mesh, found = {shard.name: shard for shard in model.owned()}, model.mesh, []
    if (
        model.options.use_distributed_optimizer or mesh.over("replicas").rank == 0
    ):  # else all data-parallel ranks own the same
        for name, values in squares.items():
            shard = owners[name]
            for piece in pieces(shard.row, model.layout, mesh.tp_rank, shard.start, shard.end):
                found.append((piece.hf_name, piece.global_shape, piece.offset, piece.read(values, Scratch()).clone()))
    return assembled(mesh, found)


def arrays(scores):
    return np.stack(scores.values[HEAD]), np.stack(scores.values[FFN]), scores.of(STEM)


def arrays_of_oracle(scores):
    layers = [np.array([list(layer.values()) for layer in kind]) for kind in (scores.head, scores.ffn)]
    return *layers, np.array(list(scores.stem.values()))


def score_all(_rank, _world_size, case, config):
    trainer = start(case, config, RULES)
    model = trainer.model
    for _ in range(2):
        trainer.iterate()
    model.synchronise()
    for group in GROUPS:
        model.retire(group)
    watchers = {unit: MicrobatchFisher(model, trainer.num_microbatches, scale) for unit, scale in SCALES.items()}
    count = trainer.num_microbatches
    settings = CollectorSettings(num_microbatches=count, kept_microbatches=count)
    collectors = {name: Collector(model, find_criterion(name), settings) for name in oracle_scores.INPUT_CRITERIA}
    for watcher in (*watchers.values(), *collectors.values()):
        watcher.arm()
    forward_backward(model, trainer.batches, trainer.num_microbatches, MICRO_BATCH, SEQUENCE)
    with BytesSent() as fisher_traffic:
        squares = {"sequence": watchers["sequence"].reduce()}
    squares["token"] = watchers["token"].reduce()
    sums = {}
    for name, collector in collectors.items():
        sums[name] = arrays(collector.finish().score(model, find_criterion(name), "batch").reduce())
    for name in known_criteria():
        for source, unit in ESTIMATES if name not in collectors else []:
            with BytesSent() as score_traffic:
                scores = score_elements(model, find_criterion(name), source, squares[unit]).reduce()
            sums[name, source, unit] = arrays(scores)
    outputs = sum(p.numel() for n, p in model.module.named_parameters() if "linear_proj" in n or "linear_fc2" in n)
    facts = {
        "fisher": dict(fisher_traffic.by_operator),
        "scores": dict(score_traffic.by_operator),
        "numbers": score_length(model.architecture),
        "outputs": outputs,
    }
    return sums, {unit: whole(model, values) for unit, values in squares.items()}, facts


@functools.cache
def expected_of(name):
    """The oracle at the same place: ({unit: squares}, {(criterion, source, unit): sums})."""
    oracle, batches = oracle_of(CONFIGS[name], RULES)
    for number in range(2):
        oracle.train_step(batches[number])
    for group in GROUPS:
        oracle.remove(*the_one(group))
    _, gradient, squares = oracle.gradients(batches[2])
    by_unit = {unit: {k: v * scale / MICRO_BATCH for k, v in squares.items()} for unit, scale in SCALES.items()}
    sums = {}
    for criterion in oracle_scores.CRITERIA:
        for source, unit in ESTIMATES:
            elements = {}
            for key, microbatch in by_unit[unit].items():
                adam, batch = oracle.exp_avg_sq[key], gradient[key].square()
                fisher = {"microbatch": microbatch, "adam": adam, "batch": batch}[source]
                elements[key] = oracle_scores.element_scores(criterion, oracle.weights[key], gradient[key], fisher)
            found = oracle_scores.unit_scores(elements, oracle.geometry, oracle.live)
            sums[criterion, source, unit] = arrays_of_oracle(found)
    for criterion in oracle_scores.INPUT_CRITERIA:
        scorer = DenseOracle(CONFIGS[name], oracle.weights, OracleSettings(criterion=criterion), live=oracle.live)
        sums[criterion] = arrays_of_oracle(scorer.unit_scores(batches[2]))
    return by_unit, sums


CASES = [
    (Case(tp=2), "qwen2"),
    (Case(dp=2), "gqa"),
    (Case(dp=2, distributed_optimizer=True), "qwen2"),
    (Case(tp=2, dp=2, distributed_optimizer=True, overlap=True, sequence_parallel=True), "gqa"),
    (Case(tp=2, pp=2, recompute="full"), "gqa"),
    (Case(tp=3, recompute="selective"), "gqa"),
]
EVERYTHING = [
    (Case(tp, pp, dp, sp, do, recompute=recompute), name)
    for tp, pp, dp, sp, do, recompute, name in itertools.product(
        (1, 2, 3), (1, 2), (1, 2), (False, True), (False, True), (None, "full", "selective"), CONFIGS
    )
    if tp * pp * dp <= 4 and (tp == 2 or not sp)  # a sequence of 8 does not split over 3
]


@pytest.mark.parametrize(("case", "name"), CASES, ids=lambda value: getattr(value, "name", value))
def test_scores_on_any_layout_are_the_oracles(case, name):
    check(case, name)


@pytest.mark.full
@pytest.mark.parametrize(("case", "name"), EVERYTHING, ids=lambda value: getattr(value, "name", value))
def test_everything(case, name):
    check(case, name)


def check(case, name):
    squares, sums = expected_of(name)
    results = run_ranks(score_all, case.world_size, case, CONFIGS[name])
    found, fisher, _ = results[0]
    for unit, tensors in squares.items():
        assert fisher[unit].keys() == tensors.keys()
        for key, expected in tensors.items():
            atol = 1e-6 * float(expected.max())
            torch.testing.assert_close(fisher[unit][key], expected, rtol=1e-5, atol=atol)
    assert {key[0] if isinstance(key, tuple) else key for key in found} == {*known_criteria()}
    for key, expected in sums.items():
        rtol = 2e-5 if key == "obc" else 1e-5  # an inverse passes the rounding of its inputs on, enlarged
        # Terms of both signs cancel in a sum, their rounding does not: what counts is the sum of their sizes.
        sizes = sums[("taylor_mix", *key[1:])] if key[0] == "taylor_signed" else expected
        for mine, theirs, size in zip(found[key], expected, sizes, strict=True):
            assert np.all(np.abs(mine - theirs) <= rtol * np.abs(size)), key
    for other, _, _ in results[1:]:  # every rank holds the same numbers
        assert all(np.array_equal(a, b) for key in found for a, b in zip(found[key], other[key], strict=True))
    assert_only_sums_travel([facts for _, _, facts in results], case)


def assert_only_sums_travel(facts, case):
    """Scoring: the sums, once over TP x PP and once over DP where its ranks score a range each. Fisher: one reduction
    of the output projections over DP; with a distributed optimizer shares of it go on to their owners."""
    reductions = (case.tp * case.pp > 1) + (case.dp > 1 and case.distributed_optimizer)
    for fact in facts:
        assert fact["scores"] == ({"allreduce_": 4 * fact["numbers"] * reductions} if reductions else {})
        fisher = dict(fact["fisher"])
        if case.distributed_optimizer and case.dp > 1:
            # Equal shares for all, of which what others own goes on to them.
            handed_on = fisher.pop("send", 0)
            (scattered,) = fisher.values()
            assert 4 * fact["outputs"] <= scattered < 4 * (fact["outputs"] + case.dp)
            assert handed_on <= scattered / case.dp
        else:
            assert fisher == ({"allreduce_": 4 * fact["outputs"]} if case.dp > 1 else {})


def test_squares_of_single_micro_batches_make_the_second_order_term_count():
    """The reason for them: with squares of the mean gradient, mix is the first-order score in all but name."""
    _, sums = expected_of("gqa")

    def difference(source, unit):
        mix, first = (
            np.concatenate([a.ravel() for a in sums[c, source, unit]]) for c in ("taylor_mix", "taylor_first")
        )
        return float(np.median(np.abs(mix - first) / first))

    by_sequence, by_token = difference("microbatch", "sequence"), difference("microbatch", "token")
    assert 1e-3 < by_sequence < by_token and by_token > 0.01
    assert difference("batch", "sequence") < by_sequence / 2
