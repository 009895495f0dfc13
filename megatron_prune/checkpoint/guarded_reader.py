"""Checkpoint files read without running what is in them: torch's pickles, and only what belongs there.

    read_metadata   FOLDER/.metadata -> torch's Metadata, out of allow-listed classes, its numbers and names checked
    GuardedReader   torch's FileSystemReader on top of that; tensors only, out of files of the folder itself
    load_plain      what torch.save wrote, out of plain values and tensors (`weights_only`)
    load_object     the same, of an object that lies among the tensors of a checkpoint

A pickle names callables and their arguments, so that loading one is running it. torch's and megatron-core's own readers
of `.metadata` load any pickle, and so does torch's planner for an entry that is no tensor (`BYTE_IO`, which Megatron's
extra states, random states and arguments are); none of them is asked here. Everything that is not listed in `_NAMES` is
refused by the name of its class before it is looked up, hence before it is imported or called.
"""

import contextlib
import dataclasses
import importlib
import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from megatron_prune.errors import UserError, first_line, one_line
from megatron_prune.reading import open_file, read_content
from megatron_prune.runtime.compat import storage_info

# What torch 2.1 and later and megatron-core's savers put into .metadata. Each is a plain record, an enumeration, a
# container or a look-up in a table: called with whatever arguments, none runs, imports, reads or writes anything.
_NAMES: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    ),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "collections": ("OrderedDict", "defaultdict"),
    "builtins": ("dict", "frozenset", "list", "set", "tuple"),
}
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a `class` statement
_LARGEST_METADATA = 4 << 30  # bytes; thousands of ranks write hundreds of MB
_MOVED = {"pathlib._local": "pathlib"}  # Python 3.13's name


@cache
def _allowed(module: str, name: str) -> Any:
    """The callable of that name; None when it is not listed, or this torch has none."""
    module = _MOVED.get(module, module)
    return getattr(importlib.import_module(module), name, None) if name in _NAMES.get(module, ()) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global of a pickle, in any of its spellings."""
        found = _allowed(module, name)
        if found is None:
            raise _refusal(self._path, f"{module}.{name}")
        return found


def _refusal(path: Path, name: str) -> UserError:
    return UserError(
        f"{one_line(str(path))}: asks for {one_line(name)[:200]}, which is neither tensor nor plain value; "
        "nothing of it was run"
    )


def read_metadata(folder: Path) -> Metadata:
    """What is stored in a `torch_dist` checkpoint, and where. Raises UserError: there is no `.metadata`, or it is
    damaged, asks for a class that has no place there, or names files outside of `folder` or more values than its files
    hold."""
    path = folder / ".metadata"
    before = {one: dict(vars(one)) for one in _records()}
    try:
        with _plainly(path):
            found = _Unpickler(io.BytesIO(read_content(path, _LARGEST_METADATA)), path).load()
    finally:
        changed = [one for one in before if dict(vars(one)) != before[one]]
        for one in changed:  # a pickle may set attributes of the classes it names
            _restore(one, before[one])
    if changed:
        raise _refusal(path, f"a change of {changed[0].__module__}.{changed[0].__name__}")
    problem = _problem(found, folder)
    if problem:
        raise UserError(f"{one_line(str(path))}: damaged, {one_line(problem)[:300]}")
    return found


@cache
def _records() -> tuple[type, ...]:
    """The listed classes that are Python's, whose attributes can be set."""
    found = [_allowed(module, name) for module, names in _NAMES.items() for name in names]
    return tuple({one for one in found if isinstance(one, type) and one.__flags__ & _HEAP_TYPE})


def _restore(one: type, attributes: dict[str, Any]) -> None:
    for name in vars(one).keys() - attributes.keys():
        delattr(one, name)
    for name, value in attributes.items():
        if vars(one).get(name) is not value:
            setattr(one, name, value)


def _problem(found: Any, folder: Path) -> str:
    """What is wrong with unpickled metadata, whose records may hold anything; empty when all is as torch writes it."""
    if not isinstance(found, Metadata) or not _is_table(getattr(found, "state_dict_metadata", None), str):
        return "it is no table of tensors"
    held = sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(entry, TensorStorageMetadata) or not _is_tensor(entry):
            return f"{key} is no tensor"
        if math.prod(entry.size) * entry.properties.dtype.itemsize > held:
            return f"{key} of shape {list(entry.size)} is larger than all files of its folder"
    if not _is_table(getattr(found, "storage_data", None), MetadataIndex):
        return "it says of no tensor where it lies"
    for index, place in found.storage_data.items():
        known = vars(place) if isinstance(place, storage_info()) else {}
        name = known.get("relative_path")
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            return f"{vars(index).get('fqn')!r} lies in {name!r}, which names no file of this folder"
        if known.get("transform_descriptors"):
            return f"{vars(index).get('fqn')!r} is packed in {name!r}, which no writer of ours or Megatron's does"
        if not _are_sizes([known.get("offset"), known.get("length")]):
            return f"{vars(index).get('fqn')!r} lies at no place in {name!r}"
    return ""


def _is_table(value: Any, keys: type) -> bool:
    return isinstance(value, dict) and all(isinstance(key, keys) for key in value)


def _is_tensor(entry: TensorStorageMetadata) -> bool:
    known = vars(entry)
    properties, chunks = known.get("properties"), known.get("chunks")
    return (
        _are_sizes(known.get("size"))
        and isinstance(properties, TensorProperties)
        and isinstance(vars(properties).get("dtype"), torch.dtype)
        and isinstance(chunks, list)
        and all(isinstance(chunk, ChunkStorageMetadata) for chunk in chunks)
        and all(_are_sizes(vars(c).get("offsets")) and _are_sizes(vars(c).get("sizes")) for c in chunks)
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


class GuardedReader(FileSystemReader):
    """torch's reader of a folder, with `read_metadata` in front; only tensors are read.

    Args:
        folder: with `.metadata`, which is read now.

    Raises:
        UserError: see `read_metadata`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder, self._metadata = folder, read_metadata(folder)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The metadata that were read when this reader was made."""
        return self._metadata

    def tensor(self, key: str) -> TensorStorageMetadata:
        """What is stored as `key`. Raises UserError when that is no tensor, nothing, or not the whole of it."""
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{one_line(str(self._folder))}: holds no tensor {key!r}")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise UserError(f"{one_line(str(self._folder))}: holds only parts of the tensor {key!r}")
        return entry

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors. Raises UserError, naming the file, for one that holds something else."""
        done: Future[None] = Future()
        files: dict[str, list[Any]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:  # which the planner would unpickle
                raise UserError(f"{one_line(str(self._folder))}: holds no tensor {item.storage_index.fqn!r}")
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in files.items():
            with _plainly(self._folder / name), open_file(self._folder / name) as file:
                for item in items:
                    place = self.storage_data[item.storage_index]
                    _insist_unpacked(io.BufferedReader(_Part(file, place.offset, place.length)))
                super().read_data(dataclasses.replace(plan, items=items), planner)
        done.set_result(None)
        return done


@contextlib.contextmanager
def _plainly(path: Path) -> Iterator[None]:
    """Errors of reading as UserErrors that name the file and, where a pickle asked for it, the class."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{one_line(str(path))}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if asked:
            raise _refusal(path, asked[1]) from error
        reason = one_line(_reason(error))[:200]
        raise UserError(f"{one_line(str(path))}: damaged or of another kind ({reason})") from error


def _reason(error: Exception) -> str:
    """What is wrong with a file, without torch's advice to load it the other way."""
    told = str(error).partition("WeightsUnpickler error:")[2].strip() or first_line(error)
    return told.partition("\n")[0].partition(" In PyTorch 2.6")[0]


def load_plain(path: Path, classes: Sequence[Callable[..., Any]] = (), **arguments: Any) -> Any:
    """`torch.load` of tensors, containers and plain values, on the host.

    Args:
        classes: that may occur besides.
        arguments: more for `torch.load`.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else, named by its class.
    """
    with _plainly(path), _besides(classes), open_file(path) as file:
        _insist_unpacked(file)
        return torch.load(path, map_location="cpu", weights_only=True, **arguments)


def load_object(folder: Path, metadata: Metadata, key: str, classes: Sequence[Callable[..., Any]] = ()) -> Any:
    """The object `key` of a `torch_dist` checkpoint, as `load_plain` reads a file.

    Args:
        metadata: of the folder, from `read_metadata`.

    Raises:
        UserError: there is no object of that name, or see `load_plain`.
    """
    place = metadata.storage_data.get(MetadataIndex(key))
    if place is None or not isinstance(metadata.state_dict_metadata.get(key), BytesStorageMetadata):
        raise UserError(f"{one_line(str(folder))}: holds no object {key!r}")
    path = folder / place.relative_path
    with _plainly(path), _besides(classes), open_file(path) as file:
        held = path.stat().st_size
        file.seek(min(place.offset, held))
        content = io.BytesIO(file.read(min(place.length, held)))
        _insist_unpacked(content)
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)


class _Part(io.RawIOBase):
    """`length` bytes of `file` from `start` on, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._at = file, start, 0
        self._length = min(length, max(file.seek(0, io.SEEK_END) - start, 0))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max({io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _insist_unpacked(file: IO[bytes]) -> None:
    """Raise ValueError for an archive whose content is larger than itself: torch packs nothing, but unpacks."""
    if not zipfile.is_zipfile(file):
        return
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("its parts are packed, which torch's are not")


def is_whole(tensor: Tensor) -> bool:
    """Whether its values are all there: a tensor of strides 0 has as many as it likes."""
    return tensor.layout is torch.strided and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def _besides(classes: Sequence[Callable[..., Any]]) -> contextlib.AbstractContextManager[Any]:
    """While entered, torch.load takes `classes` for plain values, too."""
    return torch.serialization.safe_globals(list(classes)) if classes else contextlib.nullcontext()
