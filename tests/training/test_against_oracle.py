"""The sharded system against the dense oracle: same removals, same losses, on every layout.

Each case trains a small Llama, with a removal in most iterations, on 1 to 4 gloo ranks, and compares every loss (1e-5
relative), gradient norm and removal with the oracle's. A removal may differ only where the decision's margin is below
1e-4, since rounding decides there; the comparison ends then.
"""

import itertools
import math
import statistics

import pytest

from megatron_prune.model.classes import AUTO, HYBRID, engine_of
from megatron_prune.testing.helpers.comparison import (
    ITERATIONS,
    MICRO_BATCH,
    MICRO_BATCHES,
    SEQUENCE,
    hold_together,
    iterations_of,
    oracle_run,
    oracle_settings,
)
from megatron_prune.testing.helpers.oracle_cases import (
    COARSE,
    FACTORS,
    MODELS,
    OLMO2,
    PAIRWISE,
    SPECIAL,
    case_of,
    everything,
    is_possible,
    name_of,
)
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, rounded, run_case
from megatron_prune.testing.helpers.tiny_models import random_llama_weights
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits, costs


def sharded_run(case, config, weights, settings, iterations, micro_batches=MICRO_BATCHES):
    arguments = (case, config, weights, settings, iterations, micro_batches, MICRO_BATCH, SEQUENCE)
    outcomes = run_ranks(run_case, case.world_size, *arguments, timeout=110)
    assert all(o.removals == outcomes[0].removals and o.losses == outcomes[0].losses for o in outcomes)
    return outcomes[0]


def compare(case, config, settings, iterations=ITERATIONS, micro_batches=MICRO_BATCHES):
    """Assert equality with the oracle; returns how many removals were compared, out of how many, and the outcome.

    Both train on for a few iterations after the oracle's last removal, at most to `iterations`.
    """
    weights = random_llama_weights(config, seed=3)
    oracle, expected = oracle_run(config, weights, settings, iterations, micro_batches)
    iterations = iterations_of(oracle, iterations)
    outcome = sharded_run(case, config, weights, settings, iterations, micro_batches)
    agreement = hold_together(oracle, expected, outcome)
    assert not agreement.faults
    assert len(agreement.loss_errors) == iterations or not agreement.is_complete
    assert max(agreement.loss_errors) < 1e-5, f"iteration {agreement.loss_errors.index(max(agreement.loss_errors)) + 1}"
    # Single steps enlarge rounding a hundredfold and leave no trace in later ones; a defect would stay: hence a median.
    assert max(agreement.norm_errors) < 2e-3 and statistics.median(agreement.norm_errors) < 3e-5
    return agreement.compared, agreement.of, outcome


@pytest.mark.parametrize("kind", ["head", "ffn", "stem"])
@pytest.mark.parametrize("tp", [1, 2])
def test_one_removal_of_each_kind(kind, tp):
    """The smallest complete story: three steps, one removal of a kind, two more steps."""
    rules = oracle_settings(MODELS["mha"], 0.5, types=(kind,), ratio=(1, 3), saliency_momentum=0.0)
    compared, _, outcome = compare(Case(tp=tp), MODELS["mha"], rules, iterations=5)
    assert compared == 1 and outcome.removals[0]["group"] == kind


def test_the_cases_cover_all_pairs():
    def pairs(rows):
        return {(a, row[a], b, row[b]) for row in rows for a, b in itertools.combinations(FACTORS, 2)}

    assert all(is_possible(row) for row in PAIRWISE)
    assert pairs(PAIRWISE) >= pairs(everything())


def check_many(case, config, changes, iterations=ITERATIONS):
    """All removals agree, at least 50 of them where the rules allow it, or all until rounding decides."""
    compared, of, outcome = compare(case, config, oracle_settings(config, **changes), iterations)
    assert compared == of or compared >= 10, f"rounding decided after {compared} of {of} removals"
    assert outcome.compactions > 0
    return {removal["group"] for removal in outcome.removals}


def marks_of(factors):
    """Cases in which layers leave: not with a HybridModel, so far; all but one are for the full run."""
    if factors["kinds"] != "layers":
        return []
    is_hybrid = pytest.mark.skipif(engine_of(AUTO) == HYBRID, reason="a HybridModel keeps its layers, so far")
    return [is_hybrid, *([] if factors["overlap"] else [pytest.mark.full])]


def params_of(rows):
    return [pytest.param(row, id=name_of(row), marks=marks_of(row)) for row in rows]


@pytest.mark.parametrize("factors", params_of(PAIRWISE))
def test_pairwise(factors):
    """Every fourth case removes a group per step and compacts each time, the others two, when four slots are free."""
    if PAIRWISE.index(factors) % 4 == 0:
        left = check_many(*case_of(factors))
    else:
        case, config, changes = case_of(factors, COARSE)
        left = check_many(case, config, {**changes, "ratio": (2, 1)}, ITERATIONS // 2)
    assert factors["kinds"] != "layers" or "layer" in left


@pytest.mark.parametrize("name", SPECIAL)
def test_special(name):
    check_many(*SPECIAL[name], iterations=ITERATIONS // 2)


@pytest.mark.full
@pytest.mark.parametrize("gqa", ["kv_group", "uniform", "cluster"])
@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2),
        Case(tp=3, sequence_parallel=True, quanta=COARSE),
        Case(tp=2, sequence_parallel=True, recompute="full", quanta=rounded(head=2, ffn=8, stem=4, vocab=8)),
        Case(pp=2, first_stage_layers=1),
        Case(dp=2, distributed_optimizer=True, quanta=COARSE),
    ],
    ids=lambda case: case.name,
)
def test_norms_over_all_heads(case, gqa):
    check_many(case, OLMO2, {"gqa": gqa, "ratio": (2, 1)}, iterations=ITERATIONS // 2)


@pytest.mark.full
@pytest.mark.parametrize("rules", [{"second_order": True}, {"criterion": "minitron", "ratio": (2, 1)}], ids=str)
def test_norms_behind_blocks_and_inputs_that_are_not_normed(rules):
    check_many(Case(tp=2, pp=2, quanta=COARSE), OLMO2, {"gqa": "cluster", **rules}, iterations=ITERATIONS // 2)


def test_kinds_floors_and_the_first_iteration_hold_with_several_groups_per_step():
    """FFN and stem only, three groups a step from the fifth iteration on, down to both floors and not below."""
    config = MODELS["gqa-tied"]
    floors = {"min_ffn": 50, "min_hidden": 25}
    rules = oracle_settings(
        config, types=("ffn", "stem"), ratio=(3, 1), first_prune_iter=5, saliency_momentum=0.5, **floors
    )
    compared, of, outcome = compare(Case(tp=2), config, rules, iterations=14)
    assert compared == of == (64 - 50) + (32 - 25)
    counts = [sum(r["iteration"] == i for r in outcome.removals) for i in range(1, 15)]
    assert counts == [0] * 4 + [3] * 7 + [0] * 3
    last = outcome.removals[-1]
    assert last["widths"] == {"head": 6, "ffn": 50, "stem": 25, "layer": config["num_hidden_layers"]}


@pytest.mark.full
@pytest.mark.parametrize("factors", params_of(everything()))
def test_everything(factors):
    check_many(*case_of(factors))


@pytest.mark.parametrize("case", [Case(tp=2), Case(pp=2, dp=2, distributed_optimizer=True)], ids=lambda case: case.name)
def test_several_limits_hold_at_once(case):
    """KV cache binds first, then FLOPs, which groups of every kind save; the limit of the parameters never does."""
    config = MODELS["gqa-untied"]
    geometry = Geometry.from_hf(config)
    now = costs(geometry, LiveUnits.full(geometry), SEQUENCE)
    limits = {"kv_cache_per_token": 0.7 * now["kv_cache_per_token"], "flops_per_token": 0.6 * now["flops_per_token"]}
    limits = {name: int(most) for name, most in limits.items()}
    settings = oracle_settings(config, 0.95, limits_besides=limits, seq_length=SEQUENCE, balance=0.0, ratio=(2, 1))
    oracle, _ = oracle_run(config, random_llama_weights(config, seed=3), settings, 40)
    last = costs(geometry, oracle.live, SEQUENCE)
    assert all(last[name] <= most for name, most in limits.items())
    assert last["params"] < 0.8 * now["params"], "parameters do not bind"
    compared, of, _ = compare(case, config, settings, iterations=40)
    assert compared == of and {removal.kind for removal in oracle.removals} >= {"head", "ffn"}


def test_quanta_do_not_matter():
    """Exact and coarse storage give the same losses and the same removals."""
    config = MODELS["gqa-untied"]
    rules = oracle_settings(config, gqa="cluster")
    weights = random_llama_weights(config, seed=3)
    exact, coarse = (
        sharded_run(Case(tp=2, quanta=quanta), config, weights, rules, 30)
        for quanta in (rounded(vocab=8), rounded(head=2, ffn=16, stem=16, vocab=8))
    )
    assert exact.compactions > coarse.compactions
    assert [r["gone"] for r in exact.removals] == [r["gone"] for r in coarse.removals]
    assert exact.losses == pytest.approx(coarse.losses, rel=1e-5)


def test_live_widths_are_rounded_at_the_end():
    """`round_to` removes the least salient of the rest once the target is reached, and only then."""
    config = MODELS["mha"]
    rules = oracle_settings(config, 0.7)
    weights = random_llama_weights(config, seed=3)
    plain = sharded_run(Case(tp=2), config, weights, rules, 40)
    rounded = sharded_run(Case(tp=2, round_to={"ffn": 8, "stem": 4}), config, weights, rules, 40)
    last = len(plain.removals)
    assert [r["gone"] for r in rounded.removals[:last]] == [r["gone"] for r in plain.removals]
    extra = rounded.removals[last:]
    assert extra and {r["iteration"] for r in extra} == {plain.removals[-1]["iteration"]}
    assert rounded.removals[-1]["widths"]["ffn"] % 8 == 0 and rounded.removals[-1]["widths"]["stem"] % 4 == 0
    assert rounded.parameters < plain.parameters <= rules.target_params


def test_bf16_stays_close():
    """bf16 weights with fp32 main weights: losses within 2 % of the fp32 oracle's."""
    config = MODELS["mha"]
    rules = oracle_settings(config, types=("ffn",), ratio=(1, 5))
    weights = random_llama_weights(config, seed=3)
    _, expected = oracle_run(config, weights, rules, 15)
    outcome = sharded_run(Case(tp=2, bf16=True, distributed_optimizer=True), config, weights, rules, 15)
    assert len(outcome.removals) == 3 and all(math.isfinite(loss) for loss in outcome.losses)
    assert outcome.losses == pytest.approx([result.loss for result in expected], rel=0.02)
