"""Placement: which slot of which tensor-parallel rank holds which live unit.

A *slot* is a position along a prunable dimension of a stored weight shard. It is live (holds the unit with that
original id) or empty (-1; all coupled weights are zero). Stored widths are equal on all ranks and layers, so that
megatron-core's regular layers keep working:

    StoredWidths  what comes of it on one rank
    stage_layers  which pipeline stage has which layers
    ShardLayout   int32 id arrays per kind; `pack` (pure function of live ids, TP and quanta), `without`, `is_due`
    GroupSlots    which slots hold the units of a group

After `pack` each rank holds a contiguous range of a layer's live units in original-id order. A kind that another one
follows is packed in whole clusters (a KV head with its live query heads), so that a KV head always stays with its
queries: no replicated KV weights, hence no summed gradients and no double ownership, at the price of empty slots where
there are fewer KV heads than ranks (multi-query attention on TP 2 keeps all heads on one rank). Stored query and KV
widths are separate maxima. Units that never leave (the vocabulary) sit at their own number, as megatron-core expects.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.model import first_format
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FIXED, LAYER, Kind, find_kind
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import ATTENTION_OUTPUT, EMBEDDING, EMPTY, FFN_DOWN, QKV, Runs, holds, runs

Quanta = Mapping[Kind, int]  # stored widths are multiples of these, per rank; kinds not named have their own default


def round_up(value: int, multiple: int) -> int:
    """Least multiple of `multiple` that is at least max(value, 1)."""
    return -(-max(value, 1) // multiple) * multiple


def balanced_ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut range(count) into `parts` contiguous ranges whose lengths differ by at most one, longer ones first."""
    base, extra = divmod(count, parts)
    bounds = [min(i, extra) + i * base for i in range(parts + 1)]
    return list(pairwise(bounds))


def stage_layers(
    layers: Sequence[int], stages: int, first: int | None = None, last: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Which of the stored `layers` each pipeline stage has: `first` and `last` as many on the first and last one, where
    that leaves one for each other, the rest shared out evenly, longer shares first; a pure function of these numbers.
    """
    fixed = {stage: count for stage, count in ((0, first), (stages - 1, last)) if count is not None}
    rest, others = len(layers) - sum(fixed.values()), stages - len(fixed)
    if rest < others or (rest and not others):
        fixed, rest, others = {}, len(layers), stages
    shares = iter([end - start for start, end in balanced_ranges(rest, others)] if others else [])
    counts = [fixed[stage] if stage in fixed else next(shares) for stage in range(stages)]
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return tuple(tuple(layers[start : start + count]) for start, count in zip(starts, counts, strict=True))


def _fill(sizes: np.ndarray, parts: int, capacity: int, max_items: int) -> list[tuple[int, int]] | None:
    """Contiguous ranges over clusters of `sizes`, each at most `capacity` queries and `max_items` clusters, or None."""
    ranges, start = [], 0
    for _ in range(parts):
        end, load = start, 0
        while end < len(sizes) and end - start < max_items and load + sizes[end] <= capacity:
            load += int(sizes[end])
            end += 1
        ranges.append((start, end))
        start = end
    return ranges if start == len(sizes) else None


def _cluster_widths(sizes: Sequence[np.ndarray], tp: int) -> tuple[int, int]:
    """Least stored (query, KV) widths per rank over all layers, by whole contiguous clusters (some in every layer)."""
    query = max(max(int(s.max()), -(-int(s.sum()) // tp)) for s in sizes)
    while any(_fill(s, tp, query, len(s)) is None for s in sizes):
        query += 1
    kv = max(-(-len(s) // tp) for s in sizes)
    while any(_fill(s, tp, query, kv) is None for s in sizes):
        kv += 1
    return query, kv


def _place(ids: np.ndarray, ranges: list[tuple[int, int]], slots: int) -> np.ndarray:
    """int32 [parts, slots] with ids[a:b] of each range in its first slots."""
    placed = np.full((len(ranges), slots), EMPTY, dtype=np.int32)
    for row, (a, b) in zip(placed, ranges, strict=True):
        row[: b - a] = ids[a:b]
    return placed


@dataclass(frozen=True)
class StoredWidths:
    """Per rank and layer: residual channels, query heads, KV heads, FFN channels; rows of the embedding."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """Slots of every layer and rank; arrays are int32, -1 marks an empty slot.

    Args:
        architecture: the live units; every one of them is in exactly one slot.
        tp: tensor-parallel size.
        quanta: rounding of stored widths.
        placed: for each kind of the table, [sites, ranks, slots] original ids; one rank for kinds that are not split.
        layers: original numbers of the layers that are stored, ascending: those that are left, and those that went
            since the last compaction, whose slots are all empty.
    """

    architecture: Architecture
    tp: int
    quanta: Quanta
    placed: Mapping[Kind, np.ndarray]
    layers: tuple[int, ...]

    @classmethod
    def pack(cls, architecture: Architecture, tp: int, quanta: Quanta) -> ShardLayout:
        """The compact layout: contiguous canonical ranges per rank, least stored widths."""
        widths, placed = _stored_widths(architecture, tp, quanta), {}
        for kind in architecture.table.kinds:
            if kind.is_prunable:
                follower = _follower(architecture, kind)
                if follower is None:
                    placed[kind] = _pack(architecture, kind, tp, widths[kind])
                else:
                    clusters = _pack_clusters(architecture, kind, follower, tp, (widths[kind], widths[follower]))
                    placed[kind], placed[follower] = clusters
            elif kind.follows is None:
                slots = np.arange(widths[kind] * kind.ranks(tp), dtype=np.int32)
                slots[kind.size(architecture.shape) :] = EMPTY
                placed[kind] = np.stack([slots.reshape(kind.ranks(tp), -1)] * kind.sites(architecture.shape))
        placed = {kind: placed[kind] for kind in architecture.table.kinds}
        return cls(architecture, tp, quanta, placed, architecture.layers)

    # Reading -------------------------------------------------------------------------------------------------------

    def slots(self, kind: Kind, layer: int, rank: int) -> np.ndarray:
        """int32 ids (or -1) of the slots that tensor-parallel `rank` stores along a dimension of `kind` in `layer`; a
        `fixed` dim is one unit with id 0."""
        if kind is FIXED:
            return _ONE
        return self.placed[kind][kind.site(layer), rank if kind.axis else 0]

    def serving(self, kind: Kind, layer: int, rank: int) -> np.ndarray:
        """int64 per slot of the kind that `kind` follows, on one rank: the local slot of `kind` that serves it (in an
        empty slot: where it would be if the slots were shared out evenly)."""
        assert kind.follows is not None
        leaders, slots = self.slots(kind.follows, layer, rank), self.slots(kind, layer, rank)
        even = np.arange(len(leaders)) // max(len(leaders) // len(slots), 1)
        index = np.minimum(even, len(slots) - 1).astype(np.int64)
        live, order = leaders != EMPTY, np.argsort(slots, kind="stable")
        wanted = kind.serving(leaders[live], self.architecture.shape)
        index[live] = order[np.searchsorted(slots, wanted, sorter=order)]
        return index

    def group_slots(self, group: Group, rank: int) -> GroupSlots:
        """Which slots of tensor-parallel `rank` hold the units of `group`."""
        return GroupSlots(self, group, rank)

    def width(self, kind: Kind) -> int:
        """Stored slots per rank; of the layers, how many are stored on all stages together."""
        if kind not in self.placed:
            return len(self.layers)
        return int(self.placed[kind].shape[-1])

    @cached_property
    def stored(self) -> StoredWidths:
        """What one rank stores, whatever the kinds are called."""
        table, d = self.architecture.table, self.architecture.shape.kv_channels
        embedding = table.find(EMBEDDING)
        attention, qkv, down = (table.find(role, self.layers[0]) for role in (ATTENTION_OUTPUT, QKV, FFN_DOWN))
        hidden, columns = attention.local_shape(self)
        return StoredWidths(
            hidden=hidden,
            heads=columns // d,
            kv_heads=qkv.lengths(qkv.parts[1], self, 0)[0] // d,
            ffn=down.local_shape(self)[1],
            vocab=embedding.local_shape(self)[0],
        )

    def quantum(self, kind: Kind) -> int:
        """What the stored width of `kind` is rounded up to, per rank."""
        return _quantum(kind, self.architecture.shape, self.tp, self.quanta)

    def empty_slots(self, kind: Kind) -> int:
        """Empty slots of `kind`, summed over layers and ranks; of the layers, those that are stored and gone."""
        if kind not in self.placed:
            return len(self.layers) - len(self.architecture.layers)
        return int((self.placed[kind] == EMPTY).sum())

    @cached_property
    def is_due(self) -> bool:
        """True when compacting now would free at least one quantum of some kind, or a layer."""
        if self.layers != self.architecture.layers:
            return True
        widths = _stored_widths(self.architecture, self.tp, self.quanta)
        return any(self.width(kind) > width for kind, width in widths.items())

    def fingerprint(self) -> str:
        """Hex digest of architecture and slots; equal on all ranks that agree."""
        digest = hashlib.sha256(f"{self.architecture.fingerprint()} {self.layers}".encode())
        for array in self.placed.values():
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    # Changing ------------------------------------------------------------------------------------------------------

    def without(self, group: Group) -> ShardLayout:
        """The layout after `group` is retired: its slots are empty, everything else stays in place."""
        after, placed = self.architecture.without(group), dict(self.placed)
        for kind, slots in self.placed.items():
            touched = kind.follows if kind.follows is not None else kind
            if touched not in group.gone:
                continue
            emptied = slots.copy()
            for site, units in enumerate(group.gone[touched]):
                gone = self.architecture.leaving(group, kind, site) if units else units
                emptied[site][holds(emptied[site], np.asarray(gone))] = EMPTY
            placed[kind] = emptied
        return dataclasses.replace(self, architecture=after, placed=placed)

    def compacted(self) -> ShardLayout:
        """The layout after a compaction: kinds that get narrower are packed anew, units of the others stay where they
        are, for nothing would be gained by moving them. Its stored widths are those of `pack`."""
        packed = ShardLayout.pack(self.architecture, self.tp, self.quanta)
        narrower = {kind.follows or kind for kind in self.placed if packed.width(kind) < self.width(kind)}
        kept = {kind: slots for kind, slots in self.placed.items() if (kind.follows or kind) not in narrower}
        return dataclasses.replace(packed, placed={**packed.placed, **kept})

    # Storage -------------------------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Slot map for a checkpoint (plain lists and numbers)."""
        quanta = named_quanta(self.architecture, self.tp, self.quanta)
        slots = {kind.name: slots.tolist() for kind, slots in self.placed.items()}
        return {"tp": self.tp, "quanta": quanta, "slots": slots, "layers": list(self.layers)}

    @classmethod
    def from_state(cls, architecture: Architecture, state: dict[str, Any]) -> ShardLayout:
        """Inverse of `to_state`; raises UserError unless the slots hold exactly the live units."""
        try:
            if not all(type(size) is int and size > 0 for size in (state["tp"], *state["quanta"].values())):
                raise ValueError("tp and quanta are numbers above 0")
            named = first_format.slots(state)
            placed = {kind: np.array(named[kind.name], dtype=np.int32) for kind in architecture.table.kinds}
            quanta = {find_kind(name): quantum for name, quantum in state["quanta"].items()}
            layers = state.get("layers", range(architecture.shape.num_layers))
            layout = cls(architecture, state["tp"], quanta, placed, tuple(layers))
            layout._check_slots()
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise UserError(f"layout.json: not the slot map of this architecture ({error!r})") from error
        return layout

    def _check_slots(self) -> None:
        """Raise ValueError unless the slots hold exactly the live units, and the layers those that are left."""
        known = range(self.architecture.shape.num_layers)
        stored = [layer for layer in known if layer in self.layers]
        if list(self.layers) != stored or not set(self.architecture.layers) <= set(stored):
            raise ValueError("layers other than those that are left")
        for kind, slots in self.placed.items():
            if slots.shape[:-1] != (kind.sites(self.architecture.shape), kind.ranks(self.tp)):
                raise ValueError(f"slots of {kind} for other layers or ranks")
            for site, ids in enumerate(self.architecture.sites(kind)):
                stored = slots[site][slots[site] != EMPTY]
                if not np.array_equal(stored, ids):
                    raise ValueError(f"slots of {kind} in layer {site} are not the live units")


_ONE = np.zeros(1, dtype=np.int32)


class GroupSlots:
    """Which slots of one rank hold the units of a group, looked up once for all parameters that count them.

    Args:
        layout: the one before the removal.
        rank: tensor-parallel.

    Attributes:
        kinds: those of which units leave. layers: that leave as a whole.
    """

    def __init__(self, layout: ShardLayout, group: Group, rank: int) -> None:
        self._layout, self._group, self._rank = layout, group, rank
        self.kinds = {kind for kind in layout.placed if kind in group.gone or kind.follows in group.gone}
        self.layers = frozenset(group.units(LAYER, 0))
        self._runs: dict[tuple[Kind, int], Runs] = {}

    def runs(self, kind: Kind, layer: int) -> Runs:
        """(first, past-last) slots of units of `kind` that leave `layer`, those that only served the group's too."""
        if kind not in self.kinds:
            return ()
        site = kind, kind.site(layer)
        if site not in self._runs:
            gone = self._layout.architecture.leaving(self._group, kind, layer)
            slots = self._layout.slots(kind, layer, self._rank)
            self._runs[site] = runs(np.flatnonzero(holds(slots, gone))) if len(gone) else ()
        return self._runs[site]

    def width(self, kind: Kind) -> int:
        """Slots of `kind` per rank; a `fixed` dim is one."""
        return 1 if kind is FIXED else self._layout.width(kind)


def named_quanta(architecture: Architecture, tp: int, quanta: Quanta) -> dict[str, int]:
    """What the stored width of every kind is rounded up to on each of `tp` ranks, by name."""
    kinds = (kind for kind in architecture.table.kinds if kind.follows is None)
    return {kind.name: _quantum(kind, architecture.shape, tp, quanta) for kind in kinds}


def _quantum(kind: Kind, shape: LlamaShape, tp: int, quanta: Quanta) -> int:
    return quanta[kind] if kind in quanta else kind.quantum(kind.size(shape) // kind.ranks(tp))


def _follower(architecture: Architecture, kind: Kind) -> Kind | None:
    """The kind whose units serve those of `kind`, if there is one."""
    return next((other for other in architecture.table.kinds if other.follows == kind), None)


def _stored_widths(architecture: Architecture, tp: int, quanta: Quanta) -> dict[Kind, int]:
    """Least stored slots per rank of every kind of the table."""
    widths, shape = dict[Kind, int](), architecture.shape
    for kind in architecture.table.kinds:
        follower, ranks, quantum = _follower(architecture, kind), kind.ranks(tp), _quantum(kind, shape, tp, quanta)
        if follower is not None:
            sizes = {counts.tobytes(): counts for counts in architecture.clusters(follower) if len(counts)}
            widths[kind], widths[follower] = _stored_clusters(list(sizes.values()), ranks, quantum)
        elif kind.is_prunable:
            widths[kind] = round_up(-(-architecture.width(kind) // ranks), quantum)
        elif kind.follows is None:
            widths[kind] = round_up(kind.size(shape), quantum * ranks) // ranks
    return widths


def _stored_clusters(sizes: Sequence[np.ndarray], tp: int, quantum: int) -> tuple[int, int]:
    """(query slots, KV slots) per rank; uniform clusters keep query = cluster x KV so that kernels stay grouped."""
    query, kv = _cluster_widths(sizes, tp)
    distinct = set(np.concatenate(sizes).tolist())
    if len(distinct) == 1:
        cluster = distinct.pop()
        query = round_up(query, int(np.lcm(quantum, cluster)))
        return query, query // cluster
    return round_up(query, quantum), kv


def _pack(architecture: Architecture, kind: Kind, tp: int, width: int) -> np.ndarray:
    """Balanced contiguous ranges of the live units of each site."""
    ranks = kind.ranks(tp)
    return np.stack([_place(ids, balanced_ranges(len(ids), ranks), width) for ids in architecture.sites(kind)])


def _pack_clusters(
    architecture: Architecture, kind: Kind, follower: Kind, tp: int, widths: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Contiguous ranges of whole clusters: the slots of `kind` and of `follower`."""
    leaders, followers = [], []
    for site, counts in enumerate(architecture.clusters(follower)):
        uniform = len(set(counts.tolist())) == 1
        ranges = balanced_ranges(len(counts), tp) if uniform else _fill(counts, tp, *widths)
        assert ranges is not None
        ends = np.concatenate([[0], np.cumsum(counts)])
        units = [(int(ends[a]), int(ends[b])) for a, b in ranges]
        leaders.append(_place(architecture.sites(kind)[site], units, widths[0]))
        followers.append(_place(architecture.sites(follower)[site], ranges, widths[1]))
    return np.stack(leaders), np.stack(followers)
