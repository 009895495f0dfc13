"""`megatron-prune convert-from-megatron`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["convert-from-megatron", *sys.argv[1:]])
