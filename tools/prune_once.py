"""`megatron-prune prune-once`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["prune-once", *sys.argv[1:]])
