"""From --data-path to micro-batches, through megatron-core's GPT data sets.

    parse_blend       "w1 p1 w2 p2" or one prefix -> `Blend`, its files checked
    check_vocabulary  tokenizer, data and model must agree about ids
    build_datasets    `Blend` -> (train, valid, test), megatron-core's data sets
    BatchStream       a data set -> micro-batches of one data-parallel rank

A sample is `seq_length` tokens and their successors, cut from documents that were shuffled and laid end to end; epochs
follow one another without a gap. Which samples a global batch holds depends on the seed and on the number of samples
consumed before, never on how many ranks share the batch.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_prune.data.indexed import IndexedData, inspect
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")
# A tokenizer may be smaller than its model by padding; by more than both of these it is another model's.
_PADDING_IDS, _PADDING_SHARE = 1024, 0.1
_LEAST_SURPLUS = 0.005  # megatron-core's own default


@dataclass(frozen=True)
class Blend:
    """Data sets to draw samples from.

    Attributes:
        data: the data sets, whole.
        weights: shares of the samples, positive, not normalised; None for a single data set.
    """

    data: tuple[IndexedData, ...]
    weights: tuple[float, ...] | None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Paths without .bin and .idx."""
        return tuple(data.prefix for data in self.data)


class Dataset(Protocol):
    """What `BatchStream` reads: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


# The blend ------------------------------------------------------------------------------------------------------------


def parse_blend(text: str, vocab_size: int | None = None, field: str = "data.data_path (--data-path)") -> Blend:
    """Read a blend as users write it, and check every data set in it.

    Args:
        text: one prefix, or weights and prefixes in turn, parted by white space.
        vocab_size: the model's number of ids; data with an id beyond it is refused.
        field: what errors call the option.

    Raises:
        UserError: weights and prefixes do not alternate, a weight is no positive number, files are missing or
            truncated, or an id is beyond `vocab_size`.
    """
    words = text.split()
    if not words:
        raise UserError(f"{field}: is empty; give the prefix of a .bin/.idx data set, or a blend")
    weights = None if len(words) == 1 else tuple(_weight(word, field) for word in words[::2])
    prefixes = words if weights is None else words[1::2]
    if weights is not None and len(weights) != len(prefixes):
        raise UserError(
            f'{field}: the last weight, "{words[-1]}", has no prefix; give "weight1 prefix1 weight2 prefix2"'
        )
    blend = Blend(tuple(inspect(prefix) for prefix in prefixes), weights if len(prefixes) > 1 else None)
    if vocab_size is not None:
        for data in blend.data:
            _check_ids(data, vocab_size)
    return blend


def _weight(word: str, field: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        raise UserError(
            f'{field}: expected a weight, got "{word}"; give one prefix, or "weight1 prefix1 weight2 prefix2"'
        ) from None
    if not 0 < weight < math.inf:
        raise UserError(f"{field}: the weight {word} is not above 0")
    return weight


def _check_ids(data: IndexedData, vocab_size: int) -> None:
    if data.max_token_id >= vocab_size:
        raise UserError(
            f"{data.prefix}: holds token id {data.max_token_id}, but the model's vocabulary is {vocab_size}; "
            "preprocess the data with the model's own tokenizer"
        )


def check_vocabulary(tokenizer: Tokenizer, blend: Blend, vocab_size: int) -> None:
    """Check that tokenizer, data and model belong together.

    A model may have more ids than its tokenizer, as padding: up to 1024 or a tenth of them. Data made with a tokenizer
    of the same size but another content is warned about only, since two files may hold the same tokenizer.

    Args:
        vocab_size: the model's number of ids, without what tensor parallelism pads.

    Raises:
        UserError: they do not.
    """
    unused = vocab_size - tokenizer.vocab_size
    if unused < 0 or unused > max(_PADDING_IDS, _PADDING_SHARE * vocab_size):
        raise UserError(
            f"data.tokenizer_model (--tokenizer-model): {tokenizer.path} has {tokenizer.vocab_size} ids, the model "
            f"{vocab_size}; use the model's own tokenizer"
        )
    for data in blend.data:
        _check_ids(data, vocab_size)
        made = data.metadata
        if made is None:
            logger.info("%s has no .json beside it: which tokenizer made it is not known", data.prefix)
        elif made.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{data.prefix}: was made with a tokenizer of {made.vocab_size} ids ({made.tokenizer_path}), "
                f"{tokenizer.path} has {tokenizer.vocab_size}; preprocess the data again"
            )
        elif (made.tokenizer_type, made.tokenizer_fingerprint) != (tokenizer.kind, tokenizer.fingerprint):
            logger.warning(
                "%s was made with the tokenizer %s, which is another file than %s; see that both give the same ids",
                data.prefix,
                made.tokenizer_path,
                tokenizer.path,
            )


# megatron-core's data sets --------------------------------------------------------------------------------------------


def build_datasets(
    blend: Blend,
    tokenizer: Tokenizer,
    seq_length: int,
    samples: tuple[int | None, int | None, int | None],
    split: str,
    seed: int,
    cache_path: str | None = None,
    is_built_on_rank: Callable[[], bool] = lambda: True,
    eod_mask_loss: bool = False,
) -> tuple[Any, Any, Any]:
    """Build the training, validation and test data sets. Called by all ranks; without torch.distributed, by one.

    Validation data of its own is built by a second call with `split="0,1,0"`.

    Args:
        blend, tokenizer: where samples come from, and whose end-of-document id they hold.
        seq_length: tokens of a sample.
        samples: wanted per split; 0 builds none, None takes one epoch (a single data set only).
        split: shares of the documents of every data set for training, validation and test, such as "969,30,1".
        seed: of the shuffles.
        cache_path: folder for the shuffled indices, which all ranks see; None: `PREFIX.cache` beside the first data
            set. Indices of data that was made anew are not mistaken for the old ones.
        is_built_on_rank: whether this rank reads data; the others get None. Rank 0 should.
        eod_mask_loss: leave out of the loss what is predicted at end-of-document tokens.

    Returns:
        Per split a data set of at least the samples wanted, or None: no share, no samples wanted, no data read here.
        An item holds tokens, labels [seq_length] int64 and loss_mask [seq_length] fp32.

    Raises:
        UserError: a share without documents, an epoch of less than one sample, a cache folder that is not writable.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    with _quiet("megatron.core.datasets"):
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend=(list(blend.prefixes), None if blend.weights is None else list(blend.weights)),
            split=_plain_split(split),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=eod_mask_loss,
            create_attention_mask=False,
        )
        # What is not wanted is taken out: in a split without documents megatron-core would search for ever.
        parts = [part if count != 0 else None for part, count in zip(config.split_matrix, samples)]
        _check_documents(blend, parts, samples, seq_length, split)
        sizes = [0 if part is None else count for part, count in zip(parts, samples)]
        config.split_matrix = parts
        config.path_to_cache = _cache_folder(blend, cache_path)
        config.mid_level_dataset_surplus = _surplus(blend.weights, sizes)
        datasets = _builder_class()(GPTDataset, sizes, is_built_on_rank, config).build()
    for name, dataset in zip(SPLITS, datasets):
        if dataset is not None:
            logger.info("%s data: %d samples of %d tokens", name, len(dataset), seq_length)
    train, valid, test = datasets
    return train, valid, test


def _builder_class() -> Any:
    """megatron-core's builder, able to blend without torch.distributed: it asks for a rank to write the cache."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    class Builder(BlendedMegatronDatasetBuilder):
        @staticmethod
        def build_generic_dataset(cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
            if cls is BlendedDataset and not torch.distributed.is_initialized():
                in_memory = copy.copy(args[-1])
                in_memory.path_to_cache = None
                args = (*args[:-1], in_memory)
            return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)

    return Builder


def _plain_split(split: str) -> str:
    """The three shares written without signs and exponents, which megatron-core would not read."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or sum(shares) < 1e-9:
        raise UserError(f'data.split (--split): expected three shares such as 969,30,1, got "{split}"')
    return ",".join(f"{share:.15f}" for share in shares)


def _check_documents(
    blend: Blend,
    parts: Sequence[tuple[float, float] | None],
    samples: Sequence[int | None],
    seq_length: int,
    split: str,
) -> None:
    """Every part (start, end as fractions) must hold documents of every data set, a whole epoch at least one sample."""
    for part, count, name in zip(parts, samples, SPLITS):
        if part is None:
            continue
        if count is None and blend.weights is not None:
            raise UserError(f"data.data_path (--data-path): one epoch of {name} data needs a single data set, no blend")
        for data in blend.data:
            start, end = (round(border * data.sequences) for border in part)  # as megatron-core rounds
            if start == end:
                raise UserError(
                    f"data.split (--split) {split}: leaves no document of {data.prefix} for {name}, which has "
                    f"{data.sequences} in all; give it a larger share or more documents"
                )
            if count is None and int(data.lengths[start:end].sum()) <= seq_length:
                raise UserError(
                    f"data.split (--split) {split}: the {name} part of {data.prefix} is shorter than one sample "
                    f"(seq_length {seq_length} + 1 tokens)"
                )


def _surplus(weights: Sequence[float] | None, sizes: Sequence[int | None]) -> float:
    """How many more samples than its share every data set of a blend must hold, as a fraction.

    megatron-core rounds each data set's samples up, draws the sum of them in proportion to the weights, and fails when
    one of them runs out. Drawn so, n samples take at most w * (n - 1) + 1 from a data set of share w.
    """
    surplus = _LEAST_SURPLUS
    shares = [weight / math.fsum(weights) for weight in weights] if weights else []
    for size in sizes:
        if shares and size:
            targets = [math.ceil(size * share) for share in shares]
            drawn = [share * (sum(targets) - 1) + 1 for share in shares]
            surplus = max(surplus, *(most / target - 1 for most, target in zip(drawn, targets)))
    return surplus


def _cache_folder(blend: Blend, cache_path: str | None) -> str:
    """The folder for this blend's indices; a data set that was made anew has another one. Made if need be."""
    digest = hashlib.sha256("".join(data.fingerprint for data in blend.data).encode()).hexdigest()[:16]
    folder = os.path.join(cache_path or f"{blend.prefixes[0]}.cache", digest)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.data_cache_path (--data-cache-path): {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"data.data_cache_path (--data-cache-path): {folder} cannot be written; name another folder")
    return folder


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's chatter below errors out of the log."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


# Micro-batches --------------------------------------------------------------------------------------------------------


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
