"""Pieces cover each live element of the canonical tensors exactly once, whatever layout and flat ranges cut them."""

import dataclasses
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.checkpoint.pieces import pieces, spread
from megatron_prune.checkpoint.streams import Scratch, on_host
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.families import table_of
from megatron_prune.model.kinds import find_kind
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import take
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import positions
from megatron_prune.testing.helpers.sharded import rounded


def pruned_layout(data, tp):
    """A layout with some groups retired since it was packed, and maybe a compaction between."""
    heads, groups = data.draw(st.sampled_from([(4, 4), (6, 3), (8, 2), (5, 1)]))
    bias = data.draw(st.booleans())
    shape = LlamaShape(
        2, 6, 7, heads, groups, 2, 11, 16, tie_word_embeddings=bias, add_qkv_bias=bias, qk_layernorm=bias
    )
    quanta = rounded(ffn=data.draw(st.integers(1, 3)), stem=data.draw(st.integers(1, 4)), vocab=4)
    layout = ShardLayout.pack(Architecture.full(shape), tp, quanta)
    for _ in range(data.draw(st.integers(0, 6))):
        kind = data.draw(st.sampled_from(["head", "ffn", "stem", "compact"]))
        if kind == "compact":
            layout = layout.compacted()
            continue
        layers = 1 if kind == "stem" else shape.num_layers
        live = [layout.architecture.ids(find_kind(kind), layer) for layer in range(layers)]
        if len(live[0]) > 1:
            units = tuple((int(ids[data.draw(st.integers(0, len(ids) - 1))]),) for ids in live)
            layout = layout.without(Group.of(kind, units))
    return layout


def canonical_and_local(row, layout):
    """Random source tensors by name, their live part, and each rank's local parameter filled from them."""
    source = {}
    for part in row.parts:
        size = [Architecture.full(layout.architecture.shape).width(dim.kind, row.site) * dim.size for dim in part.dims]
        source[part.hf_name] = torch.randn(size)
    canonical = {
        part.hf_name: take(
            source[part.hf_name],
            [positions(layout.architecture.ids(dim.kind, row.site), dim.size) for dim in part.dims],
        )
        for part in row.parts
    }
    local = []
    for rank in range(layout.tp):
        filled = torch.full(row.local_shape(layout, rank), float("nan"))
        for part, start, end in row.part_rows(layout, rank):
            single = dataclasses.replace(row, parts=(part,))
            ids = [single.element_ids(dim, layout, rank) for dim in range(len(part.dims))]
            filled[start:end] = take(source[part.hf_name], ids)
        local.append(filled)
    return canonical, local


@given(st.data())
def test_any_ranges_of_any_layout_tile_the_canonical_tensors(data):
    layout = pruned_layout(data, tp=data.draw(st.integers(1, 3)))
    table = table_of(layout.architecture.shape)
    for row in table.rows:
        canonical, local = canonical_and_local(row, layout)
        times = {name: torch.zeros(tensor.shape) for name, tensor in canonical.items()}
        for rank in range(layout.tp if row.is_sharded else 1):
            flat = local[rank].reshape(-1)
            cuts = sorted({0, flat.numel(), *data.draw(st.lists(st.integers(0, flat.numel()), max_size=3))})
            for start, end in pairwise(cuts):
                owned, copy = flat[start:end].clone(), torch.zeros(end - start)
                for piece in pieces(row, layout, rank, start, end):
                    assert piece.global_shape == tuple(canonical[piece.hf_name].shape)
                    place = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape))
                    values = piece.read(owned, Scratch())
                    assert torch.equal(values, canonical[piece.hf_name][place])
                    times[piece.hf_name][place] += 1
                    view = piece.view(owned)
                    assert view is None or torch.equal(view, values)
                    piece.write(copy, values)
                # What was written back is the range as it was: live elements in their slots, zeros in the empty ones.
                assert torch.equal(copy, owned)
        assert all(bool((count == 1).all()) for count in times.values())


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_spread_is_balanced_and_complete(ranks):
    sizes = np.random.default_rng(0).integers(1, 100, 40).tolist()
    chosen = spread(sizes, ranks)
    loads = [sum(size for size, rank in zip(sizes, chosen) if rank == r) for r in range(ranks)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_values_on_the_host_are_the_values_in_a_storage_of_their_size(dtype):
    scratch, buffer = Scratch(), torch.arange(60_000).remainder(97).to(dtype)
    whole, columns = buffer[12:60].view(6, 8), buffer.view(600, 100)[:6, 2:9]
    for _ in range(3):  # fresh memory, and memory that is used again
        for tensor in (whole, columns):
            found = on_host(tensor, scratch)
            assert torch.equal(found, tensor) and found.dtype == dtype and found.is_contiguous()
            assert found.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize
            torch.save(found, file := io.BytesIO())
            assert file.tell() - tensor.numel() * dtype.itemsize < 2000, "more than the values is stored"
        scratch.reset()
    assert on_host(whole, scratch).data_ptr() == whole.data_ptr(), "copied without need"
    buffer.untyped_storage().resize_(0)  # as a compaction does with a parameter buffer
