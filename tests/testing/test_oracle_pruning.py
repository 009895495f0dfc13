"""The oracle's decisions: which group, when, with which margin, under every rule a run can set."""

import dataclasses
import math

import pytest
import torch

from megatron_prune.errors import UserError
from megatron_prune.testing.helpers.tiny_models import random_batch, random_llama_weights, tiny_config
from megatron_prune.testing.reference.oracle import DenseOracle, OracleSettings
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits, count
from megatron_prune.testing.reference.oracle_scores import OracleScores, candidates, choose, head_options, smooth


def run(settings, steps, seed=0, **overrides):
    config = tiny_config(**overrides)
    oracle = DenseOracle(config, random_llama_weights(config, seed), settings)
    results = [oracle.train_step(random_batch(config, seed=step)) for step in range(steps)]
    return oracle, results


def when(results):
    """Iterations, counted from 1, at which groups went, and how many."""
    return {index + 1: len(result.removed) for index, result in enumerate(results) if result.removed}


def rules(**settings):
    return OracleSettings(**{"target_params": 1, "normalize": "none", "head_score": "sum"} | settings).choice_rules


def scores_of(geometry, live, head=100.0, ffn=100.0, stem=100.0, **lower):
    """All units of a kind cost the same, except those in `lower`: head={(layer, id): score}."""
    changed = {"head": {}, "ffn": {}, "stem": {}} | lower.get("lower", {})
    layers = range(geometry.num_layers)
    return OracleScores(
        head=tuple({u: changed["head"].get((n, u), head) for u in live.heads[n]} for n in layers),
        ffn=tuple({u: changed["ffn"].get((n, u), ffn) for u in live.ffn[n]} for n in layers),
        stem={u: changed["stem"].get(u, stem) for u in live.stem},
    )


@pytest.fixture
def mha():
    geometry = Geometry.from_hf(tiny_config())
    return geometry, LiveUnits.full(geometry)


@pytest.fixture
def gqa():
    geometry = Geometry.from_hf(tiny_config(num_attention_heads=6, num_key_value_heads=2))
    return geometry, LiveUnits.full(geometry)


# Which group ----------------------------------------------------------------------------------------------------------


def test_each_layer_loses_its_own_least_and_the_least_kind_goes(mha):
    geometry, live = mha
    scores = scores_of(geometry, live, lower={"ffn": {(0, 3): 1.0, (1, 9): 2.0, (2, 0): 3.0, (3, 47): 4.0}})
    best, margin = choose(candidates(scores, geometry, live, rules()), rules())
    assert (best.kind, best.units, best.score) == ("ffn", ((3,), (9,), (0,), (47,)), 10.0)
    # Runner-up: the stem at 100, cheaper than the second channel of layer 3 (10 + 96).
    assert margin == pytest.approx((100 - 10) / 10)


def test_the_margin_sees_the_second_best_unit_of_one_layer(mha):
    geometry, live = mha
    lower = {(layer, 3): 1.0 for layer in range(4)} | {(2, 5): 1.5}
    scores = scores_of(geometry, live, lower={"ffn": lower})
    best, margin = choose(candidates(scores, geometry, live, rules()), rules())
    assert best.units == ((3,),) * 4
    assert margin == pytest.approx(0.5 / 4)


def test_ties_go_to_the_lowest_id_and_to_head_ffn_stem(mha):
    geometry, live = mha
    scores = scores_of(geometry, live, head=1.0, ffn=1.0, stem=4.0)
    best, margin = choose(candidates(scores, geometry, live, rules()), rules())
    assert (best.kind, best.units, margin) == ("head", ((0,),) * 4, 0.0)
    for types, kind in ((("stem", "ffn"), "ffn"), (("stem",), "stem")):
        best, _ = choose(candidates(scores, geometry, live, rules(types=types)), rules())
        assert (best.kind, best.units[0]) == (kind, (0,))


def test_normalize_divides_by_the_parameters_that_leave(mha):
    geometry, live = mha
    scores = scores_of(geometry, live, head=8.0, ffn=1.0, stem=2.0)
    found = {c.kind: c for c in candidates(scores, geometry, live, rules(normalize="per_parameter"))}
    hidden, ffn, layers, vocab = 32, 48, 4, 64
    assert found["head"].score == pytest.approx(layers * 8.0 / (layers * 4 * 8 * hidden))
    assert found["ffn"].score == pytest.approx(layers * 1.0 / (layers * 3 * hidden))
    assert found["stem"].score == pytest.approx(2.0 / (layers * (4 * 32 + 3 * ffn + 2) + 1 + vocab))


def test_head_score_per_column_divides_by_the_columns_of_the_unit(gqa):
    geometry, live = gqa
    scores = scores_of(geometry, live, head=16.0)
    for mode in ("cluster", "kv_group", "uniform"):
        found = candidates(scores, geometry, live, rules(gqa=mode, head_score="per_column", types=("head",)))
        assert found[0].score == pytest.approx(4 * 16.0 / 8)


def test_floors_keep_widths(mha):
    geometry, live = mha
    scores = scores_of(geometry, live)
    floors = {"min_heads": 4, "min_ffn": 48, "min_hidden": 31}
    assert [c.kind for c in candidates(scores, geometry, live, rules(**floors))] == ["stem"]
    assert candidates(scores, geometry, live, rules(**floors | {"min_hidden": 32})) == []


def test_finish_exact_passes_over_groups_that_overshoot(mha):
    geometry, live = mha
    scores = scores_of(geometry, live, head=1.0, ffn=20.0, stem=90.0)
    target = count(geometry, live) - 300
    for finish, kind in (("any", "head"), ("exact", "ffn")):
        chosen = rules(finish=finish, target_params=target)
        assert choose(candidates(scores, geometry, live, chosen), chosen)[0].kind == kind
    only_heads = rules(target_params=target, types=("head",))
    assert choose(candidates(scores, geometry, live, only_heads), only_heads)[0].kind == "head"


# Grouped queries ------------------------------------------------------------------------------------------------------


def test_gqa_cluster_takes_single_query_heads_and_counts_the_kv_heads_that_leave(gqa):
    geometry, live = gqa
    live = live.without("head", ((0,), (3,), (4,), (5,))).without("head", ((1,), (4,), (3,), (0,)))
    assert live.kv_index(0) == [0, 1, 1, 1] and live.kv_index(1) == [0, 0, 0, 1] and live.kv_heads(2) == (0, 1)
    # Head 2 is the last one of its KV head in layer 0, head 5 in layers 1 and 2; layer 3 keeps both KV heads.
    lower = {(0, 2): 1.0, (1, 5): 1.0, (2, 5): 1.0, (3, 1): 1.0}
    best = candidates(scores_of(geometry, live, lower={"head": lower}), geometry, live, rules(gqa="cluster"))[0]
    assert best.units == ((2,), (5,), (5,), (1,))
    assert count(geometry, live) - best.parameters_after == 4 * 2 * 8 * 32 + 3 * 2 * 8 * 32
    assert [live.without("head", best.units).kv_heads(n) for n in range(4)] == [(1,), (0,), (0,), (0, 1)]


def test_gqa_kv_group_takes_a_kv_head_with_all_its_queries(gqa):
    geometry, live = gqa
    lower = {(layer, 4): 0.0 for layer in range(4)}
    best = candidates(scores_of(geometry, live, lower={"head": lower}), geometry, live, rules(gqa="kv_group"))[0]
    assert best.units == ((3, 4, 5),) * 4 and best.score == 4 * 200
    left = live.without("head", best.units)
    assert [c.kind for c in candidates(scores_of(geometry, left), geometry, left, rules())] == ["ffn", "stem"]


def test_gqa_uniform_takes_the_least_of_each_cluster_together(gqa):
    geometry, _ = gqa
    layer = {0: 5.0, 1: 1.0, 2: 9.0, 3: 4.0, 4: 4.0, 5: 3.0}
    options = head_options(layer, geometry, rules(gqa="uniform"))
    assert options == [(4.0, (1, 5)), (5.0, (1, 3)), (8.0, (0, 5))]


def test_a_whole_run_under_each_gqa_rule_keeps_its_shape():
    for mode, step in (("cluster", 1), ("kv_group", 3), ("uniform", 2)):
        settings = OracleSettings(target_params=1, types=("head",), gqa=mode, group_cost={"head": 1}, lr=3e-3)
        oracle, results = run(settings, 6, num_attention_heads=6, num_key_value_heads=2)
        widths = [6 - step * n for n in range(1, 6) if 6 - step * n > 0]
        assert len(oracle.removals) == len(widths) == sum(when(results).values())
        for layer in range(4):
            kv_heads = len(oracle.live.kv_heads(layer))
            assert oracle.weights[f"model.layers.{layer}.self_attn.k_proj.weight"].shape[0] == 8 * kv_heads
            assert {"cluster": kv_heads == 1, "kv_group": kv_heads == 1, "uniform": kv_heads == 2}[mode]


# When -----------------------------------------------------------------------------------------------------------------

FFN_ONLY = {"types": ("ffn",), "target_params": 1, "saliency_momentum": 0.0}


@pytest.mark.parametrize(
    ("ratio", "first", "expected"),
    [
        ((1, 1), 0, {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1}),
        ((1, 3), 0, {3: 1, 6: 1}),
        ((2, 3), 0, {3: 2, 6: 2}),
        ((1, 3), 4, {4: 1, 7: 1}),
        ((1, 1), 6, {6: 1, 7: 1}),
    ],
)
def test_the_ratio_says_when(ratio, first, expected):
    _, results = run(OracleSettings(ratio=ratio, first_prune_iter=first, **FFN_ONLY), 7)
    assert when(results) == expected


def test_a_head_uses_up_head_dim_pruning_steps():
    settings = OracleSettings(ratio=(4, 1), types=("head",), target_params=1)
    oracle, results = run(settings, 5)
    # Credits: 4 -> -4, 0, 4 -> -4, 0, 4 -> -4
    assert when(results) == {1: 1, 3: 1, 5: 1}
    assert oracle.credits == -4
    cheap = {"ratio": (4, 1), "types": ("head",), "target_params": 1, "group_cost": {"head": 1}}
    _, results = run(OracleSettings(**cheap), 3)
    assert when(results) == {1: 1, 2: 1, 3: 1}, "one by the scores of one iteration"
    _, results = run(OracleSettings(**cheap, limits={}), 2)
    assert when(results) == {1: 3}


def test_pruning_ends_at_the_first_step_at_or_below_the_target_and_training_goes_on():
    full, _ = run(None, 0)
    target = full.parameters() - 2 * 4 * 3 * 32 - 1
    oracle, results = run(OracleSettings(ratio=(2, 1), target_params=target, types=("ffn",), lr=3e-3), 6)
    assert when(results) == {1: 2, 2: 1}
    assert oracle.parameters() == target + 1 - 4 * 3 * 32 == oracle.removals[-1].parameters_after
    assert [removal.iteration for removal in oracle.removals] == [1, 1, 2]
    assert oracle.iteration == 6
    batch = random_batch(tiny_config(), seed=0)
    losses = [oracle.train_step(batch).loss for _ in range(4)]
    assert losses[-1] < losses[0] and len(oracle.removals) == 3


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_adam_goes_on_after_a_removal_or_begins_anew(state):
    """With `reset`, the run after a removal is one of the small model with a new optimizer; steps without one carry."""
    oracle, results = run(OracleSettings(ratio=(1, 2), target_params=1, lr=3e-3, optimizer_state=state), 4)
    assert when(results) == {2: 1, 4: 1}
    small = DenseOracle(tiny_config(), oracle.hf_state(), OracleSettings(lr=3e-3), live=oracle.live)
    oracle.settings = dataclasses.replace(oracle.settings, target_params=None)
    for seed in range(3):
        batch = random_batch(tiny_config(), seed=seed)
        oracle.train_step(batch)
        small.train_step(batch)
        same = [torch.equal(oracle.weights[name], small.weights[name]) for name in small.weights]
        assert all(same) if state == "reset" else not any(same)


def test_no_target_means_no_pruning():
    oracle, results = run(OracleSettings(target_params=None), 2)
    assert when(results) == {} and oracle.smoothed is None


# Scores over time -----------------------------------------------------------------------------------------------------


def test_several_groups_in_a_step_reuse_its_scores_without_the_units_that_are_gone():
    """Magnitude without training: scores after a removal are those of the smaller model, so six groups in one step
    are the groups of six steps, one each."""
    common = {"target_params": 1, "saliency_momentum": 0.0, "criterion": "magnitude", "lr": 0.0, "limits": {}}
    costs = {"group_cost": {"head": 1}, "head_score": "per_column", "balance": 0.0}
    at_once, _ = run(OracleSettings(ratio=(6, 1), **common, **costs), 1)
    one_by_one, _ = run(OracleSettings(ratio=(1, 1), **common, **costs), 6)
    assert len(at_once.removals) == len(one_by_one.removals) == 6
    assert len({removal.kind for removal in at_once.removals}) > 1
    for ours, theirs in zip(at_once.removals, one_by_one.removals, strict=True):
        assert (ours.kind, ours.units) == (theirs.kind, theirs.units)
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-5)


def test_scores_are_taken_before_the_optimizer_step():
    settings = OracleSettings(target_params=1, saliency_momentum=0.0, lr=0.05, normalize="none")
    config = tiny_config()
    oracle = DenseOracle(config, random_llama_weights(config), settings)
    batch = random_batch(config, seed=0)
    before = oracle.unit_scores(batch)
    (removal,) = oracle.train_step(batch).removed
    assert removal.scores["stem"] == pytest.approx(min(before.stem.values()), rel=1e-6)
    assert removal.scores["ffn"] == pytest.approx(sum(min(layer.values()) for layer in before.ffn), rel=1e-6)


def test_smoothing_is_a_moving_average_per_unit():
    first = OracleScores(head=({0: 1.0, 1: 2.0},), ffn=({0: 4.0},), stem={0: 8.0, 5: 1.0})
    later = OracleScores(head=({1: 4.0},), ffn=({0: 0.0},), stem={5: 3.0})
    assert smooth(None, first, 0.9) == first
    blended = smooth(first, later, 0.75)
    assert blended == OracleScores(head=({1: 2.5},), ffn=({0: 3.0},), stem={5: 1.5})
    assert smooth(first, later, 0.0) == later


def test_smoothing_follows_the_run_and_idle_steps_count_only_when_asked():
    common = {"ratio": (1, 1), "types": ("head",), "target_params": 1, "saliency_momentum": 0.9, "lr": 3e-3}
    asleep, _ = run(OracleSettings(**common), 3)
    awake, _ = run(OracleSettings(**common, score_idle=True), 3)
    assert asleep.removals == awake.removals
    assert asleep.smoothed != awake.smoothed


def test_removals_carry_saliencies_margin_and_size():
    oracle, _ = run(OracleSettings(ratio=(2, 1), target_params=1, lr=3e-3), 6)
    parameters = [removal.parameters_after for removal in oracle.removals]
    assert parameters == sorted(parameters, reverse=True) and parameters[-1] == oracle.parameters()
    for removal in oracle.removals:
        assert removal.kind == min(removal.scores, key=removal.scores.get)
        assert 0 <= removal.margin < math.inf
    held = sum(tensor.numel() for tensor in oracle.hf_state().values())
    assert held == oracle.parameters()


def test_float32_and_float64_remove_the_same_groups():
    config = tiny_config(num_key_value_heads=2, tie_word_embeddings=False)
    weights = random_llama_weights(config)
    runs = []
    for dtype in (torch.float32, torch.float64):
        settings = OracleSettings(ratio=(1, 1), target_params=1, lr=3e-3, gqa="cluster", group_cost={"head": 1})
        oracle = DenseOracle(config, weights, settings, dtype)
        losses = [oracle.train_step(random_batch(config, seed=step)).loss for step in range(20)]
        runs.append((losses, [(r.kind, r.units) for r in oracle.removals]))
    assert runs[0][1] == runs[1][1] and len(runs[0][1]) == 20
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"criterion": "tailor"}, {"gqa": "mha"}, {"fisher": "exact"}, {"normalize": "yes"}, {"finish": "now"}]
)
def test_unknown_settings_name_the_known_ones(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name}: .* is none of "):
        OracleSettings(**wrong)
