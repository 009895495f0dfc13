"""`python -m megatron_prune COMMAND`: see megatron_prune/commands."""

from megatron_prune.commands import start

if __name__ == "__main__":
    start()
