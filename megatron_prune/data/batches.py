"""A data set -> micro-batches of one data-parallel rank.

Which samples a global batch holds depends on the seed and on the number of samples consumed before, never on how many
ranks share the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from megatron_prune.errors import UserError


class Dataset(Protocol):
    """What `BatchStream` reads: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class BatchStream:
    """Micro-batches of one data-parallel rank, in order, for ever.

    Of the k-th micro-batch, rank r of d reads the samples consumed_samples + (k * d + r) * micro_batch_size + i: a
    global batch of n samples is the next n of the data set, for every d and micro_batch_size that divide it.

    An item is {tokens, labels: [micro_batch_size, seq_length] int64, loss_mask: the same, fp32}, on the CPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
    ) -> None:
        assert micro_batch_size > 0 and 0 <= data_parallel_rank < data_parallel_size and consumed_samples >= 0
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._stride = data_parallel_size * micro_batch_size
        self._position = consumed_samples

    @property
    def position(self) -> int:
        """Samples that all ranks together have consumed; give it to a new stream as `consumed_samples` to go on."""
        return self._position

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro-batch.

        Raises:
            UserError: the data set is exhausted.
        """
        first = self._position + self._rank * self._micro_batch_size
        end = first + self._micro_batch_size
        if end > len(self._dataset):
            raise UserError(
                f"the data set is exhausted: it holds {len(self._dataset)} samples and sample {end - 1} is wanted; "
                "lower training.train_iters (--train-iters) or give more data"
            )
        samples = [self._dataset[index] for index in range(first, end)]
        self._position += self._stride
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")}
