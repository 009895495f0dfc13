"""Turn a Hugging Face folder into a checkpoint that training loads in any layout.

    megatron-prune convert-from-hf --hf-model SmolLM-360M --save checkpoints/source
    megatron-prune convert-from-hf --gguf SmolLM2-135M.Q4_1.gguf --hf-model SmolLM2-135M

Llama 1 to 3, SmolLM, TinyLlama, Mistral, Qwen2 and Qwen3, from safetensors or legacy .bin files. What was exported with
`--kv-policy cluster` comes back as the pruned model it is, to be pruned further. Every weight is accounted for before
anything is written, and one tensor is in memory at a time. `pretrain` can also be pointed at the Hugging Face folder
itself. A GGUF file is first written as such a folder, quantized weights as plain ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from megatron_prune.commands.running import NOTHING_WRITTEN, check_new_folder, run_command, say
from megatron_prune.config.options import option
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import Rules, known_groups
from megatron_prune.saliency.scores import UnitScores, score_length

if TYPE_CHECKING:
    from megatron_prune.huggingface.weights import Reader

GIB = 2**30
LISTED = 10  # added tokens that are named
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class ImportOptions:
    """The command's options."""

    hf_model: str = option(
        None, "folder with config.json and weights; with --gguf the folder to write", metavar="DIR", required=True
    )
    save: str | None = option(
        None, "the checkpoint's folder; must not hold anything; needed but with --gguf", metavar="DIR"
    )
    gguf: str | None = option(None, "a GGUF file to be written as the folder --hf-model first", metavar="FILE")
    dtype: str | None = option(None, "float32, bfloat16 or float16; as stored in DIR unless given", metavar="T")
    resize_vocab: bool = option(
        False, "give the model rows for tokens that its tokenizer adds to the vocabulary (each the mean of the others)"
    )
    dry_run: bool = option(False, "check everything and print the plan, write nothing")


def convert(arguments: ImportOptions) -> int:
    """Check, print the plan, write; the exit status. Raises UserError."""
    if arguments.gguf is not None:
        unpack_gguf(Path(arguments.gguf), Path(arguments.hf_model), arguments)
    if arguments.save is not None:
        return convert_folder(arguments, Path(arguments.save))
    if arguments.gguf is None:
        raise UserError("--save is missing: name the checkpoint's folder")
    return 0


def unpack_gguf(file: Path, folder: Path, arguments: ImportOptions) -> None:
    """Write a GGUF file as a Hugging Face folder; with --dry-run say what it holds. Raises UserError."""
    from megatron_prune.huggingface.gguf_import import GgufModel, write_folder
    from megatron_prune.huggingface.shards import DTYPES, dtype_name

    if arguments.dtype is not None and arguments.dtype not in DTYPES:
        raise UserError(f"--dtype {arguments.dtype}: unknown; use {', '.join(DTYPES)}")
    if arguments.dry_run and arguments.save is not None:
        raise UserError("--dry-run: with --gguf leave out --save; the checkpoint is made from the folder")
    check_new_folder("--hf-model", folder)
    model = GgufModel(file)
    full = Architecture.full(model.shape)
    say(f"{file}: {full.parameters:,} parameters, most of them as {model.quantization}; all accounted for")
    if arguments.dry_run:
        say("\n".join(plan(full)))
        return
    written = write_folder(model, folder, arguments.dtype)
    say(f"{folder}: {model.shape.model_type} in {dtype_name(written)}, with its tokenizer")


def convert_folder(arguments: ImportOptions, save: Path) -> int:
    """From the folder to a checkpoint; the exit status. Raises UserError."""
    from megatron_prune.huggingface.cluster import read_architecture
    from megatron_prune.huggingface.source_facts import read_source

    folder = Path(arguments.hf_model)
    architecture = read_architecture(folder)  # before the slow imports
    from megatron_prune.checkpoint.files import refuse_content
    from megatron_prune.huggingface.shards import DTYPES, dtype_name
    from megatron_prune.huggingface.weights import FolderWeights

    if arguments.dtype is not None and arguments.dtype not in DTYPES:
        raise UserError(f"--dtype {arguments.dtype}: unknown; use {', '.join(DTYPES)}")
    refuse_content(save, "--save")
    weights = FolderWeights(folder)
    weights.check(architecture)
    read: Reader = weights
    if arguments.resize_vocab:
        architecture, read = resize(folder, architecture, weights)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else weights.dtype
    files = len({stored.file for stored in weights.stored.values()})
    say(
        f"{folder}: {len(weights.stored)} tensors in {files} file{'s' if files > 1 else ''}, "
        f"{_gib(weights.total_bytes)}, all accounted for; the largest has {_gib(weights.largest_bytes)}"
    )
    say("\n".join(plan(architecture)))
    if arguments.dry_run:
        return 0
    tokenizer, remark = find_tokenizer(folder, architecture.shape)
    say(remark)
    state: dict[str, Any] = {
        # A dtype that is asked for here is the one that exports have, too.
        "source": read_source(folder) | ({"dtype": arguments.dtype, "dtypes": {}} if arguments.dtype else {}),
        "tokenizer_model": tokenizer,
        "consumed_tokens": 0,
        "history": [],
    }
    written = write(read, len(weights.stored), save, architecture, dtype, state)
    say(f"{written}: {architecture.parameters:,} parameters in {dtype_name(dtype)}")
    return 0


def plan(architecture: Architecture) -> list[str]:
    """Lines that say what the model is, what groups cost, and what training it takes."""
    shape, rules = architecture.shape, Rules(target_params=1, gqa="cluster")
    blank = UnitScores.from_vector(architecture, np.zeros(score_length(architecture)))
    groups = {kind.name: kind.offer(blank, architecture, rules).group for kind in known_groups()}
    lines = [
        f"{shape.model_type}: {architecture.parameters:,} parameters; {shape.num_layers} layers, "
        f"{architecture.described()}, heads of {shape.kv_channels}, vocabulary {shape.vocab_size:,}, "
        f"{'tied' if shape.tie_word_embeddings else 'separate'} embeddings",
        "a group of each kind, such as single query heads: "
        + ", ".join(f"{name} {architecture.cost(group):,}" for name, group in groups.items())
        + " parameters",
        "memory per rank for weights, gradients and AdamW state (activations come on top):",
    ]
    full = Architecture.full(shape)
    if architecture != full:
        lines.insert(1, f"pruned already, from {full.parameters:,} parameters; its units keep their numbers")
    for tp in TENSOR_PARALLEL_SIZES:
        share = architecture.parameters / tp
        lines.append(
            f"  tensor parallel {tp}: fp32 {_gib(16 * share)}; bf16 {_gib(18 * share)}, with the distributed "
            f"optimizer over 8 ranks {_gib((6 + 12 / 8) * share)}"
        )
    return lines


def find_tokenizer(folder: Path, shape: LlamaShape) -> tuple[str | None, str]:
    """(path to record as the model's tokenizer, what to say about it)."""
    from megatron_prune.data.tokenizer import build_tokenizer, check_rows

    try:
        tokenizer = build_tokenizer(None, str(folder.resolve()))
        check_rows(tokenizer, shape.vocab_size, "--hf-model")
    except UserError as error:
        return None, f"tokenizer: none recorded, name one for training and export ({error})"
    return tokenizer.path, f"tokenizer: {tokenizer.kind} with {tokenizer.vocab_size:,} ids, recorded"


def resize(folder: Path, architecture: Architecture, read: Reader) -> tuple[Architecture, Reader]:
    """The model with a row for every id of its tokenizer. Raises UserError if that is another model's."""
    from megatron_prune.data.tokenizer import build_tokenizer, check_rows
    from megatron_prune.huggingface.resize import resized, with_rows

    tokenizer = build_tokenizer(None, str(folder))
    have, want = architecture.shape.vocab_size, tokenizer.vocab_size
    if tokenizer.base_size > have:
        check_rows(tokenizer, have, f"--hf-model {folder}")
    if want <= have:
        say(f"rows: the model has {have:,}, its tokenizer {want:,} ids; none to add")
        return architecture, read
    added = ", ".join(ascii(tokenizer.text_of(number)) for number in range(have, min(want, have + LISTED)))
    say(f"rows: {want - have:,} added for {added}{' and more' if want > have + LISTED else ''}; {want:,} now")
    return resized(architecture, want), with_rows(read, architecture.table, want)


def write(
    read_source: Reader, count: int, save: Path, architecture: Architecture, dtype: Any, state: dict[str, Any]
) -> Path:
    """Stream `count` tensors into a checkpoint of iteration 0; its folder."""
    from megatron_prune.checkpoint.files import CheckpointSaveError
    from megatron_prune.checkpoint.save import save_weights
    from megatron_prune.model.sources import finite
    from megatron_prune.runtime.mesh import meshed

    with tqdm(total=count, unit="tensor", desc="writing", disable=not sys.stderr.isatty()) as bar:

        def read(hf_name: str) -> Any:
            bar.update()
            return finite(read_source(hf_name).to(dtype), f"--dtype: {hf_name} as {dtype}", "take bfloat16 or float32")

        try:
            with meshed() as mesh:
                return save_weights(mesh, save, 0, architecture, read, dtype, state)
        except CheckpointSaveError as error:
            raise UserError(f"--save {save}: {error}") from error


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


main = partial(run_command, "convert-from-hf", ImportOptions, convert, interrupted=NOTHING_WRITTEN)
