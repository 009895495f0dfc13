"""What of the optimizer this rank owns, the same view for every optimizer megatron-core builds.

    OwnedShard      a flat range of one local parameter with its main weight, gradient and Adam moments
    owned_shards    all of them; `owned_spans`: what each rank of a distributed optimizer owns
    blocks          a flat range of a matrix as up to three rectangles; `rectangles`: some of its rows and columns
    steps_taken     Adam's count, for bias correction
    forget          Adam as before its first step

Without the distributed optimizer a rank owns its parameters whole. With it, ownership is by flat ranges of a buffer
that cross parameter borders: a rank may own the middle of a row, or nothing of a parameter at all.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_prune.model.llama import NamedRow
from megatron_prune.model.table import Param, Runs

MOMENTS = ("exp_avg", "exp_avg_sq")
Span = tuple[int, int]  # a flat range: first element, past-last
Spans = Mapping[int, Span]  # of a parameter: by owner, ascending, what that owns; who owns nothing is not named
NOTHING: Span = (0, 0)


@dataclass(frozen=True)
class OwnedShard:
    """Flat range [start, end) of a local parameter, as this rank's optimizer steps it.

    Args:
        name: Megatron's parameter name (see `named_rows`).
        parameter: the whole local model weight.
        row: its row of the table.
        key: the optimizer's own tensor, under which its state is kept.
    """

    name: str
    parameter: torch.nn.Parameter
    row: Param
    start: int
    end: int
    key: Tensor
    state: dict[str, Tensor]

    @property
    def main(self) -> Tensor:
        """Flat main weight of the range; a view of `parameter` where there is no separate fp32 copy."""
        return self.key.data.view(-1)

    @property
    def has_separate_main(self) -> bool:
        """True when the main weight is an fp32 copy (bf16 training), False when it is the model weight itself."""
        return self.parameter.dtype != torch.float32

    @property
    def grad(self) -> Tensor:
        """Flat reduced gradient of the range (valid between gradient reduction and the next zero_grad)."""
        return self.parameter.main_grad.view(-1)[self.start : self.end]  # type: ignore[attr-defined]

    @property
    def moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps for every element of the range, flat: Adam's moments, and of another optimizer
        whatever it has in the weight's shape; empty before the first step."""
        return {name: kept.view(-1) for name, kept in self.state.items() if _is_per_element(kept, self.key)}

    def blocks(self) -> Iterator[tuple[int, int, slice, slice]]:
        """(offset in the range, length, rows, columns) of the rectangles that this range is made of; see `blocks`."""
        return blocks(self.start, self.end, tuple(self.parameter.shape))

    def views(self, gone: tuple[Runs, ...]) -> list[Tensor]:
        """What the optimizer keeps for the element positions `gone` (per dim of the parameter): views of the moments
        and of a separate main weight."""
        if not any(gone):
            return []
        tensors = [kept for kept in self.state.values() if _is_per_element(kept, self.key)]
        tensors += [self.key] if self.has_separate_main else []
        found = list(rectangles(self.start, self.end, tuple(self.parameter.shape), gone))
        return [t.as_strided(size, stride, t.storage_offset() + at) for at, size, stride in found for t in tensors]


def _is_per_element(kept: object, key: Tensor) -> bool:
    return isinstance(kept, Tensor) and kept.shape == key.shape and kept.dim() > 0


def blocks(start: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int, slice, slice]]:
    """Cut the flat range [start, end) of a row-major matrix into rectangles.

    Yields:
        (offset, length, rows, columns): `range_tensor[offset : offset + length]` is the rectangle, row-major. A vector
        counts as a matrix of one column.
    """
    columns = shape[1] if len(shape) > 1 else 1
    position = start
    while position < end:
        row, column = divmod(position, columns)
        if column or end - position < columns:
            stop = min(end, (row + 1) * columns)
            span = (slice(row, row + 1), slice(column, column + stop - position))
        else:
            rows = (end - position) // columns
            stop = position + rows * columns
            span = (slice(row, row + rows), slice(0, columns))
        yield position - start, stop - position, *span
        position = stop


def rectangles(
    start: int, end: int, shape: tuple[int, ...], gone: tuple[Runs, ...]
) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Where the positions `gone` (per dim) of a row-major matrix of `shape` lie inside its flat range [start, end).

    Yields:
        (offset in the range, size, stride) of a rectangle; those of rows and of columns overlap.
    """
    for offset, _, rows, columns in blocks(start, end, shape):
        width = columns.stop - columns.start
        for dim, (span, across) in enumerate(((rows, columns), (columns, rows))[: len(gone)]):
            for first, last in gone[dim]:
                a, b = max(first, span.start) - span.start, min(last, span.stop) - span.start
                if a < b:
                    size = (b - a, across.stop - across.start)
                    yield offset + (a if dim else a * width), (size if dim == 0 else size[::-1]), (width, 1)


def owned_shards(rows: Iterable[NamedRow], optimizer: MegatronOptimizer) -> Iterator[OwnedShard]:
    """What this rank's `optimizer` steps, in the order of `rows`; a parameter of which it owns nothing is left out."""
    (inner,) = optimizer.chained_optimizers
    for name, parameter, row in rows:
        start, end = 0, parameter.numel()
        if isinstance(inner, DistributedOptimizer):
            if parameter not in inner.model_param_group_index_map:
                continue
            group, order = inner.model_param_group_index_map[parameter]
            key = inner.optimizer.param_groups[group]["params"][order]
            buffer, dtypes, bucket = inner.model_param_gbuf_map[parameter]
            span = inner.gbuf_ranges[buffer][dtypes][bucket]["param_map"][parameter]["param"]
            start, end = span.start, span.end
        else:
            key = getattr(parameter, "main_param", None)
            key = parameter if key is None else key
        yield OwnedShard(name, parameter, row, start, end, key, inner.optimizer.state[key])


def owned_spans(rows: Iterable[NamedRow], ddp: DistributedDataParallel, owners: int) -> dict[str, Spans]:
    """By name, the flat ranges of each parameter that the ranks of a distributed optimizer own: every bucket of `ddp`
    is cut into as many equal shards. No communication."""
    found: dict[torch.nn.Parameter, Spans] = {}
    for buffer in ddp.buffers:
        for parameter, (first, last, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            shard, start = bucket.grad_data.numel() // owners, bucket.offset
            found[parameter] = {
                owner: (max(start + owner * shard - first, 0), min(start + (owner + 1) * shard, last) - first)
                for owner in range((first - start) // shard, -((start - last) // shard))
            }
    return {name: found[parameter] for name, parameter, _ in rows}


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Adam steps that this rank's `optimizer` has counted; 0 before the first, or where it owns nothing."""
    (inner,) = optimizer.chained_optimizers
    steps = [int(group["step"]) for group in inner.optimizer.param_groups if "step" in group]
    steps += [int(state["step"]) for state in inner.optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def set_steps(optimizer: MegatronOptimizer, shards: Iterable[OwnedShard], step: int) -> None:
    """Continue the bias correction at `step`; call after the moments of `shards` were set. Does nothing for step 0."""
    if step == 0:
        return
    (inner,) = optimizer.chained_optimizers
    if isinstance(inner.optimizer, torch.optim.AdamW):
        for shard in shards:
            shard.state["step"] = torch.tensor(float(step), dtype=torch.float32, device=shard.key.device)
    else:  # TransformerEngine's and apex's FusedAdam count per group
        for group in inner.optimizer.param_groups:
            group["step"] = step


def forget(optimizer: MegatronOptimizer) -> None:
    """Drop this rank's moments and the count, as before the first step; main weights stay."""
    (inner,) = optimizer.chained_optimizers
    inner.optimizer.state.clear()
    for group in inner.optimizer.param_groups:
        group.pop("step", None)


def set_moments(shard: OwnedShard, moments: dict[str, Tensor]) -> None:
    """Give `shard` its Adam moments (flat fp32 tensors of its length)."""
    for name, value in moments.items():
        assert value.numel() == shard.end - shard.start
        shard.state[name] = value.reshape(shard.key.shape).contiguous()
