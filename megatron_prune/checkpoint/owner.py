"""Who writes into a folder, and whether that process is still alive (`lease` says what follows from it).

    Process      a process of this machine, told from later ones of its pid
    Owner        the same for others to read: host, pid and start, job, what launched it
    death        why an owner counts as dead, or None: the whole decision, pure but for a look at its process
    is_leaving   whether it will end by itself, soon

Dead is: no process of that pid and start on the same machine (at once); the same Slurm job, started again since (at
once); else no heartbeat for `EXPIRY` seconds, by the file server's clock alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EXPIRY = 120.0  # seconds; building an index may hold up a heartbeat for a while


@dataclass(frozen=True)
class Process:
    """A process of one machine. `start` is its start (ticks since boot), None where the system does not say."""

    pid: int
    start: int | None

    @classmethod
    def find(cls, pid: int) -> Process:
        """The process that has this pid now."""
        try:
            return cls(pid, _start(pid))
        except OSError:
            return cls(pid, None)

    def is_running(self) -> bool:
        """Whether this very process still runs: one that got its pid later is another, and a zombie has ended."""
        is_ours = True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):  # the latter: no system has that many
            return False
        except PermissionError:
            is_ours = False
        try:
            return self.start is None or _start(self.pid) == self.start
        except OSError:  # /proc may hide somebody else's (hidepid), or this process may open no more files
            return not is_ours or Path(f"/proc/{self.pid}").exists()


def _start(pid: int) -> int | None:
    """Start of a process from /proc; None when it is a zombie. Raises OSError: it is gone, or /proc does not say."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def this_machine() -> str:
    """What two processes share whose pids can be compared: the boot of one kernel, and a pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True)
class Owner:
    """Who holds a folder.

    Args:
        machine: see `this_machine`. job, restarts: Slurm's, how often it was requeued.
        above: pid and start of what launched it, where it ends with that.
        since: seconds since the epoch, for people.
    """

    token: str
    host: str
    machine: str
    pid: int
    start: int | None
    job: str | None
    restarts: int
    above: tuple[tuple[int, int | None], ...]
    command: str
    since: float

    @classmethod
    def of_this_process(cls, environ: Mapping[str, str], above: Sequence[Process] = ()) -> Owner:
        """This process, with a token of its own."""
        own, restarts = Process.find(os.getpid()), environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=this_machine(),
            pid=own.pid,
            start=own.start,
            job=environ.get("SLURM_JOB_ID"),
            restarts=int(restarts) if restarts.isdecimal() else 0,
            above=tuple((process.pid, process.start) for process in above),
            command=Path(sys.argv[0]).name.replace("__main__.py", "megatron-prune")[:80],
            since=time.time(),
        )

    @classmethod
    def from_json(cls, text: bytes) -> Owner:
        """Inverse of `to_json`. Raises ValueError."""
        try:
            values = json.loads(text)
            above = tuple((int(pid), start) for pid, start in values.pop("above"))
            owner = cls(**values, above=above)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if not isinstance(owner.pid, int) or not isinstance(owner.restarts, int):
            raise ValueError("pid and restarts are numbers")
        return owner

    def to_json(self) -> bytes:
        """As the file holds it."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    def is_same_process(self, other: Owner) -> bool:
        """Whether both are one process."""
        return (self.machine, self.pid, self.start) == (other.machine, other.pid, other.start)

    def was_requeued_as(self, other: Owner) -> bool:
        """Whether `other` is the same Slurm job, started again: Slurm ends the former start before."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts

    def __str__(self) -> str:
        job = "" if self.job is None else f", job {self.job}"
        at = time.strftime("%F %T", time.localtime(self.since)) if isinstance(self.since, (int, float)) else "?"
        return ascii(f"pid {self.pid} on {self.host}{job} ({self.command}, since {at})")[1:-1]


def death(owner: Owner | None, me: Owner, age: float) -> str | None:
    """Why `owner` is dead, as far as `me` can tell; None: it lives, or may live.

    Args:
        owner: None when its file cannot be read. age: seconds since its last heartbeat.
    """
    if owner is not None and owner.machine == me.machine:
        return None if Process(owner.pid, owner.start).is_running() else "its process is gone"
    if owner is not None and owner.was_requeued_as(me):
        return "its job was requeued"
    return f"no sign of life for {age:.0f} s" if age > EXPIRY else None


def is_leaving(owner: Owner | None, me: Owner) -> bool:
    """Whether it will end by itself, soon: what launched it is gone, or its job was started again."""
    if owner is None or owner.machine != me.machine:
        return False
    return owner.was_requeued_as(me) or not all(Process(*one).is_running() for one in owner.above)
