"""Run torchrun on this node, and pass on what the job is told from outside.

`supervise` starts the command and waits. When SIGTERM or SIGUSR1 arrives it sends it to the *ranks*, once each, which
finish their step, save and leave with 0; so torchrun sees them succeed and leaves with 0 as well. SIGINT and SIGHUP
become SIGTERM, unless they were ignored when this process began (nohup). After `grace` seconds, or at a second SIGINT,
what is left is killed.

torchrun itself runs with all of them ignored. It can forward signals (`--signals-to-handle`), but then it leaves
with 1 although its ranks saved, and a second signal while it waits for them makes it leave at once, without them; a
scheduler that signals every process of a job (Slurm does) and a supervisor that forwards would do just that.
"""

import logging
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megatron_prune.runtime.signals import STOP_SIGNALS, heeded_signals

logger = logging.getLogger(__name__)
_FOR_RANKS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class CommandOutcome:
    """How the command ended.

    Args:
        code: its exit status, negative when a signal ended it.
        told: the signal that arrived meanwhile, or None.
    """

    code: int
    told: signal.Signals | None


def supervise(command: Sequence[str], environment: dict[str, str], grace: float, poll: float = 0.2) -> CommandOutcome:
    """Run `command` (torchrun) until it ends, as the module's docstring says.

    Args:
        grace: seconds that ranks have to save and leave once they were told to.
        poll: seconds between looks.
    """
    told: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        told.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in heeded_signals()}
    try:
        process = subprocess.Popen(list(command), env=environment, preexec_fn=_ignore_signals)
        return _watch(process, told, grace, poll)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(process: subprocess.Popen[bytes], told: list[signal.Signals], grace: float, poll: float) -> CommandOutcome:
    informed: set[int] = set()
    deadline: float | None = None
    while True:
        try:
            code = process.wait(timeout=poll)
            return CommandOutcome(code, told[0] if told else None)
        except subprocess.TimeoutExpired:
            pass
        if not told:
            continue
        if deadline is None:
            deadline = time.monotonic() + grace
            logger.warning("told to leave by %s: ranks save and leave, within %g seconds", told[0].name, grace)
        for child in _ranks_of(process.pid):
            if child.pid not in informed and _send(child, told[0] if told[0] in _FOR_RANKS else signal.SIGTERM):
                informed.add(child.pid)
        is_impatient = told.count(signal.SIGINT) > 1
        if is_impatient or time.monotonic() > deadline:
            why = "interrupted again" if is_impatient else f"ranks are still there after {grace:g} seconds"
            logger.warning("%s: killed", why)
            for child in [*_ranks_of(process.pid, everything=True), process]:
                _send(child, signal.SIGKILL)
            return CommandOutcome(process.wait(), told[0])


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _ranks_of(pid: int, everything: bool = False) -> list[Any]:
    """The processes that torchrun has started (and theirs, with `everything`)."""
    import psutil

    try:
        return list(psutil.Process(pid).children(recursive=everything))
    except psutil.NoSuchProcess:
        return []


def _send(process: Any, number: signal.Signals) -> bool:
    """Send a signal; False when the process cannot take it yet, or any more."""
    import psutil

    if number != signal.SIGKILL and not _listens(process.pid, number):
        return False
    try:
        process.send_signal(number)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True


def _listens(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal: one that has just started ignores it, and would miss it."""
    try:
        with open(f"/proc/{pid}/status") as status:
            caught = next(line for line in status if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return True
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
