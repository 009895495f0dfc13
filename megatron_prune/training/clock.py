"""Where the time of an iteration goes, without making the device wait.

    PartClock   `with clock.part("scoring"): ...`, then `collect()` once per log line

On CUDA a part is the time between two events on the stream, which are recorded without waiting and read when a line is
printed: by then all but the last few are long past, so the one wait there costs next to nothing. On the CPU it is the
wall clock. Parts may nest: what the inner one takes is not counted again for the outer one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_prune.runtime.device import DeviceRuntime

# The parts of an iteration, in the order in which they are shown; "other" is what lies between them.
PARTS = ("forward-backward", "scoring", "optimizer", "second-order", "retire", "compact", "evaluate", "save", "figures")
_MANY = 4096  # stamps kept at most before those that are past are added up


class PartClock:
    """Adds up time by part.

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
