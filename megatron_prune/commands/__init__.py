"""What `megatron-prune COMMAND` and `python -m megatron_prune COMMAND` run, one module each, with a `main(argv)`.

Commands print; nothing else in the package does. Modules are imported when their command is called, so that `--help`
answers at once. `running.py` is what they share.
"""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from megatron_prune import __version__
from megatron_prune.errors import did_you_mean, one_line
from megatron_prune.runtime.signals import die_of_interrupts

# What libraries say about absent accelerators and about themselves at every import is no news for the user.
warnings.filterwarnings("ignore", module=r"(torch|megatron\.core|lm_eval|datasets|transformers)(\..*)?$")

# Command -> (module, what it does).
COMMANDS = {
    "pretrain": ("megatron_prune.pretrain", "train, prune while training, and train on"),
    "launch": ("megatron_prune.commands.launch_job", "run a whole job: prune, train on, export, evaluate"),
    "preprocess": ("megatron_prune.commands.preprocess_data", "turn text into a data set to train on"),
    "convert-from-hf": ("megatron_prune.commands.convert_from_hf", "Hugging Face folder -> checkpoint"),
    "convert-from-megatron": ("megatron_prune.commands.convert_from_megatron", "Megatron-LM's checkpoint -> ours"),
    "convert-to-megatron": ("megatron_prune.commands.convert_to_megatron", "checkpoint -> Megatron-LM's"),
    "convert-to-hf": ("megatron_prune.commands.convert_to_hf", "checkpoint -> folder that transformers loads"),
    "convert-to-gguf": ("megatron_prune.commands.convert_to_gguf", "Hugging Face folder -> GGUF file for llama.cpp"),
    "evaluate": ("megatron_prune.commands.evaluate", "judge models side by side: perplexity, zero-shot tasks"),
    "report": ("megatron_prune.commands.write_report", "show runs on a page: curves, shape over time, comparison"),
    "recipe": ("megatron_prune.commands.share_recipe", "share how a run pruned, without weights, to be repeated"),
    "inspect": ("megatron_prune.commands.inspect_checkpoint", "say, verify and draw what is in a checkpoint"),
    "score": ("megatron_prune.commands.score_model", "score a model's units once, by any criteria"),
    "prune-once": ("megatron_prune.commands.prune_once", "prune to a target without training, as a baseline"),
    "token-scaling": ("megatron_prune.commands.token_scaling", "compare runs by the tokens their pruning took"),
    "measure-latency": ("megatron_prune.commands.measure_latency", "time models, for a target in milliseconds"),
    "bench": ("megatron_prune.commands.bench", "measure what pruning costs, as fractions of a step"),
    "bench-save": ("megatron_prune.commands.bench_save", "measure what checkpoints cost"),
    "soak": ("megatron_prune.commands.soak_runs", "kill runs at random moments and compare what is left"),
    "doctor": ("megatron_prune.commands.examine", "say what this machine has, and what is missing for which feature"),
    "gpu-check": ("megatron_prune.commands.check_gpu", "check a machine with a GPU: numbers, speed, memory"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        (sys.stdout if words else sys.stderr).write(help_text())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"megatron-prune {__version__}")
        return 0
    if words[0] not in COMMANDS:
        nearest = did_you_mean(words[0].replace("_", "-"), COMMANDS)
        hint = f"did you mean {nearest}?" if nearest else "--help lists them"
        sys.stderr.write(f"error: unknown command {one_line(words[0])}; {hint}\n")
        return 2
    return int(importlib.import_module(COMMANDS[words[0]][0]).main(words[1:]))


def help_text() -> str:
    """All commands, a line each."""
    lines = [f"  {name:22} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: megatron-prune COMMAND [--flag value ...]",
            "",
            *lines,
            "",
            "megatron-prune COMMAND --help lists its flags.",
            "",
        ]
    )


def start(argv: Sequence[str] | None = None) -> None:
    """Run as the program does: end the process with the exit status; where nobody reads any more what it says
    (`| head`), with that of a program that the signal for it ended."""
    die_of_interrupts()
    try:
        status = main(argv)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's own flush would say it again
        status = 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 2
        sys.stderr.write("" if status != 2 else f"error: standard output: {error.strerror}\n")
    if status in (0, 1, 2):
        sys.exit(status)
    from megatron_prune.runtime.failures import leave  # knows when other ranks cannot be waited for

    leave(status)
