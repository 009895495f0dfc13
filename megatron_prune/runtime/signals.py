"""Signals that ask a run to end, as a flag that the loop looks at after each step.

A scheduler announces preemption with SIGTERM or SIGUSR1, to one rank, to all, or to the launcher, which passes it on; a
terminal sends SIGINT (Ctrl-C) and, when it is closed, SIGHUP. All mean the same, but a second SIGINT leaves at once. A
process that was started with SIGHUP or SIGINT ignored (nohup, a shell's background) goes on ignoring it. Nothing is
done in the handler itself: a rank may be in the middle of a collective, and all ranks must stop at the same step (see
`training.stopping`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)
INTERRUPTED = 128 + signal.SIGINT


def heeded_signals() -> list[signal.Signals]:
    """Those of `STOP_SIGNALS` to listen to. The launcher starts its ranks with SIGTERM and SIGUSR1 ignored, and means
    them to listen; what a terminal sends is left ignored where it is."""
    return [n for n in STOP_SIGNALS if n not in _OF_TERMINALS or signal.getsignal(n) != signal.SIG_IGN]


def begin_worker() -> None:
    """In a process of a pool: Ctrl-C, which reaches the whole group, is its parent's to handle; and when that is gone,
    however it ended, this process ends, too. A pool's workers would wait for their next job for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(INTERRUPTED)

    threading.Thread(target=follow, daemon=True).start()


def die_of_interrupts() -> None:
    """Ctrl-C ends this process as other signals do, without a traceback: modules are being imported, and nothing is
    there to be cleaned up."""
    _exchange(signal.default_int_handler, signal.SIG_DFL)


def raise_interrupts() -> None:
    """Ctrl-C is KeyboardInterrupt again."""
    _exchange(signal.SIG_DFL, signal.default_int_handler)


def _exchange(old: Any, new: Any) -> None:
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == old:
        signal.signal(signal.SIGINT, new)


class StopSignals:
    """Notes the first of `STOP_SIGNALS` that arrives; on exit the handlers from before are back.

    Only a process's main thread may install handlers: in any other thread nothing is installed, nothing noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in heeded_signals():
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
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:  # as `kill -9`, which checkpoints survive: nothing can be waited for
            os.write(2, b"interrupted again: leaving at once, unsaved\n")
            os._exit(INTERRUPTED)
        self.received = self.received or signal.Signals(number)
