"""When a run ends before its last iteration, and what all ranks must know of each other after a step.

A signal reaches one rank first, and clocks differ: what one rank has seen, all ranks act upon, after the same step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from megatron_prune.config import TrainingConfig
from megatron_prune.runtime.mesh import Mesh
from megatron_prune.training.step import most


class Stop(IntEnum):
    """Reasons to stop after a step; the larger one is named where several hold."""

    NO = 0
    EXIT_INTERVAL = 1
    TIME_LIMIT = 2
    PREEMPTED = 3

    @property
    def status(self) -> str:
        """`exit_interval`, `time_limit` or `preempted`."""
        return self.name.lower()


@dataclass
class StepAgreement:
    """Looks at a rank's own signs and agrees on them with the others.

    Args:
        training: exit_interval and exit_duration_in_mins.
        signalled: whether this process was asked to stop.
        started: `time.monotonic()` from which exit_duration_in_mins counts.
    """

    training: TrainingConfig
    mesh: Mesh
    signalled: Callable[[], bool] = lambda: False
    started: float = field(default_factory=time.monotonic)

    def after_step(self, iteration: int, is_writing: bool) -> tuple[Stop, bool]:
        """(why to stop now, whether any rank still writes a checkpoint in the background); collective.

        Args:
            iteration: finished iterations. is_writing: on this rank.
        """
        stop, writing = most([int(self._own(iteration)), int(is_writing)], self.mesh)
        return Stop(stop), bool(writing)

    def _own(self, iteration: int) -> Stop:
        minutes, interval = self.training.exit_duration_in_mins, self.training.exit_interval
        if self.signalled():
            return Stop.PREEMPTED
        if minutes is not None and time.monotonic() - self.started > minutes * 60:
            return Stop.TIME_LIMIT
        return Stop.EXIT_INTERVAL if interval and iteration % interval == 0 else Stop.NO
