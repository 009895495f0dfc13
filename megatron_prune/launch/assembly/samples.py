"""Is a file the same one? Sizes and sampled content, in bounded time for files of any size.

Files that are no larger than 64 MiB together are read whole. Of larger ones the header and 4 KiB blocks are: the first
and the last of every weight matrix (or file), and further ones at even distances, some 4,096 for one input, however
large it is. So a copy that was made anew, cut, or changed in one matrix is found, and a single changed number of a
large file may not be.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_prune.errors import UserError
from megatron_prune.reading import open_file

_WHOLE_BYTES = 64 << 20
_BLOCK, _BLOCKS = 4 << 10, 4096
_LEAST_BLOCKS = 3  # of every matrix
_READERS = 16  # blocks on their way at a time: storage over a network answers late
_MAX_HEADER = 100 << 20  # of a safetensors file, by its own rule


def fingerprints(files: Iterable[Path]) -> dict[str, str]:
    """Path -> `SIZE bytes, SHA-256`, the latter over everything or over samples, as the module's docstring says. Raises
    UserError: a file cannot be read."""
    files = list(files)
    try:
        total = sum(path.stat().st_size for path in files)
        return {str(path): _fingerprint(path, total) for path in files}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _fingerprint(path: Path, total: int) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with open_file(path) as file:
        if total <= _WHOLE_BYTES:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        else:
            header, spans = _spans(file.fileno(), size)
            digest.update(header)
            offsets = [offset for span in spans for offset in _offsets(*span, total)]
            with ThreadPoolExecutor(_READERS) as pool:
                for block in pool.map(lambda offset: os.pread(file.fileno(), _BLOCK, offset), offsets):
                    digest.update(block)
    return f"{size} bytes with digest {digest.hexdigest()[:12]}"


def _offsets(start: int, end: int, total: int) -> Iterator[int]:
    """Where blocks of the bytes from `start` to `end` begin, the first and the last among them."""
    last = max(end - _BLOCK, start)
    count = max(_LEAST_BLOCKS, _BLOCKS * (end - start) // total)
    step = max((last - start) // (count - 1), _BLOCK)
    yield from range(start, last, step)
    yield last


def _spans(file: int, size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """A safetensors file's header and where its tensors lie; of another file, nothing and all of it."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if 0 < length <= min(_MAX_HEADER, size - 8):
        header = os.pread(file, length, 8)
        try:
            tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            first = 8 + length
            return header, [(first + start, first + end) for start, end in sorted(tensors) if start < end]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # not a safetensors file
    return b"", [(0, size)]
