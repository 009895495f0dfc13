"""`megatron-prune bench`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["bench", *sys.argv[1:]])
