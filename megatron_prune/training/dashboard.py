"""A run on a terminal: one screenful that is redrawn in place, messages scroll above it.

Drawing in place, sizes of terminals and keeping others' warnings apart are rich's. Elsewhere than on a terminal the
messages are plain lines, and the last drawing follows them.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_LEVELS = "▁▂▃▄▅▆▇█"
_CURVE = 60  # points of a curve
_PAUSE = 0.2  # seconds between drawings, at least


@dataclass(frozen=True)
class Snapshot:
    """What one drawing shows.

    Args:
        parameters: (at the start, now, target or None). widths: label -> (at the start, now).
        losses, saliencies: the last ones, oldest first. facts: label -> text. seconds: part -> seconds per iteration.
    """

    iteration: int
    total_iterations: int
    consumed_tokens: int
    parameters: tuple[int, int, int | None]
    widths: Mapping[str, tuple[int, int]]
    losses: Sequence[float]
    saliencies: Sequence[float] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def render(snapshot: Snapshot) -> list[str]:
    """The lines of a drawing."""
    done = snapshot.iteration / max(snapshot.total_iterations, 1)
    first, now, target = snapshot.parameters
    lines = [
        f"iteration   {_bar(done, 30)} {snapshot.iteration:,} of {snapshot.total_iterations:,}, "
        f"{snapshot.consumed_tokens:,} tokens"
    ]
    if target is not None and first > target:
        pruned = (first - now) / (first - target)
        lines.append(f"parameters  {_bar(pruned, 30)} {now:,} ({first:,} to {target:,})")
    else:
        lines.append(f"parameters  {now:,}")
    lines += [
        f"{label:<11} {_bar(live / max(start, 1), 30)} {live:,} of {start:,}"
        for label, (start, live) in snapshot.widths.items()
    ]
    if snapshot.losses:
        lines.append(f"loss        {sparkline(snapshot.losses)} {snapshot.losses[-1]:.4f}")
    if snapshot.saliencies:
        lines.append(f"saliency    {sparkline(snapshot.saliencies)} {snapshot.saliencies[-1]:.2e}")
    if snapshot.facts:
        lines.append("            " + " | ".join(f"{label} {text}" for label, text in snapshot.facts.items()))
    if snapshot.seconds:
        parts = sorted(snapshot.seconds.items(), key=lambda item: -item[1])
        shown = [f"{part} {1000 * seconds:.1f}" for part, seconds in parts if seconds >= 5e-5]
        lines.append("ms          " + " | ".join(shown))
    return lines


def sparkline(values: Sequence[float]) -> str:
    """The values as blocks of eight heights, the smallest lowest; what is not finite is a gap."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    steps = len(_LEVELS) - 1
    return "".join(
        _LEVELS[round((value - low) / span * steps) if span else 0] if math.isfinite(value) else " " for value in values
    )


def _bar(share: float, width: int) -> str:
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "█" * filled + "░" * (width - filled)


class Dashboard:
    """Draws snapshots over each other.

    Args:
        stream: a terminal, or whatever stands in for it.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
        self._drawn = -math.inf
        self.losses: deque[float] = deque(maxlen=_CURVE)
        self.saliencies: deque[float] = deque(maxlen=_CURVE)

    def is_due(self) -> bool:
        """Whether the last drawing is old enough."""
        return time.monotonic() - self._drawn >= _PAUSE

    def draw(self, snapshot: Snapshot) -> None:
        """Replace the last drawing."""
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor()  # rich hides it until `close`, which a killed run never comes to
        lines = [*render(snapshot), ""]  # others write below it
        self._live.update(Text("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)
        self._drawn = time.monotonic()

    def write(self, text: str) -> None:
        """A message above the drawing."""
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leave the last drawing where it is."""
        self._live.stop()
