"""Files that somebody else made, opened without waiting for anybody and read no further than makes sense.

    open_file     a regular file, for reading; pipes, devices and folders are refused at once
    read_content  all of a small one, as bytes
    read_words    the same as text
    is_there      whether a file stands under a name, as against nothing at all
    insist_own    a file of a folder is not a link to a file somewhere else
    open_stream   a file, or a pipe that somebody writes into

Opening a pipe waits until somebody writes into it, which may be never, and devices have no end. All of these raise
OSError that says what stands there, in words for people (`strerror`) and with its name.
"""

import errno
import io
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from pathlib import Path

LARGEST = 512 << 20  # bytes of what is read at once and is no tensor; vocabularies take some tens of MB
_SECONDS_WITHOUT_WRITER = 10.0
_NUMBERS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_HUB_BLOB = re.compile(r"/(models|datasets)--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})$")

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "is a pipe, where a file is needed"),
    (stat.S_ISSOCK, errno.EINVAL, "is a socket, where a file is needed"),
)


def open_file(path: str | Path) -> io.BufferedReader:
    """The regular file `path`, open for reading. Raises OSError: there is none, or something else."""
    _insist_file(os.stat(path).st_mode, path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # for what has come in between
    try:
        _insist_file(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _insist_file(mode: int, path: str | Path) -> None:
    if stat.S_ISREG(mode):
        return
    for is_kind, number, words in _KINDS:
        if is_kind(mode):
            raise OSError(number, words, str(path))
    raise OSError(errno.EINVAL, "is a device, where a file is needed", str(path))


def read_content(path: str | Path, largest: int = LARGEST) -> bytes:
    """All bytes of the regular file `path`. Raises OSError: as `open_file`, or it is larger than `largest` bytes."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size <= largest:
            content = file.read(largest + 1)
            if len(content) <= largest:
                return content
    raise OSError(errno.EFBIG, f"is larger than {largest:,} bytes, which none of its kind is", str(path))


def read_words(path: str | Path, largest: int = LARGEST) -> str:
    """The same as text in UTF-8. Raises UnicodeDecodeError, too."""
    return read_content(path, largest).decode("utf-8")


def is_there(path: str | Path) -> bool:
    """Whether a regular file is there; False where nothing is. Raises OSError: something else stands there: a link that
    leads nowhere, a pipe, a device, a folder."""
    try:
        _insist_file(os.stat(path).st_mode, path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise FileNotFoundError(errno.ENOENT, "is a link to a file that is not there", str(path)) from None
        return False
    return True


def insist_own(path: str | Path, folder: str | Path | None = None) -> None:
    """See that what is read as `path` is a file of the folder it is in, and none of its reader's own.

    A stranger's folder may hold a link to any file of whoever reads it, whose text would then travel on in an export.
    A link may lead to a file in the same folder, to one of the same name anywhere, and to a hub's cache (its snapshots
    are links to blobs called by their hashes). Files of numbers, which are read as nothing else, may be links to
    anywhere: large ones often are.

    Args:
        folder: whose file it is; its parent unless given.

    Raises:
        OSError: it is a link to another file.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) if folder is None else os.fspath(folder)
    target, root = os.path.realpath(path), os.path.realpath(folder)
    inside = os.path.relpath(path, folder)
    is_own = target.startswith(os.path.join(root, "")) or target.endswith(f"{os.sep}{inside}")
    if is_own or path.endswith(_NUMBERS) or _HUB_BLOB.search(target):
        return
    raise OSError(errno.EPERM, f"is a link out of its folder, to {target}; if that is meant, put a copy here", path)


def open_stream(path: str | Path) -> io.FileIO:
    """A file, device or pipe, unbuffered. Whoever writes into a pipe may take its time, once it has begun. Raises
    OSError: it cannot be opened, or is a pipe that nobody writes into."""
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        return open(path, "rb", buffering=0)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            descriptor = opening.result(_SECONDS_WITHOUT_WRITER)
        except FuturesTimeoutError:
            raise OSError(errno.EINVAL, "is a pipe that nobody writes into", str(path)) from None
        finally:
            if not opening.done():  # lets it go on
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                os.close(opening.result())
    return os.fdopen(descriptor, "rb", buffering=0)
