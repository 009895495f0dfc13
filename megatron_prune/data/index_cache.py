"""The shuffled indices of a data set, kept as .npy files: found and checked, or made and published. No pickle is read.

Every array is a function of data, seed and sizes, all of which are in the file's name: whoever makes it makes the same.
So two builders may race, and a file that is cut short, of another kind or that holds impossible numbers (a full disk, a
killed job, a stranger) is made again and replaced. A file is written under a name of its own, flushed and renamed. A
folder that cannot be written will do as long as all files are there. megatron-core's own reader, which unpickles, is
never asked.
"""

import logging
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.data.leftovers import claim, staging
from megatron_prune.errors import UserError

FIELD = "data.data_cache_path (--data-cache-path)"
_LARGEST_HEADER = 4096  # bytes; numpy's own are 128

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One array.

    Attributes:
        name: of the file, without a folder.
        dtypes: numpy's names of the element types it may have.
        shape: exactly.
        holds: whether the content can be right, given the entries before it and itself.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    holds: Callable[[Sequence[np.ndarray]], bool]


def kept(folder: str, entries: Sequence[Entry], make: Callable[[], Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The arrays of `entries`, mapped from files in `folder`; made by `make`, in the same order, where one is missing.
    Raises UserError: they have to be made and the folder cannot be written, or its disk is full."""
    found: list[np.ndarray] = []
    for entry in entries:
        array = _open(os.path.join(folder, entry.name), entry, found)
        if array is None:
            break
        found.append(array)
    else:
        return found
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{FIELD}: {folder} holds no whole index of this data and cannot be written; name another folder"
        )
    arrays = make()
    try:
        for entry, array in zip(entries, arrays, strict=True):
            _publish(folder, entry.name, array)
        return [np.lib.format.open_memmap(os.path.join(folder, entry.name), mode="r") for entry in entries]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{FIELD}: {folder} cannot take the index of this data: {reason}; make room there, or name another folder"
        ) from error


def sized(arrays: Mapping[str, Any]) -> None:
    """Compare the sizes of mapped files with the arrays over them: reading what was cut off would end this process
    (SIGBUS).

    Args:
        arrays: numpy.memmap by what errors call the file; others are passed over.

    Raises:
        UserError: a file was cut short.
    """
    for name, array in arrays.items():
        mapping = array
        while isinstance(mapping, np.ndarray):
            mapping = mapping.base
        if isinstance(mapping, mmap.mmap) and mapping.size() < len(mapping):
            raise UserError(f"{name}: was cut short while it was in use; put the whole file back and start again")


def _open(path: str, entry: Entry, before: Sequence[np.ndarray]) -> np.ndarray | None:
    """The array, mapped; None where no such file stands, or another than `entry` says after those `before` it."""
    if not os.path.isfile(path):
        return None
    try:
        complaint = _complaint(path, entry)
        array = None if complaint else np.lib.format.open_memmap(path, mode="r", max_header_size=_LARGEST_HEADER)
    except Exception as error:  # whatever numpy's reader makes of another program's bytes
        array, complaint = None, str(error).partition("\n")[0] or type(error).__name__
    if array is not None and not entry.holds([*before, array]):
        array, complaint = None, "holds impossible numbers"
    if array is None:
        logger.warning("%s: is no whole index (%s), made again", path, complaint)
    return array


def _complaint(path: str, entry: Entry) -> str | None:
    """What is wrong with a .npy file by its header and its size, before anything of it is mapped; or None."""
    with open(path, "rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            return f"version {version}"
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_LARGEST_HEADER)
        if dtype not in map(np.dtype, entry.dtypes) or is_fortran or shape != entry.shape:
            return f"holds {dtype} {shape}"
        expected = stream.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    size = os.path.getsize(path)
    return None if size == expected else f"{size} of {expected} bytes"


def _publish(folder: str, name: str, array: np.ndarray) -> None:
    """Put an array under its name, whole or not at all."""
    place = Path(folder)
    temporary = staging(place / name)
    try:
        with claim(temporary) as stream:
            # Not numpy's own writer: it ends short on a full disk without a word.
            whole = np.ascontiguousarray(array)
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(whole))
            stream.write(whole.data.cast("B"))
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(place / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
