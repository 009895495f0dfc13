"""The choice of a group: the same as the oracle's on any scores and rules, floors kept, targets told apart."""

import dataclasses
import math
from functools import partial
from itertools import combinations, islice, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, LAYER, STEM, find_kind
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.budget import Limit, flops_per_token, kv_cache_per_token, parameters
from megatron_prune.pruning.groups import Rules
from megatron_prune.pruning.groups.layer import group_of
from megatron_prune.pruning.selector import choose, least_architecture
from megatron_prune.saliency.scores import UnitScores, score_length
from megatron_prune.testing.reference import oracle_scores
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits
from tests.model.random_models import RULES, removals, shapes

KINDS = ("head", "ffn", "stem")
ALL_KINDS = (*KINDS, "layer")


def geometry_of(shape):
    return Geometry(
        num_layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=shape.ffn_hidden_size,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab=shape.vocab_size,
        epsilon=shape.norm_epsilon,
        rope={"rope_theta": shape.rotary_base},
        tied=shape.tie_word_embeddings,
        qkv_bias=shape.add_qkv_bias,
        qk_norm=shape.qk_layernorm,
    )


def live_units(architecture):
    return LiveUnits(
        tuple(tuple(ids.tolist()) for ids in architecture.sites(HEAD)),
        tuple(tuple(ids.tolist()) for ids in architecture.sites(FFN)),
        tuple(architecture.ids(STEM, 0).tolist()),
        architecture.shape.heads_per_group,
    )


def oracle_form(scores):
    """The oracle's scores by original id."""
    a = scores.architecture
    by_layer = [
        tuple(dict(zip(ids.tolist(), row.tolist(), strict=True)) for ids, row in zip(live, values, strict=True))
        for live, values in ((a.sites(kind), scores.values[kind]) for kind in (HEAD, FFN))
    ]
    return oracle_scores.OracleScores(
        *by_layer,
        dict(zip(a.ids(STEM, 0).tolist(), scores.of(STEM).tolist(), strict=True)),
        dict(zip(a.layers, scores.of(LAYER).tolist(), strict=True)),
    )


def random_scores(architecture, seed, levels):
    """Multiples of 1/64, so that sums are exact in any order; few `levels` make ties, odd seeds negative ones too."""
    random = np.random.default_rng(seed)
    least = -levels // 2 if seed % 2 else 0
    sums = UnitScores.from_vector(architecture, random.integers(least, levels, score_length(architecture)) / 64)
    influence = random.integers(1, levels, len(architecture.layers)) / 64
    return UnitScores(architecture, {**sums.values, LAYER: (influence,)})


SEQUENCE = 7
MEASURES = {
    "flops_per_token": partial(flops_per_token, seq_length=SEQUENCE),
    "kv_cache_per_token": kv_cache_per_token,
}


@st.composite
def cases(draw):
    """(architecture that the rule can have led to, settings)"""
    architecture, rule = Architecture.full(draw(shapes())), draw(st.sampled_from(RULES))
    for group in removals(architecture, rule, draw(st.integers(0, 999)), draw(st.integers(0, 8))):
        architecture = architecture.without(group)
    for layer in architecture.layers[1:]:
        if draw(st.booleans()):
            architecture = architecture.without(group_of(architecture, layer))
    fraction = draw(st.sampled_from([0.3, 0.9, 0.99, 1.0]))
    settings = Rules(
        target_params=int(architecture.parameters * fraction),
        types=draw(st.sampled_from([c for n in (1, 2, 3, 4) for c in combinations(ALL_KINDS, n)])),
        scores={"layer": draw(st.sampled_from(["weights", "block_influence"]))},
        gqa=rule,
        head_score=draw(st.sampled_from(["per_column", "sum"])),
        normalize=draw(st.sampled_from(["none", "per_parameter"])),
        finish=draw(st.sampled_from(["exact", "first"])),
        floors={name: draw(st.integers(1, 4)) for name in ALL_KINDS},
        widths={name: draw(st.integers(0, 12)) for name in ALL_KINDS if draw(st.booleans())},
        limits=tuple(
            Limit(
                name,
                MEASURES[name](architecture.table, architecture.counts) * draw(st.sampled_from([0.3, 0.9, 1.0])),
                m,
            )
            for name, m in MEASURES.items()
            if draw(st.booleans())
        ),
    )
    if settings.limits and draw(st.booleans()):
        settings = dataclasses.replace(settings, target_params=None)
    return architecture, settings


def oracle_decision(scores, settings):
    rules = oracle_scores.ChoiceRules(
        head_score=settings.head_score,
        normalize=settings.normalize,
        gqa=settings.gqa,
        types=settings.types,
        min_widths=dict(settings.floors),
        target={limit.name: limit.most for limit in settings.budget.limits},
        seq_length=SEQUENCE,
        finish="exact" if settings.finish == "exact" else "any",
        layer_score=settings.scores["layer"],
        balanced=dict(settings.widths),
    )
    architecture = scores.architecture
    geometry, live = geometry_of(architecture.shape), live_units(architecture)
    found = oracle_scores.candidates(oracle_form(scores), geometry, live, rules)
    return found, oracle_scores.choose(found, rules) if found else None


@given(cases(), st.integers(0, 999), st.sampled_from([2, 4, 1000]))
def test_the_choice_is_the_oracles(case, seed, levels):
    architecture, settings = case
    scores = random_scores(architecture, seed, levels)
    found, expected = oracle_decision(scores, settings)
    decision = choose(scores, architecture, settings)
    if expected is None:
        assert decision is None
        return
    best, margin = expected
    assert decision is not None
    units = decision.group.gone[find_kind(best.kind)]
    assert (decision.group.name, units) == (best.kind, best.units)
    assert decision.scores == pytest.approx({candidate.kind: candidate.score for candidate in found}, rel=1e-12)
    assert decision.margin == pytest.approx(margin, rel=1e-9, abs=1e-12)
    after = architecture.without(decision.group)
    assert decision.parameters_after == best.parameters_after == after.parameters
    for kind in after.table.prunable:
        assert after.width(kind) >= min(settings.floors[kind.name], architecture.width(kind))


SHAPE = LlamaShape(2, 6, 8, 4, 2, 2, 8, 16)
FULL = Architecture.full(SHAPE)


def scores_of(head=9.0, ffn=9.0, stem=9.0):
    return UnitScores(
        FULL,
        {
            HEAD: (np.full(4, head), np.full(4, head)),
            FFN: (np.full(8, ffn), np.full(8, ffn)),
            STEM: (np.full(6, stem),),
        },
    )


def test_ties_go_to_the_lowest_id_and_to_heads_first():
    settings = Rules(1, normalize="none", head_score="sum", gqa="cluster")
    decision = choose(scores_of(), FULL, settings)
    assert decision is not None
    assert decision.group == Group.of(STEM, ((0,),)), "one stem channel costs one score, the others a score per layer"
    decision = choose(scores_of(stem=18.0), FULL, settings)
    assert decision is not None and decision.group == Group.of(HEAD, ((0,), (0,)))
    assert decision.margin == 0
    decision = choose(scores_of(head=10.0, stem=18.0), FULL, settings)
    assert decision is not None and decision.group == Group.of(FFN, ((0,), (0,)))


def test_per_column_scores_let_heads_compete_with_channels():
    by_sum, by_column = (
        choose(scores_of(head=10.0, stem=99.0), FULL, Rules(1, head_score=rule, normalize="none"))
        for rule in ("sum", "per_column")
    )
    assert by_sum is not None and by_sum.group.name == "ffn"
    assert by_column is not None and by_column.group == Group.of(HEAD, ((0, 1), (0, 1)))


def test_the_margin_tells_how_close_the_runner_up_came():
    scores = scores_of(ffn=2.0)
    first, second = scores.values[FFN]
    first[5], second[3], second[4] = 1.0, 1.0, 1.25
    decision = choose(scores, FULL, Rules(1, normalize="none"))
    assert decision is not None and decision.group == Group.of(FFN, ((5,), (3,)))
    assert decision.scores["ffn"] == 2.0 and decision.margin == pytest.approx(0.125)


def test_finish_exact_prefers_what_does_not_overshoot():
    scores = scores_of(head=0.001)
    target = FULL.parameters - FULL.cost(Group.of(FFN, ((0,), (0,))))
    exact = Rules(target, normalize="none", finish="exact")
    first = Rules(target, normalize="none", finish="first")
    chosen = choose(scores, FULL, exact)
    assert chosen is not None and chosen.group.name == "ffn" and chosen.parameters_after == target
    assert set(chosen.scores) == set(KINDS), "the record shows all three saliencies"
    chosen = choose(scores, FULL, first)
    assert chosen is not None and chosen.group.name == "head" and chosen.parameters_after < target
    only_heads = Rules(target, normalize="none", types=("head",))
    chosen = choose(scores, FULL, only_heads)
    assert chosen is not None and chosen.group.name == "head", "better below the target than never there"


def test_finish_exact_does_not_empty_a_kind_for_the_sake_of_another():
    """A head overshoots; FFN channels would end well, but go no lower than four fifths of their balanced width."""
    few = FULL
    for unit in (0, 1):
        few = few.without(Group.of(FFN, ((unit,), (unit,))))
    target = few.parameters - few.cost(Group.of(FFN, ((2,), (2,))))
    for balanced, name in ((5, "ffn"), (6, "ffn"), (7, "head")):  # 5 of 8 channels would be left
        counted = Limit("latency", target, parameters)
        rules = Rules(
            None, types=("head", "ffn"), normalize="none", widths={"ffn": balanced, "head": 1}, limits=(counted,)
        )
        scores = UnitScores.from_vector(few, np.ones(score_length(few)))
        chosen = choose(scores, few, rules)
        assert chosen is not None and chosen.group.name == name, balanced
    chosen = choose(scores, few, dataclasses.replace(rules, widths={"ffn": 7, "head": 4}))
    assert chosen is not None and chosen.group.name == "ffn", "no kind keeps its balance: the nearest"


def test_finish_exact_ends_as_near_to_the_target_as_it_can():
    """Where all groups end more than half a percent below the target, the smallest goes, not the least salient."""
    least = {kind: choose(scores_of(**{kind: 0.0}), FULL, Rules(1, types=(kind,))) for kind in KINDS}
    costs = {kind: FULL.cost(decision.group) for kind, decision in least.items() if decision}
    smallest = min(costs, key=costs.__getitem__)
    target = FULL.parameters - 1
    assert all(FULL.parameters - cost < target * 0.995 for cost in costs.values())
    other = max(costs, key=costs.__getitem__)
    chosen = choose(scores_of(**{other: 0.0}), FULL, Rules(target, normalize="none", finish="exact"))
    assert chosen is not None and chosen.group.name == smallest


@pytest.mark.parametrize("normalize", ["none", "per_parameter"])
def test_a_predicted_gain_goes_first_and_the_greater_one_before_the_smaller(normalize):
    """Dividing by parameters would put the greater of two gains behind, since more parameters leave with it."""
    rules = Rules(1, normalize=normalize, gqa="cluster")
    chosen = choose(scores_of(head=0.0, ffn=1e-9, stem=-1e-9), FULL, rules)
    assert chosen is not None and chosen.group.name == "stem", "before a group that costs nothing"
    chosen = choose(scores_of(head=-3.0, ffn=-2.0, stem=1.0), FULL, rules)
    assert chosen is not None and chosen.group.name == "head", "-6 in two layers against -4"
    assert FULL.cost(chosen.group) > FULL.cost(Group.of(FFN, ((0,), (0,)))), "the case that a division would reverse"
    assert chosen.margin == 0, "another head would do as well"


def test_random_draws_are_even_over_units_and_repeatable():
    settings = Rules(1, gqa="cluster", draw_seed=5)
    drawn = [choose(scores_of(), FULL, settings, step) for step in range(240)]
    again = [choose(scores_of(), FULL, settings, step) for step in range(240)]
    assert drawn == again
    kinds = [decision.group.name for decision in drawn if decision]
    units = {"head": 2 * 4, "ffn": 2 * 8, "stem": 6}
    for kind, count in units.items():
        assert kinds.count(kind) / 240 == pytest.approx(count / 30, abs=0.1), kind
    assert {
        unit for decision in drawn if decision and decision.group.name == "ffn" for unit in decision.group.gone[FFN][0]
    }
    assert choose(scores_of(), FULL, Rules(1, draw_seed=6), 0) != drawn[0]


def exhausted(architecture, settings, seed):
    """Prune until no kind has a candidate."""
    for _ in range(200):
        decision = choose(random_scores(architecture, seed, 1000), architecture, settings)
        if decision is None:
            return architecture
        architecture = architecture.without(decision.group)
    raise AssertionError("it never ends")


@given(cases(), st.integers(0, 99))
def test_no_pruning_goes_below_the_least_parameters(case, seed):
    architecture, settings = case
    settings = dataclasses.replace(settings, target_params=1, limits=())  # by which every group saves something
    least, end = least_architecture(architecture, settings).parameters, exhausted(architecture, settings, seed)
    assert least <= end.parameters <= architecture.parameters
    if settings.gqa != "cluster" or "head" not in settings.types:
        assert end.parameters == least, "where every order ends in the same widths, it is what is left"


@given(shapes(), st.integers(0, 99), st.integers(1, 6))
def test_the_least_parameters_of_single_heads_can_be_reached(shape, seed, min_heads):
    """By trying every choice of heads that stay: KV heads are kept for their last query head, so the choice matters."""
    architecture, per_group = Architecture.full(shape), shape.heads_per_group
    for group in removals(architecture, "cluster", seed, 20):
        architecture = architecture.without(group)
    settings = Rules(1, types=("head",), gqa="cluster", floors={"head": min_heads})
    keep = min(min_heads, architecture.num_attention_heads)
    best = []
    for ids in architecture.sites(HEAD):
        options = islice(combinations(ids.tolist(), keep), 5000)
        best.append(np.array(min(options, key=lambda stay: len({head // per_group for head in stay}))))
    reached = Architecture(shape, {**architecture.live, HEAD: tuple(best)})
    assert least_architecture(architecture, settings).parameters == reached.parameters


def test_the_fullest_kv_heads_are_the_ones_to_keep():
    """Of heads 0 | 3 4 5 (KV heads 0 and 1) three can stay on one KV head; the first three would need both."""
    shape = LlamaShape(1, 6, 8, 6, 2, 2, 8, 16)
    architecture = Architecture.full(shape).without(Group.of(HEAD, ((1,),))).without(Group.of(HEAD, ((2,),)))
    settings = Rules(1, types=("head",), gqa="cluster", floors={"head": 3})
    reached = architecture.without(Group.of(HEAD, ((0,),)))
    assert reached.width(KV_HEAD) == 1
    assert least_architecture(architecture, settings).parameters == reached.parameters


@pytest.mark.parametrize(("gqa", "min_heads"), list(product(RULES, (1, 3, 4))))
def test_floors_of_published_shapes(gqa, min_heads):
    shape = LlamaShape(2, 6, 8, 12, 3, 2, 8, 16)
    settings = Rules(1, gqa=gqa, floors={"head": min_heads, "ffn": 3, "stem": 2})
    end = exhausted(Architecture.full(shape), settings, seed=1)
    kept = {"cluster": min_heads, "uniform": 3 * math.ceil(min_heads / 3), "kv_group": 4}[gqa]
    assert (end.num_attention_heads, end.ffn_hidden_size, end.hidden_size) == (kept, 3, 2)
