"""From --data-path to megatron-core's GPT data sets.

    blend_words       "w1 p1 w2 p2" or one prefix -> its words, quoted ones whole
    read_weight       one of its weights
    parse_blend       the same -> `Blend`, its files checked
    check_vocabulary  tokenizer, data and model must agree about ids
    build_datasets    `Blend` -> (train, valid, test), megatron-core's data sets

A sample is `seq_length` tokens and their successors, cut from documents that were shuffled and laid end to end; epochs
follow one another without a gap.
"""

import hashlib
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_prune.data.guarded import guarded, raise_file_limit
from megatron_prune.data.index_cache import FIELD as CACHE_FIELD
from megatron_prune.data.indexed import IndexedData, bin_path, idx_path, inspect, metadata_path
from megatron_prune.data.tokenizer import Tokenizer, check_rows
from megatron_prune.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

SPLITS = ("training", "validation", "test")
# A tokenizer may be smaller than its model by padding; by more than both of these it is another model's.
_PADDING_IDS, _PADDING_SHARE = 1024, 0.1
_LARGEST_WEIGHT = 1e15  # and its reciprocal the least: a share must not vanish beside the others
_LEAST_SURPLUS = 0.005  # megatron-core's own default


@dataclass(frozen=True)
class Blend:
    """Data sets to draw samples from.

    Attributes:
        data: the data sets, whole.
        weights: shares of the samples, positive, not normalised; None for a single data set.
        vocab_size: the model's number of ids, which no id may reach; None: not known.
    """

    data: tuple[IndexedData, ...]
    weights: tuple[float, ...] | None
    vocab_size: int | None = None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Paths without .bin and .idx."""
        return tuple(data.prefix for data in self.data)


# The blend ------------------------------------------------------------------------------------------------------------


def blend_words(text: str, field: str = "data.data_path (--data-path)") -> list[str]:
    """A blend's weights and prefixes, in turn, or one prefix alone.

    A text that is a data set's prefix as it stands is one, spaces and all; otherwise words are parted by white space,
    and one that holds white space itself is quoted as in a shell. Raises UserError: a quotation does not end."""
    prefix = text.strip()
    if os.path.exists(bin_path(prefix)) or os.path.exists(idx_path(prefix)):
        return [prefix]
    if not set(text) & set("\"'\\"):
        return text.split()
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{field}: {text}: {str(error).lower()}; quote a prefix that holds spaces or quotes") from error


def parse_blend(text: str, vocab_size: int | None = None, field: str = "data.data_path (--data-path)") -> Blend:
    """Read a blend as users write it, and check every data set in it.

    Args:
        text: one prefix, or weights and prefixes in turn (see `blend_words`).
        vocab_size: the model's number of ids; data with an id beyond it is refused.
        field: what errors call the option.

    Raises:
        UserError: weights and prefixes do not alternate, a weight is no positive number, files are missing, truncated
            or inconsistent, or an id is beyond `vocab_size`.
    """
    words = blend_words(text, field)
    if not words:
        raise UserError(f"{field}: is empty; give the prefix of a .bin/.idx data set, or a blend")
    weights = None if len(words) == 1 else tuple(read_weight(word, field) for word in words[::2])
    prefixes = words if weights is None else words[1::2]
    if weights is not None and len(weights) != len(prefixes):
        raise UserError(
            f'{field}: the last weight, "{words[-1]}", has no prefix; give "weight1 prefix1 weight2 prefix2"'
        )
    blend = Blend(tuple(inspect(prefix) for prefix in prefixes), weights if len(prefixes) > 1 else None, vocab_size)
    if vocab_size is not None:
        for data in blend.data:
            _check_ids(data, vocab_size)
    return blend


def read_weight(word: str, field: str) -> float:
    """A weight of a blend. Raises UserError."""
    try:
        weight = float(word)
    except ValueError:
        raise UserError(
            f'{field}: expected a weight, got "{word}"; give one prefix, or "weight1 prefix1 weight2 prefix2", '
            "with quotes around a prefix that holds spaces"
        ) from None
    if not 1 / _LARGEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise UserError(f"{field}: the weight {word} is not between {1 / _LARGEST_WEIGHT:g} and {_LARGEST_WEIGHT:g}")
    return weight


def _check_ids(data: IndexedData, vocab_size: int) -> None:
    wrong = data.min_token_id if data.min_token_id < 0 else data.max_token_id
    if not 0 <= wrong < vocab_size:
        raise UserError(
            f"{data.prefix}: holds token id {wrong}, but the model's vocabulary is {vocab_size}; "
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
    check_rows(tokenizer, vocab_size)
    unused = vocab_size - tokenizer.vocab_size
    if unused > max(_PADDING_IDS, _PADDING_SHARE * vocab_size):
        raise UserError(
            f"data.tokenizer_model (--tokenizer-model): {tokenizer.path} has {tokenizer.vocab_size} ids, the model "
            f"{vocab_size}; use the model's own tokenizer"
        )
    for data in blend.data:
        _check_ids(data, vocab_size)
        made, file = data.metadata, metadata_path(data.prefix)
        if made is None:
            there = "a .json beside it that is none of preprocessing's" if file.exists() else "no .json beside it"
            logger.info("%s has %s: which tokenizer made it is not known", data.prefix, there)
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
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

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
    has_data = not dist.is_initialized() or is_built_on_rank()
    datasets = _rank_after_rank(
        lambda: _build(blend, config, samples, split, cache_path) if has_data else (None, None, None)
    )
    for name, dataset in zip(SPLITS, datasets):
        if dataset is not None:
            logger.info("%s data: %d samples of %d tokens", name, len(dataset), seq_length)
    return datasets


def _build(
    blend: Blend, config: Any, samples: tuple[int | None, int | None, int | None], split: str, cache_path: str | None
) -> tuple[Any, Any, Any]:
    """This rank's data sets, without communication; completes megatron-core's `config`."""
    with _quiet("megatron.core.datasets"):
        # What is not wanted is taken out: in a split without documents megatron-core would search for ever.
        parts = [part if count != 0 else None for part, count in zip(config.split_matrix, samples)]
        _check_documents(blend, parts, samples, config.sequence_length, split)
        sizes = [0 if part is None else count for part, count in zip(parts, samples)]
        raise_file_limit(len(blend.data), sum(part is not None for part in parts))
        config.split_matrix = parts
        config.path_to_cache = _cache_folder(blend, cache_path)
        config.fast_cache_load = True  # or megatron-core waits for other ranks in the middle of a blend
        config.mid_level_dataset_surplus = _surplus(blend.weights, sizes)
        classes = guarded(config.tokenizer.vocab_size if blend.vocab_size is None else blend.vocab_size)
        train, valid, test = classes.builder(classes.dataset, sizes, lambda: True, config).build()
    return train, valid, test


def _rank_after_rank(build: Callable[[], T]) -> T:
    """`build` on rank 0 and then on the others, which find what it put into the cache; collective.

    Where the cache is not shared, or cannot be read, a rank makes its own. Raises UserError: of the first rank that has
    one, on all ranks."""
    if not dist.is_initialized():
        return build()
    result: T | None = None
    for has_turn in (dist.get_rank() == 0, dist.get_rank() != 0):
        complaint = None
        if has_turn:
            try:
                result = build()
            except UserError as error:
                complaint = str(error)
        complaints: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(complaints, complaint)
        told = next((text for text in complaints if text is not None), None)
        if told is not None:
            raise UserError(told)
    return result  # type: ignore[return-value]


def _plain_split(split: str) -> str:
    """The three shares written without signs and exponents, which megatron-core would not read."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or sum(shares) < 1e-9:
        raise UserError(f'data.split (--split): expected three shares such as 969,30,1, got "{split}"')
    return ",".join(f"{share:.15f}" for share in shares)


def check_documents(blend: Blend, split: str, samples: Sequence[int | None], seq_length: int) -> None:
    """Raise UserError, as `build_datasets` will, where a split that is wanted holds no document of some data set."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(_plain_split(split)))
    parts = [part if count != 0 else None for part, count in zip(matrix, samples)]
    _check_documents(blend, parts, samples, seq_length, split)


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
            tokens = int(data.lengths[start:end].sum(dtype="int64"))
            if tokens == 0:
                raise UserError(
                    f"data.split (--split) {split}: the {name} part of {data.prefix} holds only empty documents; "
                    "give it a larger share or other data"
                )
            if count is None and tokens <= seq_length:
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
        raise UserError(f"{CACHE_FIELD}: {folder} cannot be made: {error.strerror}; name another folder") from error
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
