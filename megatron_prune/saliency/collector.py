"""Everything a scoring step needs besides weights and gradients, collected in one global batch's ordinary passes.

    Collector          arm() before the forward passes, finish() after the backward passes
    Collected          what `score_elements` takes, and the inputs that a second-order update will want
    MicrobatchFisher   squares of the output projections' gradients

Nothing is collected that neither the criterion nor the update asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_prune.model.kinds import Kind
from megatron_prune.model.table import ENTRANCES
from megatron_prune.optimizer.owned import Span
from megatron_prune.optimizer.wrapped import WrappedModel
from megatron_prune.resharding.live import LiveModel
from megatron_prune.saliency.criteria import (
    FISHER,
    INPUT_MAGNITUDE,
    INPUT_NORM,
    INPUT_VARIANCE,
    INVERSE_HESSIAN,
    STEM_MAGNITUDE,
    Criterion,
)
from megatron_prune.saliency.hessian import inverse_diagonals, local_columns
from megatron_prune.saliency.inputs import InfluenceWatcher, InputNeeds, InputWatcher, KeptInputs, Moments
from megatron_prune.saliency.reducer import ColumnStatistics, ElementScores, score_elements


class MicrobatchFisher:
    """The diagonal empirical Fisher of the output projections, from each micro-batch's own gradient of one iteration:
    `arm` before its forward passes, `reduce` after them.

    A squared *mean* gradient over T tokens is about 1/T of the mean squared one and makes second-order terms vanish, so
    squares are taken per micro-batch, in fp32, before megatron-core adds the gradient to its buffer. The micro-batch is
    still a mean: with b sequences of s tokens, its squared gradient is about 1/b of a sequence's and 1/(b s) of a
    token's, hence the scale (`fisher_unit: sequence` multiplies by b as LLM-Pruner's per-example squares; `token` by
    b s). Ranks that hold parts of one sequence (context parallelism, refused today) would have to add up their parts of
    a micro-batch's gradient before it is squared.

    Memory: one fp32 buffer per output projection, only while armed.

    Args:
        model: this rank's part of the model.
        num_microbatches: micro-batches per iteration and data-parallel rank (megatron-core's 1/n is undone with it).
        scale: see above.
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
        owners, lists = self._model.mesh.over("owners"), self._model.owned_spans()
        owned_by: list[list[tuple[str, Span]]] = [[] for _ in range(owners.size)]
        for name in filter(sums.__contains__, lists):
            for owner, span in lists[name].items():
                owned_by[owner].append((name, span))
        lengths = [[last - first for _, (first, last) in owned] for owned in owned_by]
        regions, share = equal_shares([sum(own) for own in lengths])
        pieces = [sums[name].view(-1)[slice(*span)] for owned in owned_by for name, span in owned]
        padding = share * owners.size - regions[-1][1]
        sent = torch.cat([*pieces, *([pieces[0].new_zeros(padding)] if padding else [])])
        sums.clear()
        received = sent.new_empty(share)
        dist.reduce_scatter_tensor(received, sent, group=owners.group)
        del sent
        own, lengths_here = self._handed_over(received.mul_(factor), regions), lengths[owners.rank]
        names = [name for name, _ in owned_by[owners.rank]]
        return dict(zip(names, own.split(lengths_here), strict=True)) if names else {}

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


def equal_shares(lengths: Sequence[int]) -> tuple[list[Span], int]:
    """(where what each owner has lies when all is put one after the other; how long an equal share of that is)."""
    ends = list(accumulate(lengths, initial=0))
    return list(pairwise(ends)), -(-ends[-1] // len(lengths))


@dataclass(frozen=True)
class CollectorSettings:
    """What the statistics depend on.

    Args:
        fisher: source of squared gradients, as `pruning.fisher`.
        fisher_scale: see `MicrobatchFisher`.
        num_microbatches: per iteration and data-parallel rank.
        kept_microbatches: of them, how many a Hessian is made from.
        damping: of that Hessian, relative to its mean diagonal.
        block_influence: whether that of the layers is wanted (see `InfluenceWatcher`).
    """

    fisher: str = "microbatch"
    fisher_scale: float = 1.0
    num_microbatches: int = 1
    kept_microbatches: int = 1
    damping: float = 0.01
    block_influence: bool = False


@dataclass(frozen=True)
class Collected:
    """Statistics of one global batch.

    Args:
        fisher: `MicrobatchFisher.reduce()`, where the criterion wants it.
        columns: statistics of the inputs per stored column.
        diagonals: [H^-1]_pp per live column, where they were computed.
        kept: inputs for a second-order update, or None.
        besides: scores of units that are no sums over output projections.
    """

    fisher: dict[str, Tensor] | None
    columns: ColumnStatistics
    diagonals: dict[str, Tensor] | None
    kept: KeptInputs | None
    besides: Mapping[Kind, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def score(self, model: LiveModel, criterion: Criterion, fisher: str) -> ElementScores:
        """S of every owned element of the output projections, from these statistics; see `score_elements`."""
        return score_elements(model, criterion, fisher, self.fisher, self.columns, self.besides)


class Collector:
    """Collects what `criterion` needs, and inputs for an update where `for_update` asks for them.

    Args:
        diagonals: [H^-1]_pp to use instead of computing them.
        for_update: inputs that are kept beyond what the criterion needs.
    """

    def __init__(
        self,
        model: LiveModel,
        criterion: Criterion,
        settings: CollectorSettings,
        diagonals: dict[str, Tensor] | None = None,
        for_update: InputNeeds | None = None,
    ) -> None:
        self._model, self._criterion, self._settings, self._diagonals = model, criterion, settings, diagonals
        needs = criterion.needs - ({INVERSE_HESSIAN} if diagonals is not None else set())
        own = InputNeeds.of_criterion(frozenset(needs), settings.kept_microbatches)
        update = for_update or InputNeeds()
        wanted = InputNeeds(own.moments, own.stem_moments, max(own.kept, update.kept), update.keep_stem)
        self._watcher = InputWatcher(model, wanted) if wanted else None
        self._fisher = None
        if FISHER in criterion.needs and settings.fisher == "microbatch":
            self._fisher = MicrobatchFisher(model, settings.num_microbatches, settings.fisher_scale)
        self._influence = InfluenceWatcher(model) if settings.block_influence else None

    def arm(self) -> None:
        """Hook the layers; call before the forward passes."""
        for part in (self._fisher, self._watcher, self._influence):
            if part is not None:
                part.arm()

    @torch.no_grad()
    def finish(self) -> Collected:
        """Unhook and reduce over ranks (collective); call when the gradients are reduced."""
        model, diagonals = self._model, self._diagonals
        squares = self._fisher.reduce() if self._fisher is not None else None
        inputs = self._watcher.finish() if self._watcher is not None else None
        kept = inputs.kept if inputs is not None else None
        if INVERSE_HESSIAN in self._criterion.needs and diagonals is None:
            assert kept is not None
            diagonals = inverse_diagonals(kept, model, self._settings.damping)
        moments = inputs.moments if inputs is not None else {}
        besides = self._influence.finish() if self._influence is not None else {}
        return Collected(squares, _columns(model, moments, diagonals or {}), diagonals, kept, besides)


def _columns(model: LiveModel, moments: dict[str, Moments], diagonals: dict[str, Tensor]) -> ColumnStatistics:
    """Statistics by output weight and name."""
    columns: dict[str, dict[str, Tensor]] = {}
    for name, found in moments.items():
        row = model.table.row(name)
        if not row.is_output:
            continue
        columns[name] = {
            INPUT_NORM: found.mean_square.sqrt(),
            INPUT_VARIANCE: found.variance,
            INPUT_MAGNITUDE: found.magnitude,
        }
        entrance = model.table.find(ENTRANCES[row.role], row.layer).name
        if entrance in moments:
            columns[name][STEM_MAGNITUDE] = moments[entrance].magnitude
    for name, diagonal in diagonals.items():
        columns.setdefault(name, {})[INVERSE_HESSIAN] = local_columns(diagonal, model, name, empty=1.0)
    return columns
