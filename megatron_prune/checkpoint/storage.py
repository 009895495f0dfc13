"""megatron-core's torch_dist format, written by threads and summed up on the way to the disk.

    Source            one rectangle to be written: key, place in the canonical tensor, where its values come from
    plan_save         all ranks agree on who writes what -> SaveTask
    SaveTask          write (this rank's files; may run in a thread) and finish (collective)
    read_into         fill tensors from a checkpoint (collective)

Planning, the file format, the metadata and loading are megatron-core's (`TorchDistSaveShardedStrategy` and
`TorchDistLoadShardedStrategy` over `torch.distributed.checkpoint`), but files are read by `guarded`, since theirs run
whatever a pickle asks for. What differs from megatron-core's own writer:

- a tensor is taken from the device when its turn comes (several sources of one rank need not exist at once), or all are
  staged in host memory first when the write is to run beside the training;
- threads instead of forked processes and a spawned queue server: writing releases the interpreter's lock, starts in no
  time, and a rank that is killed leaves no process behind;
- checksums are taken of the bytes as they go to the file, not of what is read back.
"""

import contextlib
import math
import queue
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from megatron_prune.checkpoint.files import Digest
from megatron_prune.checkpoint.guarded_reader import GuardedReader
from megatron_prune.checkpoint.pieces import spread
from megatron_prune.checkpoint.streams import ALIGNMENT, Scratch, SummingFile, on_host
from megatron_prune.errors import UserError
from megatron_prune.runtime.compat import storage_info
from megatron_prune.runtime.folders import naming

THREADS = 2  # that write, hence files, per rank (megatron-core's number)


@dataclass(frozen=True)
class Source:
    """A rectangle of a canonical tensor that this rank writes.

    Args:
        key: name of the stored tensor.
        global_shape, offset, shape: the tensor's shape, and this rectangle's place in it.
        read: gives the values, in `shape` and `dtype`, on any device; called once. They may lie in the scratch.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Scratch], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def sharded_tensor(self) -> ShardedTensor:
        """megatron-core's description of it; the values are looked up when they are written."""
        stand_in = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return irregular(self.key, stand_in, self.global_shape, self.offset)


def irregular(key: str, data: Tensor, global_shape: tuple[int, ...], offset: tuple[int, ...]) -> ShardedTensor:
    """A megatron-core ShardedTensor that is no cell of a regular grid; `data` gives shape, dtype, maybe the values."""
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=global_shape,
        global_offset=offset,
        axis_fragmentations=None,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While entered, no warnings of torch and megatron-core about their own deprecated calls are shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def one_line_each() -> Iterator[None]:
    """While entered, what torch's readers raise (one error of all tracebacks) becomes the UserError behind it."""
    try:
        yield
    except checkpoint.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise UserError(str(failure)) from error
        raise


_Bucket = tuple[Path, str, list[tuple[Any, Callable[[Scratch], Tensor]]]]  # file, its name, what to write there


class _Writer(FileSystemWriterAsync):
    """megatron-core's writer with other means: this rank's write items go to files in threads."""

    def __init__(self, folder: Path, sources: Sequence[Source], staging: Scratch | None) -> None:
        super().__init__(str(folder), thread_count=THREADS)
        self.results_queue: queue.Queue[Any] = queue.Queue()  # the base class reads the results out of it
        self.write_buckets: list[_Bucket] = []
        self.digests: dict[str, Digest] = {}
        self.error: OSError | None = None
        self._sources = {(source.key, torch.Size(source.offset)): source for source in sources}
        self._folder, self._staging = folder, staging

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Deal this rank's items to files, balanced by size; staged, their values are copied to host memory now."""
        scratch = Scratch()
        planned = [(item, self._sources[item.index.fqn, item.index.offset]) for item in plan.items]
        planned.sort(key=lambda pair: pair[1].bytes, reverse=True)
        files = spread([source.bytes for _, source in planned], THREADS)
        for file in sorted(set(files)):
            name = f"{plan.storage_data.prefix}{file}{DEFAULT_SUFFIX}"
            values = [
                (item, source.read) for where, (item, source) in zip(files, planned, strict=True) if where == file
            ]
            if self._staging is not None:
                values = [(item, _constant(self._staged(read, scratch))) for item, read in values]
            self.write_buckets.append((self._folder / name, name, values))

    def _staged(self, read: Callable[[Scratch], Tensor], scratch: Scratch) -> Tensor:
        assert self._staging is not None
        scratch.reset()
        values = read(scratch)
        return self._staging.empty(values.shape, values.dtype).copy_(values)

    def write(self) -> None:
        """Write and flush this rank's files. Raises OSError."""
        if not self.write_buckets:
            self.results_queue.put({})
            return
        with ThreadPoolExecutor(len(self.write_buckets), thread_name_prefix="checkpoint") as pool:
            results = list(pool.map(self._write_file, self.write_buckets))
        self.results_queue.put(dict(enumerate(results)))
        self._sources.clear()

    def _write_file(self, bucket: _Bucket) -> list[Any]:
        path, name, values = bucket
        results, scratch = [], Scratch()
        # The archive format has sums of its own, which cost as much as ours and would find nothing more.
        without_sums = config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
        with naming(path), without_sums, path.open("wb", buffering=1 << 20) as file:
            stream: Any = SummingFile(file)
            while values:
                item, read = values.pop()
                scratch.reset()
                start, tensor = stream.size, on_host(read(scratch), scratch)
                try:
                    torch.save(tensor, stream)
                except RuntimeError as error:
                    raise stream.error or error from error
                length = stream.size - start
                results.append(WriteResult(item.index, length, storage_info()(name, start, length)))
            stream.sync()
        self.digests[name] = Digest(stream.size, stream.crc32)
        return results

    def finish(self, metadata: Any, results: Any) -> None:
        """Write `.metadata` (one rank); a failure is kept in `error`, since other ranks wait for this one next."""
        del metadata.all_local_plans  # only of use where the next save has the same shapes
        try:
            super().finish(metadata, results)
        except OSError as error:
            self.error = error


def _constant(value: Tensor) -> Callable[[Scratch], Tensor]:
    return lambda _scratch: value


@dataclass
class SaveTask:
    """A planned save of this rank: `write` first (local), then `finish` (on all ranks, once all have written)."""

    _writer: _Writer
    _plan: tuple[Any, Any, Any]

    def write(self) -> None:
        """Write and flush this rank's files. Raises OSError."""
        self._writer.write()

    @property
    def digests(self) -> dict[str, Digest]:
        """Size and CRC-32 by name of the files that `write` has written."""
        return self._writer.digests

    def finish(self) -> None:
        """Collect all ranks' results and write `.metadata`. Raises OSError, on the first rank only."""
        save_state_dict_async_finalize(*self._plan)
        if self._writer.error is not None:
            raise self._writer.error


def plan_save(folder: Path, sources: Sequence[Source], staging: Scratch | None) -> SaveTask:
    """Exchange plans (collective); the first rank checks that each tensor is covered exactly once.

    Args:
        folder: an empty folder that all ranks see.
        staging: all values are copied there now, so that `write` may run while training goes on; None: they are read
            when their turn comes.
    """
    if staging is not None:
        staging.reset(reserve=sum(source.bytes + ALIGNMENT for source in sources))
    writer = _Writer(folder, sources, staging)
    with quiet():
        plan, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(_by_key([source.sharded_tensor() for source in sources])),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    return SaveTask(writer, plan)


def read_into(folder: Path, targets: Sequence[ShardedTensor]) -> list[Tensor]:
    """Load `targets` (collective; a rank may have none); memory is allocated on the host for those without `data`.

    Returns:
        The filled tensors, in order; those given as `data` are filled in place, in their own dtype.

    Raises:
        UserError: on all ranks: the folder holds something else than these tensors.
    """
    reader = GuardedReader(folder)
    for target in targets:
        if tuple(size := reader.tensor(target.key).size) != tuple(target.global_shape):
            raise UserError(f"{folder}: {target.key} is of shape {list(size)}, not {list(target.global_shape)}")
    with quiet(), one_line_each():
        checkpoint.load_state_dict(
            mcore_to_pyt_state_dict(_by_key(targets), is_loading=True),
            reader,
            planner=MCoreLoadPlanner(shapes_validation_sharded_tensors=list(targets)),
        )
    return [target.data for target in targets]


def _by_key(tensors: Sequence[ShardedTensor]) -> dict[str, list[ShardedTensor]]:
    """The rectangles of each stored tensor."""
    found: dict[str, list[ShardedTensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.key, []).append(tensor)
    return found
