"""The page itself: one file with everything in it."""

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.report.story import Story, read_story
from megatron_prune.runtime.folders import replace_file

HERE = Path(__file__).parent
FILE_NAME = "report.html"


def is_installed() -> bool:
    """Whether the package is there that brings plotly.js."""
    return find_spec("plotly") is not None


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Read the runs in `folders` and write the page, in one piece. Raises UserError: plotly is not installed, or a
    folder holds no run that can be read. OSError: of writing."""
    if not is_installed():
        raise UserError("a report needs plotly: pip install 'megatron_prune[report]'")
    replace_file(path, render([read_story(folder) for folder in folders]).encode())


def render(stories: Sequence[Story]) -> str:
    """The page that shows `stories`; needs plotly."""
    parts = {
        "title": escape(" and ".join(story.facts["name"] for story in stories)),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "plotly": _plotly(),
        "data": base64.b64encode(pack((story.facts, story.arrays) for story in stories)).decode(),
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text, 1)
    return page


@cache
def _plotly() -> str:
    """plotly.js, compressed: a third of its size."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 6)).decode()


TYPES = {"u1": "<u1", "u4": "<u4", "f4": "<f4", "f8": "<f8"}  # a browser has arrays of these


def pack(stories: Iterable[tuple[Mapping[str, Any], Mapping[str, np.ndarray]]]) -> bytes:
    """Facts and arrays as one block, little for a file and quick for a browser, which page.js reads.

    The block is zlib's: 4 bytes with the length of a JSON header (little-endian), the header, the arrays one after the
    other. The header lists, per story, `facts` and `arrays`: name -> type, number of elements, position among the bytes
    that follow. The bytes of an array are sorted by their place in its numbers (all lowest ones first): neighbours are
    alike, so they compress well.

    Arrays are flat and of one of `TYPES`; numbers in the facts that JSON has no word for (NaN, infinity) become null.
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
