"""Pure plans of a compaction: which elements of a parameter stay, and which move between tensor-parallel ranks.

    TransferPlan    for one parameter on one rank: element positions to keep, send and receive, per dim
    plan_transfer   (row, old layout, new layout, rank) -> TransferPlan

Both layouts hold the same live units. Along a tensor-parallel dim a unit may change its rank (only units at range
borders do); along the stem each rank picks its own. The plan of a layout to itself is empty.
"""

from dataclasses import dataclass

import numpy as np

from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import EMPTY, Param

_PART_STRIDE = 1 << 40  # ids of different parts of a packed dim must not collide


@dataclass(frozen=True)
class TransferPlan:
    """How one rank turns its old local parameter into the new one.

    Args:
        old_shape, new_shape: stored local shape under either layout.
        local: per dim, (old positions, new positions) of elements that stay on this rank.
        sharded_dim: the dim that is split over tensor-parallel ranks, or None.
        sends: rank -> old positions along `sharded_dim`; recvs: rank -> new positions along `sharded_dim`.
        arrivals: rank -> new positions there of what `sends` names; origins: old positions there of what `recvs` names.
    """

    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    local: tuple[tuple[np.ndarray, np.ndarray], ...]
    sharded_dim: int | None
    sends: dict[int, np.ndarray]
    recvs: dict[int, np.ndarray]
    arrivals: dict[int, np.ndarray]
    origins: dict[int, np.ndarray]

    def moves(self, to: bool) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """rank -> (old positions, new positions) along `sharded_dim` of what goes to it, or (`to` is False) comes."""
        olds, news = (self.sends, self.arrivals) if to else (self.origins, self.recvs)
        return {rank: (olds[rank], news[rank]) for rank in olds}

    @property
    def is_identity(self) -> bool:
        """True when nothing moves and nothing shrinks (what is in no list is an empty slot: zero before and after)."""
        return (
            self.old_shape == self.new_shape
            and not self.sends
            and not self.recvs
            and all(np.array_equal(old, new) for old, new in self.local)
        )


def _tagged_ids(row: Param, dim: int, layout: ShardLayout, rank: int) -> np.ndarray:
    """int64 per element: its source position, tagged with its part; -1 where the slot is empty."""
    pieces = []
    for number, part in enumerate(row.parts if dim == 0 else row.parts[:1]):
        spec = part.dims[dim]
        slots = layout.slots(spec.kind, row.site, rank).astype(np.int64)
        ids = slots[:, None] * spec.size + np.arange(spec.size) + number * _PART_STRIDE
        ids[slots == EMPTY] = EMPTY
        pieces.append(ids.reshape(-1))
    return np.concatenate(pieces)


def _common(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions in old, positions in new) of the live ids that both hold, in new order."""
    live_old, live_new = np.flatnonzero(old != EMPTY), np.flatnonzero(new != EMPTY)
    _, at_old, at_new = np.intersect1d(old[live_old], new[live_new], assume_unique=True, return_indices=True)
    order = np.argsort(live_new[at_new])
    return live_old[at_old][order], live_new[at_new][order]


def plan_transfer(row: Param, old: ShardLayout, new: ShardLayout, rank: int) -> TransferPlan:
    """The plan for parameter `row` on tensor-parallel `rank`; a pure function of the two layouts."""
    dims = row.dims
    sharded = next((i for i, dim in enumerate(dims) if dim.is_sharded), None)
    ids_old = [_tagged_ids(row, dim, old, rank) for dim in range(len(dims))]
    ids_new = [_tagged_ids(row, dim, new, rank) for dim in range(len(dims))]
    sends: dict[int, np.ndarray] = {}
    recvs: dict[int, np.ndarray] = {}
    arrivals: dict[int, np.ndarray] = {}
    origins: dict[int, np.ndarray] = {}
    if sharded is not None:
        for other in range(old.tp):
            if other == rank:
                continue
            outgoing, arrival = _common(ids_old[sharded], _tagged_ids(row, sharded, new, other))
            origin, incoming = _common(_tagged_ids(row, sharded, old, other), ids_new[sharded])
            if len(outgoing):
                sends[other], arrivals[other] = outgoing, arrival
            if len(incoming):
                recvs[other], origins[other] = incoming, origin
    return TransferPlan(
        old_shape=row.local_shape(old, rank),
        new_shape=row.local_shape(new, rank),
        local=tuple(_common(a, b) for a, b in zip(ids_old, ids_new, strict=True)),
        sharded_dim=sharded,
        sends=sends,
        recvs=recvs,
        arrivals=arrivals,
        origins=origins,
    )
