"""THE table: what every dimension of every parameter means, how it is packed, and what it is called in Hugging Face.

Saliency, retirement, compaction, optimizer slicing, checkpoints, import and export all read it; nothing else knows how
qkv or gate/up are packed.

    Dim         kind of unit along one dimension, and elements per unit (a head is `kv_channels` rows)
    Part        one Hugging Face tensor; the parts of a Megatron parameter are stacked along dim 0
    ParamAxes   a Megatron parameter: its name in the model and its parts
    ParamTable  the rows for one LlamaShape
    positions   slots -> element positions along a dim

On each tensor-parallel rank qkv is [q slots | k slots | v slots] x kv_channels rows and gate/up is [gate | up] rows.
(Megatron interleaves q, k, v per group; with clusters of unequal size there is no such grid.) Kinds other than `stem`
and `fixed` are split over tensor-parallel ranks; `stem` and `fixed` dims are whole on each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_prune.model.architecture import FFN, FIXED, HEAD, KV_HEAD, STEM, VOCAB, Architecture, Group, LlamaShape
from megatron_prune.model.layout import EMPTY, ShardLayout, holds

TP_SHARDED = frozenset({HEAD, KV_HEAD, FFN, VOCAB})


@dataclass(frozen=True)
class Dim:
    """One dimension: `kind` of its units and `size` elements per unit (for `fixed` the whole length, as one unit)."""

    kind: str
    size: int = 1

    @property
    def is_sharded(self) -> bool:
        """True when tensor-parallel ranks hold different units of it."""
        return self.kind in TP_SHARDED


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor W[out, in] (or a vector), named with its layer already filled in."""

    hf_name: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class ParamAxes:
    """A Megatron parameter by its name in the whole model (layers numbered over all pipeline stages).

    Args:
        name: e.g. `decoder.layers.3.self_attention.linear_qkv.weight`.
        layer: 0-based layer, or 0 for parameters outside the layers (their dims do not depend on it).
        parts: stacked along dim 0, in this order.
        is_output: True for the output layer group, on which saliency is computed (attention output, FFN down).
    """

    name: str
    layer: int
    parts: tuple[Part, ...]
    is_output: bool = False

    @property
    def is_sharded(self) -> bool:
        """True when tensor-parallel ranks hold different elements of it."""
        return any(dim.is_sharded for dim in self.parts[0].dims)

    def lengths(self, part: Part, layout: ShardLayout, rank: int) -> tuple[int, ...]:
        """Stored local shape of `part` on tensor-parallel `rank`."""
        return tuple(len(slot_ids(dim, layout, self.layer, rank)) * dim.size for dim in part.dims)

    def local_shape(self, layout: ShardLayout, rank: int = 0) -> tuple[int, ...]:
        """Stored local shape of the whole parameter on tensor-parallel `rank`."""
        shapes = [self.lengths(part, layout, rank) for part in self.parts]
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def part_rows(self, layout: ShardLayout, rank: int) -> Iterator[tuple[Part, int, int]]:
        """(part, first row, past-last row) of each part inside the local parameter."""
        start = 0
        for part in self.parts:
            length = self.lengths(part, layout, rank)[0]
            yield part, start, start + length
            start += length

    def element_ids(self, dim: int, layout: ShardLayout, rank: int) -> np.ndarray:
        """Per element along `dim` of the local parameter: its position in the SOURCE tensor of its part, or -1."""
        parts = self.parts if dim == 0 else self.parts[:1]
        return np.concatenate(
            [expand(slot_ids(part.dims[dim], layout, self.layer, rank), part.dims[dim].size) for part in parts]
        )

    def group_positions(self, group: Group, layout: ShardLayout, rank: int) -> tuple[np.ndarray, ...]:
        """Per dim of the local parameter, the element positions that hold a unit of `group`.

        `layout` is the one before the removal. KV heads whose last live query head is in the group are included.
        """
        found: list[np.ndarray] = []
        if not any(dim.kind == group.kind for part in self.parts for dim in part.dims):
            return tuple(np.zeros(0, dtype=np.int64) for _ in self.parts[0].dims)
        gone = {group.kind: np.array(group.of_layer(self.layer), dtype=np.int32)}
        if group.kind == HEAD:
            before = layout.architecture
            left = np.setdiff1d(before.heads[self.layer], gone[HEAD])
            gone[KV_HEAD] = np.setdiff1d(before.kv_heads(self.layer), left // before.shape.heads_per_group)
        for dim in range(len(self.parts[0].dims)):
            hits = [np.zeros(0, dtype=np.int64)]
            start = 0
            for part in self.parts if dim == 0 else self.parts[:1]:
                spec = part.dims[dim]
                slots = slot_ids(spec, layout, self.layer, rank)
                if spec.kind in gone:
                    hits.append(start + positions(np.flatnonzero(holds(slots, gone[spec.kind])), spec.size))
                start += len(slots) * spec.size
            found.append(np.concatenate(hits))
        return tuple(found)


@dataclass(frozen=True)
class ParamTable:
    """All parameters of a model of `shape`, in model order; `row(name)` finds one."""

    shape: LlamaShape
    rows: tuple[ParamAxes, ...]

    @classmethod
    def build(cls, shape: LlamaShape) -> ParamTable:
        """The table for `shape`."""
        rows = [_single("embedding.word_embeddings.weight", 0, "model.embed_tokens.weight", Dim(VOCAB), Dim(STEM))]
        for layer in range(shape.num_layers):
            rows.extend(_layer_rows(shape, layer))
        rows.append(_single("decoder.final_layernorm.weight", 0, "model.norm.weight", Dim(STEM)))
        if not shape.tie_word_embeddings:
            rows.append(_single("output_layer.weight", 0, "lm_head.weight", Dim(VOCAB), Dim(STEM)))
        return cls(shape, tuple(rows))

    def row(self, name: str) -> ParamAxes:
        """The row of Megatron parameter `name`; a tied LM head (last pipeline stage) is the embedding's row."""
        index = {row.name: row for row in self.rows}
        if name == "output_layer.weight" and self.shape.tie_word_embeddings:
            name = "embedding.word_embeddings.weight"
        return index[name]

    def hf_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> live shape of each tensor."""
        return {
            part.hf_name: tuple(_live_count(dim, architecture, row.layer) * dim.size for dim in part.dims)
            for row in self.rows
            for part in row.parts
        }


def _single(name: str, layer: int, hf_name: str, *dims: Dim, is_output: bool = False) -> ParamAxes:
    return ParamAxes(name, layer, (Part(hf_name, dims),), is_output)


def _layer_rows(shape: LlamaShape, layer: int) -> Iterator[ParamAxes]:
    ours, theirs, d = f"decoder.layers.{layer}.", f"model.layers.{layer}.", shape.kv_channels
    stem, head, kv, ffn = Dim(STEM), Dim(HEAD, d), Dim(KV_HEAD, d), Dim(FFN)
    qkv = (("q_proj", head), ("k_proj", kv), ("v_proj", kv))
    yield _single(f"{ours}input_layernorm.weight", layer, f"{theirs}input_layernorm.weight", stem)
    parts = tuple(Part(f"{theirs}self_attn.{name}.weight", (out, stem)) for name, out in qkv)
    yield ParamAxes(f"{ours}self_attention.linear_qkv.weight", layer, parts)
    if shape.add_qkv_bias:
        parts = tuple(Part(f"{theirs}self_attn.{name}.bias", (out,)) for name, out in qkv)
        yield ParamAxes(f"{ours}self_attention.linear_qkv.bias", layer, parts)
    if shape.qk_layernorm:
        for name in ("q", "k"):
            yield _single(
                f"{ours}self_attention.{name}_layernorm.weight",
                layer,
                f"{theirs}self_attn.{name}_norm.weight",
                Dim(FIXED, d),
            )
    yield _single(
        f"{ours}self_attention.linear_proj.weight",
        layer,
        f"{theirs}self_attn.o_proj.weight",
        stem,
        head,
        is_output=True,
    )
    yield _single(f"{ours}pre_mlp_layernorm.weight", layer, f"{theirs}post_attention_layernorm.weight", stem)
    parts = tuple(Part(f"{theirs}mlp.{name}_proj.weight", (ffn, stem)) for name in ("gate", "up"))
    yield ParamAxes(f"{ours}mlp.linear_fc1.weight", layer, parts)
    yield _single(f"{ours}mlp.linear_fc2.weight", layer, f"{theirs}mlp.down_proj.weight", stem, ffn, is_output=True)


def slot_ids(dim: Dim, layout: ShardLayout, layer: int, rank: int) -> np.ndarray:
    """int32 unit ids along `dim` as stored on `rank`, -1 where empty; a `fixed` dim is one unit with id 0."""
    if dim.kind == FIXED:
        return np.zeros(1, dtype=np.int32)
    return layout.slots(dim.kind, layer, rank)


def live_ids(dim: Dim, architecture: Architecture, layer: int) -> np.ndarray:
    """int32 live unit ids along `dim`, ascending; a `fixed` dim is one unit with id 0."""
    if dim.kind == FIXED:
        return np.zeros(1, dtype=np.int32)
    return architecture.live(dim.kind, layer)


def _live_count(dim: Dim, architecture: Architecture, layer: int) -> int:
    return len(live_ids(dim, architecture, layer))


def positions(units: np.ndarray, size: int) -> np.ndarray:
    """Element positions (int64) of units of `size` elements: [1, 3], 2 -> [2, 3, 6, 7]."""
    return (units.astype(np.int64)[:, None] * size + np.arange(size)).reshape(-1)


def expand(ids: np.ndarray, size: int) -> np.ndarray:
    """Like `positions`, but empty slots (-1) stay -1 for each of their elements."""
    elements = positions(ids, size)
    elements[np.repeat(ids == EMPTY, size)] = EMPTY
    return elements
