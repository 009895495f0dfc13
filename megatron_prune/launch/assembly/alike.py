"""Once inputs are open: do all ranks read the same files, and write into the same folder?

    Digests         one input and what identifies it, part by part
    rows            Config, Inputs -> one row for each input of a run; a further input is one more row
    difference      all ranks' rows -> what is wrong with them, or None   (pure)
    fingerprints    files -> size and sampled content of each
    insist_alike    compare rows over a mesh
    insist_shared   see over a mesh that a folder is the same for all, and that all can write to it

Nodes with copies of their own may hold other ones. Files that are no larger than 64 MiB together are compared whole. Of
larger ones the size, the header and 4 KiB blocks are: the first and the last of every weight matrix (or file), and
further ones at even distances, some 4,096 for one input, however large it is. So a copy that was made anew, cut, or
changed in one matrix is found, and a single changed number of a large file may not be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.config import Config
from megatron_prune.data.indexed import bin_path, idx_path, metadata_path
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.launch.assembly.opening import Inputs
from megatron_prune.runtime.agreement import ranks_named
from megatron_prune.runtime.failures import agreed
from megatron_prune.runtime.folders import probe_folder
from megatron_prune.runtime.mesh import Mesh, agree, broadcast_object

_WHOLE_BYTES = 64 << 20
_BLOCK, _BLOCKS = 4 << 10, 4096
_LEAST_BLOCKS = 3  # of every matrix
_READERS = 16  # blocks on their way at a time: storage over a network answers late
_MAX_HEADER = 100 << 20  # of a safetensors file, by its own rule
_FIELD, _PROBE = "checkpoint.save (--save)", ".shared-"
_PROBE_SECONDS = 30.0  # network file systems may know about a new file late


@dataclass(frozen=True)
class Digests:
    """One input.

    Args:
        field: what users call it. parts: file or property -> digest or value, equal on all ranks.
    """

    field: str
    parts: Mapping[str, str]


def rows(config: Config, inputs: Inputs) -> list[Digests]:
    """Everything that this run reads. Raises UserError for a file that cannot be read."""
    found = [_source(config, inputs), _tokenizer(inputs.tokenizer)]
    for name, blend in (
        ("data.data_path (--data-path)", inputs.train),
        ("data.valid_data_path (--valid-data-path)", inputs.valid),
    ):
        prefixes = () if blend is None else blend.prefixes
        files = [path(prefix) for prefix in prefixes for path in (idx_path, bin_path, metadata_path)]
        found.append(Digests(name, fingerprints(path for path in files if path.is_file())))
    return found


def _source(config: Config, inputs: Inputs) -> Digests:
    if inputs.record is not None:
        folder = inputs.record.path
        files = fingerprints(path for path in sorted(folder.iterdir()) if path.is_file())
        return Digests("checkpoint.load (--load)", {"iteration": str(inputs.record.iteration), **files})
    source = Path(str(config.model.hf_model))
    paths = {source / "config.json"}
    if config.model.init != "random":
        paths |= {stored.file for stored in FolderWeights(source).stored.values()}
    return Digests("model.hf_model (--hf-model)", fingerprints(sorted(paths)))


def _tokenizer(tokenizer: Tokenizer) -> Digests:
    facts = (tokenizer.kind, tokenizer.fingerprint[:12], tokenizer.vocab_size, tokenizer.bos, tokenizer.eod)
    names = ("kind", "content", "number of ids", "begin of documents", "end of documents")
    return Digests("data.tokenizer_model (--tokenizer-model)", dict(zip(names, map(str, facts), strict=True)))


def difference(ranks: Sequence[Sequence[Digests]]) -> str | None:
    """The first difference from rank 0, in one line; None when there is none."""
    for number, ours in enumerate(ranks[0]):
        theirs = [own[number].parts for own in ranks]
        for part in sorted(set().union(*theirs)):
            values = [parts.get(part, "absent") for parts in theirs]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                return (
                    f"{ours.field}: {part} is {values[others[0]]} on {ranks_named(others)}, and {values[0]} on rank 0; "
                    "give all nodes the same files"
                )
    return None


def insist_alike(mesh: Mesh, config: Config, inputs: Inputs) -> None:
    """Compare what all ranks read (collective). Raises UserError on all of them when they differ."""
    if mesh.world_size == 1:
        return
    complaint = difference(agree(mesh, agreed(mesh, lambda: rows(config, inputs))))
    if complaint is not None:
        raise UserError(complaint)


# Files ----------------------------------------------------------------------------------------------------------------


def fingerprints(files: Iterable[Path]) -> dict[str, str]:
    """Path -> `SIZE bytes, SHA-256`, the latter over everything or over samples, as the module's docstring says.

    Raises:
        UserError: a file cannot be read.
    """
    files = list(files)
    try:
        total = sum(path.stat().st_size for path in files)
        return {str(path): _fingerprint(path, total) for path in files}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _fingerprint(path: Path, total: int) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
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


# A folder -------------------------------------------------------------------------------------------------------------


def insist_shared(mesh: Mesh, save: str | None) -> None:
    """See that `save` is one folder for all ranks, and that each can write there (collective).

    Rank 0 writes a small file, which all must find with the same content; nothing of it stays, nor folders made for it.

    Args:
        save: checkpoint.save; None: nothing to do.

    Raises:
        UserError: on all ranks.
    """
    if save is None:
        return
    folder, probe = Path(save), None
    absent = [path for path in (folder, *folder.absolute().parents) if not path.exists()] if mesh.rank == 0 else []
    try:
        if mesh.rank == 0:
            probe = agreed(mesh, lambda: _write_probe(folder))
        else:
            agreed(mesh, lambda: None)
        name, content = broadcast_object(mesh, probe)
        agreed(mesh, lambda: _find_probe(folder / name, content))
        agreed(mesh, lambda: probe_folder(folder, _FIELD) if mesh.rank else None)
    finally:
        if probe is not None:
            (folder / probe[0]).unlink(missing_ok=True)
            _remove_empty(absent)


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # somebody else writes there by now
        for path in folders:
            path.rmdir()


def _write_probe(folder: Path) -> tuple[str, str]:
    """(name, content) of a new file in `folder`, which is made if need be; those that a killed run left are removed."""
    name, content = _PROBE + secrets.token_hex(8), secrets.token_hex(8)
    probe_folder(folder, _FIELD)
    for left in folder.glob(_PROBE + "*"):
        left.unlink(missing_ok=True)
    (folder / name).write_text(content)
    return name, content


def _find_probe(path: Path, content: str) -> None:
    deadline, pause = time.monotonic() + _PROBE_SECONDS, 0.05
    while True:
        try:
            if path.read_text() == content:
                return
        except OSError:
            pass  # not there, or not yet
        if time.monotonic() > deadline:
            raise UserError(
                f"{_FIELD}: {path.parent} is not the folder that rank 0 writes to; give a folder on "
                "storage that all nodes share: every rank writes its part of a checkpoint there"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
