"""Errors for people: one line, on one rank, non-zero exit on all.

    agreed        run a step that may fail on some ranks only; all ranks learn of it together
    exit_status   run a whole job and turn what it raises into an exit status

Exit status: 0 done or stopped as asked, 1 a defect or a broken run, 2 a mistake that the user can mend.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from megatron_prune.errors import DisagreementError, UserError
from megatron_prune.runtime.mesh import Mesh, agree

logger = logging.getLogger(__name__)
T = TypeVar("T")


def agreed(mesh: Mesh, step: Callable[[], T]) -> T:
    """Result of `step`, which must not communicate. Raises the first rank's UserError on all ranks when any rank
    fails.
    """
    result, complaint = None, None
    try:
        result = step()
    except UserError as error:
        complaint = str(error)
    complaints = agree(mesh, complaint)
    failed = [rank for rank, text in enumerate(complaints) if text is not None]
    if failed:
        where = "" if len(failed) == len(complaints) else f" (on ranks {', '.join(map(str, failed))} only)"
        raise UserError(f"{complaints[failed[0]]}{where}")
    return result  # type: ignore[return-value]


def exit_status(job: Callable[[], int]) -> int:
    """Run `job`; a mistake becomes one line on stderr of one rank (of each node's first, before ranks know each
    other).
    """
    try:
        return job()
    except (UserError, DisagreementError) as error:
        if _speaks():
            sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    except MemoryError as error:  # of one rank, perhaps: the launcher ends the others
        sys.stderr.write(f"error: rank {os.environ.get('RANK', '0')}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        # Ranks of a broken run fail in different ways; each one's own traceback is wanted then.
        sys.stderr.write(f"rank {os.environ.get('RANK', '0')}:\n{traceback.format_exc()}\n")
        return 1


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"
