"""Of the errors that ranks of one job raise, one is told: that of the rank that has one while the others wait for it.

    Voice       settled over the store that ranks met over, which works when the ranks' own connections are gone

Most mistakes are all ranks' at once, and rank 0 tells them. A mistake of one rank only is seen by the others as a lost
rank; which of both it is, none of them can tell by itself. Where rank 0 keeps the store itself (no torchrun) and fails
alone, the store ends with it: then the others say, beside its line, that they lost a rank.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from megatron_prune.errors import DisagreementError, UserError
from megatron_prune.runtime.failures import PEER_LOST, SilentError, lost_contact

_SECONDS = 2.0  # until ranks that raise the same have raised it, and ranks that lost the same rank have asked
_RANK_0, _TOLD = "error/0", "told"


class Voice:
    """One rank's part in settling which rank tells its error.

    Args:
        store: None for one rank, and where nothing is known of one: then rank 0 tells, as `exit_status` does.
        keeps: whether the store ends with this process.
    """

    def __init__(self, store: Any, rank: int, world_size: int, keeps: bool) -> None:
        self.store, self.rank, self.world_size, self.keeps = store, rank, world_size, keeps

    def settle(self, error: BaseException) -> None:
        """To be called before connections to other ranks are closed. Raises SilentError when another rank tells; a
        UserError or DisagreementError that is this rank's to tell is marked so.
        """
        if self.store is None or not isinstance(error, Exception):
            return
        with contextlib.suppress(RuntimeError):  # the store is gone, and who kept it: tell it, rather twice than never
            if lost_contact(error) is not None:
                if self._comes(_TOLD):
                    raise SilentError(PEER_LOST) from error
                return
            is_shared = isinstance(error, (UserError, DisagreementError))
            if is_shared and self.rank == 0:
                self.store.set(_RANK_0, "1")
            elif is_shared and self._comes(_RANK_0):
                raise SilentError(2 if isinstance(error, UserError) else 1) from error
            first = self.store.compare_set(_TOLD, "", str(self.rank)).decode()
            if is_shared and first != str(self.rank):
                raise SilentError(2 if isinstance(error, UserError) else 1) from error
        error.is_this_ranks = True  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Call after `settle` by a rank that lost others: the keeper of the store waits until the rest have asked
        it."""
        if self.store is None:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "1")
            if self.keeps:
                self._comes(*(f"left/{rank}" for rank in range(self.world_size)))

    def _comes(self, *keys: str) -> bool:
        """Whether they are set within some seconds. Asked again and again: a wait in the store that ends in vain writes
        lines of its own.
        """
        end = time.monotonic() + _SECONDS
        while not self.store.check(list(keys)):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True
