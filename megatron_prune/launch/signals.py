"""Signals that ask a run to end, as a flag that the loop looks at after each step.

    StopSignals   context manager: while it is open, SIGTERM and SIGUSR1 are noted instead of ending the process

A scheduler announces preemption with a signal, to one rank, to all, or to the launcher, which passes it on. Nothing is
done in the handler itself: a rank may be in the middle of a collective, and all ranks must stop at the same step (see
`training.stopping`).
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the first of `STOP_SIGNALS` that arrives; on exit the handlers from before are back.

    Only a process's main thread may install handlers: in any other thread nothing is installed, nothing noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
            # A launcher may have held them back until somebody listens.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def is_asked(self) -> bool:
        """Whether a signal has arrived at this process."""
        return self.received is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
