"""No kind pays for all: what stays of each while another one has more to give."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.config import PruningConfig
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import HEAD
from megatron_prune.pruning.balance import balanced_widths, proportional_share
from megatron_prune.pruning.groups import Rules, default_names, find_group
from megatron_prune.pruning.selector import choose
from megatron_prune.saliency.scores import UnitScores, score_length
from megatron_prune.testing.helpers.tiny_models import tiny_config

SOURCE = Architecture.full(
    shape_from_config(tiny_config(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4))
)

DEFAULT = tuple(map(find_group, default_names()))


def shares(rules):
    return proportional_share(SOURCE, rules.kinds(SOURCE), rules.target_params)


@pytest.mark.parametrize("types", [None, ("head", "ffn"), ("ffn",), ("stem",)])
def test_widths_of_the_share_have_the_targets_parameters(types):
    """Where all widths at a half are whole numbers, that half is found."""
    rules = Rules(target_params=1, types=types)
    half = SOURCE
    for kind in rules.kinds(SOURCE):
        half = kind.shrunk(half, half.width(kind.kind) // 2 // kind.units(half, rules), rules)
    assert shares(Rules(target_params=half.parameters, types=types)) == pytest.approx(0.5, rel=1e-12)
    assert shares(Rules(target_params=SOURCE.parameters, types=types)) == pytest.approx(1, rel=1e-12)
    assert shares(Rules(target_params=0, types=types)) == 0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.9), balance=st.floats(0, 1), favourite=st.integers(0, 2))
def test_whatever_the_scores_a_kind_goes_below_its_balanced_width_only_when_no_other_could_go(
    seed, share, balance, favourite
):
    """One kind's scores are next to nothing: it would go alone. What would end too far below the target cannot go."""
    rules = Rules(target_params=int(share * SOURCE.parameters), normalize="none")
    rules = Rules(rules.target_params, normalize="none", widths=balanced_widths(SOURCE, rules, balance))
    architecture, generator, kinds = SOURCE, np.random.default_rng(seed), DEFAULT

    def keeps(group, smaller):
        return smaller.width(group.kind) >= rules.widths[group.name]

    while architecture.parameters > rules.target_params:
        scores = UnitScores.from_vector(architecture, generator.random(score_length(architecture)))
        cheap = {kind: tuple(site * 1e-9 for site in sites) for kind, sites in scores.values.items()}
        chosen = kinds[favourite].kind
        decision = choose(
            dataclasses.replace(scores, values=scores.values | {chosen: cheap[chosen]}), architecture, rules
        )
        assert decision is not None
        smaller = {group: group.shrunk(architecture, 1, rules) for group in kinds if group.most(architecture, rules)}
        could = [
            group.name
            for group, after in smaller.items()
            if keeps(group, after) and after.parameters >= 0.995 * rules.target_params
        ]
        assert not could or decision.group.name in could
        architecture = architecture.without(decision.group)
    assert architecture.parameters >= 0.9 * rules.target_params


def test_a_cheap_kind_is_spared_by_default_and_goes_alone_without():
    widths = {}
    for balance in (0.75, 0.0):
        architecture, rules = SOURCE, Rules(target_params=SOURCE.parameters // 2)
        rules = dataclasses.replace(rules, widths=balanced_widths(SOURCE, rules, balance))
        while architecture.parameters > rules.target_params:
            vector = np.ones(score_length(architecture))
            vector[: architecture.shape.num_layers * architecture.width(HEAD)] = 1e-6
            decision = choose(UnitScores.from_vector(architecture, vector), architecture, rules)
            architecture = architecture.without(decision.group)
        widths[balance] = architecture.width(HEAD)
    assert widths == {0.75: 6, 0.0: 2}


@pytest.mark.parametrize("share", [0.83, 0.67])
def test_of_a_135m_shape_no_kind_is_ruined_by_scores_on_scales_of_their_own(share):
    """Scores as they were seen on such a model: one kind looks 192 times cheaper than the others, whichever it is."""
    config = tiny_config(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9, num_key_value_heads=3
    )
    source = Architecture.full(shape_from_config(config | {"head_dim": 64, "vocab_size": 2048}))
    rules = Rules(target_params=int(share * source.parameters))
    rules = dataclasses.replace(rules, widths=balanced_widths(source, rules, PruningConfig().balance))
    alike = proportional_share(source, DEFAULT, rules.target_params)
    for cheap in DEFAULT:
        architecture, generator = source, np.random.default_rng(0)
        draws = generator.random(score_length(source)) + 0.5
        scores = UnitScores.from_vector(source, draws)
        values = {
            kind: tuple(site / (192 if kind is cheap.kind else 1) for site in sites)
            for kind, sites in scores.values.items()
        }
        scores = dataclasses.replace(scores, values=values)
        while architecture.parameters > rules.target_params:
            decision = choose(scores, architecture, rules)
            architecture = architecture.without(decision.group)
            scores = scores.restricted(architecture)
        left = {kind.name: architecture.width(kind.kind) / source.width(kind.kind) for kind in DEFAULT}
        assert min(left.values()) >= 0.6 * alike and left[cheap.name] < 1, (cheap.name, left)
