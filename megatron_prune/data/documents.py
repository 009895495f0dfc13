"""Files -> documents. Plain text and JSON lines, packed or not; every mistake is reported with file and line.

A file is JSON lines, one object a line, where its name says so (.jsonl, .ndjson, .json, in any case) or where its first
line is a JSON object; any other is text. Whether it is packed (gzip, bzip2, xz) is seen from its content, too. What
begins like JSON of another layout, or holds NUL bytes, is refused rather than trained on. Pipes are read like files.
Text is UTF-8, with or without a byte order mark, and CRLF counts as LF.

A text file is cut into documents by one of `SEPARATORS`:

    blank-line  a document is a run of lines that are not blank; its own line breaks stay
    file        the whole file is one document
    line        every line that is not blank is a document

Trailing white space of a text document is dropped, leading indentation is kept. JSON strings are taken as they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_prune.errors import UserError, one_line
from megatron_prune.reading import open_stream

SEPARATORS = ("blank-line", "file", "line")
AUTO, TEXT, JSON_LINES = "auto", "text", "jsonl"
INPUT_FORMATS = (AUTO, TEXT, JSON_LINES)
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "packed with zstd: give a pipe, <(zstd -dc FILE)",
    b"\x04\x22\x4d\x18": "packed with lz4: give a pipe, <(lz4 -dc FILE)",
    b"PK\x03\x04": "a zip archive: give the files in it, unpacked",
    b"PAR1": "a parquet file: write it as JSON lines first",
    b"ARROW1": "an arrow file: write it as JSON lines first",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LOOKED_AT = 1 << 20  # bytes of a file, unpacked, that its kind is seen from
_OBJECT = rb"""\{\s*(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')\s*:"""  # the beginning of one, or of a Python dict

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """One document. `disk_bytes`: bytes of all files on disk that were read when it was complete."""

    text: str
    path: str
    line: int
    disk_bytes: int


def check_inputs(paths: Sequence[str]) -> int:
    """Check that all files can be opened; returns their size on disk in bytes, 0 where one is a pipe and nobody knows.
    Raises UserError: no file is given, or one is missing, a folder, or not readable."""
    if not paths:
        raise UserError("--input: no file is given")
    sizes: list[int | None] = []
    for path in paths:
        try:
            found = os.stat(path)
            if stat.S_ISDIR(found.st_mode):
                raise UserError(f"--input: {path} is a folder; give the files in it")
            if stat.S_ISREG(found.st_mode):
                with open(path, "rb"):
                    pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--input: {path} cannot be read: {reason}") from error
        sizes.append(found.st_size if stat.S_ISREG(found.st_mode) else None)  # a pipe is opened once, to be read
    return sum(size or 0 for size in sizes) if None not in sizes else 0


def read_documents(
    paths: Sequence[str], separator: str = "blank-line", json_key: str = "text", input_format: str = AUTO
) -> Iterator[Document]:
    """Yield the documents of all files, in the order given; a file is held in memory one document at a time.

    What each file was taken for is logged.

    Args:
        paths: text and JSON-lines files in any mixture.
        separator: one of `SEPARATORS`, for text files.
        json_key: where a JSON line holds its text.
        input_format: `text` or `jsonl` for all files; `auto`: see each.

    Raises:
        UserError: a damaged packed file, bytes that are no UTF-8, another kind of file, a line that is no JSON object,
            a key that is missing or holds no string.
    """
    if separator not in SEPARATORS:
        raise UserError(f'--document-separator: "{separator}" is unknown; use {", ".join(SEPARATORS)}')
    if input_format not in INPUT_FORMATS:
        raise UserError(f'--input-format: "{input_format}" is unknown; use {", ".join(INPUT_FORMATS)}')
    before = 0
    for path in paths:
        packing = None
        try:
            with open_stream(path) as stream:
                source = _Filling(stream)
                content = io.BufferedReader(source, _LOOKED_AT)
                packing = next((name for magic, name in _PACKED.items() if content.peek().startswith(magic)), None)
                lines = _unpacked(content, packing, path)
                kind = _kind(path, lines.peek(), input_format)
                texts = _json_texts(lines, path, json_key) if kind == JSON_LINES else _texts(lines, path, separator)
                for line, text in texts:
                    yield Document(text, path, line, before + source.count)
        except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
            raise UserError(f"{path}: the {packing} file is damaged or cut short: {error}") from error
        except OSError as error:
            if error.strerror is None and packing is not None:  # bzip2's own
                raise UserError(f"{path}: the {packing} file is damaged or cut short: {error}") from error
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        before += source.count


class _Filling(io.RawIOBase):
    """A stream that fills what it is given, as pipes and unpackers do not, and counts what it gave."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view, filled = memoryview(buffer), 0
        while filled < len(view):
            some = self._stream.readinto(view[filled:])
            if not some:
                break
            filled += some
        self.count += filled
        return filled


def _unpacked(stream: io.BufferedReader[Any], packing: str | None, path: str) -> io.BufferedReader[Any]:
    """The content of a file; what can be told to be neither text nor JSON is refused."""
    content: io.BufferedReader[Any] = stream
    if packing is not None:
        content = io.BufferedReader(_Filling(_UNPACKERS[packing](stream)), _LOOKED_AT)
    head = content.peek()
    what = next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive: give the files in it, unpacked"
    if what is not None:
        raise UserError(f"{path}: is {what}")
    return content


def _kind(path: str, head: bytes, input_format: str) -> str:
    """`TEXT` or `JSON_LINES`, by request, name and content; says which."""
    if input_format != AUTO:
        return input_format
    by_name = path.lower()
    for suffix in _PACKED_SUFFIXES:
        by_name = by_name.removesuffix(suffix)
    is_named = by_name.endswith(JSON_SUFFIXES)
    begins = _begins(head)
    if begins == "json":
        raise UserError(
            f"{path}: begins like JSON, but its first line is no whole JSON object; write one object on each line "
            "(jq -c), or take it for text with --input-format text"
        )
    if is_named or begins == JSON_LINES:
        why = "by its name" if is_named else "by its first line; --input-format text takes it for text"
        logger.info("%s: read as JSON lines, %s", one_line(path), why)
        return JSON_LINES
    if b"\0" in head:
        raise UserError(f"{path}: holds NUL bytes, so that it is no UTF-8 text; convert the file first")
    logger.info("%s: read as text", one_line(path))
    return TEXT


def _begins(head: bytes) -> str:
    """What the beginning of a file looks like: `JSON_LINES`, `json` (of another layout), or `TEXT`."""
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if re.match(rb"\[\s*" + _OBJECT, text):
        return "json"
    if not re.match(_OBJECT, text):
        return TEXT
    line, is_whole, _ = text.partition(b"\n")
    if not is_whole and len(head) >= _LOOKED_AT:
        return JSON_LINES  # a line longer than what is looked at
    try:
        return JSON_LINES if isinstance(json.loads(line), dict) else "json"
    except json.JSONDecodeError:
        return "json"
    except (ValueError, RecursionError):  # no UTF-8, nested too deeply, ...: reading it says more
        return JSON_LINES


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
        except ValueError as error:  # a number of thousands of digits
            raise UserError(f"{path}:{number}: is no JSON that can be read ({error})") from error
        except RecursionError as error:
            raise UserError(f"{path}:{number}: is nested too deeply to be read as JSON") from error
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
