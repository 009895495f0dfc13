"""Errors for people: one line, on one rank, non-zero exit on all.

    mishap         what the machine refused, in one line, else None
    agreed         run a step that may fail on some ranks only; all ranks learn of it together
    lost_contact   what a collective said when another rank died or hung, else None
    SilentError    another rank tells it (see `voice`)
    exit_status    run a whole job and turn what it raises into an exit status

Exit status: 0 done or stopped as asked, 1 a defect or a broken run, 2 a mistake that the user can mend or a run that
broke its own rules, 3 another rank died or hung.
"""

import contextlib
import errno
import logging
import os
import re
import resource
import select
import sys
import traceback
from collections.abc import Callable
from typing import TextIO, TypeVar

import torch.distributed as dist

from megatron_prune.errors import DisagreementError, PeerLostError, UserError, first_line, one_line
from megatron_prune.runtime.agreement import first_complaint
from megatron_prune.runtime.mesh import Mesh, agree
from megatron_prune.runtime.places import speaks
from megatron_prune.runtime.rendezvous import NotMetError
from megatron_prune.runtime.signals import raise_interrupts

logger = logging.getLogger(__name__)
T = TypeVar("T")

PEER_LOST = 3


class SilentError(Exception):
    """This rank ends with `status` and says nothing: another one tells why (see `voice`)."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def agreed(mesh: Mesh, step: Callable[[], T]) -> T:
    """Result of `step`, which must not communicate. Raises the first rank's UserError on all ranks when any rank
    fails."""
    result, complaint = None, None
    try:
        result = step()
    except UserError as error:
        complaint = str(error)
    except OSError as error:
        complaint = mishap(error)
    told = first_complaint(agree(mesh, complaint))
    if told is not None:
        raise UserError(told)
    return result  # type: ignore[return-value]


def mishap(error: BaseException) -> str | None:
    """What the machine refused (a full or read-only disk, a missing file, too many of them) or lacks, in one line; else
    None."""
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "this megatron-core imports triton, which is not installed: pip install triton"
    if isinstance(error, (OSError, RuntimeError)) and (
        getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error)
    ):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files: this process may open {soft}; raise the limit with ulimit -n"
    if not isinstance(error, OSError) or isinstance(error, ConnectionError) or error.errno is None:
        return None
    place = error.filename if error.filename2 is None else f"{error.filename} -> {error.filename2}"
    reason = error.strerror or os.strerror(error.errno)
    return one_line(reason if place is None else f"{_text(place)}: {reason}")


def _text(place: object) -> str:
    return os.fsdecode(place) if isinstance(place, (str, bytes)) else str(place)


def lost_contact(error: BaseException) -> str | None:
    """The reason in a few words when `error` comes from a collective whose other side is gone, else None.

    gloo raises plain RuntimeErrors, told by their words; NCCL and the store have classes of their own.
    """
    if "Too many open files" in str(error):
        return None  # this rank's own trouble
    text = first_line(error)
    if isinstance(error, (PeerLostError, dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return text
    found = re.search(r"Connection (closed|reset) by peer|Timed out waiting \d+\s?ms|Broken pipe|Socket closed", text)
    if isinstance(error, RuntimeError) and ("gloo" in text or found):
        return found[0] if found else text
    return None


def exit_status(job: Callable[[], int]) -> int:
    """Run `job`; a mistake becomes one line on stderr of one rank (of each node's first, before ranks know each
    other; of a rank alone, where it is that one's). From here on Ctrl-C is an exception, which cleans up."""
    raise_interrupts()
    try:
        return job()
    except SilentError as error:
        return error.status
    except (UserError, DisagreementError) as error:
        if speaks(os.environ) or isinstance(error, NotMetError):
            sys.stderr.write(f"error: {error}\n")
        elif getattr(error, "is_this_ranks", False):
            sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')}: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    except PeerLostError as error:
        sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')}: {error}\n")
        return PEER_LOST
    except MemoryError as error:  # of one rank, perhaps: the launcher ends the others
        sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            raise  # for `commands.start`
        if lost_contact(error) is not None:
            sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')}: lost another rank: {lost_contact(error)}\n")
            return PEER_LOST
        reason = mishap(error)
        if reason is not None:
            sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')}: {reason}\n")
            return 2
        # Ranks of a broken run fail in different ways; each one's own traceback is wanted then.
        sys.stderr.write(f"rank {os.environ.get('RANK', '0')}:\n{traceback.format_exc()}\n")
        return 1


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe whose reader has left."""
    with contextlib.suppress(OSError, ValueError):  # no descriptor at all, or a closed one
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def leave(status: int) -> None:
    """End the process. After a rank was lost at once: tearing communicators down would wait for the dead one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status == PEER_LOST:
        os._exit(status)
    sys.exit(status)
