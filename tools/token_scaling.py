"""`megatron-prune token-scaling`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["token-scaling", *sys.argv[1:]])
