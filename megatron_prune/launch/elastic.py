"""torchrun as the launcher starts it: a rank that fails gives torchrun its status, without a traceback of torchrun's.

Ranks say themselves what was wrong; torchrun's forty lines about its own call stack would bury that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns its exit status, or that of the rank that failed first (128 + N for signal N)."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megatron_prune.launch.watch import announce

    os.environ.update(announce(os.environ))  # ranks end when this process is gone
    try:
        run.main(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
