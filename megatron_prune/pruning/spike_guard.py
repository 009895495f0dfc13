"""When the loss jumps after a cut, stop cutting until it is back: a pure decision over the losses so far.

The loss of a step counts as a spike when it is above `factor` times the median of the `window` losses before it. From
then on the guard is pausing; it ends with the first loss at or below half way between that median and the spike's
threshold, so that a loss which scatters around the threshold does not switch it on and off. Losses of a pause do not
enter the median: what it compares with is the loss before the spike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers.

    Args:
        recent: the latest losses outside of pauses, oldest first, in nats per token.
        reference: the median that a pause compares with, None when there is no pause.
        since: iteration whose loss began the pause. pauses: how many there were.
    """

    recent: tuple[float, ...] = ()
    reference: float | None = None
    since: int | None = None
    pauses: int = 0

    @property
    def is_pausing(self) -> bool:
        """Whether nothing may be pruned now."""
        return self.reference is not None

    def to_state(self) -> dict[str, Any]:
        """Plain values."""
        return {"recent": list(self.recent), "reference": self.reference, "since": self.since, "pauses": self.pauses}

    @classmethod
    def from_state(cls, values: dict[str, Any] | None) -> GuardState:
        """Inverse of `to_state`; None gives the state of a new run. Raises OverflowError, TypeError or ValueError."""
        if values is None:
            return cls()
        kinds: dict[str, Callable[[Any], Any]] = {"reference": float, "since": int, "pauses": int}
        found = {name: kind(values[name]) for name, kind in kinds.items() if values.get(name) is not None}
        recent = tuple(map(float, values["recent"]))
        if not all(map(math.isfinite, (*recent, *found.values()))):
            raise ValueError("losses are finite")
        return cls(recent, **found)


@dataclass(frozen=True)
class SpikeGuard:
    """When a jump of the loss pauses pruning, and when pruning goes on.

    Args:
        factor: a loss above this times the median is a spike; above 1.
        window: losses that the median is taken of; before there are so many, nothing is a spike.
    """

    factor: float
    window: int

    def threshold(self, state: GuardState) -> float:
        """The loss above which the next step counts as a spike, or goes on counting as one."""
        if state.reference is not None:
            return state.reference * (1 + self.factor) / 2
        if len(state.recent) < self.window:
            return math.inf
        return self.factor * statistics.median(state.recent)

    def is_above(self, state: GuardState, loss: float) -> bool:
        """Whether `loss` begins a pause, or lets one go on; a loss that is not a number does."""
        return not loss <= self.threshold(state)

    def observe(self, state: GuardState, loss: float, is_above: bool, iteration: int) -> GuardState:
        """The state after a step. `is_above` is given: ranks agree on it, their losses may differ by rounding."""
        if is_above:
            if state.is_pausing:
                return state
            reference = statistics.median(state.recent) if state.recent else math.inf
            return GuardState(state.recent, reference, iteration, state.pauses + 1)
        return GuardState((*state.recent, loss)[-self.window :], None, None, state.pauses)
