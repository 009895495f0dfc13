"""Facts and arrays as one block: little for a file, quick for a browser.

    pack   [(facts, arrays)] -> bytes, which page.js reads

The block is zlib's: 4 bytes with the length of a JSON header (little-endian), the header, the arrays one after the
other. The header lists, per story, `facts` and `arrays`: name -> type, number of elements, position among the bytes
that follow. The bytes of an array are sorted by their place in its numbers (all lowest ones first): neighbours are
alike, so they compress well.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

TYPES = {"u1": "<u1", "u4": "<u4", "f4": "<f4", "f8": "<f8"}  # a browser has arrays of these


def pack(stories: Iterable[tuple[Mapping[str, Any], Mapping[str, np.ndarray]]]) -> bytes:
    """One compressed block. Arrays are flat and of one of `TYPES`; numbers in the facts that JSON has no word for (NaN,
    infinity) become null.
    """
    header, blocks, position = [], list[bytes](), 0
    for facts, arrays in stories:
        placed = {}
        for name, array in arrays.items():
            kind = f"{array.dtype.kind}{array.dtype.itemsize}"
            block = np.ascontiguousarray(array, dtype=TYPES[kind]).view(np.uint8)
            blocks.append(block.reshape(-1, array.dtype.itemsize).T.tobytes())
            placed[name] = (kind, len(array), position)
            position += len(blocks[-1])
        header.append({"facts": _plain(facts), "arrays": placed})
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    return zlib.compress(len(text).to_bytes(4, "little") + text + b"".join(blocks), 6)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
