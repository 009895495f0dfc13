"""The three files of a data set with prefix P, and whether they are whole.

    P.bin   token ids, document after document, nothing between (megatron-core's indexed data set)
    P.idx   its index: header, one int32 length and one int64 byte offset per sequence, the documents' borders as int64
    P.json  what preprocessing knows about it (`Metadata`); absent from data sets that Megatron-LM's own tool made

`inspect` reads the whole index and compares both files' sizes with it, so that a missing, truncated or inconsistent
file is a clear error before training starts. This module knows the layout of the .idx file; writing it is
megatron-core's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.reading import is_there, read_words

METADATA_FORMAT = "megatron_prune data 1"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, entries of the documents' borders
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_PEEK_BYTES = 64 << 20  # of a .bin without metadata, searched for its largest id; what follows is seen when it is read
_ENTRIES = 1 << 20  # of an .idx looked at together
_EDGE_BYTES = 64 << 10  # at both ends of an .idx, taken into the fingerprint


def bin_path(prefix: str) -> Path:
    """The file of token ids."""
    return Path(prefix + ".bin")


def idx_path(prefix: str) -> Path:
    """The index. It is written last: where it stands, the data set is whole."""
    return Path(prefix + ".idx")


def metadata_path(prefix: str) -> Path:
    """The file of `Metadata`."""
    return Path(prefix + ".json")


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """The type ids are stored as: uint16 where all of them fit, else int32 (the rule of megatron-core's GPT data)."""
    return np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.int32


@dataclass(frozen=True)
class Metadata:
    """What preprocessing did and found.

    Attributes:
        tokenizer_type, tokenizer_path, tokenizer_fingerprint, vocab_size: the tokenizer.
        documents, tokens: in the data set; tokens count bos and eod.
        empty_documents: without a token, left out.
        max_token_id: the largest id in the data set.
        text_bytes: UTF-8 bytes of all documents' text.
        dtype: numpy's name of the type ids are stored as.
        prepend_bos, append_eod, document_separator, json_key, inputs: the options preprocessing ran with.
    """

    tokenizer_type: str
    tokenizer_path: str
    tokenizer_fingerprint: str
    vocab_size: int
    documents: int
    tokens: int
    empty_documents: int
    max_token_id: int
    text_bytes: int
    dtype: str
    prepend_bos: bool
    append_eod: bool
    document_separator: str
    json_key: str
    inputs: tuple[str, ...]

    def to_json(self) -> str:
        """The content of a metadata file."""
        return json.dumps({"format": METADATA_FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"


def holds_metadata(prefix: str) -> bool:
    """Whether `P.json` is a metadata file, of this version or not; False where it is absent or someone else's."""
    return _metadata_content(prefix) is not None


def read_metadata(prefix: str) -> Metadata | None:
    """The metadata of a data set; None where there is no such file, or another program's. Raises UserError: the file
    says it is metadata but lacks some of it; or what stands there is no file (a link to none)."""
    try:
        is_there(metadata_path(prefix))
    except OSError as error:
        raise UserError(f"{metadata_path(prefix)}: {error.strerror}; copy all three files again") from error
    content = _metadata_content(prefix)
    if content is None:
        return None
    names = {field.name for field in dataclasses.fields(Metadata)}
    if set(content) != names:
        different = ", ".join(sorted(names.symmetric_difference(content)))
        raise UserError(
            f"{metadata_path(prefix)}: fields are missing or unknown ({different}); preprocess the data again"
        )
    wrong = [field.name for field in dataclasses.fields(Metadata) if not _has_type(content[field.name], field.type)]
    if wrong:
        raise UserError(f"{metadata_path(prefix)}: {wrong[0]} has a value of the wrong kind; preprocess the data again")
    return Metadata(**{**content, "inputs": tuple(content["inputs"])})


def _has_type(value: Any, annotation: Any) -> bool:
    """Whether a JSON value is what an annotation of `Metadata` says; counts are not negative."""
    if annotation == "int":
        return type(value) is int and value >= 0
    if annotation == "tuple[str, ...]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, {"str": str, "bool": bool}[annotation])


def _metadata_content(prefix: str) -> dict[str, Any] | None:
    try:
        content = json.loads(read_words(metadata_path(prefix)))
    except (OSError, ValueError, RecursionError):  # absent, or a JSON-lines corpus of the same name
        return None
    if not isinstance(content, dict) or content.pop("format", None) != METADATA_FORMAT:
        return None
    return content


@dataclass(frozen=True)
class IndexedData:
    """A data set on disk whose files are whole.

    Attributes:
        prefix: path without .bin and .idx.
        sequences: number of sequences; preprocessing makes one of every document, and GPT data sets are split by them.
        tokens: number of ids.
        dtype: the type ids are stored as.
        metadata: what preprocessing wrote down, None for another tool's data set.
    """

    prefix: str
    sequences: int
    tokens: int
    dtype: np.dtype[Any]
    metadata: Metadata | None

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] int32, tokens of every sequence, mapped from the .idx anew: no file stays open."""
        return np.memmap(idx_path(self.prefix), np.int32, mode="r", offset=_HEADER.size, shape=(self.sequences,))

    @property
    def max_token_id(self) -> int:
        """The largest id; without metadata, the largest among the first 64 MiB."""
        return self._peeked[1] if self.metadata is None else self.metadata.max_token_id

    @property
    def min_token_id(self) -> int:
        """The smallest id, which another tool's data may hold below 0; with metadata 0."""
        return self._peeked[0] if self.metadata is None else 0

    @cached_property
    def _peeked(self) -> tuple[int, int]:
        """The smallest and the largest id in the first `_PEEK_BYTES`, read rather than mapped: the file may shrink."""
        count = min(self.tokens, _PEEK_BYTES // self.dtype.itemsize)
        ids = np.fromfile(bin_path(self.prefix), self.dtype, count)
        return int(ids.min(initial=0)), int(ids.max(initial=0))

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over sizes and both ends of the index: changes when the data is made anew."""
        size = idx_path(self.prefix).stat().st_size
        digest = hashlib.sha256(f"{size} {self.tokens} {self.dtype.name}".encode())
        with open(idx_path(self.prefix), "rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, size - _EDGE_BYTES), os.SEEK_SET)
            digest.update(stream.read())
        return digest.hexdigest()


def inspect(prefix: str) -> IndexedData:
    """Read the index of a data set, every entry of it, and check that its files are whole. Raises UserError: a file is
    missing, cannot be read, is no indexed data set, is truncated, or is longer than the index says; an entry of the
    index contradicts the others; `P.json` describes other data; or the data set holds no token."""
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix) and idx_path(prefix[: -len(suffix)]).is_file():
            raise UserError(f"{prefix}: give the prefix without {suffix}")
    for path in (idx_path(prefix), bin_path(prefix)):
        if not _is_file(path):
            what = "is no file" if os.path.lexists(path) else "does not exist"
            raise UserError(f"{path}: {what}; make it with megatron-prune preprocess --output-prefix {quote(prefix)}")
    index = idx_path(prefix)
    try:
        with open(index, "rb") as stream:
            sequences, borders, dtype = _header(stream, index)
            tokens = _checked_tokens(stream, prefix, sequences, borders, dtype.itemsize)
    except OSError as error:
        raise UserError(f"{error.filename or index}: cannot be read: {error.strerror}") from error
    metadata = read_metadata(prefix)
    if metadata is not None and (metadata.tokens, metadata.dtype) != (tokens, dtype.name):
        raise UserError(
            f"{metadata_path(prefix)}: describes other data ({metadata.tokens} tokens as {metadata.dtype}, the index "
            f"says {tokens} as {dtype.name}); copy all three files again, or remove this one"
        )
    return IndexedData(prefix, sequences, tokens, dtype, metadata)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return False


def _header(stream: BinaryIO, index: Path) -> tuple[int, int, np.dtype[Any]]:
    """(sequences, entries of the documents' borders, dtype)."""
    header = stream.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC[: len(header)] or not header:
        raise UserError(f"{index}: is no index of megatron-core's data sets")
    if len(header) < _HEADER.size:
        raise UserError(f"{index}: is truncated; preprocess the data again")
    _, version, code, sequences, borders = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise UserError(f"{index}: version {version} with element type {code} is not supported")
    return sequences, borders, np.dtype(_DTYPES[code])


def _checked_tokens(stream: BinaryIO, prefix: str, sequences: int, borders: int, itemsize: int) -> int:
    """Compare all entries with each other and both files' sizes with them; returns the number of tokens."""
    index, data = idx_path(prefix), bin_path(prefix)
    if index.stat().st_size < _HEADER.size + sequences * (4 + 8) + borders * 8:
        raise UserError(f"{index}: is truncated; preprocess the data again")
    if sequences == 0:
        raise UserError(f"{prefix}: the data set holds no documents")
    expected = _checked_sequences(stream, index, sequences, itemsize)
    _check_borders(stream, index, sequences, borders)
    actual = data.stat().st_size
    if actual < expected:
        raise UserError(f"{data}: is truncated: {actual} of {expected} bytes; copy it or preprocess the data again")
    if actual > expected:
        raise UserError(f"{data}: does not belong to {index.name}: {actual} bytes instead of {expected}")
    if expected == 0:
        raise UserError(f"{prefix}: the data set holds no tokens")
    return expected // itemsize


def _checked_sequences(stream: BinaryIO, index: Path, sequences: int, itemsize: int) -> int:
    """Every sequence must begin where the one before it ends; returns the end of the last, in bytes."""
    lengths = _entries(stream, _HEADER.size, sequences, "<i4")
    offsets = _entries(stream, _HEADER.size + sequences * 4, sequences, "<i8")
    first = end = 0
    for some_lengths, some_offsets in zip(lengths, offsets):
        wrong = some_lengths < 0
        ends = end + np.cumsum(some_lengths, dtype=np.int64) * itemsize
        starts = np.concatenate(([end], ends[:-1]))
        wrong |= some_offsets != starts
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"{index}: is damaged: sequence {first + at} has {some_lengths[at]} tokens at byte {some_offsets[at]}, "
                f"where byte {starts[at]} is due; preprocess the data again"
            )
        first, end = first + len(ends), int(ends[-1])
    return end


def _check_borders(stream: BinaryIO, index: Path, sequences: int, borders: int) -> None:
    """Documents are runs of sequences: their borders rise from 0 to the number of sequences."""
    last = 0
    for some in _entries(stream, _HEADER.size + sequences * (4 + 8), borders, "<i8"):
        if some[0] < last or (np.diff(some) < 0).any():
            raise UserError(f"{index}: is damaged: the documents' borders do not rise; preprocess the data again")
        last = int(some[-1])
    if last != sequences:
        raise UserError(
            f"{index}: is damaged: the documents end at sequence {last} of {sequences}; preprocess the data again"
        )


def _entries(stream: BinaryIO, start: int, count: int, dtype: str) -> Iterator[np.ndarray]:
    """`count` numbers from byte `start` on, a million at a time; two of these may take turns on one stream."""
    size = np.dtype(dtype).itemsize
    for first in range(0, count, _ENTRIES):
        stream.seek(start + first * size)
        wanted = min(_ENTRIES, count - first)
        content = stream.read(wanted * size)
        if len(content) < wanted * size:
            raise UserError(f"{stream.name}: was cut short while it was read; copy it again")
        yield np.frombuffer(content, dtype)
