"""The sharded system against the dense oracle: same removals, same losses, on every layout.

Each case trains a small Llama for some dozens of iterations, with a removal in most of them, on 1 to 4 gloo ranks, and
compares every loss (1e-5 relative), gradient norm and removal with the oracle's. A removal may differ only where the
decision's margin is below 1e-4, since rounding decides there; the comparison ends then.
"""

import math

import pytest

from megatron_prune.model.layout import Quanta
from megatron_prune.testing.oracle import DenseOracle, OracleSettings
from megatron_prune.testing.ranks import run_ranks
from megatron_prune.testing.sharded import Case, RandomTokens, run_case
from megatron_prune.testing.tiny_models import random_llama_weights, tiny_config

MICRO_BATCHES, MICRO_BATCH, SEQUENCE = 4, 2, 16
MARGIN = 1e-4

MHA = tiny_config(intermediate_size=80)
GQA = tiny_config(
    intermediate_size=80, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False, vocab_size=61
)
MQA = tiny_config(intermediate_size=80, num_attention_heads=4, num_key_value_heads=1)
QWEN2 = tiny_config(intermediate_size=80, model_type="qwen2", num_attention_heads=6, num_key_value_heads=3)
QWEN3 = tiny_config(intermediate_size=80, model_type="qwen3", num_attention_heads=6, num_key_value_heads=2)


def oracle_run(config, weights, settings, iterations):
    oracle = DenseOracle(config, weights, settings)
    tokens = RandomTokens(config["vocab_size"], SEQUENCE, iterations * MICRO_BATCHES * MICRO_BATCH)
    results = [oracle.train_step(tokens.micro_batches(i, MICRO_BATCHES, MICRO_BATCH)) for i in range(iterations)]
    return oracle, results


def compare(case, config, settings, iterations, loss_tolerance=1e-5):
    weights = random_llama_weights(config, seed=3)
    oracle, expected = oracle_run(config, weights, settings, iterations)
    arguments = (case, config, weights, settings, iterations, MICRO_BATCHES, MICRO_BATCH, SEQUENCE)
    outcomes = run_ranks(run_case, case.world_size, *arguments, timeout=110)
    assert all(o.removals == outcomes[0].removals and o.losses == outcomes[0].losses for o in outcomes)
    outcome = outcomes[0]
    compared = 0
    for removal, mine in zip(oracle.removals, outcome.removals, strict=False):
        same = (mine["kind"], mine["units"]) == (removal.kind, removal.units)
        if removal.margin < MARGIN and not same:
            break
        where = f"removal {compared}: margin {removal.margin}"
        assert same, where
        assert mine["iteration"] == removal.iteration and mine["parameters"] == removal.parameters_after, where
        assert mine["scores"] == pytest.approx(dict(removal.scores), rel=2e-3), where
        compared += 1
    last = iterations if compared == len(oracle.removals) else oracle.removals[compared].iteration
    for i in range(last):
        assert outcome.losses[i] == pytest.approx(expected[i].loss, rel=loss_tolerance), f"iteration {i + 1}"
        assert outcome.grad_norms[i] == pytest.approx(expected[i].grad_norm, rel=20 * loss_tolerance)
    if compared == len(oracle.removals):
        assert len(outcome.removals) == compared and outcome.parameters == oracle.parameters()
    return compared, outcome


def settings(target=0.4, config=MHA, **changes):
    size = DenseOracle(config, random_llama_weights(config)).parameters()
    return OracleSettings(lr=2e-3, target_params=int(size * target), group_cost={"head": 3}, **changes)


@pytest.mark.parametrize("kind", ["head", "ffn", "stem"])
@pytest.mark.parametrize("tp", [1, 2])
def test_one_removal_of_each_kind(kind, tp):
    """The smallest complete story: three steps, one removal of a kind, three more steps."""
    rules = settings(0.5, types=(kind,), ratio=(1, 3), saliency_momentum=0.0)
    compared, outcome = compare(Case(tp=tp), MHA, rules, iterations=5)
    assert compared == 1 and outcome.removals[0]["kind"] == kind


CASES = [
    (Case(), MHA, {}),
    (Case(tp=2, sequence_parallel=True), GQA, {}),
    (Case(tp=3), GQA, {"gqa": "cluster"}),
    (Case(pp=2, dp=2, distributed_optimizer=True), MHA, {"fisher": "adam"}),
    (Case(tp=2, dp=2, distributed_optimizer=True, overlap=True), GQA, {"gqa": "uniform", "ratio": (2, 1)}),
    (Case(tp=2, pp=2, distributed_optimizer=True, sequence_parallel=True), QWEN2, {"gqa": "cluster"}),
    (Case(dp=2, distributed_optimizer=True, quanta=Quanta(1, 8, 8, 8)), MQA, {"gqa": "cluster", "normalize": "none"}),
    (Case(tp=2, dp=2, recompute="full"), QWEN3, {"criterion": "taylor_first", "head_score": "sum"}),
    (Case(pp=2, first_stage_layers=1), GQA, {"criterion": "obd", "fisher_unit": "token", "gqa": "cluster"}),
    (Case(tp=2, recompute="selective", quanta=Quanta(2, 16, 4, 8)), MHA, {"criterion": "magnitude"}),
]


@pytest.mark.parametrize(("case", "config", "changes"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_many_removals(case, config, changes):
    rules = settings(config=config, **changes)
    compared, outcome = compare(case, config, rules, iterations=60)
    assert compared >= 20, "rounding decided too early to compare anything"
    assert outcome.compactions > 0


def test_bf16_stays_close():
    """bf16 weights with fp32 main weights: losses within 2 % of the fp32 oracle's until the first removal that
    differs.
    """
    rules = settings(types=("ffn",), ratio=(1, 5))
    weights = random_llama_weights(MHA, seed=3)
    _, expected = oracle_run(MHA, weights, rules, 15)
    case = Case(tp=2, bf16=True, distributed_optimizer=True)
    outcome = run_ranks(run_case, 2, case, MHA, weights, rules, 15, MICRO_BATCHES, MICRO_BATCH, SEQUENCE, timeout=110)[
        0
    ]
    assert len(outcome.removals) == 3 and all(math.isfinite(loss) for loss in outcome.losses)
    for mine, theirs in zip(outcome.losses, expected, strict=True):
        assert mine == pytest.approx(theirs.loss, rel=0.02)
