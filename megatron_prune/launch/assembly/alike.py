"""Once inputs are open: do all ranks read the same files, and write into the same folder?

    Digests         one input and what identifies it, part by part
    rows            Config, Inputs -> one row for each input of a run; a further input is one more row
    difference      all ranks' rows -> what is wrong with them, or None   (pure)
    insist_alike    compare rows over a mesh
    insist_shared   see over a mesh that a folder is the same for all, and that all can write to it

Nodes with copies of their own may hold other ones. Large files are compared by samples (see `samples`).
"""

import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.config import Config
from megatron_prune.data.indexed import bin_path, idx_path, metadata_path
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.launch.assembly.opening import Inputs
from megatron_prune.launch.assembly.samples import fingerprints
from megatron_prune.launch.assembly.teaching import FIELD as TEACHER
from megatron_prune.pruning.replay import FIELD as REPLAY
from megatron_prune.runtime.agreement import ranks_named
from megatron_prune.runtime.failures import agreed
from megatron_prune.runtime.folders import probe_folder, write_file
from megatron_prune.runtime.mesh import Mesh, agree, broadcast_object

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
    found += _named_files(config, inputs.record is None)
    found.append(Digests(TEACHER, {} if inputs.teacher is None else fingerprints(inputs.teacher.files)))
    return found


def _named_files(config: Config, begins: bool) -> list[Digests]:
    """Single files that decide what the model is or becomes; `begins`: the run does not go on from a checkpoint."""
    files = {
        "pruning.target: latency_table": config.pruning.target.latency_table,
        REPLAY: config.pruning.replay,
        "model.architecture (--architecture)": config.model.architecture if begins else None,
    }
    return [Digests(field, fingerprints([Path(path)])) for field, path in files.items() if path is not None]


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
    write_file(folder / name, content.encode())
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
