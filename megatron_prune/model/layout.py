"""Placement: which slot of which tensor-parallel rank holds which live unit.

A *slot* is a position along a prunable dimension of a stored weight shard. It is live (holds the unit with that
original id) or empty (-1; all coupled weights are zero). Stored widths are equal on all ranks and layers, so that
megatron-core's regular layers keep working:

    Quanta        how far stored widths are rounded up, per kind
    ShardLayout   int32 id arrays per kind; `pack` (pure function of live ids, TP and quanta), `without`, `is_due`

After `pack` each rank holds a contiguous range of a layer's live units in original-id order. Under grouped-query
attention whole clusters (a KV head with its live query heads) are packed, so a KV head always stays with its queries:
no replicated KV weights, hence no summed gradients and no double ownership, at the price of empty slots where there
are fewer KV heads than ranks (multi-query attention on TP 2 keeps all heads on one rank). Stored query and KV widths
are separate maxima.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.model.architecture import FFN, HEAD, KV_HEAD, STEM, VOCAB, Architecture, Group

EMPTY = -1


@dataclass(frozen=True)
class Quanta:
    """Stored widths are multiples of these, per tensor-parallel rank (1 = the exact size)."""

    head: int = 1
    ffn: int = 1
    stem: int = 1
    vocab: int = 128


def round_up(value: int, multiple: int) -> int:
    """Least multiple of `multiple` that is at least max(value, 1)."""
    return -(-max(value, 1) // multiple) * multiple


def balanced_ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut range(count) into `parts` contiguous ranges whose lengths differ by at most one, longer ones first."""
    base, extra = divmod(count, parts)
    bounds = [min(i, extra) + i * base for i in range(parts + 1)]
    return list(pairwise(bounds))


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


def _head_widths(sizes: list[np.ndarray], tp: int) -> tuple[int, int]:
    """Least stored (query, KV) widths per rank over all layers, by whole contiguous clusters."""
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


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """Slots of every layer and tensor-parallel rank; arrays are int32, -1 marks an empty slot.

    Args:
        architecture: the live units; every one of them is in exactly one slot.
        tp: tensor-parallel size.
        quanta: rounding of stored widths.
        heads, kv_heads, ffn: [layers, tp, slots] original ids.
        kv_index: [layers, tp, query slots], the local KV slot a query slot attends with (meaningless in empty slots).
        stem: [slots], the same on all ranks.
        vocab: [tp, slots].
    """

    architecture: Architecture
    tp: int
    quanta: Quanta
    heads: np.ndarray
    kv_heads: np.ndarray
    kv_index: np.ndarray
    ffn: np.ndarray
    stem: np.ndarray
    vocab: np.ndarray

    @classmethod
    def pack(cls, architecture: Architecture, tp: int, quanta: Quanta) -> ShardLayout:
        """The compact layout: contiguous canonical ranges per rank, least stored widths."""
        layers = architecture.shape.num_layers
        heads, kv_heads, kv_index = _pack_heads(architecture, tp, quanta.head)
        ffn_slots = round_up(-(-architecture.ffn_hidden_size // tp), quanta.ffn)
        ranges = balanced_ranges(architecture.ffn_hidden_size, tp)
        ffn = np.stack([_place(architecture.ffn[layer], ranges, ffn_slots) for layer in range(layers)])
        stem = _place(
            architecture.stem, [(0, architecture.hidden_size)], round_up(architecture.hidden_size, quanta.stem)
        )[0]
        vocab_size = architecture.shape.vocab_size
        padded = round_up(vocab_size, quanta.vocab * tp)
        vocab = np.arange(padded, dtype=np.int32)
        vocab[vocab_size:] = EMPTY
        return cls(architecture, tp, quanta, heads, kv_heads, kv_index, ffn, stem, vocab.reshape(tp, -1))

    # Reading -------------------------------------------------------------------------------------------------------

    def slots(self, kind: str, layer: int, rank: int) -> np.ndarray:
        """int32 ids (or -1) of the slots that tensor-parallel `rank` stores along a dimension of `kind` in `layer`."""
        if kind == STEM:
            return self.stem
        if kind == VOCAB:
            return self.vocab[rank]
        return {HEAD: self.heads, KV_HEAD: self.kv_heads, FFN: self.ffn}[kind][layer, rank]

    def width(self, kind: str) -> int:
        """Stored slots per rank."""
        arrays = {HEAD: self.heads, KV_HEAD: self.kv_heads, FFN: self.ffn, STEM: self.stem, VOCAB: self.vocab}
        return int(arrays[kind].shape[-1])

    def empty_slots(self, kind: str) -> int:
        """Empty slots of `kind`, summed over layers and ranks."""
        arrays = {HEAD: self.heads, KV_HEAD: self.kv_heads, FFN: self.ffn, STEM: self.stem, VOCAB: self.vocab}
        return int((arrays[kind] == EMPTY).sum())

    @property
    def is_compact(self) -> bool:
        """True when no kind could be stored in fewer slots."""
        return not self.is_due

    @cached_property
    def is_due(self) -> bool:
        """True when compacting now would free at least one quantum of some kind."""
        a, tp = self.architecture, self.tp
        if self.width(FFN) > round_up(-(-a.ffn_hidden_size // tp), self.quanta.ffn):
            return True
        if self.width(STEM) > round_up(a.hidden_size, self.quanta.stem):
            return True
        query, kv = _stored_head_widths(a, tp, self.quanta.head)
        return self.width(HEAD) > query or self.width(KV_HEAD) > kv

    def fingerprint(self) -> str:
        """Hex digest of architecture and slots; equal on all ranks that agree."""
        digest = hashlib.sha256(self.architecture.fingerprint().encode())
        for array in (self.heads, self.kv_heads, self.kv_index, self.ffn, self.stem, self.vocab):
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    # Changing ------------------------------------------------------------------------------------------------------

    def without(self, group: Group) -> ShardLayout:
        """The same slots with those of `group` empty; KV heads that lose their last query head empty with it."""
        after = self.architecture.without(group)
        if group.kind == STEM:
            return dataclasses.replace(self, architecture=after, stem=_emptied(self.stem, group.units[0]))
        name = "heads" if group.kind == HEAD else "ffn"
        array = getattr(self, name).copy()
        for layer, units in enumerate(group.units):
            array[layer] = _emptied(array[layer], units)
        if group.kind == FFN:
            return dataclasses.replace(self, architecture=after, ffn=array)
        kv_heads = self.kv_heads.copy()
        for layer in range(len(kv_heads)):
            kv_heads[layer][~np.isin(kv_heads[layer], after.kv_heads(layer))] = EMPTY
        return dataclasses.replace(self, architecture=after, heads=array, kv_heads=kv_heads)

    def compacted(self) -> ShardLayout:
        """The layout after a compaction: a pure function of the live ids, TP and quanta."""
        return ShardLayout.pack(self.architecture, self.tp, self.quanta)

    # Storage -------------------------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Slot map for a checkpoint (plain lists and numbers)."""
        arrays = {n: getattr(self, n).tolist() for n in ("heads", "kv_heads", "kv_index", "ffn", "stem", "vocab")}
        return {"tp": self.tp, "quanta": dataclasses.asdict(self.quanta), **arrays}

    @classmethod
    def from_state(cls, architecture: Architecture, state: dict[str, Any]) -> ShardLayout:
        """Inverse of `to_state`; raises UserError unless the slots hold exactly the live units."""
        try:
            arrays = {
                n: np.array(state[n], dtype=np.int32) for n in ("heads", "kv_heads", "kv_index", "ffn", "stem", "vocab")
            }
            layout = cls(architecture, state["tp"], Quanta(**state["quanta"]), **arrays)
            layout._check_slots()
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise UserError(f"layout.json: not the slot map of this architecture ({error!r})") from error
        return layout

    def _check_slots(self) -> None:
        """Raise ValueError unless the slots hold exactly the live units."""
        for kind in (HEAD, KV_HEAD, FFN, STEM, VOCAB):
            for layer in range(self.architecture.shape.num_layers):
                ranks = range(1 if kind == STEM else self.tp)
                stored = np.concatenate([self.slots(kind, layer, r) for r in ranks])
                if not np.array_equal(stored[stored != EMPTY], self.architecture.live(kind, layer)):
                    raise ValueError(f"slots of {kind} in layer {layer} are not the live units")


def holds(slots: np.ndarray, units: Sequence[int] | np.ndarray) -> np.ndarray:
    """Bool per slot: does it hold one of `units`? Those are few, and one comparison each beats a general search."""
    found = np.zeros(slots.shape, dtype=bool)
    for unit in units:
        found |= slots == unit
    return found


def _emptied(slots: np.ndarray, units: tuple[int, ...]) -> np.ndarray:
    emptied = slots.copy()
    emptied[holds(slots, units)] = EMPTY
    return emptied


def _clusters(architecture: Architecture) -> list[np.ndarray]:
    """Per layer: how many live query heads each live KV head serves, in KV order."""
    per_group = architecture.shape.heads_per_group
    return [np.unique(heads // per_group, return_counts=True)[1] for heads in architecture.heads]


def _stored_head_widths(architecture: Architecture, tp: int, quantum: int) -> tuple[int, int]:
    """(query slots, KV slots) per rank; uniform clusters keep query = cluster x KV so that kernels stay grouped."""
    sizes = _clusters(architecture)
    query, kv = _head_widths(sizes, tp)
    distinct = {int(n) for s in sizes for n in np.unique(s)}
    if len(distinct) == 1:
        cluster = distinct.pop()
        query = round_up(query, int(np.lcm(quantum, cluster)))
        return query, query // cluster
    return round_up(query, quantum), kv


def _pack_heads(architecture: Architecture, tp: int, quantum: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    query_slots, kv_slots = _stored_head_widths(architecture, tp, quantum)
    sizes = _clusters(architecture)
    heads, kv_heads, kv_index = [], [], []
    for layer, counts in enumerate(sizes):
        uniform = len(set(counts.tolist())) == 1
        ranges = balanced_ranges(len(counts), tp) if uniform else _fill(counts, tp, query_slots, kv_slots)
        assert ranges is not None
        ends = np.concatenate([[0], np.cumsum(counts)])
        heads.append(_place(architecture.heads[layer], [(int(ends[a]), int(ends[b])) for a, b in ranges], query_slots))
        kv_heads.append(_place(architecture.kv_heads(layer), ranges, kv_slots))
        index = np.arange(query_slots) // max(query_slots // kv_slots, 1)
        local = np.tile(np.minimum(index, kv_slots - 1), (tp, 1))
        for row, (a, b) in zip(local, ranges, strict=True):
            row[: int(ends[b] - ends[a])] = np.repeat(np.arange(b - a), counts[a:b])
        kv_index.append(local.astype(np.int32))
    return np.stack(heads), np.stack(kv_heads), np.stack(kv_index)
