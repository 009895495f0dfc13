"""Layouts: every live unit in exactly one slot, contiguous after a compaction, no more padding than the rounding."""

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM, VOCAB
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import EMPTY
from megatron_prune.testing.helpers.sharded import rounded
from tests.model.random_models import architectures, groups, layouts, quanta, shapes

KINDS = (HEAD, KV_HEAD, FFN, STEM, VOCAB)


def shape(heads=4, kv_heads=4, ffn=8, layers=1, hidden=8):
    return LlamaShape(layers, hidden, ffn, heads, kv_heads, 2, 8, 16)


def packed(tp, quanta=None, **sizes):
    return ShardLayout.pack(Architecture.full(shape(**sizes)), tp, quanta or rounded(vocab=1))


def repacked(layout):
    return ShardLayout.pack(layout.architecture, layout.tp, layout.quanta)


def per_rank(layout, kind, layer):
    ranks = range(kind.ranks(layout.tp))
    return [layout.slots(kind, layer, rank) for rank in ranks]


def live(slots):
    return slots[slots != EMPTY].tolist()


def assert_sound(layout):
    """Every live unit in one slot, in canonical order over ranks; each query head beside the KV head it reads."""
    architecture = layout.architecture
    for layer in range(architecture.shape.num_layers):
        for kind in KINDS:
            stored = per_rank(layout, kind, layer)
            assert [unit for slots in stored for unit in live(slots)] == architecture.ids(kind, layer).tolist(), kind
            assert all(len(slots) == layout.width(kind) and slots.dtype == np.int32 for slots in stored)
        for rank in range(layout.tp):
            heads, kv_heads = layout.slots(HEAD, layer, rank), layout.slots(KV_HEAD, layer, rank)
            index = layout.serving(KV_HEAD, layer, rank)
            assert index.min() >= 0 and index.max() < len(kv_heads)
            served = kv_heads[index][heads != EMPTY]
            assert served.tolist() == (heads[heads != EMPTY] // architecture.shape.heads_per_group).tolist()
            assert sorted(set(served.tolist())) == live(kv_heads)


@given(layouts())
def test_every_live_unit_has_one_slot_through_any_removals(layout):
    assert_sound(layout)
    assert_sound(layout.compacted())


@given(layouts())
def test_packed_ranges_are_contiguous_and_padded_at_the_end_only(layout):
    compact, architecture = repacked(layout), layout.architecture
    for layer in range(architecture.shape.num_layers):
        for kind in KINDS:
            filled = [len(live(slots)) for slots in per_rank(compact, kind, layer)]
            assert all(EMPTY not in s[:n] for s, n in zip(per_rank(compact, kind, layer), filled, strict=True))
            if kind == FFN:
                assert max(filled) - min(filled) <= 1, "balanced"


@given(layouts())
def test_padding_is_never_more_than_the_rounding(layout):
    compact, architecture, tp = layout.compacted(), layout.architecture, layout.tp
    for kind in (FFN, STEM, VOCAB):
        assert compact.width(kind) % layout.quantum(kind) == 0
        ranks = kind.ranks(tp)
        assert 0 <= compact.width(kind) * ranks - architecture.width(kind) < ranks * layout.quantum(kind)
    largest, clusters = 0, set()
    for heads in architecture.sites(HEAD):
        sizes = np.unique(heads // architecture.shape.heads_per_group, return_counts=True)[1]
        largest, clusters = max(largest, int(sizes.max())), clusters | set(sizes.tolist())
    rounded_to = int(np.lcm(layout.quantum(HEAD), largest)) if len(clusters) == 1 else layout.quantum(HEAD)
    needed = -(-architecture.num_attention_heads // tp) + largest - 1  # whole clusters: at worst one short of another
    assert compact.width(HEAD) % layout.quantum(HEAD) == 0
    assert compact.width(HEAD) < needed + rounded_to


def least_widths(architecture, tp):
    """Stored (query, KV) widths by trying every way to cut each layer's clusters into contiguous ranges."""
    layers = []
    for heads in architecture.sites(HEAD):
        sizes = np.unique(heads // architecture.shape.heads_per_group, return_counts=True)[1].tolist()
        cuts = combinations(sorted([*range(len(sizes) + 1)] * (tp - 1)), tp - 1)
        bounds = {(0, *cut, len(sizes)) for cut in cuts}
        layers.append({(max(sum(sizes[a:b]) for a, b in pairwise(c)), max(np.diff(c))) for c in bounds})
    query = max(min(q for q, _ in options) for options in layers)
    return query, int(max(min(k for q, k in options if q <= query) for options in layers))


@given(architectures(), st.integers(1, 3))
def test_head_widths_are_the_least_possible(architecture, tp):
    layout = ShardLayout.pack(architecture, tp, {})
    assert (layout.width(HEAD), layout.width(KV_HEAD)) == least_widths(architecture, tp)


@given(layouts())
def test_a_compaction_packs_what_gets_narrower_and_moves_nothing_else(layout):
    compact, fresh = layout.compacted(), repacked(layout)
    assert compact.compacted().fingerprint() == compact.fingerprint() and not compact.is_due
    for kinds in ((HEAD, KV_HEAD), (FFN,), (STEM,), (VOCAB,)):
        source = fresh if any(fresh.width(kind) < layout.width(kind) for kind in kinds) else layout
        assert all(np.array_equal(compact.placed[kind], source.placed[kind]) for kind in kinds)


@given(layouts())
def test_compaction_is_due_when_some_width_shrinks(layout):
    compact = layout.compacted()
    assert layout.is_due == any(compact.width(kind) < layout.width(kind) for kind in KINDS)
    assert all(compact.width(kind) <= layout.width(kind) for kind in (FFN, STEM, VOCAB))


@given(st.data())
def test_compacting_often_or_seldom_ends_at_the_same_widths(data):
    architecture = Architecture.full(data.draw(shapes()))
    often = seldom = ShardLayout.pack(architecture, data.draw(st.integers(1, 4)), data.draw(quanta()))
    for group in data.draw(groups(architecture)):
        often, seldom = often.without(group).compacted(), seldom.without(group)
        assert often.architecture == seldom.architecture
    assert_sound(often)
    assert all(often.width(kind) == seldom.compacted().width(kind) for kind in (FFN, STEM, VOCAB))


@given(layouts())
def test_a_slot_map_comes_back_from_a_checkpoint_as_it_was(layout):
    state = json.loads(json.dumps(layout.to_state()))
    assert ShardLayout.from_state(layout.architecture, state).fingerprint() == layout.fingerprint()


@given(layouts())
def test_a_removal_empties_the_slots_of_its_group_only(layout):
    architecture = layout.architecture
    if architecture.ffn_hidden_size == 1:
        return
    gone = tuple(int(ids[-1]) for ids in architecture.sites(FFN))
    after = layout.without(Group.of(FFN, tuple((unit,) for unit in gone)))
    for layer, unit in enumerate(gone):
        before = layout.placed[FFN][layer]
        assert np.array_equal(after.placed[FFN][layer], np.where(before == unit, EMPTY, before))
    assert all(after.placed[kind] is layout.placed[kind] for kind in KINDS if kind != FFN)
    assert after.empty_slots(FFN) == layout.empty_slots(FFN) + len(gone)
    assert after.fingerprint() != layout.fingerprint()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "stored"),
    [
        (15, 5, 2, (9, 3)),  # SmolLM-360M: 5 clusters of 3 on 2 ranks
        (15, 5, 4, (6, 2)),
        (9, 3, 2, (6, 2)),  # SmolLM-135M
        (9, 9, 2, (5, 5)),
        (8, 1, 2, (8, 1)),  # multi-query: all heads on the rank that has the KV head
        (32, 8, 4, (8, 2)),
    ],
)
def test_any_head_count_on_any_tp(heads, kv_heads, tp, stored):
    layout = packed(tp, heads=heads, kv_heads=kv_heads, layers=2)
    assert (layout.width(HEAD), layout.width(KV_HEAD)) == stored
    assert_sound(layout)


def test_multi_query_attention_leaves_the_second_rank_without_heads():
    layout = packed(2, heads=8, kv_heads=1)
    assert live(layout.slots(HEAD, 0, 0)) == list(range(8)) and live(layout.slots(KV_HEAD, 0, 0)) == [0]
    assert live(layout.slots(HEAD, 0, 1)) == live(layout.slots(KV_HEAD, 0, 1)) == []


def test_ffn_that_tp_does_not_divide():
    layout = packed(4, rounded(ffn=1), ffn=2731)
    assert layout.width(FFN) == 683
    assert [len(live(layout.slots(FFN, 0, rank))) for rank in range(4)] == [683, 683, 683, 682]
    assert packed(4, rounded(ffn=64), ffn=2731).width(FFN) == 704


def test_widths_are_stored_in_64s_where_a_rank_holds_many_units():
    assert packed(1, hidden=576, ffn=1536).to_state()["quanta"] == {"head": 1, "ffn": 64, "stem": 64, "vocab": 1}
    assert packed(4, hidden=576, ffn=1536).quantum(FFN) == 1, "384 on each rank"
    wide = packed(2, hidden=576, ffn=1536)
    for unit in range(127):
        wide = wide.without(Group.of(FFN, ((unit,),)))
        assert not wide.is_due
    assert wide.without(Group.of(FFN, ((127,),))).compacted().width(FFN) == 704
    assert packed(1, rounded(ffn=1), ffn=1536).quantum(FFN) == 1


def test_a_quantum_postpones_compactions():
    layout, due = packed(2, rounded(ffn=4, vocab=1), ffn=16), []
    for unit in range(9):
        layout = layout.without(Group.of(FFN, ((unit,),)))
        due.append(layout.is_due)
    assert due == [False] * 7 + [True] * 2, "8 slots per rank shrink by 4 when 8 of the 16 units are gone"


def test_a_cluster_that_shrinks_keeps_its_kv_head_beside_it():
    """15 heads over 5 KV on TP 2, one query after the other: widths fall as soon as whole clusters pack tighter."""
    layout, widths = packed(2, heads=15, kv_heads=5), []
    for head in (0, 1, 3):
        layout = layout.without(Group.of(HEAD, ((head,),))).compacted()
        assert_sound(layout)
        widths.append((layout.width(HEAD), layout.width(KV_HEAD)))
    assert widths == [(8, 3), (7, 3), (6, 3)]
