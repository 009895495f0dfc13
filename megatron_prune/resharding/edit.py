"""Change weights between steps, outside the optimizer: model weights and fp32 main weights stay in step.

    WeightEditor   `columns` reads fp32 columns of a local weight, `add_product` adds left @ right to it

In fp32 training the model weight is the main weight. In bf16 the fp32 main weight is changed and the model weight
becomes its rounding, exactly as after an optimizer step; with the distributed optimizer each data-parallel rank holds
a part of the main weights, so both methods are collectives over DP then. Moments stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.optimizer.wrapped import WrappedModel


class WeightEditor:
    """Reads and changes local weights of `model`, which it brings in step over DP first."""

    def __init__(self, model: WrappedModel) -> None:
        model.synchronise()
        self._owners = model.mesh.over("owners")
        self._weights = {name: parameter for name, parameter, _ in model.rows()}
        self._shards = {shard.name: shard for shard in model.owned()}
        self._is_split = model.options.use_distributed_optimizer and self._owners.size > 1

    @torch.no_grad()
    def columns(self, name: str, positions: np.ndarray) -> Tensor:
        """Main weights of the local columns `positions` (ascending) of weight `name`, fp64 [rows, columns]."""
        weight = self._weights[name]
        index = torch.from_numpy(positions).to(weight.device)
        if weight.dtype == torch.float32:
            return weight.data.index_select(1, index).double()
        found = torch.zeros(len(weight), len(positions), dtype=torch.float64, device=weight.device)
        for rows, span, block in self._main_blocks(name):
            at = np.flatnonzero((positions >= span.start) & (positions < span.stop))
            here = torch.from_numpy(positions[at] - span.start).to(weight.device)
            found[rows, torch.from_numpy(at).to(weight.device)] = block.index_select(1, here).double()
        if self._is_split:
            dist.all_reduce(found, group=self._owners.group)  # every element has one owner: an exact sum
        return found

    @torch.no_grad()
    def add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Weight `name` += left @ right, fp64 [rows, r] and [r, columns], the same on all data-parallel ranks."""
        weight = self._weights[name]
        if weight.dtype == torch.float32:
            weight.data.copy_(torch.addmm(weight.data.double(), left, right))
            return
        rounded = torch.zeros_like(weight)
        for rows, span, block in self._main_blocks(name):
            block.copy_(torch.addmm(block.double(), left[rows], right[:, span]))
            rounded[rows, span] = block.to(weight.dtype)
        if self._is_split:
            dist.all_reduce(rounded, group=self._owners.group)
        weight.data.copy_(rounded)

    def _main_blocks(self, name: str) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, view of the main weight) of the rectangles that this rank owns."""
        shard = self._shards.get(name)
        if shard is None:
            return
        for offset, length, rows, columns in shard.blocks():
            block = shard.main[offset : offset + length].view(rows.stop - rows.start, columns.stop - columns.start)
            yield rows, columns, block
