"""Where ranks meet before they have a process group: the store at MASTER_ADDR:MASTER_PORT.

    open_store      torchrun's store, or (without torchrun) one that rank 0 keeps
    keeps_store     who keeps it
    store_answers   whether it is still there
    check_port      whether this node can keep one
    NotMetError     the others could not be reached; each rank says so itself

A host that cannot be resolved, a port that is taken, an address where nobody answers and a port that belongs to another
program are mistakes of the user, told within the time that ranks may be late.
"""

import errno
import logging
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from megatron_prune.errors import UserError, first_line

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKUPS = 1.0
_SECONDS_TO_DIE = 0.2  # until all connections of a process that was killed are closed
_SECONDS_TO_ANSWER = 5.0  # beyond the store's own timeout


class NotMetError(UserError):
    """This rank could not meet the others, so nobody can speak for it."""


def open_store(rank: int, world_size: int, environ: Mapping[str, str], minutes: float) -> Any:
    """A torch.distributed.TCPStore that all ranks share; it must be kept alive until the process ends.

    Args:
        environ: MASTER_ADDR, MASTER_PORT and what torchrun sets.
        minutes: how long the others may be late.

    Raises:
        NotMetError: it cannot be had.
    """
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    hosts = keeps_store(rank, environ)
    deadline = time.monotonic() + 60 * minutes
    _resolve(address, port, deadline, minutes)
    outcome: list[Any] = []
    patience = timedelta(seconds=max(deadline - time.monotonic(), 1.0))

    def connect() -> None:
        from torch.distributed import TCPStore

        try:
            outcome.append(
                TCPStore(
                    address,
                    port,
                    is_master=hosts,
                    timeout=patience,
                    wait_for_workers=False,
                    multi_tenant=True,  # a process may open the store of its rank a second time
                )
            )
        except Exception as error:  # handed to the rank's own thread below
            outcome.append(error)

    # torch waits for ever for the answer of a program that is no store: the thread is left behind then.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience.total_seconds() + _SECONDS_TO_ANSWER)
    if not outcome:
        raise not_met(rank, world_size, environ, minutes, "what answers there is another program")
    if isinstance(outcome[0], Exception):
        if hosts and "EADDRINUSE" in str(outcome[0]):
            raise NotMetError(_taken(port))
        raise not_met(rank, world_size, environ, minutes, first_line(outcome[0])) from outcome[0]
    return outcome[0]


def keeps_store(rank: int, environ: Mapping[str, str]) -> bool:
    """Whether this rank keeps the store itself: rank 0, unless torchrun's agent does."""
    return rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def store_answers(environ: Mapping[str, str]) -> bool:
    """Whether somebody listens at the store's address, of a rank that has just lost another. A store that is asked
    after its keeper has died writes the stack of its own code."""
    time.sleep(_SECONDS_TO_DIE)
    try:
        with socket.create_connection((environ["MASTER_ADDR"], int(environ["MASTER_PORT"])), timeout=2):
            return True
    except OSError:
        return False


def not_met(rank: int, world_size: int, environ: Mapping[str, str], minutes: float, reason: str) -> NotMetError:
    """The error of a rank that waited for the others in vain."""
    place = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    return NotMetError(
        f"MASTER_ADDR, MASTER_PORT: rank {rank} could not meet the other {world_size - 1} ranks at {place} within "
        f"{minutes:g} minutes ({reason})"
    )


def check_port(port: int) -> None:
    """Refuse a port of this node that another program listens at. Raises NotMetError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise NotMetError(f"MASTER_PORT: port {port} cannot be used: {error.strerror}") from error
            raise NotMetError(_taken(port)) from error


def _taken(port: int) -> str:
    return (
        f"MASTER_PORT: port {port} of {socket.gethostname()} is taken by another program, perhaps a run that has not "
        "ended; give another port to all ranks"
    )


def _resolve(address: str, port: int, deadline: float, minutes: float) -> None:
    """Wait until the name is known: in a cluster that starts its machines with the job it may come late."""
    is_told = False
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise NotMetError(
                    f"MASTER_ADDR: {address} is no host that is known here ({reason}, tried for {minutes:g} minutes); "
                    "set it to rank 0's host"
                ) from error
        if not is_told:
            logger.warning("MASTER_ADDR: %s is not known yet, trying for %g minutes", address, minutes)
            is_told = True
        time.sleep(_SECONDS_BETWEEN_LOOKUPS)
