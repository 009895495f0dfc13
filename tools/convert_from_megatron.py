"""Make a checkpoint to start from out of one that Megatron-LM saved: GPTModel in Llama's shape, `torch_dist` format.

    python tools/convert_from_megatron.py --load MEGATRON_DIR --save DIR [--tokenizer-model PATH] [--vocab-size N ...]

The shape is read from the tensors and from the arguments stored beside them; flags go before those. Weights only:
tensors are streamed, all are accounted for. A mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_prune.errors import UserError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="folder that Megatron saved to, or one iter_... folder in it")
    add("--save", required=True, metavar="DIR", help="the new checkpoint's folder; must not hold anything")
    add("--tokenizer-model", metavar="PATH", help="tokenizer to record as the model's")
    for name in ("num-attention-heads", "num-query-groups", "kv-channels", "vocab-size", "max-position-embeddings"):
        add(f"--{name}", type=int, metavar="N", help="as the stored arguments say unless given")
    for name in ("norm-epsilon", "rotary-base"):
        add(f"--{name}", type=float, metavar="X", help="as the stored arguments say unless given")
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace) -> None:
    """Open, check, write. Raises UserError."""
    from megatron_prune.checkpoint import CheckpointSaveError, save_weights
    from megatron_prune.checkpoint.megatron import MegatronCheckpoint, ShapeOptions
    from megatron_prune.model.architecture import Architecture
    from megatron_prune.model.param_axes import ParamTable
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import close_mesh, init_mesh

    save = Path(arguments.save)
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UserError(f"--save {save}: is there already; name a folder that does not exist or is empty")
    options = ShapeOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ShapeOptions)})
    source = MegatronCheckpoint(Path(arguments.load), options)
    architecture = Architecture.full(source.shape)
    names = list(ParamTable.build(source.shape).hf_shapes(architecture))
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\..*")  # remarks on absent accelerators
    try:
        convert(parse(argv))
    except UserError as error:
        print(f"convert_from_megatron: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
