"""`megatron-prune convert-from-hf`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["convert-from-hf", *sys.argv[1:]])
