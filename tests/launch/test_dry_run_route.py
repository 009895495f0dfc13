"""The way to the target: widths, schedule, tokens and FLOPs, by hand and against published token counts."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.config import (
    Config,
    Curve,
    DataConfig,
    GroupConfig,
    GroupConfigs,
    PruningConfig,
    TrainingConfig,
    read_file,
)
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.launch.estimate.route import plan_phases, plan_plain, plan_route, removal_iters
from megatron_prune.launch.estimate.traffic import compactions
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.budget import training_flops
from megatron_prune.pruning.schedule import RatioSchedule
from megatron_prune.testing.helpers.sharded import rounded
from megatron_prune.training.pruning_settings import live_multiples, pruning_schedule

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "configs"
SMOL = LlamaShape(24, 2048, 8192, 32, 32, 64, 49152, 2048, tie_word_embeddings=True)
GQA = LlamaShape(3, 64, 120, 12, 4, 8, 100, 128, tie_word_embeddings=True)


GROUPS = GroupConfigs(head=GroupConfig(cost=4), ffn=GroupConfig(), stem=GroupConfig())


def config_for(**pruning):
    base = Config()
    pruning.setdefault("groups", GROUPS)
    return dataclasses.replace(
        base,
        data=DataConfig(seq_length=32),
        training=TrainingConfig(global_batch_size=4),
        pruning=PruningConfig(**pruning),
    )


def test_published_token_counts_come_out():
    """SmolLM-1.7B to 469 M at four ratios took 2.5, 4.5, 8.4 and 72.1 B tokens (EfficientLLM's ablation)."""
    recipe = read_file(RECIPES / "smollm_1.7b_to_469m.yaml")
    for ratio, published in (("4:1", 2.5e9), ("2:1", 4.5e9), ("1:1", 8.4e9), ("1:9", 72.1e9)):
        config = dataclasses.replace(recipe, pruning=dataclasses.replace(recipe.pruning, ratio=ratio))
        route = plan_route(config, Architecture.full(SMOL))
        iterations = removal_iters(pruning_schedule(config, route.source), route, config.tokens_per_iteration)
        phase, _ = plan_phases(config, route, iterations)
        assert phase.tokens == pytest.approx(published, rel=0.02), ratio
    target = route.target
    assert (target.num_attention_heads, target.shape.num_layers) == (19, 24)
    assert target.ffn_hidden_size == pytest.approx(3018, abs=10) and target.hidden_size == pytest.approx(1225, abs=10)
    assert "Figure 7" in route.assumption


def schedule(pruning_steps, gradient_steps, first, **cost):
    return RatioSchedule(pruning_steps, gradient_steps, first, {"head": 1, "ffn": 1, "stem": 1} | cost, 10)


def forecast(rules, kinds):
    return rules.forecast(kinds, np.full(len(kinds), 11), 1).tolist()


def test_a_head_is_paid_off_before_the_next_group():
    assert forecast(schedule(1, 9, 10, head=4), ("head", "ffn", "ffn")) == [10, 46, 55]
    assert forecast(schedule(4, 1, 0), ("ffn",) * 5) == [1, 1, 1, 1, 2]
    assert forecast(schedule(3, 2, 0, stem=2), ("stem", "stem", "ffn", "ffn")) == [2, 2, 4, 4]


@given(
    kinds=st.lists(st.sampled_from(["head", "ffn", "stem"]), min_size=1, max_size=20),
    steps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    first=st.integers(0, 12),
    costs=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
)
def test_removals_follow_the_schedule_iteration_by_iteration(kinds, steps, first, costs):
    rules = schedule(*steps, first, head=costs[0], ffn=costs[1], stem=costs[2])
    expected, credits, waiting, iteration = [], 0.0, list(kinds), 0
    while waiting:  # as the trainer goes: every iteration asks the schedule
        iteration += 1
        if rules.is_open(iteration, 0, 11):
            credits = rules.credited(credits)
            while waiting and rules.is_due(credits, 0, 11):
                credits = rules.spent(credits, waiting.pop(0))
                expected.append(iteration)
    assert forecast(rules, kinds) == expected


@pytest.mark.parametrize("gqa", ["kv_group", "uniform", "cluster"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_the_route_ends_at_the_target(gqa, share):
    source = Architecture.full(GQA)
    config = config_for(target_params=int(source.parameters * share), gqa=gqa, finish="first")
    route = plan_route(config, source)
    assert route.after(0) == source and route.after(len(route.kinds)) == route.target
    assert route.target.parameters <= config.pruning.target_params < route.after(len(route.kinds) - 1).parameters
    shares = [
        route.target.num_attention_heads / 12,
        route.target.ffn_hidden_size / 120,
        route.target.hidden_size / 64,
    ]
    one_head_group = {"kv_group": 3, "uniform": 4, "cluster": 1}[gqa] / 12
    assert max(shares) - min(shares) <= one_head_group + 1 / 64, "kinds shrink by different factors"
    if gqa == "uniform":
        assert route.target.width(KV_HEAD) == 4


def test_exact_finish_ends_within_one_percent():
    source = Architecture.full(GQA)
    for target in range(40_000, 70_000, 1_777):
        route = plan_route(config_for(target_params=target), source)
        assert target * 0.99 <= route.target.parameters <= target


def test_only_given_kinds_leave_and_floors_hold():
    source = Architecture.full(GQA)
    route = plan_route(config_for(target_params=60_000, types=("ffn",)), source)
    assert set(route.kinds) == {"ffn"}
    route = plan_route(
        config_for(target_params=30_000, groups=GROUPS.having("stem", floor=60).having("head", floor=12)), source
    )
    assert route.target.hidden_size >= 60 and route.target.num_attention_heads == 12


def test_widths_are_rounded_at_the_end():
    source = Architecture.full(GQA)
    config = config_for(target_params=50_000, groups=GROUPS.having("ffn", round_to=16).having("stem", round_to=8))
    target = plan_route(config, source).target
    assert target.ffn_hidden_size % 16 == 0 and target.hidden_size % 8 == 0 and target.parameters <= 50_000


def test_widths_of_large_sources_are_rounded_by_default():
    """By a 64th of the source's width at most, of kinds that may leave, unless a number is given."""
    source = Architecture.full(dataclasses.replace(GQA, hidden_size=600, ffn_hidden_size=2100))
    for groups, types, multiples in (
        ({}, ("head", "ffn", "stem"), {"head": 1, "ffn": 16, "stem": 8}),
        ({"stem": GroupConfig(round_to=1)}, ("ffn", "stem"), {"ffn": 16, "stem": 1}),
        ({"stem": GroupConfig(floor=3)}, ("ffn",), {"ffn": 16}),
    ):
        config = config_for(target_params=6_000_000, types=types, groups=GroupConfigs(groups))
        assert live_multiples(config, source) == multiples
        target = plan_route(config, source).target
        assert target.ffn_hidden_size % 16 == 0 and 0.97 < target.parameters / 6_000_000 <= 1
        assert target.hidden_size == 600 or "stem" in types
    assert {kind.round_to(kind.size(GQA)) for kind in (HEAD, FFN, STEM)} == {1}, "small sources are left alone"


def test_flops_are_summed_over_the_widths_that_are_trained():
    source = Architecture.full(GQA)
    config = config_for(target_params=40_000, ratio="2:3", first_prune_iter=7)
    config = dataclasses.replace(config, continued=dataclasses.replace(config.continued, continue_tokens=12_800))
    route = plan_route(config, source)
    iterations = removal_iters(pruning_schedule(config, source), route, config.tokens_per_iteration)
    pruning, continued = plan_phases(config, route, iterations)
    gone = [int(np.sum(iterations < i)) for i in range(1, pruning.iterations + 1)]
    by_hand = sum(128 * training_flops(route.after(count), 32) for count in gone)
    assert pruning.flops == pytest.approx(by_hand, rel=5e-3)  # widths are sampled
    assert pruning.tokens == pruning.iterations * 128 and pruning.iterations == iterations[-1]
    assert continued.iterations == 100
    assert continued.flops == pytest.approx(12_800 * training_flops(route.target, 32))
    stops = dataclasses.replace(config, training=dataclasses.replace(config.training, exit_at_target=True))
    assert [phase.iterations for phase in plan_phases(stops, route, iterations)] == [pruning.iterations, 0]


def test_a_curve_over_one_schedule_ends_where_it_says():
    """The target at 30 % of the run at the latest, the rest of train_iters for the small model."""
    source = Architecture.full(GQA)
    config = config_for(target_params=40_000, schedule="curve", curve=Curve("cubic", "10%", "30%"))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr_schedule="whole_run"))
    route = plan_route(config, source)
    iterations = removal_iters(pruning_schedule(config, source), route, config.tokens_per_iteration)
    assert 100 < iterations[0] <= 105 and 250 < iterations[-1] <= 300 and (np.diff(iterations) >= 0).all()
    sizes = pruning_schedule(config, source).size(iterations * config.tokens_per_iteration)
    after = np.array([route.after(count).parameters for count in range(1, len(iterations) + 1)])
    assert (after <= sizes + 0.02 * source.parameters).all(), "sizes between samples are interpolated"
    pruning, continued = plan_phases(config, route, iterations)
    assert pruning.iterations + continued.iterations == config.training.train_iters


def test_plain_training_has_one_phase():
    source, config = Architecture.full(GQA), config_for()
    training, continued = plan_plain(config, source)
    assert training.iterations == config.training.train_iters and continued.iterations == 0
    assert training.flops == pytest.approx(training.tokens * training_flops(source, 32))


def test_widths_that_are_no_multiples_are_told_and_brought_down():
    shape = dataclasses.replace(GQA, hidden_size=576, ffn_hidden_size=1536)
    route = plan_route(config_for(target_params=2_000_000), Architecture.full(shape))
    assert route.uneven == {"ffn": 64, "stem": 64}
    even = route.even
    assert even.width(FFN) == route.target.width(FFN) // 64 * 64 and even.width(STEM) % 64 == 0
    assert even.width(HEAD) == route.target.width(HEAD) and even.parameters < route.target.parameters
    assert not plan_route(config_for(target_params=30_000), Architecture.full(GQA)).uneven, "small models: any width"


@pytest.mark.parametrize("tp", [1, 2])
def test_compactions_are_counted_as_layouts_say(tp):
    """Walk the route with a real layout that compacts whenever it is due."""
    source = Architecture.full(dataclasses.replace(GQA, num_query_groups=12))
    quantum = rounded(head=1, ffn=8, stem=4, vocab=1)
    config = config_for(target_params=30_000, gqa="cluster", ratio="1:1")
    route = plan_route(config, source)
    iterations = removal_iters(pruning_schedule(config, source), route, config.tokens_per_iteration)
    layout = start = ShardLayout.pack(source, tp, quantum)
    happened = set()
    for count, iteration in enumerate(iterations.tolist(), 1):
        after = ShardLayout.pack(route.after(count), tp, quantum)
        if any(after.width(kind) < layout.width(kind) for kind in (HEAD, FFN, STEM)):
            happened.add(iteration)
            layout = after
    assert compactions(start, route, iterations) == sorted(happened)
    assert Counter(route.kinds)["ffn"] > 16


@pytest.mark.parametrize(
    ("first", "last", "counts"), [(None, None, [4, 4, 4]), (2, None, [2, 5, 5]), (3, 1, [3, 8, 1])]
)
def test_layers_of_pipeline_stages(first, last, counts):
    base = Config()
    parallel = dataclasses.replace(
        base.parallel,
        pipeline_model_parallel_size=3,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    config = dataclasses.replace(base, parallel=parallel, training=TrainingConfig(global_batch_size=8))
    placement = Placement.plan(config, 6, 12)
    assert [len(stage) for stage in placement.stages] == counts
    assert [layer for stage in placement.stages for layer in stage] == list(range(12))
    assert [placement.in_flight(stage) for stage in range(3)] == [3, 2, 1]
