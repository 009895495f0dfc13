"""Of the errors that ranks of one job raise, one is told: that of the rank that has one while the others wait for it.

Most mistakes are all ranks' at once, and rank 0 tells them. A mistake of one rank only is seen by the others as a lost
rank; which of both it is, none of them can tell by itself. Where rank 0 keeps the store itself (no torchrun), it hangs
up on the others and stays until they have asked.
"""

import contextlib
import os
import socket
import stat
import time
from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import DisagreementError, UserError
from megatron_prune.runtime.failures import PEER_LOST, SilentError, lost_contact
from megatron_prune.runtime.rendezvous import store_answers

_SECONDS = 2.0  # until ranks that raise the same have raised it, and ranks that lost the same rank have asked
_SECONDS_OF_STORE = 10.0  # at most, once its keeper has failed: others may be in the midst of a step
_RANK_0, _TOLD = "error/0", "told"


class Voice:
    """One rank's part in settling which rank tells its error.

    Args:
        store: None for one rank, and where nothing is known of one: then rank 0 tells, as `exit_status` does.
        keeps: whether the store ends with this process.
        to_ranks: its `connections` to other ranks.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, keeps: bool, to_ranks: frozenset[int] = frozenset()
    ) -> None:
        self.store, self.rank, self.world_size, self.keeps = store, rank, world_size, keeps
        self.connections = to_ranks

    def settle(self, error: BaseException) -> None:
        """To be called before connections to other ranks are closed. Raises SilentError when another rank tells; a
        UserError or DisagreementError that is this rank's to tell is marked so."""
        if self.store is None or not isinstance(error, Exception):
            return
        with contextlib.suppress(RuntimeError):  # the store is gone, and who kept it: tell it, rather twice than never
            if lost_contact(error) is not None:
                if not store_answers(os.environ):
                    self.store = None
                    return
                if self._comes(_SECONDS, _TOLD):
                    raise SilentError(PEER_LOST) from error
                return
            is_shared = isinstance(error, (UserError, DisagreementError))
            if is_shared and self.rank == 0:
                self.store.set(_RANK_0, "1")
            elif is_shared and self._comes(_SECONDS, _RANK_0):
                raise SilentError(2 if isinstance(error, UserError) else 1) from error
            first = self.store.compare_set(_TOLD, "", str(self.rank)).decode()
            if is_shared and first != str(self.rank):
                raise SilentError(2 if isinstance(error, UserError) else 1) from error
        error.is_this_ranks = True  # type: ignore[attr-defined]

    def leave(self) -> None:
        """To be called last: who keeps the store lets the others notice, and waits until they have asked it."""
        if self.store is None:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "1")
            if self.keeps:
                # Destroying a process group closes nothing as long as a traceback or a hook refers to it.
                for connection in self.connections:
                    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection)) as other:
                        other.shutdown(socket.SHUT_RDWR)
                self._comes(_SECONDS_OF_STORE, *(f"left/{rank}" for rank in range(self.world_size)))

    def _comes(self, seconds: float, *keys: str) -> bool:
        """Whether they are set in time. Asked again and again: a wait in the store that ends in vain writes lines of
        its own."""
        end = time.monotonic() + seconds
        while not self.store.check(list(keys)):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True


def connections(environ: Mapping[str, str]) -> frozenset[int]:
    """File descriptors of this process's TCP connections; those to the store at MASTER_PORT are left out."""

    def is_to_a_rank(descriptor: int) -> bool:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        with socket.socket(fileno=os.dup(descriptor)) as one:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                return False
            ports = {str(one.getsockname()[1]), str(one.getpeername()[1])}
        return environ.get("MASTER_PORT") not in ports

    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by now, or connected to nobody
            if is_to_a_rank(int(name)):
                found.add(int(name))
    return frozenset(found)
