"""A Hugging Face folder as one GGUF file, which llama.cpp and what is built on it load.

    convert     folder -> file, one tensor in memory at a time
    Converted   what was written

The head dimension is stated (key and value length), so that widths which pruning left need no common divisor. Llama and
Mistral without sliding window become `llama`, whose rotary embedding turns neighbouring channels where Hugging Face's
turns halves: rows of q and k are put in that order. Qwen 2 and 3 and OLMo 2 turn halves in llama.cpp too.

Norms and biases are stored in f32. Q8_0 quantizes blocks of 32 along a row; rows that are no multiple of it are stored
in f16, and the caller is told which.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prune.data.hub_files import read_json
from megatron_prune.data.leftovers import claim, sole_writer, staging
from megatron_prune.errors import UserError
from megatron_prune.huggingface import cluster
from megatron_prune.huggingface.config import read_shape
from megatron_prune.huggingface.gguf_tokenizer import Vocabulary, read_vocabulary
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.families import table_of
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import QKV, QKV_BIAS
from megatron_prune.pruning.groups import known_groups

# --dtype -> GGUF's type of matrices.
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ARCHITECTURES = {"llama": "llama", "mistral": "llama"} | {kind: kind for kind in ("qwen2", "qwen3", "olmo2", "smollm3")}
# What config.json calls numbers of units -> what GGUF does.
_NUMBERS = {
    "num_attention_heads": "head_count",
    "num_key_value_heads": "head_count_kv",
    "intermediate_size": "feed_forward_length",
    "hidden_size": "embedding_length",
    "vocab_size": "vocab_size",
}
ROPE_FACTORS = "rope_freqs.weight"
BLOCK = 32  # values of a row that Q8_0 quantizes together
_FLOAT16, _BFLOAT16 = torch.finfo(torch.float16).max, torch.finfo(torch.bfloat16).max
_LARGEST = {"F16": _FLOAT16, "BF16": _BFLOAT16, "Q8_0": 127 * _FLOAT16}  # a block's scale is a float16


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        file: the GGUF file.
        architecture: llama.cpp's name.
        tensors: how many.
        parameters: their elements.
        matrices: how many of the tensors are matrices (of q8_0, those that are quantized and `fallbacks`).
        fallbacks: names of tensors stored in f16 instead of Q8_0.
        rounding: widths by whose rounding all of them would be quantized, as `--prune-groups` takes them
            ("hidden=32 ffn=32"); empty where there is nothing to gain, or a head's own width is in the way.
    """

    file: Path
    architecture: str
    tensors: int
    parameters: int
    matrices: int
    fallbacks: tuple[str, ...]
    rounding: str


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written: GGUF's name, shape [rows, columns], GGUF's type, and how to fetch it (fp32)."""

    name: str
    shape: tuple[int, ...]
    kind: str
    fetch: Callable[[], Tensor]


def convert(
    folder: str | Path, save: str | Path, dtype: str = "f16", on_tensor: Callable[[str], Any] = lambda _: None
) -> Converted:
    """Write the model in `folder` to the file `save`, which must not exist.

    Args:
        dtype: of matrices, one of `DTYPES`.
        on_tensor: told each tensor's name when it is written.

    Raises:
        UserError: an option is wrong, the gguf package is missing, the file is in the way, or the model or its
            tokenizer does not map to GGUF exactly. Nothing is left behind.
    """
    gguf = gguf_package()
    folder, target = Path(folder), Path(save)
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; use {', '.join(DTYPES)}")
    if target.exists():
        raise UserError(f"--save {save}: is there already; name another file")
    shape = _shape(folder)
    weights = FolderWeights(folder)
    weights.check(shape)
    vocabulary = read_vocabulary(folder, shape.vocab_size)
    entries = list(_entries(weights, shape, DTYPES[dtype]))
    architecture = architecture_of(shape)
    writer = gguf.GGUFWriter(None, architecture)
    _write_metadata(writer, gguf, shape, folder, dtype)
    _write_vocabulary(writer, vocabulary)
    try:
        with sole_writer(target, "--save"):
            staged = staging(target)
            try:
                with claim(staged):
                    _write_tensors(writer, gguf, entries, staged, on_tensor)
                    if target.exists():  # came while this ran
                        raise UserError(f"--save {save}: is there already; name another file")
                    staged.replace(target)
            finally:
                with contextlib.suppress(OSError):  # told below, if it matters
                    staged.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--save {save}: cannot be written: {error.strerror or error}") from error
    fallbacks = tuple(entry.name for entry in entries if dtype == "q8_0" and entry.kind == "F16")
    parameters = sum(math.prod(entry.shape) for entry in entries if entry.name != ROPE_FACTORS)
    matrices = sum(len(entry.shape) == 2 for entry in entries)
    rounding = _rounding(shape) if fallbacks else ""
    return Converted(target, architecture, len(entries), parameters, matrices, fallbacks, rounding)


def _rounding(shape: LlamaShape) -> str:
    """What `--prune-groups` would need for every row to be a multiple of 32; empty where it cannot do it."""
    table, found = table_of(shape), []
    for group in known_groups():
        unit = table.columns(group.kind)
        if group.kind in table.kinds and group.kind.size(shape) * unit % BLOCK:
            if unit > 1:  # heads cannot be rounded to it
                return ""
            found.append(f"{group.name}.round_to={BLOCK}")
    return " ".join(found)


def gguf_package() -> Any:
    """The package gguf. Raises UserError where there is none."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: install megatron-prune[gguf]") from error
    return gguf


def _shape(folder: Path) -> LlamaShape:
    file = folder / "config.json"
    if file.is_file() and read_json(file).get("model_type") == cluster.MODEL_TYPE:
        raise UserError(
            f"{folder}: cluster attention, whose KV heads serve different numbers of query heads, does not map to "
            "GGUF; export the checkpoint with --kv-policy expand, which gives the same logits"
        )
    shape = read_shape(folder)
    obstacle = why_not(shape)
    if obstacle:
        raise UserError(f"{file}: {obstacle}")
    return shape


def architecture_of(shape: LlamaShape) -> str:
    """llama.cpp's name for the computation: a SmolLM3 with a rotary embedding in every layer is a Llama."""
    is_plain = shape.model_type == "smollm3" and not shape.no_rope_layers
    return "llama" if is_plain else ARCHITECTURES[shape.model_type]


def why_not(shape: LlamaShape) -> str | None:
    """What keeps a model of this shape from being a GGUF file, or None."""
    kind, scaling = shape.model_type, (shape.rope_scaling or {}).get("rope_type")
    if kind not in ARCHITECTURES:
        return f"{kind} models are not written as GGUF ({', '.join(ARCHITECTURES)} are)"
    if scaling == "llama3" and architecture_of(shape) != "llama":
        return f"rope_scaling llama3 of a {kind} model does not map to GGUF"
    if shape.no_rope_layers not in ((), tuple(range(3, shape.num_layers, 4))):
        without = ", ".join(map(str, shape.no_rope_layers))
        return f"llama.cpp leaves the rotary embedding out in layers 3, 7, 11 and so on, this model in {without}"
    if kind == "olmo2":
        channels = shape.num_attention_heads * shape.kv_channels
        if channels != shape.hidden_size:
            hidden = shape.hidden_size
            return f"llama.cpp wants as many channels of an olmo2 model's heads ({channels}) as hidden ones ({hidden})"
        if shape.tie_word_embeddings:
            return "llama.cpp wants an output layer of its own of an olmo2 model, and this one's is tied"
    return None


# Tensors --------------------------------------------------------------------------------------------------------------


def _entries(weights: FolderWeights, shape: LlamaShape, kind: str) -> Iterator[_Entry]:
    """Every tensor of the file, in order. Matrices in `kind`, where their rows allow it."""
    if (shape.rope_scaling or {}).get("rope_type") == "llama3":
        factors = rope_factors(shape)
        yield _Entry(ROPE_FACTORS, tuple(factors.shape), "F32", lambda: factors)
    names, turned = tensor_names(shape), turned_heads(shape)
    for name, size in table_of(shape).hf_shapes(Architecture.full(shape)).items():
        stored = "F32" if len(size) == 1 else kind
        if stored == "Q8_0" and size[-1] % BLOCK:
            stored = "F16"
        yield _Entry(names[name], size, stored, _fetcher(weights, name, turned.get(name)))


def tensor_names(shape: LlamaShape) -> dict[str, str]:
    """Hugging Face's name of every tensor -> llama.cpp's, by the gguf package's table.

    `model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`.
    """
    gguf = gguf_package()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture_of(shape).upper()], shape.num_layers)
    found = {
        name: names.get_name(name, try_suffixes=(".weight", ".bias"))
        for name in table_of(shape).hf_shapes(Architecture.full(shape))
    }
    assert None not in found.values(), found
    return found


def turned_heads(shape: LlamaShape) -> dict[str, int]:
    """Names of what llama.cpp has in another order, the rows of q and k, and how many heads each has; mostly none."""
    if architecture_of(shape) not in ("llama", "smollm3"):
        return {}
    stacked = (part for row in table_of(shape).rows if row.role in (QKV, QKV_BIAS) for part in row.parts[:2])
    return {part.hf_name: part.dims[0].kind.size(shape) for part in stacked}


def _fetcher(weights: FolderWeights, name: str, heads: int | None) -> Callable[[], Tensor]:
    def fetch() -> Tensor:
        tensor = weights(name).float()
        return tensor if heads is None else interleave(tensor, heads)

    return fetch


def interleave(tensor: Tensor, heads: int, undo: bool = False) -> Tensor:
    """Rows of q or k [heads * head_dim, ...]: channel i of a head's first half, then i of its second, and so on.

    With `undo` back again.
    """
    sizes = (heads, -1, 2) if undo else (heads, 2, -1)
    return tensor.unflatten(0, sizes).transpose(1, 2).flatten(0, 2)


def rope_factors(shape: LlamaShape) -> Tensor:
    """By what Llama 3's scaling divides each rotary frequency, fp32 [head_dim / 2]."""
    scaling = shape.rope_scaling
    assert scaling is not None
    channels = torch.arange(0, shape.kv_channels, 2, dtype=torch.float64) / shape.kv_channels
    wavelengths = 2 * math.pi * shape.rotary_base**channels
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # How far a frequency is within the band from the stretched (0) to the untouched (1).
    position = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    share = position.clamp(0, 1)
    return (1 / ((1 - share) / scaling["factor"] + share)).float()


def _write_tensors(writer: Any, gguf: Any, entries: list[_Entry], file: Path, on_tensor: Callable[[str], Any]) -> None:
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        stored = gguf.quants.quant_shape_to_byte_shape(entry.shape, kind)
        # Sizes are known beforehand: the header is written first, and nothing is collected.
        writer.add_tensor_info(entry.name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file(file)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            values = entry.fetch()
            kind, largest = entry.kind.lower(), _LARGEST.get(entry.kind, math.inf)
            if values.abs().max() > largest:
                raise UserError(f"--dtype {kind}: {entry.name} holds values beyond its range ({largest:,.6g}); use f32")
            packed = gguf.quants.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[entry.kind])
            writer.write_tensor_data(packed)
            on_tensor(entry.name)
    finally:
        writer.close()


# Metadata -------------------------------------------------------------------------------------------------------------


def _write_metadata(writer: Any, gguf: Any, shape: LlamaShape, folder: Path, dtype: str) -> None:
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for unit in filter(lambda unit: unit.hf_key, table_of(shape).kinds):
        getattr(writer, f"add_{_NUMBERS[unit.hf_key]}")(unit.size(shape))
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_block_count(shape.num_layers)
    writer.add_key_length(shape.kv_channels)
    writer.add_value_length(shape.kv_channels)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.kv_channels)
    writer.add_rope_freq_base(shape.rotary_base)
    if (shape.rope_scaling or {}).get("rope_type") == "linear":
        assert shape.rope_scaling is not None
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope_scaling["factor"])


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.remove_extra_whitespaces is not None:
        writer.add_remove_extra_whitespaces(vocabulary.remove_extra_whitespaces)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
