"""torchrun as the launcher starts it: a rank that fails gives torchrun its status, without a traceback of torchrun's.

Ranks say themselves what was wrong; torchrun's forty lines about its own call stack would bury that. Nodes that cannot
meet are one line on each, and status 2.
"""

import contextlib
import os
import sys
from collections.abc import Sequence

from megatron_prune.errors import first_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns its exit status, or that of the rank that failed first (128 + N for signal N)."""
    from torch.distributed import DistNetworkError, DistStoreError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megatron_prune.data.leftovers import scratch_folder
    from megatron_prune.launch.assembly.watch import announce

    os.environ.update(announce(os.environ))  # ranks end when this process is gone
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.ExitStack() as held:
            if not any(word.startswith("--log-dir") for word in words):  # else it leaves a folder of its own
                words.insert(0, f"--log-dir={held.enter_context(scratch_folder())}")
            run.main(words)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except (DistNetworkError, DistStoreError) as error:  # torchrun's own: ranks are processes of their own
        sys.stderr.write(
            f"error: MASTER_ADDR, MASTER_PORT: this node could not meet the others ({first_line(error)})\n"
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
