"""Turn a Hugging Face folder into one GGUF file, for llama.cpp and what is built on it.

    python tools/convert_to_gguf.py --hf-model exported --save model.gguf --dtype q8_0

Tokenizer included. Cluster attention does not map: export the checkpoint with --kv-policy expand. A mistake is one line
on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_prune.errors import UserError

if TYPE_CHECKING:
    from megatron_prune.huggingface.gguf_file import Converted


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--hf-model", required=True, metavar="DIR", help="folder, as tools/convert_to_hf.py writes it")
    add("--save", required=True, metavar="FILE", help="file to write; must not exist")
    add("--dtype", default="f16", metavar="T", help="f32, f16, bf16 or q8_0, of matrices; norms and biases stay f32")
    return parser.parse_args(argv)


def quantized(done: Converted) -> str:
    """How much of the file Q8_0 could take, and what a run would have to set for all of it."""
    text = f"q8_0: {done.matrices - len(done.fallbacks)} of {done.matrices} matrices"
    if not done.fallbacks:
        return text
    names = dict.fromkeys(re.sub(r"^blk\.\d+\.", "blk.*.", name) for name in done.fallbacks)  # layers are alike
    text += f"; the others in f16, since their rows are no multiple of 32: {', '.join(names)}"
    if done.rounding:
        text += f"\nprune with --prune-round-widths {done.rounding}, and all of them can be quantized"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    from megatron_prune.huggingface.gguf_file import convert

    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        with tqdm(unit="tensor", desc="writing", disable=not sys.stderr.isatty()) as bar:
            done = convert(arguments.hf_model, arguments.save, arguments.dtype, lambda _: bar.update())
    except UserError as error:
        print(f"convert_to_gguf: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_to_gguf: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{done.file}: {done.architecture}, {done.parameters:,} parameters in {done.tensors} tensors, "
        f"{done.file.stat().st_size:,} bytes"
    )
    if arguments.dtype == "q8_0":
        print(quantized(done))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the partial file is removed
    sys.exit(main())
