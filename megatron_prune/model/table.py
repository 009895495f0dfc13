"""THE table of parameters: what each is for, what every dimension of it means, how it is packed, and what it is called
in Hugging Face. Which ones a model has is listed by family, in `model.families`.

Saliency, retirement, compaction, optimizer slicing, checkpoints, import, export and estimates all read it; nothing else
knows how qkv or gate/up are packed, and nothing tells parameters apart by their names.

    Dim           kind of unit along one dimension, and elements per unit (a head is `kv_channels` rows)
    Part          one Hugging Face tensor; the parts of a Megatron parameter are stacked along dim 0
    Param         a Megatron parameter: name, layer, role and parts
    ParamTable    the rows for one LlamaShape; counts parameters for any widths
    positions     slots -> element positions along a dim

On each tensor-parallel rank qkv is [q slots | k slots | v slots] x kv_channels rows and gate/up is [gate | up] rows.
(Megatron interleaves q, k, v per group; with clusters of unequal size there is no such grid.) Dims of a kind without a
mesh axis (`stem`, `fixed`) are whole on each rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prune.model.kinds import FIXED, LAYER, Kind, in_order
from megatron_prune.model.shape import LlamaShape

if TYPE_CHECKING:
    from megatron_prune.model.architecture import Architecture, Group
    from megatron_prune.model.layout import GroupSlots, ShardLayout

Runs = tuple[tuple[int, int], ...]  # (first, past-last) of stretches of neighbours
EMPTY = -1  # the id in a slot that holds no unit

# Roles: what a parameter is for, whatever it is called.
EMBEDDING, LM_HEAD, NORM, HEAD_NORM = "embedding", "LM head", "norm", "norm of heads"
QKV, ATTENTION_OUTPUT, FFN_UP, FFN_DOWN = "qkv", "attention output", "gate/up", "FFN down"
QKV_BIAS, BIAS = "bias of qkv", "bias"
OUTPUTS = (ATTENTION_OUTPUT, FFN_DOWN)  # the output layer group, on which saliency is computed
ENTRANCES = {ATTENTION_OUTPUT: QKV, FFN_DOWN: FFN_UP}  # where the block of an output reads the stem
LINEARS = (QKV, ATTENTION_OUTPUT, FFN_UP, FFN_DOWN, LM_HEAD)  # multiplied by inputs that may be watched
TIED_COPY = "output_layer.weight"  # what megatron-core calls an LM head, a tied one's second copy included
HF_LM_HEAD = "lm_head.weight"  # what Hugging Face does


@dataclass(frozen=True)
class Dim:
    """One dimension: `kind` of its units and `size` elements per unit (for `fixed` the whole length, as one unit)."""

    kind: Kind
    size: int = 1

    @property
    def is_sharded(self) -> bool:
        """True when tensor-parallel ranks hold different units of it."""
        return self.kind.axis is not None


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor W[out, in] (or a vector), named with its layer already filled in."""

    hf_name: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Param:
    """A Megatron parameter by its name in the whole model (layers numbered over all pipeline stages).

    Args:
        name: e.g. `decoder.layers.3.self_attention.linear_qkv.weight`.
        layer: 0-based layer, or None for parameters outside the layers.
        role: what it is for, one of the names above.
        parts: stacked along dim 0, in this order.
    """

    name: str
    layer: int | None
    role: str
    parts: tuple[Part, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Of the first part; the others differ at most in dim 0."""
        return self.parts[0].dims

    @property
    def site(self) -> int:
        """The layer whose units its dims count; 0 outside the layers, where all kinds are shared."""
        return self.layer or 0

    def lives_in(self, architecture: Architecture) -> bool:
        """Whether its layer, if it has one, is still there; else the parameter has no live element."""
        return self.layer is None or self.layer in architecture.layers

    @property
    def is_output(self) -> bool:
        """True in the output layer group, on which saliency is computed (attention output, FFN down)."""
        return self.role in OUTPUTS

    @property
    def is_sharded(self) -> bool:
        """True when tensor-parallel ranks hold different elements of it."""
        return any(dim.is_sharded for dim in self.dims)

    def lengths(self, part: Part, layout: ShardLayout, rank: int) -> tuple[int, ...]:
        """Stored local shape of `part` on tensor-parallel `rank`."""
        return tuple(len(layout.slots(dim.kind, self.site, rank)) * dim.size for dim in part.dims)

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
        dims = (part.dims[dim] for part in self._along(dim))
        ids = np.concatenate([expand(layout.slots(d.kind, self.site, rank), d.size) for d in dims])
        return ids if self.lives_in(layout.architecture) else np.full_like(ids, EMPTY)

    def group_runs(self, gone: GroupSlots) -> tuple[Runs, ...]:
        """Per dim of the local parameter, the (first, past-last) element positions of what holds a unit of the group.

        Units that only served units of the group are included.
        """
        found: list[Runs] = []
        for dims in self._stacked:
            runs: list[tuple[int, int]] = []
            if any(dim.kind in gone.kinds for dim in dims):
                start = 0
                for dim in dims:
                    runs += [(start + a * dim.size, start + b * dim.size) for a, b in gone.runs(dim.kind, self.site)]
                    start += gone.width(dim.kind) * dim.size
            found.append(tuple(runs))
        if self.layer in gone.layers and not any(found):  # it has no units of the layer's own, such as a norm
            found[0] = ((0, sum(gone.width(dim.kind) * dim.size for dim in self._stacked[0])),)
        return tuple(found)

    def group_positions(self, group: Group, layout: ShardLayout, rank: int) -> tuple[np.ndarray, ...]:
        """`group_runs` as int64 positions; `layout` is the one before the removal."""
        runs = self.group_runs(layout.group_slots(group, rank))
        return tuple(np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b) for a, b in dim)]) for dim in runs)

    @cached_property
    def _stacked(self) -> tuple[tuple[Dim, ...], ...]:
        """Per dim, those of the parts that follow one another along it."""
        return tuple(tuple(part.dims[dim] for part in self._along(dim)) for dim in range(len(self.dims)))

    def _along(self, dim: int) -> tuple[Part, ...]:
        """The parts that follow one another along `dim`."""
        return self.parts if dim == 0 else self.parts[:1]


@dataclass(frozen=True)
class ParamTable:
    """All parameters of a model of `shape`, in model order (`families.table_of`); `row(name)` finds one."""

    shape: LlamaShape
    rows: tuple[Param, ...]

    def row(self, name: str) -> Param:
        """The row of Megatron parameter `name`; a tied LM head (last pipeline stage) is the embedding's row."""
        if name == TIED_COPY and self.shape.tie_word_embeddings:
            return next(row for row in self.rows if row.role == EMBEDDING)
        return self._index[name]

    @cached_property
    def _index(self) -> dict[str, Param]:
        return {row.name: row for row in self.rows}

    def find(self, role: str, layer: int | None = None) -> Param:
        """The one row of `role` in `layer`."""
        return self._by_role[role, layer]

    @cached_property
    def _by_role(self) -> dict[tuple[str, int | None], Param]:
        return {(row.role, row.layer): row for row in reversed(self.rows)}  # the first of equals

    @cached_property
    def names_in_layers(self) -> frozenset[str]:
        """What parameters of layers are called inside of them, as in `self_attention.linear_proj.weight`."""
        return frozenset(row.name.split(".", 3)[3] for row in self.rows if row.layer is not None)

    @cached_property
    def norms_followers(self) -> bool:
        """Whether units of a kind that follows another (KV heads) are normed together, so that copies would count."""
        return any(row.role == HEAD_NORM and row.dims[0].kind.follows is not None for row in self.rows)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of unit that its dims count, in the order of their registration."""
        return in_order(dim.kind for row in self.rows for part in row.parts for dim in part.dims)

    @cached_property
    def prunable(self) -> tuple[Kind, ...]:
        """Those of `kinds` whose units may leave by themselves, and the layers."""
        return (*(kind for kind in self.kinds if kind.is_prunable), LAYER)

    @cached_property
    def varying(self) -> tuple[Kind, ...]:
        """Those of `kinds` whose number changes: prunable ones and those that follow them, and the layers."""
        return (*(kind for kind in self.kinds if kind.varies), LAYER)

    @cached_property
    def scored(self) -> tuple[Kind, ...]:
        """Those of `prunable` along dims of the output layer group: they have saliencies."""
        seen = {dim.kind for row in self.rows if row.is_output for dim in row.dims}
        return tuple(kind for kind in self.prunable if kind in seen)

    def columns(self, kind: Kind) -> int:
        """Columns of an output projection that one unit of a scored `kind` owns (for rows: 1)."""
        return next((row.dims[1].size for row in self.rows if row.is_output and row.dims[1].kind == kind), 1)

    @cached_property
    def parts(self) -> dict[str, tuple[Part, int]]:
        """Hugging Face name -> (part, site of its row) of each tensor of the source, in model order."""
        return {part.hf_name: (part, row.site) for row in self.rows for part in row.parts}

    def hf_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> live shape of each tensor that is there."""
        return {
            part.hf_name: tuple(architecture.width(dim.kind, row.site) * dim.size for dim in part.dims)
            for row in self.rows
            if row.lives_in(architecture)
            for part in row.parts
        }

    def elements(self, widths: Mapping[Kind, np.ndarray], roles: tuple[str, ...] | None = None) -> Any:
        """Elements of all parameters (or of those of `roles`) at `widths` (see `Architecture.counts`), an int of int64
        ones, a float of shares of widths; a tied LM head is counted once, as the embedding."""
        flat = np.concatenate([np.ones(1, dtype=np.int64), *(widths[kind] for kind in (*self.kinds, LAYER))])
        factors, *places = self._terms if roles is None else self._terms_of(roles)
        return (factors * np.prod([flat[place] for place in places], axis=0)).sum().item()

    def channels(self, widths: Mapping[Kind, np.ndarray], role: str, dim: int, after: int = 0) -> Any:
        """Elements along `dim` of the parameters of `role` (of their parts but for the first `after`), summed over
        layers; `widths` as in `elements`."""
        dims = [(part.dims[dim], row.site) for row in self.rows if row.role == role for part in row.parts[after:]]
        return sum(widths[d.kind][d.kind.site(site)] * d.size * widths[LAYER][site] for d, site in dims)

    @cached_property
    def _terms(self) -> tuple[np.ndarray, ...]:
        return self._terms_of(None)

    def _terms_of(self, roles: tuple[str, ...] | None) -> tuple[np.ndarray, ...]:
        """The count of elements as a polynomial of the widths: int64 (factors, places, places, places) of its terms,
        places in [1 | widths of each kind | layers]."""
        starts, place = {}, 1
        for kind in self.kinds:
            starts[kind] = place
            place += kind.sites(self.shape)
        terms: Counter[tuple[int, int, int]] = Counter()
        for row in self.rows:
            if roles is not None and row.role not in roles:
                continue
            for part in row.parts:
                places = [0 if dim.kind is FIXED else starts[dim.kind] + dim.kind.site(row.site) for dim in part.dims]
                first, second = sorted((*places, 0)[:2])
                terms[first, second, 0 if row.layer is None else place + row.layer] += int(
                    np.prod([dim.size for dim in part.dims])
                )
        table = np.array([(factor, *at) for at, factor in terms.items()], dtype=np.int64).reshape(-1, 4)
        return tuple(table.T)


def holds(slots: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Bool per slot: does it hold one of `units`? Those are few, and one comparison each beats a general search."""
    found = np.zeros(slots.shape, dtype=bool)
    for unit in units:
        found |= slots == unit
    return found


def runs(at: np.ndarray) -> Runs:
    """Stretches of neighbours among ascending numbers: [1, 2, 5] -> (1, 3), (5, 6)."""
    if len(at) <= 1:
        return ((int(at[0]), int(at[0]) + 1),) if len(at) else ()
    first = np.flatnonzero(np.diff(at, prepend=at[0] - 2) != 1)
    return tuple((int(at[a]), int(at[b - 1]) + 1) for a, b in zip(first, [*first[1:], len(at)], strict=True))


def positions(units: np.ndarray, size: int) -> np.ndarray:
    """Element positions (int64) of units of `size` elements: [1, 3], 2 -> [2, 3, 6, 7]."""
    return (units.astype(np.int64)[:, None] * size + np.arange(size)).reshape(-1)


def expand(ids: np.ndarray, size: int) -> np.ndarray:
    """Like `positions`, but empty slots (-1) stay -1 for each of their elements."""
    elements = positions(ids, size)
    elements[np.repeat(ids == EMPTY, size)] = EMPTY
    return elements
