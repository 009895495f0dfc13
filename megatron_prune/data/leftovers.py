"""Temporary files and folders that tell whether somebody still writes them.

    sole_writer   be the only one who writes a target, a file or a folder
    staging       a name beside the target, after removing what killed processes left under such names
    claim         create a file that is locked as long as it is open
    claim_folder  the same for a folder
    scratch_folder  a folder among the system's temporary ones, for what is not to outlive this process
    clear_unowned remove those of processes that are gone

The lock is the kernel's (flock): it ends with the process, however that ended, and other nodes see it on file systems
that share locks. Where there are no locks at all, nothing is ever cleared.
"""

import fcntl
import glob
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_prune.errors import UserError

logger = logging.getLogger(__name__)

_SCRATCH = "megatron_prune-"
_TRIES = 1000


@contextmanager
def sole_writer(target: Path, what: str) -> Iterator[None]:
    """Nobody else who asks here writes `target` while this is entered; `.NAME.writer` beside it says who does. Folders
    that are made for it and stay empty are removed.

    Args:
        what: the flag that names the target, for messages.

    Raises:
        UserError: somebody else writes it, and the line names who; or the folder around it cannot be written.
    """
    path = target.parent / f".{target.name}.writer"
    try:
        made = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what} {target}: its folder cannot be made: {error.strerror or error}") from error
    try:
        clear_unowned([path])
        stream = claim(path)
    except OSError as error:
        if path.exists():
            who = path.read_text(encoding="utf-8", errors="replace")[:200] or "somebody who just began"
            raise UserError(
                f"{what} {target}: is being written by {who}; wait for it, or name another place (if nobody is alive, "
                f"remove {path})"
            ) from error
        raise UserError(f"{what} {target}: cannot be written: {error.strerror or error}") from error
    with stream:
        try:
            stream.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
            stream.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # something is in it
                for place in made:
                    place.rmdir()


def staging(target: Path) -> Path:
    """`.NAME.0123abcd.partial` beside `target`, not there yet; unowned ones of the same target are removed."""
    named = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]+\.partial")
    found = target.parent.glob(f".{glob.escape(target.name)}.*.partial")
    clear_unowned(path for path in found if named.fullmatch(path.name))
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def claim(path: Path) -> BinaryIO:
    """Create `path` for writing, locked until it is closed. Raises FileExistsError: it is there. OSError: it cannot be
    made."""
    while True:
        stream = open(path, "xb")  # noqa: SIM115 - the caller closes it, and lets go of the lock with that
        if _lock(stream.fileno(), path):
            return stream
        stream.close()


@contextmanager
def claim_folder(path: Path, mode: int = 0o777) -> Iterator[None]:
    """Make the folder `path`, and those above it, locked while entered; if it is still there afterwards, it goes.
    Raises FileExistsError: it is there. OSError: it cannot be made."""
    for number in range(_TRIES):
        try:
            path.mkdir(mode, parents=True)
        except FileExistsError:  # or one who clears, and took this one's for a leftover, has it still in hand
            if number in (0, _TRIES - 1):
                raise
            time.sleep(0.01)
            continue
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            if _lock(descriptor, path):
                break
            os.close(descriptor)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder of this process's own in the system's folder for temporary files, while entered. Those of this
    user's processes that were killed are removed. Raises OSError: it cannot be made."""
    place = Path(tempfile.gettempdir())
    clear_unowned(path for path in place.glob(f"{_SCRATCH}*") if _is_own(path))
    path = place / f"{_SCRATCH}{secrets.token_hex(8)}"
    with claim_folder(path, 0o700):
        yield path


def _is_own(path: Path) -> bool:
    with suppress(OSError):
        found = path.lstat()
        return found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)
    return False


def _lock(descriptor: int, path: Path) -> bool:
    """Lock what has just been made as `path`; False: somebody who clears came between, and it is gone or will be."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: then nobody clears, either
        return True
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def clear_unowned(paths: Iterable[Path]) -> None:
    """Remove the files and folders among `paths` that nobody holds a claim on."""
    for path in paths:
        mode = os.O_RDONLY if path.is_dir() else os.O_RDWR  # NFS locks no file that was opened for reading
        try:
            descriptor = os.open(path, mode | os.O_NOFOLLOW)
        except OSError:  # it has just gone, or it is not ours to remove
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:  # somebody writes it, or it is not ours to remove
            continue
        finally:
            os.close(descriptor)
        logger.info("%s: removed, left by a run that was killed", path)
