"""Bytes that one rank sends per iteration, by kind, with ring algorithms.

    Traffic           a line: what, bytes, and when
    training_traffic  what every iteration sends
    pruning_traffic   what iterations that score send on top, and what a compaction moves
    handed_on         elements that change their owner in a compaction; `crossing`: their tensor-parallel rank
    compactions       when there is one on the way to the target
    stage_moves       what layers that change their pipeline stage on that way send

A ring all-reduce over n ranks sends 2 (n - 1) / n of the data, a reduce-scatter or all-gather half of that. Small
messages (losses, norms, decisions) are left out.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megatron_prune.config import Config
from megatron_prune.launch.estimate.activations import FP32, element_size, hessian_traffic, micro_batch_tokens
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.launch.estimate.rank_memory import GradientBuffer, output_elements, stage_buffer, stage_rows
from megatron_prune.launch.estimate.route import Route
from megatron_prune.model.layout import ShardLayout
from megatron_prune.pruning.groups import find_group
from megatron_prune.saliency.scores import score_length

_MOMENTS = 2
_SAMPLED = 16  # owners that are looked at


@dataclass(frozen=True)
class Traffic:
    """`bytes` that one rank sends; `what` says for what and how."""

    what: str
    bytes: float


def half_ring(ranks: int) -> float:
    """Share of the data that a rank sends in a reduce-scatter or all-gather over `ranks`."""
    return (ranks - 1) / ranks


def training_traffic(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> list[Traffic]:
    """What a rank of `stage` sends in every iteration; kinds that send nothing are left out."""
    buffer, size = stage_buffer(config, layout, placement, stage), element_size(config)
    share = half_ring(placement.dp)
    lines = []
    if config.parallel.use_distributed_optimizer:
        lines.append(Traffic("gradients over DP: reduce-scatter, fp32", FP32 * buffer.numel * share))
        lines.append(Traffic("weights over DP: all-gather", size * buffer.numel * share))
    else:
        lines.append(Traffic("gradients over DP: all-reduce, fp32", 2 * FP32 * buffer.numel * share))
    lines.append(Traffic("activations over TP", _tensor_parallel(config, layout, placement, stage)))
    neighbours = (not placement.is_first(stage)) + (not placement.is_last(stage))
    tokens = micro_batch_tokens(config) // (placement.tp if config.parallel.splits_sequences else 1)
    passed = neighbours * placement.micro_batches * tokens * layout.stored.hidden * size
    lines.append(Traffic("activations over PP: to the neighbouring stages", passed))
    if layout.architecture.shape.tie_word_embeddings and placement.pp > 1 and stage in (0, placement.pp - 1):
        embedding = layout.stored.vocab * layout.stored.hidden
        lines.append(Traffic("tied embedding's gradient between first and last stage", FP32 * embedding))
    return [line for line in lines if line.bytes]


def _tensor_parallel(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> float:
    """Counted in passes of one micro-batch's activations [S, B, H] through half a ring.

    Without sequence parallelism each layer all-reduces twice forward and twice backward. With it, all-reduces become a
    reduce-scatter and an all-gather, and the backward pass gathers the two inputs again. Full recomputation repeats the
    forward pass of a layer.
    """
    layers, splits = len(placement.stages[stage]), config.parallel.splits_sequences
    recomputes = config.model.recompute_granularity == "full"
    per_layer = (10 if splits else 8) + (4 if recomputes else 0)
    passes = layers * per_layer
    if placement.is_first(stage):  # embedding: all-reduce, or reduce-scatter and its all-gather backward
        passes += 2
    if placement.is_last(stage):  # output layer: all-reduce backward, or gather, gather again, reduce-scatter
        passes += 3 if splits else 2
    tokens = micro_batch_tokens(config)
    sent = passes * tokens * layout.stored.hidden * element_size(config)
    if layout.architecture.table.norms_followers:  # sums of squares of queries and keys, all-reduced either way
        sent += layers * (6 if recomputes else 4) * 2 * FP32 * tokens
    return placement.micro_batches * sent * half_ring(placement.tp)


def _shares_of_others(
    config: Config, layout: ShardLayout, placement: Placement, stage: int, dp_rank: int | None
) -> int:
    """Of an equal share of the output weights, the elements that others own; of the rank with most without `dp_rank`
    (see `saliency.collector`)."""
    buffer = stage_buffer(config, layout, placement, stage)
    rows = [row for row, _ in stage_rows(layout.architecture.table, placement, stage)]
    is_output = [row.is_output for row in reversed(rows)]
    lengths = [
        sum(b - a for number, a, b in buffer.ranges(rank, placement.dp) if is_output[number])
        for rank in range(placement.dp)
    ]
    ends, share = list(accumulate(lengths, initial=0)), -(-sum(lengths) // placement.dp)

    def sent(rank: int) -> int:
        here = min(share, max(ends[-1] - rank * share, 0))
        own = min(ends[rank + 1], (rank + 1) * share) - max(ends[rank], rank * share)
        return here - max(own, 0)

    return sent(dp_rank) if dp_rank is not None else max(map(sent, range(placement.dp)))


def handed_on(before: GradientBuffer, after: GradientBuffer, dp: int, dp_rank: int | None = None) -> float:
    """Elements that owner `dp_rank` (None: of several the one with most) hands to others when `before` becomes `after`;
    what leaves a parameter is taken to leave evenly."""
    most = 0.0
    for rank in range(0, dp, -(-dp // _SAMPLED)) if dp_rank is None else (dp_rank,):
        kept, sent = {number: (a, b) for number, a, b in after.ranges(rank, dp)}, 0.0
        for number, *held in before.ranges(rank, dp):
            (old, new), span = (buffer.size(number) for buffer in (before, after)), kept.get(number, (0, 0))
            a, b = max(held[0] / old, span[0] / new), min(held[1] / old, span[1] / new)
            sent += new * ((held[1] - held[0]) / old - max(b - a, 0.0))
        most = max(most, sent)
    return most


def crossing(layout: ShardLayout, compacted: ShardLayout, placement: Placement, stage: int) -> float:
    """Elements that a rank in the middle hands to its tensor-parallel neighbours when `layout` becomes `compacted`.

    Which units leave is taken for chance: as many more or fewer than their share lie on one side of a border as a
    binomial number scatters, and so many change sides. Clusters stay whole.
    """
    table, middle, elements = layout.architecture.table, placement.tp // 2 / placement.tp, 0.0
    for kind in table.kinds:
        if kind.axis is None or kind.follows is not None or compacted.width(kind) >= layout.width(kind):
            continue
        unit = next((other for other in table.kinds if other.follows == kind), kind)
        units, left = (of.architecture.width(unit) for of in (layout, compacted))
        crossed = math.sqrt(2 / math.pi * (units - left) * left / units * middle * (1 - middle))
        parts = ((row, part) for row, _ in stage_rows(table, placement, stage) for part in row.parts)
        held = (row.lengths(part, layout, 0) for row, part in parts if {kind, unit} & {dim.kind for dim in part.dims})
        elements += crossed * sum(map(math.prod, held)) / layout.width(unit)
    return elements


def pruning_traffic(
    config: Config,
    layout: ShardLayout,
    placement: Placement,
    stage: int,
    needs_fisher: bool,
    compacted: ShardLayout | None = None,
    dp_rank: int | None = None,
) -> tuple[list[Traffic], Traffic]:
    """(what an iteration that scores sends on top, what one compaction sends) for a rank of `stage`.

    Args:
        compacted: the layout that a compaction of `layout` brings; None: nothing is compacted. dp_rank: which
            rank; None: the one that sends most.
    """
    sharded, numbers = config.parallel.use_distributed_optimizer, score_length(layout.architecture)
    model_parallel = placement.tp * placement.pp
    share = half_ring(model_parallel) + (half_ring(placement.dp) if sharded else 0)
    lines = [Traffic(f"scores: {numbers:,} numbers, all-reduce, fp32", 2 * FP32 * numbers * share)]
    if needs_fisher:
        outputs = output_elements(layout, placement, stage) * half_ring(placement.dp)
        how = "reduce-scatter, shares to their owners" if sharded else "all-reduce"
        sent = outputs + _shares_of_others(config, layout, placement, stage, dp_rank) if sharded else 2 * outputs
        lines.append(Traffic(f"Fisher of the output projections over DP: {how}, fp32", FP32 * sent))
    hessians = hessian_traffic(config, layout, placement, stage)
    lines.append(
        Traffic("Hessians (of an FFN removal, or of all layers for obc): inputs over TP, sums over DP", hessians)
    )
    moved, state = 0.0, FP32 * (_MOMENTS + config.training.bf16)
    if compacted is not None:
        per_element = element_size(config) + state / (placement.dp if sharded else 1)
        moved = per_element * crossing(layout, compacted, placement, stage)
        if sharded:  # flat ranges are cut at other places then
            before, after = (stage_buffer(config, shards, placement, stage) for shards in (layout, compacted))
            moved += state * handed_on(before, after, placement.dp, dp_rank)
    what = "one compaction: optimizer state that changes its owner, units that change their TP rank (by chance)"
    return [line for line in lines if line.bytes], Traffic(what, moved)


def compactions(layout: ShardLayout, route: Route, iterations: np.ndarray) -> list[int]:
    """Iterations of `route` after which stored widths shrink, ascending.

    Args:
        layout: at the start.
        iterations: `removal_iters` of the route.
    """
    kinds = {group.name: group.kind for group in route.rules.kinds(route.source)}
    units = {group.name: group.units(route.source, route.rules) for group in route.rules.kinds(route.source)}
    multiples = {name: layout.quantum(kind) * kind.ranks(layout.tp) for name, kind in kinds.items()}
    width = {name: route.source.width(kind) for name, kind in kinds.items()}
    due = set[int]()
    for name, iteration in zip(route.kinds, iterations, strict=True):
        before = -(-width[name] // multiples[name])
        width[name] -= units[name]
        if -(-width[name] // multiples[name]) < before:
            due.add(int(iteration))
    return sorted(due)


def stage_moves(
    config: Config, layout: ShardLayout, placement: Placement, route: Route, iterations: np.ndarray
) -> Traffic:
    """What a rank of the busiest stage sends on the whole of `route` for layers that go to another pipeline stage:
    weights from each rank to its counterpart, optimizer state from its owners.

    Args:
        layout: at the start. placement: of it. iterations: `removal_iters` of the route.
    """
    names = {name for name in route.kinds if len(find_group(name).shrunk(route.source, 1, route.rules).layers)
             < len(route.source.layers)}  # fmt: skip
    optimizer = FP32 * (_MOMENTS + config.training.bf16)
    sharded = config.parallel.use_distributed_optimizer
    per_element = element_size(config) + optimizer / (placement.dp if sharded else 1)
    moved, sent = 0, Counter[int]()
    for last in (number for number, name in enumerate(route.kinds, 1) if name in names):
        together = int(np.searchsorted(iterations, iterations[last - 1], side="right"))  # compacted at its end
        after = ShardLayout.pack(route.after(together), layout.tp, layout.quanta)
        later = placement.of(config, after.layers)
        homes = {layer: stage for stage, layers in enumerate(later.stages) for layer in layers}
        for stage, layers in enumerate(placement.stages):
            for layer in layers:
                if homes.get(layer, stage) != stage:
                    moved += 1
                    sent[stage] += sum(
                        math.prod(row.local_shape(after)) for row in after.architecture.table.rows if row.layer == layer
                    )
        placement = later
    what = f"layers that change their pipeline stage ({moved} times, if it is the last ones that leave)"
    return Traffic(what, per_element * max(sent.values(), default=0))
