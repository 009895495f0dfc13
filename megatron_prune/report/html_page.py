"""The page itself: one file with everything in it.

render         stories -> HTML
write_page     runs' folders -> a file
is_installed   whether plotly is, whose plotly.js draws the page
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path

from megatron_prune.errors import UserError
from megatron_prune.report.packing import pack
from megatron_prune.report.story import Story, read_story
from megatron_prune.runtime.folders import replace_file

HERE = Path(__file__).parent
FILE_NAME = "report.html"


def is_installed() -> bool:
    """Whether the package is there that brings plotly.js."""
    return find_spec("plotly") is not None


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Read the runs in `folders` and write the page, in one piece.

    Raises:
        UserError: plotly is not installed, or a folder holds no run that can be read. OSError: of writing.
    """
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
