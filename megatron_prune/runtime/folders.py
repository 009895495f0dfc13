"""Writing for readers who may come at any moment, and whether a folder can be written at all.

probe_folder   make it, write a block, leave nothing but the folder: before the work whose result goes there
hindrance      what can be seen of that without touching anything
write_file     a new file, on the disk when the call returns
replace_file   a file's new content in the place of the old, in one piece
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_prune.errors import UserError


def probe_folder(folder: str | Path, field: str) -> None:
    """Make `folder` and write a block in it, that a full disk would not take; nothing stays but the folder.

    Raises:
        UserError: that is not possible; `field` names the folder in the message.
    """
    probe = Path(folder) / f".probe.{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}: {folder} cannot be written: {reason}; give another folder") from error


def hindrance(folder: str | Path) -> str | None:
    """Why `folder` could not be made or written, as far as is to be seen; None: nothing speaks against it."""
    try:
        nearest = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    except (OSError, ValueError) as error:
        return str(error)
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} may not be written"


def write_file(path: Path, content: bytes, lasting: bool = True) -> None:
    """Write `path`; `lasting`: it survives a power cut from here on. Raises OSError that names the file."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # the system names none where a write fails, as on a full disk
        raise


def replace_file(path: Path, content: bytes, lasting: bool = True) -> None:
    """As `write_file`; a reader finds either the old content or the new, and a failure leaves the old and no more."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_file(temporary, content, lasting)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
