"""Work on a stranger's input that may go on for ever, or ask for more memory than there is."""

import contextlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

_LARGEST = 64 << 20  # bytes of a result


class OverrunError(RuntimeError):
    """It took more time or memory than it may, or failed."""


def bounded(job: Callable[[], str], seconds: int, memory: int) -> str:
    """What `job` returns. It runs in a copy of this process and changes nothing here.

    Args:
        seconds: of a processor. memory: bytes beyond what this process has.

    Raises:
        OverrunError: it needs more, or raises anything.
    """
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        _run(job, sink, seconds, memory)
    try:
        os.close(sink)
        with os.fdopen(source, "rb") as file:
            content = file.read(_LARGEST + 1)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    _, status = os.waitpid(child, 0)
    if status != 0 or len(content) > _LARGEST:
        raise OverrunError(f"needs more than {seconds} s or {memory >> 20} MiB")
    return content.decode()


def _run(job: Callable[[], str], sink: int, seconds: int, memory: int) -> None:
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with contextlib.suppress(OSError, ValueError):  # not on macOS
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
        with os.fdopen(sink, "wb") as file:
            file.write(job().encode())
        status = 0
    finally:
        os._exit(status)
