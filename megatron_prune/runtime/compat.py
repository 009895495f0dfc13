"""Private names of other packages, all of them, behind one door.

A private name may move with any release. What has no public way is reached from here and nowhere else, which a test
reads all modules for, and only by the names in `PRIVATE`, which another test looks up in the installed releases: when
one is gone, that test says which.

    PRIVATE             the names, and why no public one does
    storage_info        where in a file of a checkpoint a tensor lies
    TorchDispatchMode   sees all operators of torch
    set_rng_with        who sets megatron-core's CUDA random state
    hooked_datasets     megatron-core's data sets, which ask before they build indices and read samples
    start_all_workers   a process pool that never starts more workers later
    stop_feeding        a process pool whose workers are gone ends
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # also for importers
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

_GPT = "megatron.core.datasets.gpt_dataset:GPTDataset"
_POOL = "concurrent.futures:ProcessPoolExecutor()"
PRIVATE = {  # module:name, with () where it is an instance's
    "torch.utils._python_dispatch:TorchDispatchMode": "documented by torch, under this module's name",
    "torch.distributed.checkpoint.filesystem:_StorageInfo": "what .metadata is made of",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": "asks CUDA's own generators, which a CPU has not",
    f"{_GPT}._build_document_sample_shuffle_indices": "its cache is read by numpy.load, which unpickles",
    f"{_GPT}._query_document_sample_shuffle_indices": "behind it, samples that are cut short are padded",
    "megatron.core.datasets.blended_dataset:BlendedDataset._build_indices": "its cache is read by numpy.load",
    f"{_POOL}._safe_to_dynamically_spawn_children": "Python 3.11: a pool that grows while it loses one raises",
    f"{_POOL}._call_queue": "Python below 3.12: a pool that lost its workers waits for them for ever",
    f"{_POOL}._call_queue._reader": "the same",
    "transformers:PretrainedConfig._attn_implementation": "as in transformers' own models; in exported code only",
}


def __getattr__(name: str) -> Any:
    """TorchDispatchMode, when it is first asked for: who needs another name of here need not wait for torch."""
    if name != "TorchDispatchMode":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def storage_info() -> Any:
    """The class of (relative_path, offset, length), as torch's metadata keeps it of every stored tensor."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo


def set_rng_with(setter: Callable[..., None]) -> None:
    """Let `setter(state, ...)` set what megatron-core takes for the random state of a CUDA device."""
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = setter


def hooked_datasets() -> SimpleNamespace:
    """megatron-core's GPTDataset (`gpt`) and BlendedDataset (`blended`), to be derived from.

    A subclass has `make_indices(build)`, which gives the index arrays in place of `build()`, and, of GPTDataset,
    `read_sample(read)`, which gives (token ids, document ids, from 0.19 on tokens per document) in place of `read()`.
    """
    from megatron.core.datasets import blended_dataset, gpt_dataset

    class Gpt(gpt_dataset.GPTDataset):
        def _build_document_sample_shuffle_indices(self) -> Any:
            return self.make_indices(super()._build_document_sample_shuffle_indices)

        def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
            return self.read_sample(partial(super()._query_document_sample_shuffle_indices, idx))

    class Blended(blended_dataset.BlendedDataset):
        def _build_indices(self) -> Any:
            return self.make_indices(super()._build_indices)

    return SimpleNamespace(gpt=Gpt, blended=Blended)


def start_all_workers(pool: ProcessPoolExecutor) -> None:
    """Have the first job start all workers of a new pool: Python 3.11 raises where one is added while others die."""
    vars(pool)["_safe_to_dynamically_spawn_children"] = False


def stop_feeding(pool: ProcessPoolExecutor) -> None:
    """Let `shutdown` return although the pool's workers are dead.

    Its thread that feeds them may be writing into a pipe that nobody reads any more, and `shutdown` waits for it for
    ever (CPython issue 94777, mended in 3.12 by closing the pipe's other end as here).
    """
    calls: Any = getattr(pool, "_call_queue", None)
    if calls is not None:
        calls._reader.close()
