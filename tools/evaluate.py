"""`megatron-prune evaluate`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["evaluate", *sys.argv[1:]])
