"""Where a rank's tensors lie in the canonical ones: pure arithmetic, no communication.

    Piece    a rectangle of a flat local range and the place of its live elements in the canonical tensor
    pieces   a flat range of a local parameter -> its pieces
    spread   deal items of given sizes over ranks

A *canonical* tensor is a Hugging Face tensor that holds live units only, in ascending original id. Slots hold a layer's
live units in that same order, first within a rank and then over tensor-parallel ranks, so the live elements of any
contiguous range of slots are contiguous in the canonical tensor. Hence every rectangle of every range that a rank owns,
whatever the sharding, is one rectangle of the canonical tensor: nothing is gathered to save or to load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prune.checkpoint.streams import Scratch
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import EMPTY, Dim, Param, expand
from megatron_prune.optimizer.owned import blocks


@dataclass(frozen=True)
class Piece:
    """Live elements of one rectangle.

    Args:
        hf_name: the canonical tensor.
        global_shape: its shape; `offset` and `shape` are the place of this piece in it (one or two dims).
        start, height, width: the rectangle is `flat[start : start + height * width].view(height, width)`.
        rows, columns: positions of the live elements inside the rectangle, int64, ascending.
    """

    hf_name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    height: int
    width: int
    rows: np.ndarray
    columns: np.ndarray

    def view(self, flat: Tensor) -> Tensor | None:
        """The live elements as a view of `flat` in `shape`, or None where empty slots lie between them."""
        if len(_runs(self.rows)) > 1 or len(_runs(self.columns)) > 1:
            return None
        return self.read(flat, Scratch())

    def read(self, flat: Tensor, scratch: Scratch) -> Tensor:
        """The live elements of `flat`, in `shape`: a view where that is possible, else on the host in `scratch`."""
        block = self._block(flat)
        row_runs, columns = _runs(self.rows), _runs(self.columns)
        if len(row_runs) == len(columns) == 1:
            found = block[row_runs[0], columns[0]]
        else:
            shape = (len(self.rows), len(self.columns))
            on_host = flat.device.type == "cpu"
            found = (
                scratch.empty(shape, flat.dtype)
                if on_host
                else torch.empty(shape, dtype=flat.dtype, device=flat.device)
            )
            index = torch.from_numpy(self.columns).to(flat.device)
            for rows, out in zip(row_runs, found.split([run.stop - run.start for run in row_runs]), strict=True):
                if len(columns) == 1:
                    out.copy_(block[rows, columns[0]])
                else:
                    torch.index_select(block[rows], 1, index, out=out)
        return found if len(self.shape) == 2 else found[:, 0]

    def write(self, flat: Tensor, values: Tensor) -> None:
        """Put `values` of `shape` at the live elements of `flat`; others stay as they are."""
        rows, columns = (torch.from_numpy(live).to(flat.device) for live in (self.rows, self.columns))
        values = values.to(device=flat.device, dtype=flat.dtype).view(len(rows), len(columns))
        self._block(flat)[rows[:, None], columns] = values

    def _block(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.height * self.width].view(self.height, self.width)


def _runs(positions: np.ndarray) -> list[slice]:
    """Ascending positions as ranges without a gap."""
    ends = np.flatnonzero(np.diff(positions) > 1)
    firsts, lasts = positions[np.append(0, ends + 1)], positions[np.append(ends, len(positions) - 1)]
    return [slice(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]


@dataclass(frozen=True)
class _Axis:
    """One dim of one part on one rank: the live elements among the stored ones, and where they start canonically."""

    is_live: np.ndarray
    first: int
    total: int

    @classmethod
    def of(cls, dim: Dim, row: Param, layout: ShardLayout, rank: int) -> _Axis:
        below = range(rank) if dim.is_sharded else ()
        first = sum(int((layout.slots(dim.kind, row.site, r) != EMPTY).sum()) for r in below) * dim.size
        ids = expand(layout.slots(dim.kind, row.site, rank), dim.size)
        return cls(ids != EMPTY, first, layout.architecture.width(dim.kind, row.site) * dim.size)

    def live(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        """(live positions counted from `start`, canonical position of the first) of the stored range [start, stop)."""
        return np.flatnonzero(self.is_live[start:stop]), self.first + int(self.is_live[:start].sum())


_ONE_COLUMN = _Axis(np.ones(1, dtype=bool), 0, 1)  # a vector is a matrix of one column


def pieces(row: Param, layout: ShardLayout, rank: int, start: int, end: int) -> Iterator[Piece]:
    """Cut the flat range [start, end) of parameter `row` on tensor-parallel `rank` into pieces.

    The range's own flat tensor has length end - start. Rectangles without a live element give no piece.
    """
    if not row.lives_in(layout.architecture):
        return
    parts = [
        (part, first, last, [_Axis.of(dim, row, layout, rank) for dim in part.dims])
        for part, first, last in row.part_rows(layout, rank)
    ]
    for offset, _, rows, columns in blocks(start, end, row.local_shape(layout, rank)):
        width = columns.stop - columns.start
        for part, first, last, axes in parts:
            top, bottom = max(rows.start, first), min(rows.stop, last)
            if top >= bottom:
                continue
            column_axis = axes[1] if len(axes) == 2 else _ONE_COLUMN
            live_rows, row_offset = axes[0].live(top - first, bottom - first)
            live_columns, column_offset = column_axis.live(columns.start, columns.stop)
            if not len(live_rows) or not len(live_columns):
                continue
            dims = len(axes)
            yield Piece(
                hf_name=part.hf_name,
                global_shape=tuple(axis.total for axis in axes),
                offset=(row_offset, column_offset)[:dims],
                shape=(len(live_rows), len(live_columns))[:dims],
                start=offset + (top - rows.start) * width,
                height=bottom - top,
                width=width,
                rows=live_rows,
                columns=live_columns,
            )


def spread(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each item: the largest first, each to the rank with the least so far (ties: the lowest rank)."""
    loads = [0] * ranks
    chosen = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        chosen[item] = min(range(ranks), key=lambda r: (loads[r], r))
        loads[chosen[item]] += sizes[item]
    return chosen
