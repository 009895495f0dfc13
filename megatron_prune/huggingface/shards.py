"""Writing safetensors files tensor by tensor, cut into shards of a limited size.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, begin
and end in the data), then the data without gaps. Headers are known before any tensor is, so nothing is collected.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.runtime.folders import naming, write_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WRITTEN = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ALIGNMENT = 8


@dataclass(frozen=True)
class ShardEntry:
    """A tensor to be written: its name, its shape in the file and the dtype it is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its data in the file."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class StoredDtypes:
    """Which dtype every weight of an export is stored in: one, but for a few (norms that stay in float32)."""

    main: torch.dtype
    others: Mapping[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str) -> torch.dtype:
        """The dtype in which the weight called `name` is stored."""
        return self.others.get(name, self.main)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `500MB`, `2GiB` or `123456`. Raises UserError: it is none of these."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(f"--max-shard-size {text}: is no size; write 5GB, 500MB or 2GiB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def plan_shards(entries: list[ShardEntry], max_bytes: int) -> list[list[ShardEntry]]:
    """Cut the tensors, in order, into shards of at most `max_bytes` of data; a larger tensor gets one of its own."""
    shards: list[list[ShardEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def write_shards(folder: Path, shards: list[list[ShardEntry]], fetch: Callable[[str], Tensor]) -> list[Path]:
    """Write the shards, and `model.safetensors.index.json` when there are several; returns the weight files.

    Args:
        fetch: name -> the tensor in the entry's shape and dtype; each is asked for once, in order.
    """
    count = len(shards)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for name, entries in zip(names, shards, strict=True):
        _write_file(folder / name, entries, fetch)
    if count > 1:
        every = [entry for entries in shards for entry in entries]
        sizes = {
            "total_size": sum(entry.bytes for entry in every),
            "total_parameters": sum(entry.elements for entry in every),
        }
        weight_map = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
        index = {"metadata": sizes, "weight_map": weight_map}
        text = (json.dumps(index, indent=2) + "\n").encode()
        write_file(folder / "model.safetensors.index.json", text, lasting=False)
    return [folder / name for name in names]


def _write_file(path: Path, entries: list[ShardEntry], fetch: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.bytes
        header[entry.name] = {"dtype": _WRITTEN[entry.dtype], "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            tensor = fetch(entry.name)
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, f"{entry.name}: {tensor.shape}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
