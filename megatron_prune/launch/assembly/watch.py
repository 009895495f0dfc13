"""A thread beside a rank that sees what the rank cannot: its launcher is dead, or its folder is somebody else's.

A launcher that was killed cannot tell its ranks anything, and they would train on beside the ones that the next start
brings. A rank without its launcher tells itself to leave (SIGTERM: the step is finished, a checkpoint saved) and is
ended when it has not left after `grace` seconds. A rank that lost the lease ends at once, in the middle of whatever it
does: nothing of it may reach the folder any more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.checkpoint.lease import Lease
from megatron_prune.checkpoint.owner import Process, this_machine
from megatron_prune.runtime.places import grace_seconds
from megatron_prune.runtime.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from megatron_prune.runtime.mesh import Mesh

VARIABLE = "MEGATRON_PRUNE_LAUNCHERS"
LEASE_LOST, LEFT_ALONE = 2, 3  # exit statuses
_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"


def announce(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variable that names this process to those it starts, after the ones above it."""
    own = Process.find(os.getpid())
    before = [word for word in environ.get(VARIABLE, "").split(";")[1:] if word]
    return {VARIABLE: ";".join([this_machine(), *before, f"{own.pid}:{own.start or 0}"])}


def launchers(environ: Mapping[str, str]) -> list[Process]:
    """Processes that this one ends with; none where a person or a scheduler started it."""
    found = []
    machine, *words = environ.get(VARIABLE, "").split(";")
    for word in words if machine == this_machine() else []:  # else it came along into a container
        pid, _, start = word.partition(":")
        if pid.isdecimal() and start.isdecimal():
            found.append(Process(int(pid), int(start) or None))
    if _OF_TORCHRUN in environ and os.getppid() not in [process.pid for process in found]:
        found.append(Process.find(os.getppid()))
    return found


class Watch:
    """Looks every `poll` seconds while it is open.

    Args:
        lease: of the folder this process writes into; None: it writes into none.
        above: see `launchers`.
        grace: seconds to save and leave without a launcher; None: as GRACE_SECONDS says.

    Raises:
        UserError: GRACE_SECONDS is no number.
    """

    def __init__(
        self, lease: Lease | None, above: Sequence[Process], grace: float | None = None, poll: float = 1.0
    ) -> None:
        self.lease, self.above, self.poll = lease, above, poll
        self.grace = grace_seconds(os.environ) if grace is None else grace
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        # A signal that the main thread holds back must not come in through this one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        deadline: float | None = None
        while not self._closed.wait(self.poll):
            lease = self.lease
            loss = None if lease is None else lease.loss()
            if loss is not None and lease is self.lease and lease is not None:
                _end(LEASE_LOST, f"error: {lease.path.parent}: {loss}; this run stops and writes nothing more\n")
            if deadline is None:
                gone = next((process for process in self.above if not process.is_running()), None)
                if gone is not None:
                    if os.environ.get("LOCAL_RANK", "0") == "0":
                        _say(f"the launcher (pid {gone.pid}) is gone: saving and leaving\n")
                    deadline = time.monotonic() + self.grace
                    os.kill(os.getpid(), signal.SIGTERM)
            elif time.monotonic() > deadline:
                _end(LEFT_ALONE, f"error: still here {self.grace:g} s after the launcher was gone: ended\n")


@contextlib.contextmanager
def writing(directory: str | None, mesh: Mesh, watch: Watch) -> Iterator[None]:
    """Hold the folder that a run writes into, if it writes (collective at its begin). Raises UserError on all ranks
    when another run holds it."""
    if directory is None:
        yield
        return
    from megatron_prune.checkpoint.save import hold  # imports torch, which launchers do without

    with hold(mesh, Path(directory), above=launchers(os.environ)) as lease:
        watch.lease = lease
        try:
            yield
        finally:
            watch.lease = None


def _say(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:  # who would have read it is gone, too
        return


def _end(status: int, text: str) -> None:
    _say(text)
    os._exit(status)
