"""A real model pruned to half of its parameters on the tokens that the minutes allow, from where the last call ended.

The model is `--model`, or stories260K of the real inputs with its own kind of text; the run is an ordinary one with the
project's defaults, which stops by its time limit, saved, and goes on when it is asked for again.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import UserError
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.model.kinds import find_kind
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row
from megatron_prune.testing.benchmarks.gpu_check.way import python


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: tokens of an iteration, and the learning rate."""

    seq_length: int
    batch: int
    micro_batch: int
    lr: float
    iterations: int


SMALL = Recipe(256, 8, 8, 1e-3, 300)
LARGE = Recipe(1024, 16, 8, 2e-4, 4000)


def check(context: Context) -> Iterator[Row]:
    """Losses of the run as far as it got."""
    model = context.model or (context.data / "stories260K" if context.data is not None else None)
    if model is None:
        yield Row("pruned to half", "no model: --model DIR, or real inputs by --data DIR")
        return
    source = read_architecture(model)
    recipe = SMALL if source.parameters < 10_000_000 else LARGE
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as temporary:
        run = context.state or Path(temporary) / "run"
        data = run.parent / f"{run.name}_data" / "text"
        if not data.with_suffix(".bin").exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            words = ("--input", _text(context), "--output-prefix", data, "--append-eod", "--tokenizer-model", model)
            python("-m", "megatron_prune", "preprocess", *words)
        python("-m", "megatron_prune.pretrain", *_arguments(context, recipe, model, data, run, source.parameters // 2))
        yield from _found(run)


def _text(context: Context) -> Path:
    if context.data is None:
        raise UserError("gpu-check, science: text comes from the real inputs; name them by --data DIR")
    return context.data / "text" / "tinystories_944k.txt"


def _arguments(context: Context, recipe: Recipe, model: Path, data: Path, run: Path, target: int) -> list[object]:
    iterations = 4 if context.tiny else recipe.iterations
    return [
        *("--hf-model", model, "--data-path", data, "--split", "90,10,0", "--save", run, "--load", run),
        *("--device", context.device, "--seq-length", recipe.seq_length, "--global-batch-size", recipe.batch),
        *("--micro-batch-size", recipe.micro_batch, "--lr", recipe.lr, "--train-iters", iterations),
        *("--prune-target-params", target, "--prune-groups", "head.cost=1", "--prune-ratio", "2:1"),
        *("--continue-tokens", iterations * recipe.batch * recipe.seq_length, "--log-interval", 20),
        *("--eval-interval", 100, "--eval-iters", 8, "--exit-duration-in-mins", max(1, round(context.minutes))),
        *(("--bf16",) if context.is_cuda else ()),
    ]


def _found(run: Path) -> Iterator[Row]:
    summary = json.loads((run / "summary.json").read_text())
    yield Row("run", f"iteration {summary.get('iteration')}, {summary.get('consumed_tokens'):,} tokens")
    for name, stage in summary["stages"].items():
        widths = ", ".join(f"{find_kind(kind).title} {width}" for kind, width in stage["widths"].items())
        loss, size = stage["validation_loss"], stage["parameters"]
        yield Row(f"{name}: validation loss", f"{loss:.4f} at {size:,} parameters ({widths})", value=loss)
