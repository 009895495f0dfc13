"""The diagonal empirical Fisher of the output layer group, from each micro-batch's own gradient.

A squared *mean* gradient over T tokens is about 1/T of the mean squared one and makes second-order terms vanish, so
squares are taken per micro-batch, in fp32, before megatron-core adds the gradient to its buffer. The micro-batch is
still a mean: with b sequences of s tokens, its squared gradient is about 1/b of a sequence's and 1/(b s) of a
token's, hence the scale (`fisher_unit: sequence` multiplies by b as LLM-Pruner's per-example squares; `token` by b s).

    MicrobatchFisher   arm() before the forward pass of an iteration that prunes, reduce() after it
    equal_shares       pure: what owners own, cut into equal shares

Ranks that hold parts of one sequence (context parallelism, refused today) would have to add up their parts of a
micro-batch's gradient before it is squared.

Memory: one fp32 buffer per output projection, only while armed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_prune.optimizer.owned import Span
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
        return self._reduce_scatter(sums, factor) if sums else {}

    def _reduce_scatter(self, sums: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
        """The ranges that this rank's optimizer owns, summed over DP.

        Owners own different numbers of output weights. So all of them, owner after owner, are reduce-scattered in equal
        shares, and what of a share belongs to others goes to them: nothing is padded to the longest.
        """
        owners = self._model.mesh.over("owners")
        spans = {name: ranges for name, ranges in self._model.owned_spans().items() if name in sums}
        mine = {name: end - start for name, ranges in spans.items() for start, end in [ranges[owners.rank]] if end}
        regions, share = equal_shares(spans, owners.size)
        pieces = [sums[name].view(-1)[slice(*ranges[r])] for r in range(owners.size) for name, ranges in spans.items()]
        padding = share * owners.size - regions[-1][1]
        sent = torch.cat([*pieces, *([pieces[0].new_zeros(padding)] if padding else [])])
        sums.clear()
        received = sent.new_empty(share)
        dist.reduce_scatter_tensor(received, sent, group=owners.group)
        del sent
        owned = self._handed_over(received.mul_(factor), regions)
        return dict(zip(mine, owned.split(list(mine.values())), strict=True)) if mine else {}

    def _handed_over(self, share: Tensor, regions: list[Span]) -> Tensor:
        """From this rank's equal share to its own region."""
        owners, size = self._model.mesh.over("owners"), len(share)
        first, last = regions[owners.rank]
        own, start, operations = share.new_empty(last - first), owners.rank * size, list[dist.P2POp]()
        for other in range(owners.size):
            a, b = max(regions[other][0], start), min(regions[other][1], start + size)
            c, d = max(first, other * size), min(last, other * size + size)
            if other == owners.rank and a < b:
                own[a - first : b - first] = share[a - start : b - start]
            elif other != owners.rank:
                pairs = ((dist.isend, a, b, share, start), (dist.irecv, c, d, own, first))
                operations += [
                    dist.P2POp(how, whole[x - at : y - at], owners.global_rank(other), owners.group)
                    for how, x, y, whole, at in pairs
                    if x < y
                ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return own


def equal_shares(spans: Mapping[str, Sequence[Span]], owners: int) -> tuple[list[Span], int]:
    """(where each owner's ranges lie when all are put one after the other; how long an equal share of them is)."""
    lengths = [sum(ranges[owner][1] - ranges[owner][0] for ranges in spans.values()) for owner in range(owners)]
    ends = list(accumulate(lengths, initial=0))
    return list(pairwise(ends)), -(-ends[-1] // owners)
