"""Bring a model to the state of a checkpoint, whatever layout either has."""

from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.files import damages, read_manifest, refuse_damaged, resolve
from megatron_prune.checkpoint.pieces import spread
from megatron_prune.checkpoint.record import COMMON_FILE, RunRecord
from megatron_prune.checkpoint.rng import restore_rng
from megatron_prune.checkpoint.tensors import load_moments, load_weights
from megatron_prune.errors import UserError
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import Mesh, agree, broadcast_object


@torch.no_grad()
def load_checkpoint(
    model: LiveModel, directory: str | Path, step: int | None = None, *, load_optim: bool = True
) -> dict[str, Any]:
    """Load into `model`, which must have been built with the checkpoint's architecture (see `RunRecord`); collective.

    Every file is verified first, a share by each rank. Bit for bit what was saved when the layout is the saved one;
    random generators are restored when the mesh is the same.

    Args:
        directory: the folder that was saved to. step: iteration; None: the newest complete one.
        load_optim: False leaves the optimizer as new (and the random generators as they are).

    Returns:
        The `state` given to `save_checkpoint`.

    Raises:
        UserError: on all ranks: no such checkpoint, a damaged file (the newest good checkpoint is named), or another
            architecture.
    """
    record = verified_record(model.mesh, directory, step)
    if record.architecture != model.architecture:
        raise UserError(f"{record.path}: the model was built with another architecture than the one stored there")
    load_weights(model, record.path, record.facts)
    if load_optim:
        load_moments(model, record.path, record.facts)
        mesh = model.mesh
        if record.facts.mesh == (mesh.tp_size, mesh.pp_size, mesh.dp_size) and len(record.rng) == mesh.world_size:
            restore_rng(record.rng[mesh.rank], record.path / COMMON_FILE)
    return record.state


def verified_record(mesh: Mesh, directory: str | Path, step: int | None) -> RunRecord:
    """The record, after all files have been verified by all ranks together. Raises UserError on all ranks."""
    directory = Path(directory)
    iteration, folder = _on_first_rank(mesh, lambda: resolve(directory, step))
    complaints = damages(folder, _share(mesh, folder))
    found = next((c for reported in agree(mesh, complaints) for c in reported), None)
    if found is not None:
        _on_first_rank(mesh, lambda: refuse_damaged(folder.parent, iteration, [found]))
    return RunRecord.read(folder)


def _share(mesh: Mesh, folder: Path) -> list[str]:
    """The files that this rank verifies; none where the list itself is damaged, which all ranks then report."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError):
        return []
    readers = spread([d.size for d in manifest.values()], mesh.world_size)
    return [name for name, reader in zip(manifest, readers, strict=True) if reader == mesh.rank]


def _on_first_rank(mesh: Mesh, act: Any) -> Any:
    """What `act` returns on rank 0, on all ranks; a UserError there is raised on all."""
    result, error = None, None
    if mesh.rank == 0:
        try:
            result = act()
        except UserError as raised:
            error = str(raised)
    result, error = broadcast_object(mesh, (result, error))
    if error is not None:
        raise UserError(error)
    return result
