"""Write a checkpoint: in one go, or beside the training.

    save_checkpoint   the running model and the run's state -> DIR/iter_...
    save_weights      a checkpoint without training state, straight from a source of tensors (conversion tools)
    hold              one writer per folder (see `lease`), over a mesh
    AsyncSaver        holds the save that is being written in the background

Order, the same for both ways:

    1. rank 0 makes the temporary folder, all ranks plan who writes what        (collective)
    2. each rank writes and flushes its files, rank 0 the small ones as well    (local; in a thread when asynchronous)
    3. all ranks tell each other how it went, rank 0 sees that all files are there, lists the sums, renames and
       deletes                                                                    (collective)

Between two collectives only step 2 and rank 0's work on files can fail, and each is followed by an exchange of its
outcome: either all ranks return or all raise `CheckpointSaveError`, the temporary folder is gone and older checkpoints
are as they were.
"""

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.checkpoint.files import (
    CheckpointSaveError,
    Digest,
    Retention,
    begin,
    check_present,
    digest,
    publish,
    refuse_step,
    step_name,
    write_files,
    write_manifest,
)
from megatron_prune.checkpoint.lease import Lease, acquire
from megatron_prune.checkpoint.owner import Process
from megatron_prune.checkpoint.pieces import spread
from megatron_prune.checkpoint.record import Facts, record_files
from megatron_prune.checkpoint.rng import capture_rng
from megatron_prune.checkpoint.storage import SaveTask, Source, plan_save
from megatron_prune.checkpoint.streams import Scratch
from megatron_prune.checkpoint.tensors import facts_of, sources, weight_key
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import ShardLayout
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import Mesh, agree, broadcast_object

logger = logging.getLogger(__name__)

METADATA = ".metadata"  # written by torch.distributed.checkpoint
KEEP_ALL = Retention()


@dataclass
class _Save:
    """One checkpoint on its way to the disk; every rank has its own."""

    mesh: Mesh
    directory: Path
    iteration: int
    retain: Retention
    folder: Path
    task: SaveTask
    files: dict[str, bytes]
    goes_back: bool = False
    digests: dict[str, Digest] = field(default_factory=dict)
    error: str | None = field(default=None)

    def whole(self) -> Path:
        """Steps 2 and 3. Raises as `finish`; when it is interrupted (Ctrl-C), nothing is left."""
        try:
            self.write()
            return self.finish()
        except BaseException:
            self.abandon()
            raise

    def write(self) -> None:
        """Step 2; a failure is kept for step 3."""
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as beside:
                small = beside.submit(write_files, self.folder, self.files if self.mesh.rank == 0 else {})
                self.task.write()
            self.digests = self.task.digests | small.result()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            self.error = f"rank {self.mesh.rank}: {_words(error)}"

    def finish(self) -> Path:
        """Step 3: the published folder. Raises CheckpointSaveError on all ranks."""
        reports = agree(self.mesh, (self.error, self.digests))
        error = next((text for text, _ in reports if text is not None), None)
        if error is None:
            digests = {name: d for _, files in reports for name, d in files.items()}
            error = broadcast_object(self.mesh, self._complete(digests))
        if error is not None:
            self.abandon()
            raise CheckpointSaveError(
                f"checkpoint of iteration {self.iteration} not saved to {self.directory}: {error}"
            )
        return self.directory / step_name(self.iteration)

    def _complete(self, digests: dict[str, Digest]) -> str | None:
        """`.metadata` is put together by all ranks; the rest is rank 0's. Returns what went wrong there, or None."""
        try:
            self.task.finish()
            if self.mesh.rank == 0:
                check_present(self.folder, digests)
                write_manifest(self.folder, digests | {METADATA: digest(self.folder / METADATA)})
                publish(self.folder, self.directory, self.iteration, self.goes_back)
        except OSError as error:
            return _words(error)
        if self.mesh.rank == 0:
            try:
                self.retain.apply(self.directory, self.iteration)
            except OSError as error:  # the new checkpoint is complete: no reason to stop
                logger.warning("older checkpoints in %s could not be deleted: %s", self.directory, _words(error))
        return None

    def abandon(self) -> None:
        """Remove what was written."""
        if self.mesh.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _start(
    mesh: Mesh,
    directory: str | Path,
    iteration: int,
    parts: Sequence[Source],
    files: dict[str, bytes],
    retain: Retention,
    staging: Scratch | None = None,
    goes_back: bool = False,
) -> _Save:
    """Step 1. Raises CheckpointSaveError on all ranks."""
    directory, folder, problem = Path(directory), None, None
    if mesh.rank == 0:
        try:
            folder = begin(directory, iteration)
        except OSError as error:
            problem = _words(error)
    folder, problem = broadcast_object(mesh, (folder, problem))
    if folder is None:
        raise CheckpointSaveError(f"checkpoint of iteration {iteration} not saved to {directory}: {problem}")
    return _Save(mesh, directory, iteration, retain, folder, plan_save(folder, parts, staging), files, goes_back)


class AsyncSaver:
    """The save that is being written in the background, at most one.

    All ranks must call `finalize` at the same points of the run: it exchanges how far they are. The host memory that
    values are copied to stays for the next save.
    """

    def __init__(self) -> None:
        self.staging = Scratch()
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """True between the start of a save and its `finalize`; the same on all ranks."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, save: _Save) -> None:
        """Write `save` in a thread; its values are in host memory already."""
        assert self._save is None, "finalize the save before this one first"
        self._save = save
        self._thread = threading.Thread(target=save.write, name="checkpoint", daemon=True)
        self._thread.start()

    def finalize(self, blocking: bool) -> Path | None:
        """Publish the save if all ranks have written it (collective).

        Args:
            blocking: wait until they have.

        Returns:
            The published folder, or None when nothing was published now.

        Raises:
            CheckpointSaveError: on all ranks; the saver is free for the next save.
        """
        if self._save is None or self._thread is None:
            return None
        if blocking:
            self._thread.join()
        elif any(agree(self._save.mesh, self._thread.is_alive())):
            return None
        self._thread.join()
        save, self._save, self._thread = self._save, None, None
        return save.finish()


@torch.no_grad()
def save_checkpoint(
    model: LiveModel,
    directory: str | Path,
    iteration: int,
    state: dict[str, Any],
    *,
    retain: Retention = KEEP_ALL,
    saver: AsyncSaver | None = None,
    goes_back: bool = False,
) -> Path | None:
    """Save `model`, its optimizer, random generators and `state` as DIR/iter_... (collective).

    Args:
        state: the run's own, plain values, arrays and tensors (see `record`); rank 0's is stored.
        retain: which older checkpoints stay.
        saver: write in the background; the checkpoint appears with a later `saver.finalize`.
        goes_back: an older iteration than the folder's newest may take its place.

    Returns:
        The checkpoint's folder; None with `saver`.

    Raises:
        CheckpointSaveError: on all ranks; older checkpoints are untouched. With `saver`, also for the save before.
        TypeError: `state` holds something that cannot be stored.
    """
    if saver is not None:
        saver.finalize(blocking=True)
    model.synchronise()
    facts, rng = facts_of(model), agree(model.mesh, capture_rng())
    files = record_files(iteration, model.layout, facts, state, rng)
    parts = sources(model, facts)
    staging = saver.staging if saver is not None else None
    if staging is not None:
        staging.pinned = model.mesh.device.kind == "cuda"
    save = _start(model.mesh, directory, iteration, parts, files, retain, staging, goes_back)
    if saver is not None:
        saver.start(save)
        return None
    return save.whole()


def save_weights(
    mesh: Mesh,
    directory: str | Path,
    iteration: int,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    state: dict[str, Any],
) -> Path:
    """Save a checkpoint of weights only, as a run starts from (collective; tensors are dealt over the ranks).

    Args:
        read: Hugging Face name -> the canonical (live) tensor; called once per tensor, from two threads.
        dtype: in which they are stored.

    Raises:
        CheckpointSaveError: on all ranks.
        UserError: on all ranks: another process writes into the folder.
    """
    shapes = architecture.table.hf_shapes(architecture)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    writers = spread(sizes, mesh.world_size)
    parts = [
        Source(weight_key(name), shape, (0,) * len(shape), shape, dtype, _reader(read, name, shape, dtype))
        for (name, shape), writer in zip(shapes.items(), writers, strict=True)
        if writer == mesh.rank
    ]
    facts = Facts(str(dtype).removeprefix("torch."), (), 0, 1, 1, 1)
    files = record_files(iteration, ShardLayout.pack(architecture, 1, {}), facts, state, [])
    with hold(mesh, Path(directory), "--save"):
        return _start(mesh, directory, iteration, parts, files, KEEP_ALL).whole()


@contextlib.contextmanager
def hold(
    mesh: Mesh, directory: Path, what: str = "checkpoint.save", above: Sequence[Process] = ()
) -> Iterator[Lease | None]:
    """Hold `directory` while the block runs: rank 0's lease, None on other ranks (collective at its begin). Raises
    UserError: on all ranks; see `lease.acquire`."""
    lease, complaint = None, None
    if mesh.rank == 0:
        try:
            refuse_step(directory, what)
            lease = acquire(directory, above, what)
        except UserError as error:
            complaint = str(error)
    try:
        complaint = broadcast_object(mesh, complaint)
        if complaint is not None:
            raise UserError(complaint)
        yield lease
    finally:
        if lease is not None:
            lease.release()


def _reader(
    read: Callable[[str], Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[Scratch], Tensor]:
    def tensor(_scratch: Scratch) -> Tensor:
        value = read(name)
        assert tuple(value.shape) == shape, f"{name}: {tuple(value.shape)}, expected {shape}"
        return value.to(dtype)

    return tensor
