"""Sums per unit as plain arrays: they travel as one vector, follow their units, and are smoothed as the oracle's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import FFN, HEAD, LAYER, STEM, find_kind
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups.layer import group_of
from megatron_prune.saliency.scores import UnitScores, score_length, smooth
from megatron_prune.testing.reference import oracle_scores
from tests.model.random_models import groups, shapes


def random_scores(architecture, random):
    return UnitScores.from_vector(architecture, random.random(score_length(architecture)))


def by_id(scores):
    a = scores.architecture
    layers = [
        tuple(dict(zip(ids.tolist(), row.tolist(), strict=True)) for ids, row in zip(live, values, strict=True))
        for live, values in ((a.sites(kind), scores.values[kind]) for kind in (HEAD, FFN))
    ]
    return oracle_scores.OracleScores(
        *layers, dict(zip(a.ids(STEM, 0).tolist(), scores.of(STEM).tolist(), strict=True))
    )


@given(st.data())
def test_smoothed_scores_follow_their_units_through_removals(data):
    architecture = Architecture.full(data.draw(shapes()))
    random, momentum = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    mine, theirs = None, None
    for group in data.draw(groups(architecture, at_most=5)):
        new = random_scores(architecture, random)
        mine, theirs = smooth(mine, new, momentum), oracle_scores.smooth(theirs, by_id(new), momentum)
        found = by_id(mine)
        assert found.stem == pytest.approx(theirs.stem)
        for layer in range(architecture.shape.num_layers):
            assert found.head[layer] == pytest.approx(theirs.head[layer])
            assert found.ffn[layer] == pytest.approx(theirs.ffn[layer])
        architecture = architecture.without(group)
        kept = mine.restricted(architecture)
        for layer in range(architecture.shape.num_layers):
            assert by_id(kept).head[layer] == {h: found.head[layer][h] for h in architecture.ids(HEAD, layer).tolist()}
        assert by_id(kept).stem == {channel: found.stem[channel] for channel in architecture.ids(STEM, 0).tolist()}


@given(shapes())
def test_scores_come_back_from_a_checkpoint_as_they_were(shape):
    scores = random_scores(Architecture.full(shape), np.random.default_rng(0))
    again = UnitScores.from_state(scores.architecture, scores.to_state())
    for kind, sites in scores.values.items():
        assert all(np.array_equal(*pair) for pair in zip(again.values[kind], sites, strict=True))
        assert all(site.dtype == np.float64 for site in sites)
    assert not scores.not_finite and set(again.values) == {HEAD, FFN, STEM}


def test_block_influence_follows_its_layers_through_removals_and_checkpoints():
    architecture = Architecture.full(LlamaShape(4, 6, 8, 4, 2, 2, 8, 16))
    sums = random_scores(architecture, np.random.default_rng(0))
    first = UnitScores(architecture, {**sums.values, LAYER: (np.array([0.4, 0.1, 0.3, 0.2]),)})
    kept = first.restricted(architecture.without(group_of(architecture, 1)))
    again = UnitScores.from_state(kept.architecture, kept.to_state())
    new = UnitScores(kept.architecture, {**kept.values, LAYER: (np.array([0.6, 0.3, 0.4]),)})
    assert smooth(again, new, 0.5).of(LAYER).tolist() == [0.5, 0.3, pytest.approx(0.3)]
    assert smooth(sums, new, 0.5).of(LAYER).tolist() == new.of(LAYER).tolist(), "asked for since the last scoring"


@given(shapes())
def test_scores_of_a_checkpoint_of_the_first_format(shape):
    """One array per kind: layers x units, for stem channels units."""
    scores = random_scores(Architecture.full(shape), np.random.default_rng(0))
    state = {"head": np.stack(scores.values[HEAD]), "ffn": np.stack(scores.values[FFN]), "stem": scores.of(STEM)}
    again = UnitScores.from_state(scores.architecture, state)
    for kind, sites in scores.values.items():
        assert all(np.array_equal(*pair) for pair in zip(again.values[kind], sites, strict=True))


@pytest.mark.parametrize("kind", ["head", "ffn", "stem"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_any_sum_that_is_not_finite_is_seen(kind, value):
    scores = random_scores(Architecture.full(LlamaShape(2, 6, 8, 4, 2, 2, 8, 16)), np.random.default_rng(0))
    scores.values[find_kind(kind)][-1][-1] = value
    assert scores.not_finite == ("stem" if kind == "stem" else f"{kind} in layer 1",)
