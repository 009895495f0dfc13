"""Bytes that one rank holds, by kind, at the stored widths of a layout.

    rank_memory        all kinds, for one pipeline stage and data-parallel rank
    fullest_rank       the rank that holds the most
    gradient_buffer    megatron-core's contiguous buffer: padding, buckets, who owns what

State (weights, gradients, optimizer) is exact; activations come from `activations`. Not counted: what the allocator
loses, the collectives' own buffers, the CUDA context.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_prune.config import Config
from megatron_prune.launch.estimate.activations import (
    BF16,
    FP32,
    element_size,
    hessian_memory,
    micro_batch_tokens,
    recomputed_activations,
    saved_activations,
)
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.table import EMBEDDING, Param, ParamTable

_MOMENTS = 2
_PARAM_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128  # elements; megatron-core's, with the distributed optimizer
_LEAST_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000  # megatron-core's default bucket, in elements


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Args:
        stage, dp_rank: which rank (its tensor-parallel siblings hold as much).
        weights: in the training dtype, with the padding of buffers and empty slots.
        gradients: the fp32 buffer.
        optimizer: Adam's moments and, with bf16, fp32 main weights; one fp32 step count per tensor.
        activations: what the backward passes of all micro-batches in flight need, at its peak.
        temporary: the largest gradient before it is added to the buffer, the logits' gradient, gathered sequences.
        fisher: squared micro-batch gradients of the output projections, on iterations that score.
        scoring: everything held besides state while scores are computed (activations are free then).
        teacher: weights of a frozen teacher, and what its logits need beside the student's.
        kept: inputs of layers, on iterations that need Hessians. hessian: one of them, while it is factorised.
    """

    stage: int
    dp_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    fisher: int
    scoring: int
    teacher: int = 0
    kept: int = 0
    hessian: int = 0

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def training(self) -> int:
        """Peak of an iteration that does not score."""
        return self.state + self.teacher + self.activations + self.temporary

    @property
    def peak(self) -> int:
        """Peak of an iteration that scores."""
        passes = self.activations + self.temporary + self.fisher
        return self.state + self.teacher + self.kept + max(passes, self.scoring + self.hessian)


@dataclass(frozen=True)
class GradientBuffer:
    """megatron-core's flat buffer of one rank, in elements.

    Args:
        spans: per parameter, in buffer order, (start, end).
        buckets: (start, end), padding included.
    """

    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Elements in all, padding included."""
        return self.buckets[-1][1]

    @property
    def unpadded(self) -> int:
        """Elements that belong to parameters."""
        return sum(end - start for start, end in self.spans)

    def size(self, number: int) -> int:
        """Elements of a parameter by its number in `spans`."""
        first, last = self.spans[number]
        return last - first

    def owned(self, dp_rank: int, dp: int) -> list[int]:
        """Elements of each parameter of which `dp_rank` owns some, when every bucket is cut into `dp` equal shards."""
        return [last - first for _, first, last in self.ranges(dp_rank, dp)]

    def ranges(self, dp_rank: int, dp: int) -> list[tuple[int, int, int]]:
        """(number of the parameter in `spans`, first, past-last element of it) of what `dp_rank` owns."""
        found = []
        for first, last in self.buckets:
            shard = (last - first) // dp
            start, end = first + dp_rank * shard, first + (dp_rank + 1) * shard
            for number in range(bisect_right(self._ends, start), len(self.spans)):
                a, b = self.spans[number]
                if a >= end:
                    break
                found.append((number, max(start, a) - a, min(end, b) - a))
        return found

    @cached_property
    def _ends(self) -> list[int]:
        return [end for _, end in self.spans]


def gradient_buffer(
    numels: list[int], shared: list[bool], dp: int, is_padded: bool, bucket: int | None
) -> GradientBuffer:
    """Lay parameters out as megatron-core 0.16 does: last one first, cut into buckets of at least `bucket` elements.

    Args:
        numels: elements per parameter, in model order.
        shared: parameters that get a bucket of their own when padded (tied embeddings on two pipeline stages).
        is_padded: with the distributed optimizer, parameters start at multiples of 64 elements and buckets end at
            multiples of 128 and `dp`.
        bucket: None for a single bucket.
    """
    multiple = math.lcm(dp, _BUCKET_ALIGNMENT)
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    position = bucket_start = 0

    def close(end: int) -> int:
        padded = _round_up(end, multiple) if is_padded else end
        buckets.append((bucket_start, padded))
        return padded

    for numel, is_shared in zip(reversed(numels), reversed(shared), strict=True):
        alone = is_shared and is_padded
        start = _round_up(position, _PARAM_ALIGNMENT) if is_padded else position
        if alone and position > bucket_start:
            start = bucket_start = close(start)
        position = start + numel
        spans.append((start, position))
        if alone or (bucket is not None and position - bucket_start >= bucket):
            position = bucket_start = close(position)
    if position > bucket_start:
        close(position)
    return GradientBuffer(tuple(spans), tuple(buckets))


def stage_rows(table: ParamTable, placement: Placement, stage: int) -> Iterator[tuple[Param, bool]]:
    """(row, whether it is a tied embedding that two stages hold) of each parameter of `stage`, in model order."""
    is_shared = table.shape.tie_word_embeddings and placement.pp > 1
    for row in table.rows:
        if row.layer is not None:
            if row.layer in placement.stages[stage]:
                yield row, False
        elif row.role == EMBEDDING:
            if placement.is_first(stage):
                yield row, is_shared
        elif placement.is_last(stage):
            yield row, False
    if is_shared and placement.is_last(stage):
        yield table.find(EMBEDDING), True


def stage_buffer(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> GradientBuffer:
    """The gradient buffer of a rank of `stage`."""
    table, parallel = layout.architecture.table, config.parallel
    rows = list(stage_rows(table, placement, stage))
    numels = [math.prod(row.local_shape(layout)) for row, _ in rows]
    bucket = None
    if parallel.overlap_grad_reduce and stage == 0:  # later stages reduce in one piece
        bucket = parallel.ddp_bucket_size or max(_LEAST_BUCKET, _BUCKET_PER_RANK * placement.dp)
    shared = [is_shared for _, is_shared in rows]
    return gradient_buffer(numels, shared, placement.dp, parallel.use_distributed_optimizer, bucket)


def output_elements(layout: ShardLayout, placement: Placement, stage: int) -> int:
    """Elements of the output projections (where saliency is computed) that a rank of `stage` stores."""
    rows = stage_rows(layout.architecture.table, placement, stage)
    return sum(math.prod(row.local_shape(layout)) for row, _ in rows if row.is_output)


def teacher_memory(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> int:
    """Bytes on a rank of `stage` for a frozen teacher of this layout (see `training.distillation`).

    On the last stage: its logits in the training dtype and four fp32 tables of a micro-batch's logits; with several
    stages also the hidden states of all micro-batches.
    """
    size, tokens = element_size(config), micro_batch_tokens(config)
    rows = stage_rows(layout.architecture.table, placement, stage)
    total = size * sum(math.prod(row.local_shape(layout)) for row, _ in rows)
    if placement.is_last(stage):
        total += tokens * layout.stored.vocab * (size + 4 * FP32)
        if placement.pp > 1:
            split = placement.tp if config.parallel.splits_sequences else 1
            total += size * layout.stored.hidden * placement.micro_batches * tokens // split
    return total


def rank_memory(
    config: Config,
    layout: ShardLayout,
    placement: Placement,
    stage: int,
    dp_rank: int,
    needs_fisher: bool = False,
    teacher: ShardLayout | None = None,
) -> RankMemory:
    """What the rank at (`stage`, `dp_rank`) holds.

    Args:
        needs_fisher: whether scoring accumulates squared gradients per micro-batch. teacher: of the frozen one.
    """
    buffer = stage_buffer(config, layout, placement, stage)
    width, sharded = element_size(config), config.parallel.use_distributed_optimizer
    if sharded:
        owned = buffer.owned(dp_rank, placement.dp)
    else:
        owned = [end - start for start, end in buffer.spans]
    per_element = FP32 * (_MOMENTS + config.training.bf16)
    outputs = output_elements(layout, placement, stage) * FP32
    owned_outputs = -(-outputs // placement.dp) if sharded else outputs
    fisher = outputs if needs_fisher else 0
    sent = fisher + owned_outputs if needs_fisher and sharded and placement.dp > 1 else 0
    kept, hessian = hessian_memory(config, layout, placement, stage)
    saved = saved_activations(config, layout, placement, stage) * placement.in_flight(stage)
    return RankMemory(
        stage=stage,
        dp_rank=dp_rank,
        weights=width * (buffer.numel if sharded else buffer.unpadded),
        gradients=FP32 * buffer.numel,
        optimizer=per_element * sum(owned) + FP32 * len(owned),
        activations=saved + recomputed_activations(config, layout, placement, stage),
        temporary=_temporary(config, layout, placement, stage, buffer),
        fisher=fisher,
        scoring=fisher + sent + owned_outputs,
        teacher=0 if teacher is None else teacher_memory(config, teacher, placement, stage),
        kept=kept,
        hessian=hessian,
    )


def fullest_rank(
    config: Config,
    layout: ShardLayout,
    placement: Placement,
    needs_fisher: bool = False,
    teacher: ShardLayout | None = None,
) -> RankMemory:
    """The rank with the highest peak."""
    dp_ranks = range(placement.dp if config.parallel.use_distributed_optimizer else 1)
    ranks = []
    for stage in range(placement.pp):
        buffer = stage_buffer(config, layout, placement, stage)
        owned = [sum(buffer.owned(rank, placement.dp)) for rank in dp_ranks]
        ranks.append(rank_memory(config, layout, placement, stage, owned.index(max(owned)), needs_fisher, teacher))
    return max(ranks, key=lambda rank: rank.peak)


def _temporary(config: Config, layout: ShardLayout, placement: Placement, stage: int, buffer: GradientBuffer) -> int:
    size, tokens = element_size(config), micro_batch_tokens(config)
    total = size * max(end - start for start, end in buffer.spans)
    if placement.is_last(stage) and config.training.bf16:  # the fp32 logits are counted as activations
        total += BF16 * layout.stored.vocab * tokens
    if config.parallel.splits_sequences:
        total += size * layout.stored.hidden * tokens
    return total


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
