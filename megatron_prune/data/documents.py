"""Files -> documents. Plain text and JSON lines, each gzipped or not; every mistake is reported with file and line.

A file whose name ends in .jsonl, .ndjson or .json (before an optional .gz) holds one JSON object per line, any other is
text. Whether a file is gzipped is seen from its content. Text is UTF-8, with or without a byte order mark, and CRLF
counts as LF.

A text file is cut into documents by one of `SEPARATORS`:

    blank-line  a document is a run of lines that are not blank; its own line breaks stay
    file        the whole file is one document
    line        every line that is not blank is a document

Trailing white space of a text document is dropped, leading indentation is kept. JSON strings are taken as they are.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_prune.errors import UserError

SEPARATORS = ("blank-line", "file", "line")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One document. `disk_bytes`: bytes of all files on disk that were read when it was complete."""

    text: str
    path: str
    line: int
    disk_bytes: int


def check_inputs(paths: Sequence[str]) -> int:
    """Check that all files can be opened; returns their size on disk in bytes.

    Raises:
        UserError: no file is given, or one is missing, a folder, or not readable.
    """
    if not paths:
        raise UserError("--input: no file is given")
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"--input: {path} is a folder; give the files in it")
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise UserError(f"--input: {path} cannot be read: {error.strerror}") from error
    return sum(Path(path).stat().st_size for path in paths)


def read_documents(paths: Sequence[str], separator: str = "blank-line", json_key: str = "text") -> Iterator[Document]:
    """Yield the documents of all files, in the order given; a file is held in memory one document at a time.

    Args:
        paths: text and JSON-lines files in any mixture.
        separator: one of `SEPARATORS`, for text files.
        json_key: where a JSON line holds its text.

    Raises:
        UserError: a damaged gzip file, bytes that are no UTF-8, a line that is no JSON object, a key that is missing
            or holds no string.
    """
    if separator not in SEPARATORS:
        raise UserError(f'--document-separator: "{separator}" is unknown; use {", ".join(SEPARATORS)}')
    before = 0
    for path in paths:
        try:
            with open(path, "rb") as stream:
                lines, position = _lines(stream)
                texts = _json_texts(lines, path, json_key) if _is_json(path) else _texts(lines, path, separator)
                for line, text in texts:
                    yield Document(text, path, line, before + position())
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: the gzip file is damaged or cut short: {error}") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        before += Path(path).stat().st_size


def _is_json(path: str) -> bool:
    name = path[: -len(".gz")] if path.endswith(".gz") else path
    return name.endswith(JSON_SUFFIXES)


def _lines(stream: BinaryIO) -> tuple[Iterable[bytes], Callable[[], int]]:
    """The lines of a file, unpacked if need be, and how far the file itself has been read (bytes)."""
    packed = stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    stream.seek(0)
    if packed:
        return io.BufferedReader(gzip.GzipFile(fileobj=stream), 1 << 20), stream.tell
    return iter(stream.readline, b""), stream.tell


def _decoded(lines: Iterable[bytes], path: str) -> Iterator[tuple[int, str]]:
    """Number the lines from 1 and decode them; line ends become a single newline."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: is no UTF-8 text ({error.reason}); convert the file first") from error
        yield number, text[:-2] + "\n" if text.endswith("\r\n") else text


def _texts(lines: Iterable[bytes], path: str, separator: str) -> Iterator[tuple[int, str]]:
    """Cut a text file into (first line's number, document)."""
    document: list[str] = []
    first = 1
    for number, line in _decoded(lines, path):
        blank = not line.strip()
        if blank and separator == "blank-line" and document:
            yield first, "".join(document).rstrip()
            document = []
        if blank and (separator != "file" or not document):
            continue  # leading blank lines belong to no document
        if separator == "line":
            yield number, line.rstrip()
            continue
        if not document:
            first = number
        document.append(line)
    if document:
        yield first, "".join(document).rstrip()


def _json_texts(lines: Iterable[bytes], path: str, key: str) -> Iterator[tuple[int, str]]:
    """The string under `key` of every line that is not blank."""
    for number, line in _decoded(lines, path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: is no JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number}: expected a JSON object on every line, got {type(entry).__name__}")
        if key not in entry:
            found = ", ".join(list(entry)[:8]) or "none"
            raise UserError(f'{path}:{number}: has no key "{key}" (keys: {found}); choose one with --json-key')
        text = entry[key]
        if not isinstance(text, str):
            raise UserError(f'{path}:{number}: "{key}" holds no string but {type(text).__name__}')
        if "\\u" in line:
            _check_surrogates(text, path, number)
        yield number, text


def _check_surrogates(text: str, path: str, number: int) -> None:
    """JSON's escapes can spell half a character, which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{path}:{number}: holds half of a surrogate pair, which is no text") from error
