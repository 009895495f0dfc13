"""The last steps of a tensor on its way into a file: host memory, the file, the sum over it.

Scratch        host memory that is used again and again: fresh memory costs more than the copy into it
on_host        a tensor as the format wants it: contiguous in host memory, in a storage of just its size
SummingFile    sums up what is written to it, and has the disk begin before the last byte is there
"""

import contextlib
import ctypes
import math
import os
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_prune.checkpoint.crc import crc32

ALIGNMENT = 64  # bytes
_CHUNK = 4 << 20  # written and summed up in turn, so that the sum finds it in the cache
_HAND_OVER = 32 << 20  # bytes after which the disk begins


class Scratch:
    """Memory for tensors that are done with together; used by one thread at a time.

    Args:
        pinned: keep it page-locked: a GPU then copies into it several times as fast.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._wanted = 0

    def reset(self, reserve: int = 0) -> None:
        """All tensors given out are done with; there will be room for `reserve` bytes, and for what was wanted."""
        room = max(self._wanted, reserve)
        if room > len(self._memory):
            self._memory = torch.empty(room, dtype=torch.uint8)
            if self.pinned:
                _pin(self._memory)
        self._wanted = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until `reset`, in a storage of just its size."""
        start, size = self._wanted, math.prod(shape) * dtype.itemsize
        self._wanted = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        if start + size > len(self._memory):
            return torch.empty(tuple(shape), dtype=dtype)
        return _window(self._memory[start : start + size], dtype, shape)


def _pin(memory: Tensor) -> None:
    """Page-lock `memory` until it is gone. (`pin_memory=True` would round its size up to a power of two.)"""
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0:  # else it stays as it is, only slower
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())


def _window(flat: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The same memory as a storage of its own, which ends where the values do (the format stores whole storages).

    By address, since `Tensor.numpy` would forbid the storage behind it to be resized ever after, which compaction does.
    """
    memory: Any = (ctypes.c_byte * (flat.numel() * flat.itemsize)).from_address(flat.data_ptr())
    memory.owner = flat  # lives as long as the window
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def on_host(tensor: Tensor, scratch: Scratch) -> Tensor:
    """Contiguous in host memory, in a storage of just its size: the values in place where they are so, else a copy."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        return _window(tensor.view(-1), tensor.dtype, tensor.shape)
    return scratch.empty(tensor.shape, tensor.dtype).copy_(tensor)


class SummingFile:
    """Sums up what is written to `file` (in order; nothing seeks).

    Attributes:
        size, crc32: of all that was written. error: what went wrong, since torch's archive writer hides it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._handed_over = 0
        self.size, self.crc32 = 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`. Raises OSError."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                self._file.write(chunk)
                self.crc32 = crc32(chunk, self.crc32)
                self.size += len(chunk)
                if self.size - self._handed_over >= _HAND_OVER:
                    self._hand_over()
        except OSError as error:
            self.error = self.error or error
            raise
        return len(view)

    def _hand_over(self) -> None:
        """Let the disk begin with what is there: it works while the rest is picked, summed up and written."""
        self._file.flush()
        if hasattr(os, "posix_fadvise"):  # not on macOS
            # Linux starts to write what it is told to forget, and does not wait for the end of it.
            place = self._handed_over, self.size - self._handed_over
            with contextlib.suppress(OSError):  # advice that a file system does not take harms nothing
                os.posix_fadvise(self._file.fileno(), *place, os.POSIX_FADV_DONTNEED)
        self._handed_over = self.size

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Return when everything is on the disk. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())
