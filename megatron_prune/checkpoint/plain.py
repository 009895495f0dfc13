"""Any nesting of plain values, arrays and tensors as bytes that load without running code, by `load_plain`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prune.checkpoint.guarded_reader import is_whole, load_plain
from megatron_prune.errors import UserError

_ARRAY = "__ndarray__"


def pack(values: dict[str, Any]) -> bytes:
    """What `torch.save` makes of `values`. Raises TypeError as `encode` does."""
    file = io.BytesIO()
    torch.save({name: encode(value, name) for name, value in values.items()}, file)
    return file.getvalue()


def unpack(path: Path) -> Any:
    """Inverse of `pack`. Raises UserError: the file holds something else than plain values."""
    try:
        return decode(load_plain(path))
    except (AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: holds what is never stored ({type(error).__name__}: {error})") from error


def encode(value: Any, where: str = "state") -> Any:
    """A copy of `value` that torch loads without running code. Raises TypeError: something else than plain values,
    containers, arrays and tensors; names where."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where}: keys must be strings or integers, not {key!r}")
        return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(encode(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(f"{where}: {type(value).__name__} cannot be stored; give plain values, arrays or tensors")


def decode(value: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            if not is_whole(value[_ARRAY]):
                raise TypeError("an array has fewer values than its shape")
            return value[_ARRAY].numpy()
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(decode(item) for item in value)
    return value
