"""`megatron-prune inspect`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["inspect", *sys.argv[1:]])
