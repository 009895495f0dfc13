"""Make a checkpoint to start from out of one that Megatron-LM saved: a model in Llama's shape, `torch_dist` format.

    megatron-prune convert-from-megatron --load MEGATRON_DIR --save DIR [--tokenizer-model PATH] [--vocab-size N ...]

The shape is read from the tensors and from the arguments stored beside them; flags go before those. Weights only:
tensors are streamed, all are accounted for.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prune.commands.convert_from_hf import write
from megatron_prune.commands.running import NOTHING_WRITTEN, run_command, say
from megatron_prune.config.options import filled, option

_STORED = "as the stored arguments say unless given"


@dataclass(frozen=True)
class MegatronImportOptions:
    """The command's options."""

    load: str = option(None, "folder that Megatron saved to, or one iter_... in it", metavar="DIR", required=True)
    save: str = option(None, "the new checkpoint's folder; must not hold anything", metavar="DIR", required=True)
    tokenizer_model: str | None = option(None, "tokenizer to record as the model's", metavar="PATH")
    num_attention_heads: int | None = option(None, _STORED)
    num_query_groups: int | None = option(None, _STORED)
    kv_channels: int | None = option(None, _STORED)
    vocab_size: int | None = option(None, _STORED)
    max_position_embeddings: int | None = option(None, _STORED)
    norm_epsilon: float | None = option(None, _STORED)
    rotary_base: float | None = option(None, _STORED)


def convert(arguments: MegatronImportOptions) -> int:
    """Open, check, write; the exit status. Raises UserError."""
    from megatron_prune.checkpoint.files import refuse_content
    from megatron_prune.checkpoint.megatron import MegatronCheckpoint, ShapeOptions
    from megatron_prune.model.architecture import Architecture

    save = Path(arguments.save)
    refuse_content(save, "--save")
    source = MegatronCheckpoint(Path(arguments.load), filled(ShapeOptions, arguments))
    architecture = Architecture.full(source.shape)
    names = list(architecture.table.parts)
    source.check(names)
    say(
        f"{source.path}: {len(source.stored)} tensors of the model, all accounted for; {source.skipped} others left out"
    )
    state: dict[str, Any] = {
        "source": {},
        "tokenizer_model": arguments.tokenizer_model,
        "consumed_tokens": 0,
        "history": [],
    }
    written = write(source, len(names), save, architecture, source.dtype, state)
    say(f"{written}: {architecture.parameters:,} parameters")
    return 0


main = partial(run_command, "convert-from-megatron", MegatronImportOptions, convert, interrupted=NOTHING_WRITTEN)
