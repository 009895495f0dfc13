"""Writing for readers who may come at any moment, and whether a folder can be written at all.

probe_folder   make it, write a block, leave nothing but the folder: before the work whose result goes there
hindrance      what can be seen of that without touching anything
naming         what the system refuses names the file
write_file     a new file, on the disk when the call returns
replace_file   a file's new content in the place of the old, in one piece
replace_figure the same for a drawing of matplotlib's
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError


def probe_folder(folder: str | Path, field: str) -> None:
    """Make `folder` and write a block in it, that a full disk would not take; nothing stays but the folder. Raises
    UserError: that is not possible; `field` names the folder in the message."""
    probe = Path(folder) / f".probe.{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            probe.unlink(missing_ok=True)
            with probe.open("xb") as file:
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


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """While entered, an OSError that names no file, as that of a write to a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_file(path: Path, content: bytes, lasting: bool = True) -> None:
    """Write `path`; `lasting`: it survives a power cut from here on. Raises OSError that names the file.

    It is a new file: what a link leads to, that stands in its place, is not touched.
    """
    with naming(path):
        path.unlink(missing_ok=True)
    with naming(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        if lasting:
            os.fsync(file.fileno())


def replace_file(path: Path, content: bytes, lasting: bool = True) -> None:
    """As `write_file`; a reader finds either the old content or the new, and a failure leaves the old and no more."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_file(temporary, content, lasting)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_figure(path: Path, figure: Any, dpi: int) -> None:
    """Draw a figure of matplotlib's, in the format that the name's ending says, and `replace_file`."""
    figure.savefig(drawn := io.BytesIO(), dpi=dpi, format=path.suffix[1:])
    replace_file(path, drawn.getvalue(), lasting=False)
