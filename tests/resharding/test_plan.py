"""Plans of a compaction, carried out in plain numpy on all ranks: each live element ends up where the layout says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.families import table_of
from megatron_prune.model.kinds import FFN, HEAD
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.resharding.plan import plan_transfer
from megatron_prune.testing.helpers.sharded import rounded
from tests.model.random_models import layouts


def local_values(row, layout, rank):
    """The local parameter when every live element holds a number of its own (from 1), and every empty slot 0."""
    values = np.zeros(row.local_shape(layout, rank), dtype=np.int64)
    columns = row.element_ids(1, layout, rank) if values.ndim == 2 else np.zeros(1, dtype=np.int64)
    table = values.reshape(len(values), -1)
    for number, (_, start, end) in enumerate(row.part_rows(layout, rank)):
        rows = row.element_ids(0, layout, rank)[start:end]
        codes = 1 + columns[None, :] + 1000 * (rows[:, None] + 1000 * number)
        table[start:end] = np.where((rows[:, None] >= 0) & (columns[None, :] >= 0), codes, 0)
    return values


def put(target, source, dim, to, taken):
    np.moveaxis(target, dim, 0)[to] = np.moveaxis(source, dim, 0)[taken]


def carry_out(plans, tensors):
    """What all ranks hold after the transfer; `tensors` are theirs before."""
    kept = []
    for plan, tensor in zip(plans, tensors, strict=True):
        for dim, (old, new) in enumerate(plan.local):
            if dim != plan.sharded_dim:
                shape = list(tensor.shape)
                shape[dim] = plan.new_shape[dim]
                picked = np.zeros(shape, dtype=tensor.dtype)
                put(picked, tensor, dim, new, old)
                tensor = picked
        kept.append(tensor)
    results = []
    for rank, plan in enumerate(plans):
        dim = plan.sharded_dim
        if dim is None:
            results.append(kept[rank])
            continue
        result = np.zeros(plan.new_shape, dtype=kept[rank].dtype)
        old, new = plan.local[dim]
        put(result, kept[rank], dim, new, old)
        for other, places in plan.recvs.items():
            put(result, kept[other], dim, places, plans[other].sends[rank])
        results.append(result)
    return results


@given(layouts())
def test_a_compaction_moves_every_live_element_to_its_new_slot(old):
    new, ranks = old.compacted(), range(old.tp)
    for row in table_of(old.architecture.shape).rows:
        plans = [plan_transfer(row, old, new, rank) for rank in ranks]
        for rank, plan in enumerate(plans):
            assert rank not in plan.sends and rank not in plan.recvs
            assert plan.old_shape == row.local_shape(old, rank) and plan.new_shape == row.local_shape(new, rank)
            for other in ranks:
                assert len(plan.sends.get(other, ())) == len(plans[other].recvs.get(rank, ())), "sends match receives"
        before = [local_values(row, old, rank) for rank in ranks]
        moved = carry_out(plans, before)
        for rank, plan in enumerate(plans):
            assert np.array_equal(moved[rank], local_values(row, new, rank)), (row.name, rank)
            assert not plan.is_identity or np.array_equal(moved[rank], before[rank])


@given(layouts(), st.booleans())
def test_the_plan_of_a_layout_to_itself_is_empty(layout, compact):
    layout = layout.compacted() if compact else layout
    for row in table_of(layout.architecture.shape).rows:
        for rank in range(layout.tp):
            plan = plan_transfer(row, layout, layout, rank)
            assert plan.is_identity and not plan.sends and not plan.recvs, row.name


SHAPE = LlamaShape(1, 8, 12, 6, 6, 2, 8, 16)


def test_units_at_range_borders_travel_and_others_stay():
    """FFN 12 on TP 3: four units leave rank 0, so each border shifts and a few units move to the rank before."""
    layout = ShardLayout.pack(Architecture.full(SHAPE), 3, rounded(vocab=1))
    for unit in range(3):
        layout = layout.without(Group.of(FFN, ((unit,),)))
    row = table_of(SHAPE).row("decoder.layers.0.mlp.linear_fc2.weight")
    plans = [plan_transfer(row, layout, layout.compacted(), rank) for rank in range(3)]
    assert [{to: at.tolist() for to, at in plan.sends.items()} for plan in plans] == [{}, {0: [0, 1]}, {1: [0]}]
    assert [{of: at.tolist() for of, at in plan.recvs.items()} for plan in plans] == [{1: [1, 2]}, {2: [2]}, {}]


def test_heads_travel_as_whole_blocks_of_query_key_and_value():
    layout = ShardLayout.pack(Architecture.full(SHAPE), 2, rounded(vocab=1)).without(Group.of(HEAD, ((0,),)))
    layout = layout.without(Group.of(HEAD, ((1,),)))
    row = table_of(SHAPE).row("decoder.layers.0.self_attention.linear_qkv.weight")
    sends = [plan_transfer(row, layout, layout.compacted(), rank).sends for rank in range(2)]
    assert not sends[0]
    assert sends[1][0].tolist() == [0, 1, 6, 7, 12, 13], "head 3's two rows of q, of k and of v, three heads apart"
