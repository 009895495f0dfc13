"""`megatron-prune measure-latency`, for scripts that call it here."""

import sys

from megatron_prune.commands import start

if __name__ == "__main__":
    start(["measure-latency", *sys.argv[1:]])
