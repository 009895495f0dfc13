"""Instruments for tests and benchmarks: time, bytes communicated, peak memory of this process.

Stopwatch    wall and CPU seconds of a call, the slowest rank's
Dispatches   operators that torch dispatches, and copies between host and device
BytesSent    bytes that this rank hands to collectives, whatever function they were started through
PeakMemory   highest memory in use since `start`: resident memory on the CPU, allocated memory on CUDA
"""

import ctypes
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.runtime.compat import TorchDispatchMode
from megatron_prune.runtime.device import DeviceRuntime
from megatron_prune.runtime.mesh import Mesh

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's names for mallopt
_WITH_OUTPUTS = ("allgather", "alltoall", "gather", "reduce_scatter", "scatter")  # collectives with tensors for both
_PAGE_RETURNED_AT_ONCE = 1 << 16
_HIGH_WATER_RESET = "5"  # what Linux wants written to clear_refs


@dataclass(frozen=True)
class Seconds:
    """Time of one call: wall clock, and CPU time of the process, which other users of a busy machine hardly change."""

    wall: float
    cpu: float


class Stopwatch:
    """Times calls that all ranks of `mesh` make together; the slowest rank counts."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        gc.collect()
        gc.freeze()  # or each `time` would first walk half a million objects of the libraries

    def time(self, job: Callable[[], Any]) -> tuple[Any, Seconds]:
        """(result of `job`, its time); starts together on all ranks, queued work on a device is waited for."""
        device = self.mesh.device
        gc.collect()  # what earlier calls left behind is not this one's cost
        device.synchronize()
        dist.barrier(group=self.mesh.over("world").group)
        wall, cpu = time.perf_counter(), time.process_time()
        result = job()
        device.synchronize()
        spent = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], device=device.device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX, group=self.mesh.over("world").group)
        return result, Seconds(*(float(s) for s in spent))


class BytesSent(TorchDispatchMode):
    """Counts, while entered, the bytes of every tensor that this rank puts into a collective or sends.

    All collectives pass torch's dispatcher as operators of the namespace `c10d`, so nothing is missed and nothing is
    counted twice. What a rank only receives (receives, outputs of gathers) is not counted: it is counted where it is
    put in; a broadcast counts on every rank. What travels on the wire for it depends on the library's algorithm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self.by_operator.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then go on as usual."""
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d" and not name.startswith(("recv", "barrier", "monitored_barrier", "check")):
            # Outputs come first in the signature where there are separate ones.
            position = int(name.lstrip("_").startswith(_WITH_OUTPUTS))
            self.by_operator[name] += sum(t.numel() * t.element_size() for t in _tensors(args[position]))
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """Counts, while entered, the operators that torch dispatches on this thread.

    Attributes:
        total: all of them. copies: those that move a tensor between host and device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then go on as usual."""
        result = func(*args, **(kwargs or {}))
        self.total += 1
        places = {leaf.device.type for leaf in _tensors((args, result))}
        self.copies += len(places) > 1 and "copy" in func.name()
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments, which are nested at most in lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


class PeakMemory:
    """Highest memory between `start` and `peak`, above what was in use at `set_rest` (or when this was made).

    On CUDA it is `max_memory_allocated`. On Linux it is the kernel's own high-water mark of resident memory (which
    misses nothing, unlike sampling), with glibc told to give freed tensors back at once; that makes allocation slow, so
    time nothing in the same process. Elsewhere `is_available` is False.
    """

    def __init__(self, device: DeviceRuntime) -> None:
        self.device = device
        self.is_available = device.kind == "cuda" or _prepare_allocator()
        self.set_rest()

    def set_rest(self) -> None:
        """What is in use now is the program itself: it is not counted from here on."""
        self.start()
        self._at_rest = self._highest() if self.is_available else 0

    def start(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.is_available:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text(_HIGH_WATER_RESET)

    def peak(self) -> int:
        """Bytes at the highest point since `start`."""
        assert self.is_available
        return self._highest() - self._at_rest

    def _highest(self) -> int:
        if self.device.kind == "cuda":
            return int(torch.cuda.max_memory_allocated())
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _prepare_allocator() -> bool:
    """Make resident memory follow tensors; False where the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        told = libc.mallopt(_MMAP_THRESHOLD, _PAGE_RETURNED_AT_ONCE), libc.mallopt(_TRIM_THRESHOLD, 1 << 17)
        Path("/proc/self/clear_refs").write_text(_HIGH_WATER_RESET)
    except (AttributeError, OSError):  # another C library, or a container that forbids it
        return False
    return all(told)
