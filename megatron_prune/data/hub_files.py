"""Small files of a Hugging Face folder, and what a folder is where it holds no model.

read_json       a file -> its JSON object
present         whether a file is there; something else in its place is refused, a link out of its folder, too
is_lfs_pointer  a clone without Git LFS
what_else       what such a folder may be instead, as a hint for people
hub_id          the model's id, where the folder is a hub's cache
"""

import json
import re
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError
from megatron_prune.reading import insist_own, is_there, open_file, read_words

LFS_HINT = "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError: there is no such file, it is a link out of its folder, or no JSON
    object."""
    try:
        insist_own(file)
        content = json.loads(read_words(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if is_lfs_pointer(file):
            raise UserError(f"{file}: {LFS_HINT}") from error
        raise UserError(f"{file}: invalid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: invalid JSON: nested too deeply") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object")
    return content


def present(file: Path, folder: Path | None = None) -> bool:
    """Whether `file` of `folder` (its parent unless given) is there. Raises UserError: something else is (a link that
    leads nowhere, a pipe, a folder): left out in silence, its content would be missed later; or it is a link that
    `insist_own` refuses."""
    try:
        is_file = is_there(file)
        insist_own(file, folder)
        return is_file
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def is_lfs_pointer(file: Path) -> bool:
    """Whether a clone without Git LFS left a few lines of text in the place of `file`."""
    with open_file(file) as content:
        return content.read(23) == b"version https://git-lfs"


def what_else(folder: Path) -> str:
    """What a folder that holds no model may be instead, as the end of a complaint; empty when nothing is known."""
    if (folder / "adapter_config.json").is_file():
        return "; it is an adapter (LoRA): merge it into its base model, save that, and name the result"
    if (folder / "snapshots").is_dir():
        return "; it is a hub's cache of a model: name one of the folders in snapshots"
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)):
        return "; if it is a hub's id: nothing is downloaded here, so fetch the model and name the folder it is in"
    return ""


def hub_id(folder: Path) -> str | None:
    """`ORGANISATION/MODEL` where `folder` is a snapshot in a hub's cache, whose own name is a commit's."""
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$", folder.resolve().as_posix())
    return f"{cached[1]}/{cached[2]}" if cached else None
