"""Temporary files that tell whether somebody still writes them.

    claim         create a file that is locked as long as it is open
    clear_unowned remove those of processes that are gone

The lock is the kernel's (flock): it ends with the process, however that ended, and other nodes see it on file systems
that share locks. Where there are no locks at all, nothing is ever cleared.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)


def claim(path: Path) -> BinaryIO:
    """Create `path` for writing, locked until it is closed.

    Raises:
        FileExistsError: it is there. OSError: it cannot be made.
    """
    while True:
        stream = open(path, "xb")  # noqa: SIM115 - the caller closes it, and lets go of the lock with that
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody clears it, who came between these two lines
            stream.close()
            continue
        except OSError:  # no locks here: then nobody clears, either
            return stream
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                return stream
        stream.close()  # it was cleared


def clear_unowned(paths: Iterable[Path]) -> None:
    """Remove the files among `paths` that nobody holds a claim on."""
    for path in paths:
        try:
            with open(path, "r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # somebody writes it, it has just gone, or it is not ours to remove
            continue
        logger.info("%s: removed, left by a run that was killed", path)
