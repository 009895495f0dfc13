"""megatron-core's data set classes, made safe against files that are damaged, shrink, or hold foreign ids.

    guarded           -> `Guarded`: GPTDataset, and a builder of them that never communicates
    TokenReader       tokens of a .bin file, read and never mapped
    raise_file_limit  allow this process as many open files as a blend keeps open

Indices come from `index_cache` instead of megatron-core's own reader, which unpickles. Every sample is looked at as it
is read: it is whole, and its ids are the model's. A .bin that is cut short under a running job is an error with the
file's name, where a mapped file would kill the process (SIGBUS).
"""

import copy
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.data.index_cache import Entry, kept, sized
from megatron_prune.data.indexed import bin_path, idx_path
from megatron_prune.errors import UserError
from megatron_prune.runtime.compat import hooked_datasets

_SPARE_FILES = 256  # for everything else that a rank opens later: checkpoints, logs, connections


@dataclass(frozen=True)
class Guarded:
    """megatron-core's data set classes with checks, made when first asked for: their import takes seconds."""

    dataset: Any
    builder: Any


class TokenReader:
    """Tokens of a .bin file, under the interface of megatron-core's readers. Raises UserError: the file cannot be
    opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as this object lives
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        """`count` numbers from byte `offset` on. Raises UserError: the file ends before, or the disk fails."""
        size = int(count) * np.dtype(dtype).itemsize
        content = bytearray()
        try:
            while len(content) < size:
                some = os.pread(self._file.fileno(), size - len(content), int(offset) + len(content))
                if not some:
                    raise UserError(
                        f"{self.path}: was cut short while it was in use: it ends before byte {offset + size}; put the "
                        "whole file back and start again"
                    )
                content += some
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more: {error.strerror}") from error
        return np.frombuffer(content, dtype)


def raise_file_limit(data_sets: int, splits: int) -> None:
    """Let this process open as many files as a blend needs: tokens, index, and three arrays of each split. Raises
    UserError: the system allows fewer."""
    wanted = data_sets * (2 + 3 * splits) + 2 * splits
    try:
        wanted += len(os.listdir("/proc/self/fd")) + _SPARE_FILES
    except OSError:  # not on Linux
        wanted += 2 * _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"data.data_path (--data-path): {data_sets} data sets keep {wanted} files open, and this system allows "
            f"{hard} (ulimit -Hn); raise that to {wanted}, or put data sets together"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def guarded(vocab_size: int) -> Guarded:
    """The classes for data of a model with `vocab_size` ids."""
    from megatron.core.datasets import blended_dataset, blended_megatron_dataset_builder
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    hooked: Any = hooked_datasets()

    class GPTDataset(hooked.gpt):
        @staticmethod
        def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
            dataset = IndexedDataset(dataset_path, multimodal=False, mmap=False)
            dataset.bin_reader = TokenReader(bin_path(dataset_path))
            return dataset

        def make_indices(self, build: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
            return kept(self.config.path_to_cache, _gpt_entries(self), _in_memory(self, build))

        def read_sample(self, read: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
            sized(
                {
                    str(idx_path(self.dataset.path_prefix)): self.dataset.index.bin_buffer_mmap,
                    **_named(self.config.path_to_cache, self, _GPT_INDICES),
                }
            )
            sample = read()
            text, documents = sample[:2]
            if len(text) != self.config.sequence_length + 1 or text.min() < 0 or text.max() >= vocab_size:
                raise UserError(_unfit(self, text, documents, vocab_size))
            return sample

    class BlendedDataset(hooked.blended):
        def make_indices(self, build: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
            return kept(self.config.path_to_cache, _blend_entries(self), _in_memory(self, build))

        def __getitem__(self, idx: int) -> dict[str, Any]:
            sized(_named(self.config.path_to_cache, self, _BLEND_INDICES))
            return super().__getitem__(idx)

    class Builder(blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder):
        @staticmethod
        def build_generic_dataset(cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
            if cls is blended_dataset.BlendedDataset:
                return BlendedDataset(*args)
            tokens, path, _, size, split, config = args  # with `fast_cache_load` the documents are left out
            bounds = (round(share * cls.numel_low_level_dataset(tokens)) for share in config.split_matrix[split.value])
            return cls(tokens, path, np.arange(*bounds, dtype=np.int32), size, split, config)

    return Guarded(GPTDataset, Builder)


# Indices --------------------------------------------------------------------------------------------------------------

_GPT_INDICES = ("document_index", "sample_index", "shuffle_index")
_BLEND_INDICES = ("dataset_index", "dataset_sample_index")


def _in_memory(dataset: Any, build: Callable[[], Sequence[np.ndarray]]) -> Callable[[], Sequence[np.ndarray]]:
    """`build` of megatron-core's, kept from reading and writing a cache of its own, on any rank."""

    def make() -> Sequence[np.ndarray]:
        config = dataset.config
        dataset.config = copy.copy(config)
        dataset.config.path_to_cache, dataset.config.mock = None, True  # a mock's indices stay in memory
        try:
            return build()
        finally:
            dataset.config = config

    return make


def _file(dataset: Any, split: Any, index: str) -> str:
    """Name of the file of an index, as megatron-core gives it."""
    return f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split.name}-{index}.npy"


def _named(folder: str, dataset: Any, indices: Sequence[str]) -> dict[str, Any]:
    split = dataset.split if hasattr(dataset, "datasets") else dataset.index_split
    return {os.path.join(folder, _file(dataset, split, name)): getattr(dataset, name) for name in indices}


def _gpt_entries(dataset: Any) -> list[Entry]:
    """What the indices of one data set must be (see megatron-core's GPTDataset for their meaning)."""
    indices, length = dataset.indices, dataset.config.sequence_length
    tokens = int(np.sum(dataset.dataset.sequence_lengths[indices]))
    wanted = 0 if dataset.num_samples is None else dataset.num_samples * length + 1
    epochs = max(1, -(-wanted // tokens))
    documents, samples, first = epochs * len(indices), (epochs * tokens - 1) // length, int(indices[0])

    def follow_each_other(arrays: Sequence[np.ndarray]) -> bool:
        return _follow_each_other(arrays[1], dataset.dataset.sequence_lengths[arrays[0]], length)

    names = [_file(dataset, dataset.index_split, index) for index in _GPT_INDICES]
    return [
        Entry(names[0], ("int32",), (documents,), lambda arrays: _all_as_often(arrays[0], first, len(indices))),
        Entry(names[1], ("int32", "int64"), (samples + 1, 2), follow_each_other),
        Entry(names[2], ("uint32", "int64"), (samples,), lambda arrays: _all_as_often(arrays[2], 0, samples)),
    ]


def _blend_entries(dataset: Any) -> list[Entry]:
    sizes = np.array([len(part) for part in dataset.datasets])

    def draw_by_weight(arrays: Sequence[np.ndarray]) -> bool:
        if not _within(arrays[0], 0, len(sizes)):
            return False
        drawn = np.bincount(arrays[0], minlength=len(sizes))
        share = dataset.size * np.asarray(dataset.weights)
        return bool((drawn <= sizes).all() and (abs(drawn - share) <= len(sizes)).all())

    def count_up(arrays: Sequence[np.ndarray]) -> bool:
        drawn = np.bincount(arrays[0], minlength=len(sizes))
        expected = np.concatenate([np.arange(count) for count in drawn])
        return bool((arrays[1][np.argsort(arrays[0], kind="stable")] == expected).all())

    names = [_file(dataset, dataset.split, index) for index in _BLEND_INDICES]
    return [
        Entry(names[0], ("int16",), (dataset.size,), draw_by_weight),
        Entry(names[1], ("int64",), (dataset.size,), count_up),
    ]


def _within(array: np.ndarray, start: int, end: int) -> bool:
    return bool(array.min(initial=start) >= start and array.max(initial=start) < end)


def _all_as_often(array: np.ndarray, first: int, count: int) -> bool:
    """Whether each of `count` numbers from `first` on is there as often as the others, and nothing else."""
    if not _within(array, first, first + count):
        return False
    return bool((np.bincount(array - first, minlength=count) == len(array) // count).all())


def _follow_each_other(array: np.ndarray, lengths: np.ndarray, step: int) -> bool:
    """Whether (document, offset) are the places 0, step, 2 * step, ... in documents of these `lengths`, end to end."""
    if not _within(array[:, 0], 0, len(lengths)):
        return False
    ends = np.cumsum(lengths, dtype=np.int64)
    places = ends[array[:, 0]] - lengths[array[:, 0]] + array[:, 1]
    inside = (array[:, 1] >= 0) & (array[:, 1] <= lengths[array[:, 0]])
    return bool(inside.all() and (places == np.arange(len(array)) * step).all())


def _unfit(dataset: Any, text: np.ndarray, documents: np.ndarray, vocab_size: int) -> str:
    """What to say of a sample that no model can read."""
    prefix, length = dataset.dataset.path_prefix, dataset.config.sequence_length
    where = f"near document {documents[0]}"
    if len(text) != length + 1:
        return (
            f"{dataset.config.path_to_cache}: is damaged: a sample {where} of {prefix} has {len(text)} tokens instead "
            f"of {length + 1}; delete this folder"
        )
    wrong = int(text.min()) if text.min() < 0 else int(text.max())
    return (
        f"{prefix}: holds token id {wrong} {where}, but the model's vocabulary is {vocab_size}; preprocess the data "
        "with the model's own tokenizer"
    )
