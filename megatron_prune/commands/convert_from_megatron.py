"""Make a checkpoint to start from out of one that Megatron-LM saved: a model in Llama's shape, `torch_dist` format.

    megatron-prune convert-from-megatron --load MEGATRON_DIR --save DIR [--tokenizer-model PATH] [--vocab-size N ...]

The shape is read from the tensors and from the arguments stored beside them; flags go before those. Weights only:
tensors are streamed, all are accounted for.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError

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
    from megatron_prune.checkpoint import CheckpointSaveError, save_weights
    from megatron_prune.checkpoint.megatron import MegatronCheckpoint, ShapeOptions
    from megatron_prune.model.architecture import Architecture
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import close_mesh, init_mesh

    save = Path(arguments.save)
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UserError(f"--save {save}: is there already; name a folder that does not exist or is empty")
    options = ShapeOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ShapeOptions)})
    source = MegatronCheckpoint(Path(arguments.load), options)
    architecture = Architecture.full(source.shape)
    names = list(architecture.table.parts)
    source.check(names)
    print(
        f"{source.path}: {len(source.stored)} tensors of the model, all accounted for; {source.skipped} others left out"
    )
    state: dict[str, Any] = {
        "source": {},
        "tokenizer_model": arguments.tokenizer_model,
        "consumed_tokens": 0,
        "history": [],
    }
    mesh = init_mesh(choose_device("cpu"), 1, 1)
    try:
        with tqdm(total=len(names), unit="tensor", desc="writing", disable=not sys.stderr.isatty()) as bar:

            def read(hf_name: str) -> Any:
                bar.update()
                return source(hf_name)

            written = save_weights(mesh, save, 0, architecture, read, source.dtype, state)
    except CheckpointSaveError as error:
        raise UserError(f"--save {save}: {error}") from error
    finally:
        close_mesh()
    print(f"{written}: {architecture.parameters:,} parameters")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command(
        "convert-from-megatron", MegatronImportOptions, convert, argv, "interrupted; nothing was written"
    )
