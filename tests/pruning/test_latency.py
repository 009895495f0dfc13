"""Time as a budget: what a table says between its points, and which tables are refused."""

import dataclasses
import json

import numpy as np
import pytest

from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import FFN
from megatron_prune.pruning.budget import LATENCY, Limit
from megatron_prune.pruning.groups import Rules, known_groups
from megatron_prune.pruning.latency import LatencyTable, Point, around, features
from megatron_prune.pruning.selector import choose
from megatron_prune.saliency.scores import UnitScores, score_length
from megatron_prune.testing.helpers.tiny_models import tiny_config

SHAPE = shape_from_config(tiny_config(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4))
SOURCE = Architecture.full(SHAPE)
TRUE = np.array([0.5, 0.2, 0.0, 1e-5, 2e-5, 1e-5, 1e-3])  # milliseconds for one of each feature


def of(shape):
    architecture = Architecture.full(shape)
    return float(features(architecture.table, architecture.counts) @ TRUE)


def table(noise=0.0):
    random = np.random.default_rng(0)
    points = (Point(shape, of(shape) * (1 + noise * random.normal())) for shape in around(SHAPE, (0.75, 0.5)))
    return LatencyTable("decode", tuple(points))


def test_times_between_the_points_are_those_of_the_law_behind_them(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(table().to_json()))
    found = LatencyTable.read(tmp_path / "table.json")
    assert len(found.points) == 11 and found.worst < 1e-6
    between = dataclasses.replace(SHAPE, num_layers=5, ffn_hidden_size=41, num_attention_heads=6, num_query_groups=3)
    architecture = Architecture.full(between)
    assert found.measure(architecture.table, architecture.counts) == pytest.approx(of(between), rel=1e-3)


def test_with_noise_no_removal_is_predicted_to_cost_time():
    measured, rules = table(noise=0.05), Rules(1, types=("head", "ffn", "stem", "layer"))
    assert (measured.weights >= 0).all() and measured.worst < 0.2
    limit = Limit(LATENCY, 1.0, measured.measure)
    for group in known_groups():
        assert limit.of(group.shrunk(SOURCE, 1, rules)) <= limit.of(SOURCE)
    assert limit.of(known_groups()[-1].shrunk(SOURCE, 4, rules)) < 0.8 * limit.of(SOURCE), "half of the layers"


def test_by_time_a_layer_goes_where_by_parameters_a_channel_would():
    """One FFN channel of every layer is worth next to nothing, but layers are what costs time here."""
    kinds, scores = ("ffn", "layer"), UnitScores.from_vector(SOURCE, np.ones(score_length(SOURCE)))
    channels = tuple(np.append(0.01, site[1:]) for site in scores.values[FFN])
    scores = UnitScores(SOURCE, {**scores.values, FFN: channels})
    by_size = choose(scores, SOURCE, Rules(1000, types=kinds))
    milliseconds = Limit(LATENCY, 0.5 * of(SHAPE), lambda table, counts: 0.2 * counts[known_groups()[-1].kind].sum())
    by_time = choose(scores, SOURCE, Rules(None, types=kinds, limits=(milliseconds,)))
    assert by_size is not None and by_size.group.name == "ffn"
    assert by_time is not None and by_time.group.name == "layer"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "no table"),
        ('{"what": "x", "points": []}', "no table"),
        ('{"what": "x", "points": [{"shape": {}, "milliseconds": 1}]}', "no table"),
        (json.dumps(table(noise=3.0).to_json()).replace("-", ""), "off what widths explain"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path, content, complaint):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        LatencyTable.read(tmp_path / "table.json")
    assert "\n" not in str(caught.value) and "latency_table" in str(caught.value)
