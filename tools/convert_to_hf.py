"""`megatron-prune convert-to-hf`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["convert-to-hf", *sys.argv[1:]])
