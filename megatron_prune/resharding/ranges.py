"""State of a distributed optimizer in a compaction: only what changes its owner travels, and goes there directly.

    Block         rows and columns of a stored matrix that go from one tensor-parallel rank to one, itself among them
    block_pairs   of a parameter: each block where it lies before and where it will lie
    overlaps      pure: which stretch of a block each old owner hands to each new one
    Exchange      carries the state of one parameter after the other over, to another pipeline stage, too

Both layouts keep the order of units, so the elements of a block stand in the same order in the old stored matrix and in
the new one. An owner's flat range of either is therefore one stretch of the block, and the exchange is an overlap of
stretches: no element has an index of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.optimizer.owned import NOTHING, Span, Spans, blocks
from megatron_prune.resharding.plan import TransferPlan
from megatron_prune.runtime.mesh import Mesh


@dataclass(frozen=True)
class Block:
    """Ascending int64 `rows` and `columns` of a matrix that is stored with `width` columns."""

    rows: np.ndarray
    columns: np.ndarray
    width: int

    def before(self, position: int) -> int:
        """Elements of the block that lie before a flat `position` of the stored matrix."""
        row, column = divmod(position, self.width)
        at = int(np.searchsorted(self.rows, row))
        count = at * len(self.columns)
        if column and at < len(self.rows) and self.rows[at] == row:
            count += int(np.searchsorted(self.columns, column))
        return count

    def stretch(self, span: Span) -> Span:
        """Which of its elements, counted in order, lie in a flat range of the stored matrix."""
        return self.before(span[0]), self.before(span[1])


def block_pairs(plan: TransferPlan, to: bool) -> Iterator[tuple[int | None, Block, Block]]:
    """(other tensor-parallel rank, or None for this one; the block before, the block after) of what leaves this rank
    (`to`) or comes to it; what stays here is in both."""
    old_rows, new_rows = plan.local[0]
    old_columns, new_columns = plan.local[1] if len(plan.local) > 1 else (_ONE, _ONE)
    widths = [shape[1] if len(shape) > 1 else 1 for shape in (plan.old_shape, plan.new_shape)]
    yield None, Block(old_rows, old_columns, widths[0]), Block(new_rows, new_columns, widths[1])
    for rank, (old, new) in plan.moves(to).items():
        if plan.sharded_dim == 0:
            yield rank, Block(old, old_columns, widths[0]), Block(new, new_columns, widths[1])
        else:
            yield rank, Block(old_rows, old, widths[0]), Block(new_rows, new, widths[1])


_ONE = np.zeros(1, dtype=np.int64)


def overlaps(mine: Span, block: Block, spans: Spans) -> Iterator[tuple[int, int, int]]:
    """(owner, first, past-last) of what a stretch of a block has in common with what each owner has of it."""
    for owner, span in spans.items():
        first, last = block.stretch(span)
        a, b = max(mine[0], first), min(mine[1], last)
        if a < b:
            yield owner, a, b


class Exchange:
    """Moves owned ranges within a pipeline stage, or from one to another. All ranks of these stages call `move` for the
    same parameters in the same order."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._owner = mesh, mesh.over("owners").rank
        self._stage, self._tp_rank = mesh.pp_rank, mesh.tp_rank

    def move(
        self,
        tensors: list[Tensor],
        plan: TransferPlan,
        old: Spans,
        new: Spans,
        start: int | None = None,
        end: int | None = None,
    ) -> list[Tensor]:
        """This rank's new flat ranges of what `tensors` are the old flat ranges of (equally long, of one dtype).

        Args:
            plan: of the parameter. old, new: the ranges of the owners of the same tensor-parallel rank.
            start, end: the stages that it leaves and comes to, this rank's being one of them; None: it stays here.
        """
        start, end = (self._stage if stage is None else stage for stage in (start, end))
        if not tensors or (start == end and plan.is_identity and old == new):
            return tensors
        outgoing, stays = dict[int, Tensor](), None
        if start == self._stage:
            outgoing, stays = self._leaving(tensors, plan, old, new, end)
        incoming = list[tuple[int, Tensor]]()
        arrived = list[tuple[Block, list[Tensor]]]()
        if end == self._stage:
            arrived = list(self._arriving(tensors, plan, old, new, stays, incoming, start))
        operations = [dist.P2POp(dist.isend, values, rank) for rank, values in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, values, rank) for rank, values in incoming]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        if end != self._stage:
            return []
        first, last = new.get(self._owner, NOTHING)
        results = [tensor.new_zeros(last - first) for tensor in tensors]
        for block, pieces in arrived:
            for result, values in zip(results, torch.cat(pieces, dim=1), strict=True):
                _place(values, result, (first, last), block, plan.new_shape)
        return results

    def _leaving(
        self, tensors: list[Tensor], plan: TransferPlan, old: Spans, new: Spans, end: int
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """([tensors, elements] for each other rank, the same that stays here)."""
        mine, outgoing, stays = old.get(self._owner, NOTHING), dict[int, Tensor](), None
        for other, block, there in block_pairs(plan, to=True):
            held = block.stretch(mine)
            if held[0] == held[1]:
                continue
            values = torch.stack([_picked(tensor, mine, block, plan.old_shape) for tensor in tensors])
            for owner, a, b in overlaps(held, there, new):
                rank, piece = self._rank(end, other, owner), values[:, a - held[0] : b - held[0]]
                if rank == self._mesh.rank:
                    stays = piece
                else:
                    outgoing[rank] = piece.contiguous()
        return outgoing, stays

    def _arriving(
        self,
        tensors: list[Tensor],
        plan: TransferPlan,
        old: Spans,
        new: Spans,
        stays: Tensor | None,
        incoming: list[tuple[int, Tensor]],
        start: int,
    ) -> Iterator[tuple[Block, list[Tensor]]]:
        """(block, its elements here as consecutive pieces) of all that this rank will own; `incoming` gets those pieces
        that are still to be received, and from whom."""
        mine = new.get(self._owner, NOTHING)
        for other, there, block in block_pairs(plan, to=False):
            pieces = []
            for owner, a, b in overlaps(block.stretch(mine), there, old):
                rank = self._rank(start, other, owner)
                if rank == self._mesh.rank:
                    assert stays is not None
                    pieces.append(stays)
                else:
                    pieces.append(tensors[0].new_empty(len(tensors), b - a))
                    incoming.append((rank, pieces[-1]))
            if pieces:
                yield block, pieces

    def _rank(self, stage: int, other: int | None, owner: int) -> int:
        return self._mesh.owner_at(stage, self._tp_rank if other is None else other, owner)


def _pieces(
    span: Span, block: Block, shape: Sequence[int]
) -> Iterator[tuple[slice, tuple[int, int], list[np.ndarray]]]:
    """The block's part of a flat range, as (where a rectangle of the range lies in it, its shape, [rows, columns] of
    the block in it), in order."""
    for offset, length, *spans in blocks(*span, tuple(shape)):
        inside = [
            at[slice(*np.searchsorted(at, (s.start, s.stop)))] - s.start
            for at, s in zip((block.rows, block.columns), spans, strict=True)
        ]
        if len(inside[0]) and len(inside[1]):
            rows, columns = (s.stop - s.start for s in spans)
            yield slice(offset, offset + length), (rows, columns), inside


def _picked(flat: Tensor, span: Span, block: Block, shape: Sequence[int]) -> Tensor:
    """The block's elements among those of a flat range, in order."""
    found = [flat.new_empty(0)]
    for where, size, inside in _pieces(span, block, shape):
        part = flat[where].view(size)
        for dim, at in enumerate(inside):
            if len(at) < size[dim]:
                part = part.index_select(dim, torch.from_numpy(at).to(flat.device))
        found.append(part.reshape(-1))
    return torch.cat(found) if len(found) != 2 else found[1]


def _place(values: Tensor, flat: Tensor, span: Span, block: Block, shape: Sequence[int]) -> None:
    """Inverse of `_picked`: put `values` where they belong in a flat range."""
    start = 0
    for where, size, inside in _pieces(span, block, shape):
        rows, columns = map(len, inside)
        part, target = values[start : start + rows * columns].view(rows, columns), flat[where].view(size)
        start += rows * columns
        at = [torch.from_numpy(positions).to(flat.device) for positions in inside]
        if (rows, columns) == size:
            target.copy_(part)
        elif columns == size[1]:
            target.index_copy_(0, at[0], part)
        else:
            target[at[0][:, None], at[1]] = part
