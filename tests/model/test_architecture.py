"""Widths and parameter counts: one truth, whatever has been removed, and back from JSON as it was."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture, Group, from_ranges, to_ranges
from megatron_prune.model.families import table_of
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM
from megatron_prune.model.shape import LlamaShape
from tests.model.random_models import architectures, groups, shapes, the_one

SMOL_360M = LlamaShape(32, 960, 2560, 15, 5, 64, 49152, 2048, tie_word_embeddings=True)
PUBLISHED = {
    361_821_120: SMOL_360M,
    134_515_008: LlamaShape(30, 576, 1536, 9, 3, 64, 49152, 2048, tie_word_embeddings=True),
    1_711_376_384: LlamaShape(24, 2048, 8192, 32, 32, 64, 49152, 2048, tie_word_embeddings=True),
    6_738_415_616: LlamaShape(32, 4096, 11008, 32, 32, 128, 32000, 4096),
}


def tensor_elements(architecture):
    table = table_of(architecture.shape)
    return sum(math.prod(shape) for shape in table.hf_shapes(architecture).values())


@pytest.mark.parametrize("parameters", PUBLISHED)
def test_counts_of_published_models(parameters):
    assert Architecture.full(PUBLISHED[parameters]).parameters == parameters


@given(architectures())
def test_parameters_are_the_elements_of_all_tensors(architecture):
    assert architecture.parameters == tensor_elements(architecture)


@given(architectures())
def test_json_round_trip(architecture):
    text = json.dumps(architecture.to_json())
    again = Architecture.from_json(json.loads(text))
    assert again == architecture and hash(again) == hash(architecture)
    assert again.parameters == architecture.parameters and json.dumps(again.to_json()) == text


@given(st.sets(st.integers(0, 40)))
def test_ranges_round_trip(ids):
    text = to_ranges(np.array(sorted(ids), dtype=np.int32))
    assert from_ranges(text).tolist() == sorted(ids)
    assert not ids or text.count(",") < len(ids)


def test_ranges_read_well():
    assert to_ranges(np.array([0, 1, 2, 5, 7, 8], dtype=np.int32)) == "0-2,5,7-8"


NOUNS = {"head": "num_attention_heads", "ffn": "ffn_hidden_size", "stem": "hidden_size"}


@given(st.data())
def test_removals_cost_what_leaves(data):
    architecture = Architecture.full(data.draw(shapes()))
    for group in data.draw(groups(architecture)):
        after = architecture.without(group)
        assert architecture.cost(group) == tensor_elements(architecture) - tensor_elements(after) > 0
        name, units = the_one(group)
        was = {kind: getattr(architecture, field) for kind, field in NOUNS.items()}
        gone = {kind: getattr(after, field) for kind, field in NOUNS.items()}
        assert {kind: was[kind] - gone[kind] for kind in was} == dict.fromkeys(was, 0) | {name: len(units[0])}
        for layer in range(architecture.shape.num_layers):
            for kind in (HEAD, FFN, STEM):
                left = set(architecture.ids(kind, layer).tolist()) - set(group.units(kind, layer))
                assert after.ids(kind, layer).tolist() == sorted(left)
            served = {head // architecture.shape.heads_per_group for head in after.ids(HEAD, layer).tolist()}
            assert after.ids(KV_HEAD, layer).tolist() == sorted(served)
        architecture = after


@given(st.data())
def test_what_follows_is_the_same_along_the_way_and_afresh(data):
    architecture = data.draw(architectures())
    for group in data.draw(groups(architecture)):
        architecture = architecture.without(group)
        afresh = Architecture(architecture.shape, architecture.live)
        for kind in architecture.table.kinds:  # asked at every step: what was found before a removal is kept
            ids, expected = architecture.sites(kind), afresh.sites(kind)
            assert [one.tolist() for one in ids] == [one.tolist() for one in expected], kind


def test_a_kv_head_leaves_with_its_last_query_head_only():
    shape = dataclasses.replace(SMOL_360M, num_layers=1)
    one = Architecture.full(shape)
    q_and_o, k_and_v = 2 * 64 * 960, 2 * 64 * 960
    assert one.cost(Group.of("head", ((3,),))) == q_and_o
    for head in (3, 4):
        one = one.without(Group.of("head", ((head,),)))
    assert one.ids(KV_HEAD, 0).tolist() == [0, 1, 2, 3, 4]
    assert one.cost(Group.of("head", ((5,),))) == q_and_o + k_and_v
    assert one.without(Group.of("head", ((5,),))).ids(KV_HEAD, 0).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize(
    "group", [Group.of("head", ((0,), (0,))), Group.of("ffn", ((1,), (1,))), Group.of("stem", ((2,),))]
)
def test_what_is_gone_cannot_be_removed_again(group):
    architecture = Architecture.full(LlamaShape(2, 4, 4, 4, 2, 2, 8, 8)).without(group)
    with pytest.raises(AssertionError, match="not all of them are alive"):
        architecture.without(group)


def broken(data, path, value):
    copy = json.loads(json.dumps(data))
    *way, last = path
    place = copy
    for step in way:
        place = place[step]
    place[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("parameters",), 7),
        (("live", "stem"), "0-1"),
        (("live", "stem"), "0-x"),
        (("live", "stem"), "0-2,4"),
        (("live", "ffn", 1), "1-4"),
        (("live", "head"), ["", ""]),
        (("live", "head", 0), "0-2"),
        (("live", "ffn"), ["0-3"]),
        (("shape", "num_query_groups"), 3),
        (("shape",), {}),
        (("shape", "colour"), "red"),
        (("live", "head", 0), "0,0-2"),
    ],
)
def test_a_damaged_file_is_refused_by_name(path, value):
    good = Architecture.full(LlamaShape(2, 4, 4, 4, 2, 2, 8, 8)).to_json()
    with pytest.raises(UserError, match=r"architecture\.json"):
        Architecture.from_json(broken(good, path, value))
