"""A data set -> micro-batches of one data-parallel rank, read ahead.

Which samples a global batch holds depends on the seed and on the number of samples consumed before, never on how many
ranks share the batch.

torch's DataLoader draws, collates and pins; one thread of this process asks it for the next iteration's micro-batches
while this one computes. The DataLoader's own worker processes are left alone: reading 4 x 2,048 tokens takes 0.4 ms,
and what is slow, a file system that lets us wait, holds no lock meanwhile. Such processes would be forked out of ranks
that communicate, so that they keep the sockets of a rank that was killed open, die of the signals that ask a run to
save (Slurm sends them to every process) and take the rank with them, and tell of damaged data in a traceback.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_prune.errors import UserError
from megatron_prune.runtime.device import DeviceRuntime


class Dataset(Protocol):
    """What `BatchStream` reads: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class BatchStream:
    """Micro-batches of one data-parallel rank, in order, for ever.

    Of the k-th micro-batch, rank r of d reads the samples consumed_samples + (k * d + r) * micro_batch_size + i: a
    global batch of n samples is the next n of the data set, for every d and micro_batch_size that divide it.

    An item is {tokens, labels: [micro_batch_size, seq_length] int64, loss_mask: the same, fp32}, on the CPU.

    Args:
        ahead: micro-batches that are read before they are asked for.
        device: where they will go; for a GPU they lie in page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        ahead: int = 0,
        device: DeviceRuntime | None = None,
    ) -> None:
        assert micro_batch_size > 0 and 0 <= data_parallel_rank < data_parallel_size and consumed_samples >= 0
        self._position, self._stride = consumed_samples, data_parallel_size * micro_batch_size
        self._samples, self._ahead = len(dataset), ahead
        places = range(data_parallel_rank * micro_batch_size, (data_parallel_rank + 1) * micro_batch_size)
        self._last = places[-1]
        starts = range(consumed_samples, self._samples - self._last, self._stride)
        is_cuda = device is not None and device.kind == "cuda"
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=([start + place for place in places] for start in starts),
            collate_fn=_stack,
            pin_memory=is_cuda,
            generator=torch.Generator(),  # or it would draw from the generator that trains
        )
        self._read = partial(next, iter(loader), None)
        self._coming: deque[Future[dict[str, Tensor] | None]] = deque()
        on_its_device = (torch.cuda.set_device, (device.device,)) if device is not None and is_cuda else (None, ())
        self._reader = ThreadPoolExecutor(1, "data", *on_its_device)

    @property
    def position(self) -> int:
        """Samples that all ranks together have consumed; give it to a new stream as `consumed_samples` to go on."""
        return self._position

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next micro-batch; what went wrong when it was read is raised now. Raises UserError: the data set is
        exhausted, or its files are damaged."""
        while len(self._coming) <= self._ahead:
            self._coming.append(self._reader.submit(self._read))
        batch = self._coming.popleft().result()
        if batch is None:
            raise UserError(
                f"the data set is exhausted: it holds {self._samples} samples and sample "
                f"{self._position + self._last} is wanted; lower training.train_iters (--train-iters) or give "
                "more data"
            )
        self._position += self._stride
        return batch


def _stack(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")}
