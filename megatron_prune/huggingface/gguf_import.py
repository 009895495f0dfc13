"""A GGUF file as a Hugging Face folder: what `gguf_file` does, the other way, and quantized weights as plain ones.

    GgufModel     what a file says: shape, special ids, tensors under Hugging Face's names, one in memory at a time
    write_folder  config.json, generation_config.json, safetensors, tokenizer (`gguf_vocabulary`)

Only what is known is read. A number of the model that is not understood, a tensor too many or too few, a quantization
that the gguf package cannot undo: each is one line. A quantized model is a rounded one; training goes on from there.
"""

import contextlib
import json
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prune.data.hub_files import LFS_HINT, is_lfs_pointer
from megatron_prune.data.leftovers import claim_folder, sole_writer, staging
from megatron_prune.errors import UserError, first_line
from megatron_prune.huggingface.config import WRITTEN_FOR, config_json, shape_from_config
from megatron_prune.huggingface.gguf_file import (
    ROPE_FACTORS,
    gguf_package,
    interleave,
    rope_factors,
    tensor_names,
    turned_heads,
)
from megatron_prune.huggingface.gguf_vocabulary import write_tokenizer
from megatron_prune.huggingface.shards import DTYPES, ShardEntry, dtype_name, write_shards
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.families import table_of
from megatron_prune.model.shape import LlamaShape
from megatron_prune.reading import open_file
from megatron_prune.runtime.folders import write_file

# GGUF's architecture -> the model_type whose computation it is.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# config.json's name -> GGUF's, after "llama.".
_NUMBERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_WIDTHS = ("attention.value_length", "rope.dimension_count")  # must be the head's own, like key_length
_SCALING = {"rope.scaling.type", "rope.scaling.factor"}
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# Llama 3's scaling is in the file as factors only; these numbers give them, but for the largest factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, by its type
_TEXT, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufModel:
    """A GGUF file of a known family, every tensor accounted for.

    Attributes:
        fields: its metadata by GGUF's names.
        shape: the model's.
        special_ids: ids by config.json's names.
        stored_dtype: what most elements are stored in; bfloat16 for quantized ones.
        quantization: GGUF's name of what most elements are stored in.

    Raises:
        UserError: it is no whole GGUF file, of another family, or says something that is not understood.
    """

    def __init__(self, file: str | Path) -> None:
        self.file, self._gguf = Path(file), gguf_package()
        with _damaged(self.file):
            self._understand()

    def _understand(self) -> None:
        self.fields, self._tensors = _read(self.file, self._gguf)
        self.shape = self._read_shape()
        self._names = tensor_names(self.shape)
        self._turned = turned_heads(self.shape)
        self._account()
        sizes = Counter[str]()
        for tensor in self._tensors.values():
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        self.quantization = sizes.most_common(1)[0][0]
        self.stored_dtype = _PLAIN.get(self.quantization, torch.bfloat16)
        special = {name: self.fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _SPECIAL.items()}
        self.special_ids = {name: int(number) for name, number in special.items() if number is not None}

    def __call__(self, hf_name: str) -> Tensor:
        """The tensor with Hugging Face's name, fp32, its rows in Hugging Face's order."""
        tensor = self._tensors[self._names[hf_name]]
        kind = tensor.tensor_type
        try:
            values = self._gguf.quants.dequantize(tensor.data, kind)
        except NotImplementedError as error:
            raise UserError(f"{self.file}: {tensor.name} is stored as {kind.name}, which cannot be undone") from error
        shape = tuple(int(length) for length in reversed(tensor.shape))
        result = torch.from_numpy(np.array(values, np.float32).reshape(shape))
        heads = self._turned.get(hf_name)
        if heads is not None:
            result = interleave(result, heads, undo=True)
        if not result.isfinite().all():
            raise UserError(f"{self.file}: {tensor.name} holds values that are not finite")
        return result

    def _read_shape(self) -> LlamaShape:
        where, architecture = str(self.file), self.fields.get("general.architecture")
        if architecture not in _FAMILIES:
            raise UserError(f"{where}: general.architecture: {architecture!r} is not read ({', '.join(_FAMILIES)} are)")
        numbers = {
            name.removeprefix(f"{architecture}."): value
            for name, value in self.fields.items()
            if name.startswith(f"{architecture}.")
        }
        known = {*_NUMBERS.values(), *_WIDTHS, *_SCALING, "vocab_size"}
        strange = sorted(name for name in set(numbers) - known if numbers[name])
        if strange:
            raise UserError(
                f"{where}: {architecture}.{strange[0]}: is not understood, so the model might be another one"
            )
        config = {ours: _decimal(numbers[theirs]) for ours, theirs in _NUMBERS.items() if theirs in numbers}
        config |= {"model_type": _FAMILIES[architecture], "hidden_act": "silu", "vocab_size": self._vocabulary_size()}
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        config |= {"tie_word_embeddings": "output.weight" not in self._tensors, "rope_scaling": self._scaling(numbers)}
        shape = shape_from_config(config, where)
        for name in _WIDTHS:
            if numbers.get(name, shape.kv_channels) != shape.kv_channels:
                raise UserError(f"{where}: {architecture}.{name}: {numbers[name]} is not a head's {shape.kv_channels}")
        return self._with_llama3(shape)

    def _vocabulary_size(self) -> int | None:
        embedding = self._tensors.get("token_embd.weight")
        return int(embedding.shape[-1]) if embedding is not None else None

    def _scaling(self, numbers: Mapping[str, Any]) -> dict[str, Any] | None:
        kind = numbers.get("rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "linear":
            raise UserError(f"{self.file}: rope.scaling.type: {kind!r} is not supported (none, linear are)")
        return {"rope_type": "linear", "factor": _decimal(numbers.get("rope.scaling.factor", 1.0))}

    def _with_llama3(self, shape: LlamaShape) -> LlamaShape:
        """The shape with Llama 3's scaling, where the file has its factors. Raises UserError if they are others."""
        stored = self._tensors.get(ROPE_FACTORS)
        if stored is None:
            return shape
        factors = torch.from_numpy(np.array(stored.data, np.float32).reshape(-1))
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
        scaled = LlamaShape(**(vars(shape) | {"rope_scaling": scaling}))
        ours = rope_factors(scaled)
        if ours.shape != factors.shape or not torch.allclose(ours, factors, rtol=1e-5):
            raise UserError(f"{self.file}: {ROPE_FACTORS}: are not those of Llama 3's scaling")
        return scaled

    def _account(self) -> None:
        """See that the file's tensors are the model's: names and shapes."""
        shapes = table_of(self.shape).hf_shapes(Architecture.full(self.shape))
        wanted = {theirs: shapes[name] for name, theirs in self._names.items()}
        missing = [name for name in wanted if name not in self._tensors]
        extra = [name for name in self._tensors if name not in wanted and name != ROPE_FACTORS]
        for words, names in (("lacks", missing), ("holds, beside the model's tensors,", extra)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{self.file}: {words} {names[0]!a}{more}")
        for name, shape in wanted.items():
            stored = tuple(int(length) for length in reversed(self._tensors[name].shape))
            if stored != shape:
                raise UserError(f"{self.file}: {name} is {list(stored)} instead of {list(shape)}")


def write_folder(model: GgufModel, folder: str | Path, dtype: str | None = None) -> torch.dtype:
    """Write the model as a Hugging Face folder that does not exist yet, or is empty; returns the dtype of its weights.

    Args:
        dtype: one of `shards.DTYPES`; None: as stored, and bfloat16 for quantized weights.

    Raises:
        UserError: a tensor cannot be read, the tokenizer is none that is known, or the folder cannot be written.
            Nothing is left behind.
    """
    target = Path(folder).resolve()
    stored = DTYPES[dtype] if dtype else model.stored_dtype
    full = Architecture.full(model.shape)
    entries = [ShardEntry(name, shape, stored) for name, shape in full.table.hf_shapes(full).items()]

    def fetch(name: str) -> Tensor:
        values = model(name).to(stored)
        if not values.isfinite().all():
            raise UserError(f"--dtype {dtype}: {name} holds values beyond its range; take bfloat16 or float32")
        return values

    config = config_json(full, dtype_name(stored), model.shape.num_query_groups, model.special_ids)
    try:
        staged = staging(target)
        with sole_writer(target, "--hf-model"), claim_folder(staged):
            _write_json(staged / "config.json", config)
            with _damaged(model.file):
                ends = write_tokenizer(model.fields, staged, model.shape, str(model.file))
            generation = model.special_ids | ({"eos_token_id": ends} if len(ends) > 1 else {})
            _write_json(staged / "generation_config.json", generation | {"transformers_version": WRITTEN_FOR})
            write_shards(staged, [entries], fetch)
            _write_card(model, staged)
            if target.exists():
                target.rmdir()  # empty, or it is in the way after all
            staged.rename(target)
    except OSError as error:
        raise UserError(f"--hf-model {folder}: cannot be written: {error.strerror or error}") from error
    return stored


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_file(file, (json.dumps(content, indent=2) + "\n").encode(), lasting=False)


def _write_card(model: GgufModel, folder: Path) -> None:
    """README.md with what the file says of its origin, which exports and their cards then repeat."""
    licence = model.fields.get("general.license")
    head = f"---\nlicense: {json.dumps(licence)}\n---\n" if isinstance(licence, str) else ""
    name = model.fields.get("general.name", model.file.stem)
    text = f"{head}# {name}\n\nFrom {model.file.name}, most of whose weights were stored as {model.quantization}.\n"
    write_file(folder / "README.md", text.encode(), lasting=False)


def _decimal(value: Any) -> Any:
    """A number that the file holds in 32 bits, as whoever wrote it meant it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read(file: Path, gguf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata by name, tensors by name); tensors stay in the file, which is mapped."""
    if not file.is_file():
        raise UserError(f"--gguf {file}: is no file")
    if is_lfs_pointer(file):
        raise UserError(f"{file}: {LFS_HINT}")
    _check_head(file)
    reader = gguf.GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@contextlib.contextmanager
def _damaged(file: Path) -> Iterator[None]:
    """What reading a damaged file raises as a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError, struct.error) as error:
        raise UserError(f"{file}: is cut off, damaged or no GGUF file: {first_line(error)}") from error


def _check_head(file: Path) -> None:
    """Step over all that comes before the tensors, whose counts the file must have room for: gguf's reader counts on
    beyond the end. Raises ValueError and the like where it has not."""
    with open_file(file) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"

        def numbers(kinds: str, at: int) -> tuple[int, ...]:
            return struct.unpack_from(order + kinds, data, at)

        def room(at: int) -> int:
            if at > len(data):
                raise ValueError(f"ends before byte {at}")
            return at

        def past_text(at: int) -> int:
            return room(at + 8 + numbers("Q", at)[0])

        def past_value(kind: int, at: int) -> int:
            if kind == _TEXT:
                return past_text(at)
            if kind != _ARRAY:
                return room(at + _BYTES[kind])
            inner, count = numbers("IQ", at)
            at += 12
            if inner in _BYTES:
                return room(at + count * _BYTES[inner])
            for _ in range(count):  # each takes up room, or the end is reached
                at = past_value(inner, at)
            return at

        tensors, fields = numbers("QQ", 8)
        at = 24
        for _ in range(fields):
            at = past_text(at)
            at = past_value(numbers("I", at)[0], at + 4)
        for _ in range(tensors):
            at = past_text(at)
            at = room(at + 16 + 8 * numbers("I", at)[0])
