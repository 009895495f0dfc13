"""Make a checkpoint that stock Megatron-LM loads out of one of ours: GPTModel's names, `torch_dist` format.

    megatron-prune convert-to-megatron --load RUN --save DIR [--tensor-model-parallel-size N] [--optimizer-state]

Live units only: the weights (`--finetune` or `--no-load-optim` in Megatron-LM), with `--optimizer-state` also Adam's
state for its distributed optimizer; the model's arguments beside them (`--use-checkpoint-args`). Stock layers know one
number of heads, KV heads and FFN channels, and share them out evenly over tensor-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_prune.commands.running import NOTHING_WRITTEN, run_command, say
from megatron_prune.config.options import filled, option
from megatron_prune.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_prune.checkpoint.reader import CheckpointReader
    from megatron_prune.checkpoint.to_megatron import AdamState
    from megatron_prune.huggingface.kv_policy import KvPlan
    from megatron_prune.model.architecture import Architecture
    from megatron_prune.model.shape import LlamaShape

MOST_RANKS = 8  # that are tried, to say which fit


@dataclass(frozen=True)
class MegatronExportOptions:
    """The command's options."""

    load: str = option(None, "a run's folder, or one of its iter_... folders", metavar="DIR", required=True)
    save: str = option(None, "the new checkpoint's folder; must not hold anything", metavar="DIR", required=True)
    ckpt_step: int | None = option(None, "iteration; the newest unless given")
    tensor_model_parallel_size: int = option(1, "ranks that the model must be shareable over", at_least=1)
    make_vocab_size_divisible_by: int = option(128, "as it will be given to Megatron-LM", at_least=1)
    kv_policy: str = option(
        "auto",
        "native: grouped-query attention as it is; expand: KV heads repeated, one per query head; auto: native where "
        "it is exact, else expand",
        metavar="P",
    )
    optimizer_state: bool = option(False, "Adam's state, too, for Megatron-LM's distributed optimizer")
    dtype: str | None = option(None, "float32, bfloat16 or float16; the checkpoint's unless given", metavar="T")


def stock_shape(architecture: Architecture, plan: KvPlan) -> LlamaShape:
    """The shape of the written model. Raises UserError where layers differ."""
    ragged = [f"{kind.title} {architecture.span(kind)}" for kind in architecture.table.varying if not kind.follows]
    if any(" to " in span for span in ragged):
        raise UserError(f"layers of a stock model are alike, and these have {', '.join(ragged)}")
    return dataclasses.replace(
        architecture.shape,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=plan.num_key_value_heads,
    )


def adam_of(reader: CheckpointReader, plan: KvPlan) -> AdamState:
    """The run's optimizer. Raises UserError where it is not there, or repeated KV heads have none."""
    from megatron_prune.checkpoint.record import CONFIG_FILE
    from megatron_prune.checkpoint.to_megatron import AdamState
    from megatron_prune.config import read_file
    from megatron_prune.huggingface.weights import layers_left

    if not reader.record.facts.optimizer:
        raise UserError(f"--optimizer-state: {reader.path} holds weights alone")
    if plan.repeats is not None:
        raise UserError(
            "--optimizer-state: KV heads are repeated (--kv-policy expand), and copies have no state of their own; "
            "leave the flag out"
        )
    used = read_file(reader.path / CONFIG_FILE).optimizer

    @cache
    def of_kind(kind: str) -> Callable[[str], Tensor]:
        return layers_left(partial(reader.read_optimizer, kind), reader.architecture)[0]

    step = reader.record.facts.adam_step
    return filled(AdamState, used, read=lambda kind, hf_name: of_kind(kind)(hf_name), step=step)


def convert(arguments: MegatronExportOptions) -> int:
    """Check, read, write; the exit status. Raises UserError."""
    from megatron_prune.checkpoint.files import refuse_content
    from megatron_prune.checkpoint.reader import CheckpointReader
    from megatron_prune.checkpoint.to_megatron import save_for_megatron, stock_misfit
    from megatron_prune.huggingface.kv_policy import CLUSTER, KvPlan
    from megatron_prune.huggingface.provenance import tokenizer_of
    from megatron_prune.huggingface.shards import DTYPES
    from megatron_prune.huggingface.weights import layers_left
    from megatron_prune.runtime.mesh import meshed

    save, tp = Path(arguments.save), arguments.tensor_model_parallel_size
    refuse_content(save, "--save")
    if arguments.kv_policy == CLUSTER:
        raise UserError(f"--kv-policy {CLUSTER}: stock Megatron has no such attention; use native or expand")
    reader = CheckpointReader(arguments.load, arguments.ckpt_step)
    dtype = DTYPES.get(arguments.dtype or reader.record.facts.dtype)
    if dtype is None:
        raise UserError(f"--dtype {arguments.dtype}: unknown; use {', '.join(DTYPES)}")
    read_left, architecture = layers_left(reader.read, reader.architecture)
    plan = KvPlan.choose(architecture, arguments.kv_policy)
    shape = stock_shape(architecture, plan)
    adam = adam_of(reader, plan) if arguments.optimizer_state else None
    misfit = stock_misfit(shape, tp)
    if misfit:
        raise UserError(f"--tensor-model-parallel-size {tp}: {misfit}")
    multiple = arguments.make_vocab_size_divisible_by * tp
    padded = -(-shape.vocab_size // multiple) * multiple
    tokenizer = tokenizer_of(reader.meta)
    more = {
        "make_vocab_size_divisible_by": arguments.make_vocab_size_divisible_by,
        "tokenizer_model": tokenizer[1] if tokenizer else None,
    }
    parts = architecture.table.parts
    with meshed(), tqdm(total=len(parts), unit="tensor", desc="reading", disable=not sys.stderr.isatty()) as bar:

        def read(hf_name: str) -> Any:
            bar.update()
            part, layer = parts[hf_name]
            return plan.apply(part, layer, read_left(hf_name))

        written = save_for_megatron(save, reader.record.iteration, shape, read, dtype, padded, more, adam)
    report(written, shape, plan.policy, dtype, adam, padded)
    return 0


def report(
    written: Path, shape: LlamaShape, policy: str, dtype: torch.dtype, adam: AdamState | None, padded: int
) -> None:
    """Say what was written, and what to know of it."""
    from megatron_prune.checkpoint.to_megatron import stock_misfit

    fits = [str(n) for n in range(1, MOST_RANKS + 1) if stock_misfit(shape, n) is None]
    say(
        f"{written}: GPTModel, {shape.num_layers} layers, hidden {shape.hidden_size}, FFN {shape.ffn_hidden_size}, "
        f"{shape.num_attention_heads} heads, {shape.num_query_groups} KV heads ({policy}), {dtype}"
    )
    if adam:
        say(
            f"Adam after {adam.step} steps; Megatron-LM goes on with it given --lr {adam.lr} --min-lr {adam.min_lr} "
            "--use-distributed-optimizer --override-opt-param-scheduler"
        )
    if padded > shape.vocab_size:
        say(f"{padded - shape.vocab_size} rows of padding take part in Megatron's softmax, and do not here")
    say(f"tensor-parallel sizes that share it out evenly: {', '.join(fits)}")


main = partial(run_command, "convert-to-megatron", MegatronExportOptions, convert, interrupted=NOTHING_WRITTEN)
