"""One writer per folder: a lease that a dead owner cannot hold, without locks that a network file system may not keep.

    DIR/writer.lease-7     who writes into DIR (`Owner`, as JSON); its time of change is the heartbeat

    acquire         take DIR, or say in one line who has it -> Lease
    Lease           keeps it alive (`loss`), gives it back (`release`)
    refuse_others   last look before a folder is cleared or a checkpoint published

A file is made under a name of its own and then linked to the next number, which fails where there is one: of any number
of starters one wins. It then looks again, and steps back unless every other file is a dead owner's: of two that link,
the later sees the earlier. Files are judged anew at that second look, never by the names seen at the first: numbers
begin again once a folder was given back, and a starter that stood still between its looks would take a live owner's
file for the dead one's that had this name before. Only who has won removes dead owners' files. So a file's owner holds
DIR as long as that file is there, and nobody ever removes a live one's. Who counts as dead: see `owner`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_prune.checkpoint.owner import EXPIRY, Owner, Process, death, is_leaving
from megatron_prune.errors import UserError
from megatron_prune.reading import open_file

PREFIX = "writer.lease-"
PATIENCE = 30.0  # seconds that a starter waits for an owner that is about to leave
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_TRIES = 20


class FolderBusyError(OSError):
    """Another live process writes into the folder."""


def is_lease(path: Path) -> bool:
    """Whether a file is a lease's: no content of the folder."""
    return path.name.startswith(PREFIX)


def _leases(directory: Path) -> dict[int, Path]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return {}
    found = (re.fullmatch(re.escape(PREFIX) + r"(\d{1,9})", name) for name in names)
    return {int(match[1]): directory / match[0] for match in found if match}


def _read(path: Path, now: float) -> tuple[Owner | None, float]:
    """(owner, seconds since its heartbeat). Raises FileNotFoundError when it has just been removed."""
    with open_file(path) as file:  # opened: a network file system then asks its server
        text, age = file.read(1 << 16), now - os.fstat(file.fileno()).st_mtime
    try:
        return Owner.from_json(text), age
    except ValueError:
        return None, age


def live_owner(directory: Path) -> Owner | None:
    """Who holds `directory`, this process or another; None when nobody does, as far as this one can tell."""
    me, now = Owner.of_this_process(os.environ), time.time()
    for path in _leases(directory).values():
        with contextlib.suppress(OSError):
            owner, age = _read(path, now)
            if owner is not None and death(owner, me, age) is None:
                return owner
    return None


def refuse_others(directory: Path) -> None:
    """Raise FolderBusyError when a live process other than this one holds `directory`."""
    owner = live_owner(directory)
    if owner is not None and not owner.is_same_process(Owner.of_this_process(os.environ)):
        raise FolderBusyError(errno.EBUSY, f"being written by {owner}", str(directory))


class Lease:
    """A lease that this process holds; its file is `path`.

    Args:
        is_nested: it is held further out, by the same process, and given back there.
        made: folders that were made for it, outermost first.
    """

    def __init__(self, path: Path, owner: Owner, is_nested: bool = False, made: tuple[Path, ...] = ()) -> None:
        self.path, self.owner, self.is_nested, self.made = path, owner, is_nested, made

    def loss(self) -> str | None:
        """None while it is held, and the heartbeat is given; else who has the folder now, in words.

        A file that cannot be read just now (a server that does not answer) is no loss.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            now = live_owner(self.path.parent)
            return "its lease was removed" if now is None else f"it is written by {now} now"
        except OSError:
            return None
        try:
            owner = Owner.from_json(os.read(handle, 1 << 16))
            if owner.token != self.owner.token:
                return f"it is written by {owner} now"
            os.utime(handle)  # of this very file, whatever has its name meanwhile
            return None
        except (OSError, ValueError):
            return None
        finally:
            os.close(handle)

    def release(self) -> None:
        """Give it back; folders that were made for it and are empty go as well."""
        if self.is_nested or self.loss() is not None:
            return
        with contextlib.suppress(OSError):  # the heartbeat ends with the process
            self.path.unlink(missing_ok=True)
            for folder in reversed(self.made):
                folder.rmdir()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(directory: Path, above: Sequence[Process] = (), what: str = "checkpoint.save") -> Lease:
    """Take `directory`, which is made where it is not there.

    An owner that is about to leave, its launcher gone, is waited for up to `PATIENCE` seconds.

    Args:
        above: what launched this process, where it ends with that.
        what: the field or flag that names the folder, for messages.

    Raises:
        UserError: somebody else has it (the line names who), or the folder cannot be written.
    """
    me, deadline = Owner.of_this_process(os.environ, above), time.monotonic() + PATIENCE
    try:
        made = _make(directory)
        proposal = directory / f"{PREFIX}new-{me.token}"
        try:
            with proposal.open("xb") as file:
                file.write(me.to_json())
                file.flush()
                os.fsync(file.fileno())
            return _compete(directory, proposal, me, deadline, made, what)
        finally:
            proposal.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            raise UserError(f"{what}: {error.filename} is a file; give a folder") from error
        raise UserError(f"{what}: {directory} cannot be written: {error.strerror}") from error


def _make(directory: Path) -> tuple[Path, ...]:
    """Make the folder; those that were not there, outermost first."""
    absent = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return tuple(reversed(absent))


def _compete(directory: Path, proposal: Path, me: Owner, deadline: float, made: tuple[Path, ...], what: str) -> Lease:
    for _ in range(_TRIES):
        found = _attempt(directory, proposal, me, made)
        while found is not None and not isinstance(found, Lease) and found[1] and time.monotonic() < deadline:
            time.sleep(0.2)
            found = _attempt(directory, proposal, me, made)
        if isinstance(found, Lease):
            return found
        if found is not None:
            raise UserError(
                f"{what}: {directory} is being written by {found[0]}; wait for that run or stop it, or give another "
                "folder"
            )
        time.sleep(random.uniform(0.01, 0.1))
    raise UserError(f"{what}: {directory}: other runs are starting there at this moment; start one of them")


def _attempt(directory: Path, proposal: Path, me: Owner, made: tuple[Path, ...]) -> Lease | tuple[str, bool] | None:
    """The lease; or (who has it, whether that one is about to leave); or None: something changed, try again."""
    present = _leases(directory)
    os.utime(proposal)
    now = proposal.stat().st_mtime  # of the same clock as the heartbeats
    try:
        alive = _alive(present.values(), me, now)
    except FileNotFoundError:
        return None
    if alive is not None:
        path, owner, age = alive
        if owner is not None and owner.is_same_process(me):
            return Lease(path, owner, is_nested=True)
        return _words(owner, me, age, path), is_leaving(owner, me)
    number = max(present, default=0) + 1
    mine = directory / f"{PREFIX}{number}"
    if not _link(proposal, mine, me):
        return None
    others = {other: path for other, path in _leases(directory).items() if other != number}
    try:  # numbers come again: what was dead a moment ago may by now be somebody's, who came and linked meanwhile
        is_alone = not set(others) - set(present) and _alive(others.values(), me, now) is None
    except FileNotFoundError:
        is_alone = False
    if not is_alone:
        mine.unlink(missing_ok=True)
        return None
    for path in present.values():
        path.unlink(missing_ok=True)
    for path in directory.glob(f"{PREFIX}new-*"):  # of starters that were killed
        with contextlib.suppress(OSError):
            if path != proposal and now - path.stat().st_mtime > EXPIRY:
                path.unlink()
    return Lease(mine, me, made=made)


def _alive(leases: Iterable[Path], me: Owner, now: float) -> tuple[Path, Owner | None, float] | None:
    """The first that is not dead, with its owner and age. Raises FileNotFoundError: one has just been removed."""
    for path in leases:
        owner, age = _read(path, now)
        if death(owner, me, age) is None:
            return path, owner, age
    return None


def _words(owner: Owner | None, me: Owner, age: float, path: Path) -> str:
    if owner is None:
        return f"somebody ({path} cannot be read; remove it if no run is alive)"
    if owner.machine == me.machine:
        return str(owner)
    return f"{owner}, last heard of {max(age, 0):.0f} s ago (it counts as dead after {EXPIRY:.0f} s)"


def _link(proposal: Path, mine: Path, me: Owner) -> bool:
    """Make `mine`, if nobody else has; whether this process did."""
    try:
        os.link(proposal, mine)
        return True
    except FileExistsError:  # or done, and a network file system's answer was lost
        with contextlib.suppress(OSError):
            return os.path.samefile(proposal, mine)
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        with mine.open("xb") as file:  # a file system without hard links
            file.write(me.to_json())
    except FileExistsError:
        return False
    return True
