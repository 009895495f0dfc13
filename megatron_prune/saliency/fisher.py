"""The diagonal empirical Fisher of the output layer group, from each micro-batch's own gradient.

A squared *mean* gradient over T tokens is about 1/T of the mean squared one and makes second-order terms vanish, so
squares are taken per micro-batch, in fp32, before megatron-core adds the gradient to its buffer. The micro-batch is
still a mean: with b sequences of s tokens, its squared gradient is about 1/b of a sequence's and 1/(b s) of a
token's, hence the scale (`fisher_unit: sequence` multiplies by b as LLM-Pruner's per-example squares; `token` by b s).

    MicrobatchFisher   arm() before the forward pass of an iteration that prunes, reduce() after it

Ranks that hold parts of one sequence (context parallelism, refused today) would have to add up their parts of a
micro-batch's gradient before it is squared.

Memory: one fp32 buffer per output projection, only while armed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_prune.optimizer.owned import OwnedShard
from megatron_prune.optimizer.wrapped import WrappedModel


class MicrobatchFisher:
    """Accumulates squared micro-batch gradients of the output projections of one iteration.

    Args:
        model: this rank's part of the model.
        num_microbatches: micro-batches per iteration and data-parallel rank (megatron-core's 1/n is undone with it).
        scale: see the module's docstring.
    """

    def __init__(self, model: WrappedModel, num_microbatches: int, scale: float) -> None:
        self._model, self._count, self._scale = model, num_microbatches, scale
        self._sums: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def arm(self) -> None:
        """Hook the output projections; their gradients are seen once per micro-batch, before accumulation."""
        for name, parameter, row in self._model.rows():
            if row.is_output:
                self._sums[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
                self._handles.append(parameter.register_hook(lambda grad, name=name: self._add(name, grad)))

    def _add(self, name: str, grad: Tensor) -> None:
        own = grad.float()
        self._sums[name].addcmul_(own, own, value=self._count**2)

    @torch.no_grad()
    def reduce(self) -> dict[str, Tensor]:
        """Unhook, and return the mean over all micro-batches of all DP ranks, flat, on each owned range, by name."""
        for handle in self._handles:
            handle.remove()
        sums, self._sums, self._handles = self._sums, {}, []
        shards = [shard for shard in self._model.owned() if shard.row.is_output]
        tokens = self._model.mesh.over("tokens")
        factor = self._scale / (self._count * tokens.size)
        if tokens.size == 1:
            return {shard.name: sums[shard.name].view(-1).mul_(factor) for shard in shards}
        if not self._model.options.use_distributed_optimizer:
            for value in sums.values():
                dist.all_reduce(value, group=tokens.group)
            return {shard.name: sums[shard.name].view(-1).mul_(factor) for shard in shards}
        return self._reduce_scatter(sums, shards, factor)

    def _reduce_scatter(self, sums: dict[str, Tensor], shards: list[OwnedShard], factor: float) -> dict[str, Tensor]:
        """One reduce-scatter: each rank receives just the ranges that its optimizer owns."""
        owners, device = self._model.mesh.over("owners"), self._model.mesh.device.device
        spans: list[dict[str, tuple[int, int]]] = [{} for _ in range(owners.size)]
        mine = {shard.name: (shard.start, shard.end) for shard in shards}
        dist.all_gather_object(spans, mine, group=owners.group)
        longest = max(sum(end - start for start, end in span.values()) for span in spans)
        sent = torch.zeros(owners.size, longest, dtype=torch.float32, device=device)
        for row, span in zip(sent, spans, strict=True):
            at = 0
            for name, (start, end) in span.items():
                row[at : at + end - start] = sums[name].view(-1)[start:end]
                at += end - start
        received = torch.empty(longest, dtype=torch.float32, device=device)
        dist.reduce_scatter_tensor(received, sent.view(-1), group=owners.group)
        received.mul_(factor)
        lengths = [end - start for start, end in mine.values()]
        return dict(zip(mine, received[: sum(lengths)].split(lengths), strict=True)) if mine else {}
