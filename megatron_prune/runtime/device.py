"""The device runtime: the same megatron-core on CUDA/NCCL and on CPU/gloo; and a clock for either (`PartClock`).

megatron-core asks for device "cuda" in many places. Where no CUDA device is used, `redirect_cuda_to_cpu` answers these
requests with the CPU: tensor factories through a torch function mode, and the handful of `torch.cuda` functions that
megatron-core calls. It is process-wide, installed once by `choose_device`, and this module is the only one that knows.
Where CUDA is there, nothing is touched.
"""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_prune.errors import UserError
from megatron_prune.runtime.compat import set_rng_with


@dataclass(frozen=True)
class DeviceRuntime:
    """What the run computes on: `kind` is `cuda` or `cpu`, `backend` the collective library that goes with it."""

    kind: str
    backend: str
    device: torch.device

    def synchronize(self) -> None:
        """Wait for queued work, so that a wall clock means something."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Highest allocated device memory (CUDA), or resident memory of the process now (CPU)."""
        if self.kind == "cuda":
            return int(torch.cuda.max_memory_allocated())
        import psutil

        return int(psutil.Process().memory_info().rss)


def choose_device(requested: str = "auto") -> DeviceRuntime:
    """Pick the device for this process and prepare megatron-core for it.

    Args:
        requested: `auto` (CUDA when there is one), `cuda` or `cpu`.

    Raises:
        UserError: CUDA was asked for and there is none, or there are fewer devices than local ranks.
    """
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise UserError("--device cuda: no CUDA device is visible here; use --device cpu or auto")
    if requested == "cpu" or not has_cuda:
        redirect_cuda_to_cpu()
        return DeviceRuntime("cpu", "gloo", torch.device("cpu"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--nproc-per-node: local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible)"
        )
    torch.cuda.set_device(local_rank)
    return DeviceRuntime("cuda", "nccl", torch.device("cuda", local_rank))


class _CpuForCuda(TorchFunctionMode):
    """Answers `device="cuda"` with the CPU and calls CPU tensor types by their CUDA names, as megatron-core expects."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every torch call comes through here: the usual one, without a device, must cost next to nothing.
        if func is _TO_CUDA:
            return args[0]
        if kwargs:
            device = kwargs.get("device")
            if device is not None and "cuda" in str(device):
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)
        result = func(*args)
        if func is _TYPE and len(args) == 1:
            return result.replace("torch.", "torch.cuda.")
        return result


_TO_CUDA, _TYPE = torch.Tensor.cuda, torch.Tensor.type


class _NoStream:
    """Stands in for a CUDA stream: the CPU computes in order. A class, because libraries annotate with the name."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()

    def wait_stream(self, _stream: Any) -> None:
        """As of a CUDA stream; what the CPU was told to do before is done."""

    def synchronize(self) -> None:
        """As of a CUDA stream; what the CPU was told to do is done."""


def redirect_cuda_to_cpu() -> None:
    """Install the redirection once per process (a second call does nothing)."""
    if issubclass(torch.cuda.Stream, _NoStream):
        return
    replacements: dict[str, Any] = {
        "current_device": lambda: "cpu",
        "synchronize": lambda *_, **__: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "default_stream": lambda *_: _NoStream(),
        "current_stream": lambda *_: _NoStream(),
        "Stream": _NoStream,
        "stream": lambda _: contextlib.nullcontext(),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    set_rng_with(torch.cuda.set_rng_state)
    _CpuForCuda().__enter__()


_MANY = 4096  # stamps kept at most before those that are past are added up


class PartClock:
    """Where time goes, without making the device wait: `with clock.part("scoring"): ...`, then `collect()` once in a
    while.

    On CUDA a part is the time between two events on the stream, which are recorded without waiting and read by
    `collect`: by then all but the last few are long past, so the one wait there costs next to nothing. On the CPU it is
    the wall clock. Parts may nest: what the inner one takes is not counted again for the outer one.

    Args:
        device: what the work runs on.
    """

    def __init__(self, device: DeviceRuntime) -> None:
        self._is_cuda = device.kind == "cuda"
        self._open: list[tuple[str, Any]] = []
        self._spans: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`."""
        now = self._stamp()
        if self._open:
            outer, since = self._open.pop()
            self._spans.append((outer, since, now))
            self._open.append((outer, now))
        self._open.append((name, now))
        try:
            yield
        finally:
            end = self._stamp()
            inner, since = self._open.pop()
            self._spans.append((inner, since, end))
            if self._open:
                self._open.append((self._open.pop()[0], end))
            if len(self._spans) > _MANY:
                self._add_up(only_past=True)

    def collect(self) -> dict[str, float]:
        """Seconds by part since the last call; waits until the device has finished the last part."""
        self._add_up(only_past=False)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _stamp(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self, only_past: bool) -> None:
        if self._is_cuda and self._spans and not only_past:
            self._spans[-1][2].synchronize()
        kept = []
        for name, start, end in self._spans:
            if not self._is_cuda:
                self._seconds[name] += end - start
            elif end.query():
                self._seconds[name] += start.elapsed_time(end) / 1000
            else:
                kept.append((name, start, end))
        self._spans = kept
