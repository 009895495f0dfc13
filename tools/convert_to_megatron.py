"""`megatron-prune convert-to-megatron`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["convert-to-megatron", *sys.argv[1:]])
