"""Turn a Hugging Face folder into one GGUF file, for llama.cpp and what is built on it.

    megatron-prune convert-to-gguf --hf-model exported --save model.gguf --dtype q8_0

Tokenizer included. Cluster attention does not map: export the checkpoint with --kv-policy expand.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_prune.commands.running import NOTHING_WRITTEN, run_command, say
from megatron_prune.config.options import option

if TYPE_CHECKING:
    from megatron_prune.huggingface.gguf_file import Converted


@dataclass(frozen=True)
class GgufOptions:
    """The command's options."""

    hf_model: str = option(None, "folder, as convert-to-hf writes it", metavar="DIR", required=True)
    save: str = option(None, "file to write; must not exist", metavar="FILE", required=True)
    dtype: str = option("f16", "f32, f16, bf16 or q8_0, of matrices; norms and biases stay f32", metavar="T")


def write(arguments: GgufOptions) -> int:
    """Convert and say what was written; the exit status. Raises UserError."""
    from megatron_prune.huggingface.gguf_file import convert

    with tqdm(unit="tensor", desc="writing", disable=not sys.stderr.isatty()) as bar:
        done = convert(arguments.hf_model, arguments.save, arguments.dtype, lambda _: bar.update())
    say(
        f"{done.file}: {done.architecture}, {done.parameters:,} parameters in {done.tensors} tensors, "
        f"{done.file.stat().st_size:,} bytes"
    )
    if arguments.dtype == "q8_0":
        say(quantized(done))
    return 0


def quantized(done: Converted) -> str:
    """How much of the file Q8_0 could take, and what a run would have to set for all of it."""
    text = f"q8_0: {done.matrices - len(done.fallbacks)} of {done.matrices} matrices"
    if not done.fallbacks:
        return text
    names = dict.fromkeys(re.sub(r"^blk\.\d+\.", "blk.*.", name) for name in done.fallbacks)  # layers are alike
    text += f"; the others in f16, since their rows are no multiple of 32: {', '.join(names)}"
    if done.rounding:
        text += f"\nprune with --prune-groups {done.rounding}, and all of them can be quantized"
    return text


main = partial(run_command, "convert-to-gguf", GgufOptions, write, interrupted=NOTHING_WRITTEN)
