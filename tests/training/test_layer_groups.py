"""Whole layers leave: the sharded system against the dense oracle, which drops them physically."""

from dataclasses import replace

import pytest

from megatron_prune.config import (
    Config,
    GroupConfig,
    GroupConfigs,
    ModelConfig,
    ParallelConfig,
    PruningConfig,
    SecondOrder,
)
from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.launch.assembly.opening import check_target
from megatron_prune.launch.estimate.route import plan_route
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.classes import AUTO, HYBRID, engine_of
from megatron_prune.model.layout import stage_layers
from megatron_prune.testing.helpers.comparison import oracle_run, oracle_settings
from megatron_prune.testing.helpers.oracle_cases import COARSE, MODELS
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.helpers.tiny_models import random_llama_weights
from tests.training.test_against_oracle import compare, sharded_run

ALL = ("head", "ffn", "stem", "layer")
BY_INFLUENCE = {"layer_score": "block_influence"}
CASES = {
    "tp1": (Case(), 5, {}),
    "tp2": (Case(tp=2, quanta=COARSE), 5, {}),
    "dp2-distributed": (Case(dp=2, distributed_optimizer=True, overlap=True, quanta=COARSE), 5, BY_INFLUENCE),
    "pp2-uneven": (Case(pp=2, first_stage_layers=3, quanta=COARSE), 5, {}),
    "pp2-dp2-distributed": (Case(pp=2, dp=2, distributed_optimizer=True, quanta=COARSE), 6, {}),
    "pp3": (Case(pp=3, quanta=COARSE), 6, {}),
    "tp2-pp2": (Case(tp=2, pp=2, sequence_parallel=True, quanta=COARSE), 6, BY_INFLUENCE),
    "recompute-uneven": (Case(pp=2, dp=2, first_stage_layers=1, recompute="full", quanta=COARSE), 5, BY_INFLUENCE),
}
FULL = {"recompute-uneven"}


HAS_HYBRID = pytest.mark.skipif(engine_of(AUTO) == HYBRID, reason="a HybridModel keeps its layers, so far")


@HAS_HYBRID
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] if n in FULL else []) for n in CASES])
def test_layers_leave_among_other_groups(name):
    """On pipeline stages the others are shared out anew each time, so that layers and their optimizer state move."""
    case, layers, changes = CASES[name]
    model = {**MODELS["gqa-untied"], "num_hidden_layers": layers}
    cost = {"head": 3, "layer": 3}
    settings = oracle_settings(
        model, 0.35, types=ALL, gqa="cluster", ratio=(2, 1), group_cost=cost, min_layers=case.pp, balance=0.5, **changes
    )
    compared, of, outcome = compare(case, model, settings, 40)
    assert compared == of
    gone = [removal["gone"]["layer"][0][0] for removal in outcome.removals if removal["group"] == "layer"]
    assert len(gone) >= 2 and {removal["group"] for removal in outcome.removals} >= {"ffn", "layer"}
    assert outcome.stored["layer"] == layers - len(gone) >= case.pp


@HAS_HYBRID
@pytest.mark.full
def test_in_bf16_the_same_layers_leave_and_losses_stay_close():
    """fp32 main weights go with their layers to the other stage; losses within 2 % of the fp32 oracle's."""
    model = {**MODELS["mha"], "num_hidden_layers": 6}
    settings = oracle_settings(
        model, 0.5, types=("layer",), ratio=(1, 4), group_cost={"layer": 1}, min_layers=2, balance=0.0
    )
    _, expected = oracle_run(model, random_llama_weights(model, seed=3), settings, 14)
    case = Case(pp=2, dp=2, bf16=True, distributed_optimizer=True)
    outcome = sharded_run(case, model, random_llama_weights(model, seed=3), settings, 14)
    removals = [removal.units for result in expected for removal in result.removed]
    assert [tuple(map(tuple, removal["gone"]["layer"])) for removal in outcome.removals] == removals
    assert len(removals) >= 2 and outcome.losses == pytest.approx([result.loss for result in expected], rel=0.02)


SOURCE = Architecture.full(shape_from_config({**MODELS["gqa-untied"], "num_hidden_layers": 6}))


def config_of(share, stages, **changes):
    pruning = PruningConfig(target_params=int(share * SOURCE.parameters), types=("layer",), **changes)
    return replace(
        Config(),
        pruning=pruning,
        model=ModelConfig(engine="gpt"),
        parallel=ParallelConfig(pipeline_model_parallel_size=stages),
    )


def test_the_estimate_takes_layers_and_no_stage_runs_empty():
    config = config_of(0.6, 2, balance=0.0)
    check_target(config, SOURCE)
    route = plan_route(config, SOURCE)
    assert set(route.kinds) == {"layer"} and route.target.parameters <= config.pruning.target_params
    assert route.target.widths()["layer"] == 6 - len(route.kinds) >= 2
    with pytest.raises(UserError, match="cannot be reached: at the floors of layer"):
        check_target(config_of(0.6, 6), SOURCE)
    check_target(config_of(0.6, 1), SOURCE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": "hybrid"}, "HybridModel|hybrid"),
        ({"second": True}, "second_order"),
        ({"chunk": 2}, "recompute_num"),
        ({"scores": {"layer": "influence"}}, 'layer: score "influence" is none of weights, block_influence'),
        ({"scores": {"ffn": "block_influence"}}, 'ffn: score "block_influence" is none of weights$'),
        ({"scores": {"layer": "block_influence"}, "metric": "random"}, "block_influence has no say with metric random"),
    ],
)
def test_what_does_not_go_with_layers_is_refused_in_one_line(changes, told):
    groups = GroupConfigs({name: GroupConfig(score=score) for name, score in changes.get("scores", {}).items()})
    options = {"groups": groups, "metric": changes.get("metric", "obd")}
    config = config_of(0.6, 1, second_order=SecondOrder(enabled="second" in changes), **options)
    chunk = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": changes.get("chunk"),
    }
    model = ModelConfig(engine=changes.get("engine", "auto"), **(chunk if "chunk" in changes else {}))
    with pytest.raises(UserError, match=told) as caught:
        check_target(replace(config, model=model), SOURCE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "arguments", "shares"),
    [
        ((0, 1, 2, 3), (2,), [(0, 1), (2, 3)]),
        ((0, 2, 3, 5, 9), (2,), [(0, 2, 3), (5, 9)]),
        ((0, 1, 2, 3, 4), (2, 1), [(0,), (1, 2, 3, 4)]),
        ((0, 1, 2, 3, 4, 5), (3, 1, None), [(0,), (1, 2, 3), (4, 5)]),
        ((1, 4), (2, 2), [(1,), (4,)]),
        ((1, 4, 6), (3, 1, 2), [(1,), (4,), (6,)]),
    ],
)
def test_stages_share_out_what_is_left(layers, arguments, shares):
    """First and last keep the number they are given while every other stage has a layer."""
    assert stage_layers(layers, *arguments) == tuple(shares)
