"""Which canonical tensors a rank of the running model saves and loads, by key.

    model/<hf_name>                  weights, in the model's dtype
    optimizer/<kind>/<hf_name>       exp_avg, exp_avg_sq, and main where it differs from the weight (bf16 training)

    sources         what this rank writes
    load_weights    fill model weights and main weights
    load_moments    fill Adam's moments

Every stored element is written by one rank: weights are dealt over the data-parallel copies, of what tensor-parallel
ranks hold alike the first writes, the second copy of a tied embedding is not written. Optimizer state is written by its
owners, flat range by flat range, and loaded by them: no rank ever holds another's.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.checkpoint.pieces import Piece, pieces, spread
from megatron_prune.checkpoint.record import Facts
from megatron_prune.checkpoint.storage import Source, irregular, read_into
from megatron_prune.model.table import Param
from megatron_prune.optimizer.owned import MOMENTS, OwnedShard, set_moments
from megatron_prune.resharding.live import LiveModel

MAIN = "main"


def weight_key(hf_name: str) -> str:
    """Key of a model weight."""
    return f"model/{hf_name}"


def optimizer_key(kind: str, hf_name: str) -> str:
    """Key of optimizer state of `kind` (`exp_avg`, `exp_avg_sq`, `main`)."""
    return f"optimizer/{kind}/{hf_name}"


def facts_of(model: LiveModel) -> Facts:
    """What `sources` of all ranks together will store (collective)."""
    step, mesh = model.adam_step(), model.mesh
    kinds = (*(MOMENTS if step else ()), *((MAIN,) if model.dtype != torch.float32 else ()))
    return Facts(str(model.dtype).removeprefix("torch."), kinds, step, mesh.tp_size, mesh.pp_size, mesh.dp_size)


def sources(model: LiveModel, facts: Facts) -> list[Source]:
    """The rectangles that this rank writes. Model weights must be in step on all ranks (`synchronise`)."""
    layout, mesh = model.layout, model.mesh
    rows = [entry for entry in model.rows() if not _is_copy(entry[0], entry[2], model)]
    replicas = mesh.over("replicas")
    writers = spread([parameter.numel() for _, parameter, _ in rows], replicas.size)
    mine = {name for (name, _, _), writer in zip(rows, writers, strict=True) if writer == replicas.rank}
    found: list[Source] = []
    for name, parameter, row in rows:
        if name in mine:
            flat = parameter.data.view(-1)
            for piece in pieces(row, layout, mesh.tp_rank, 0, parameter.numel()):
                found.append(_source(weight_key(piece.hf_name), piece, flat))
    for shard in model.owned():
        is_whole = not model.options.use_distributed_optimizer  # then all data-parallel ranks own the same
        if _is_copy(shard.name, shard.row, model) or (is_whole and shard.name not in mine):
            continue
        flats = {**shard.moments, MAIN: shard.main}
        for piece in pieces(shard.row, layout, mesh.tp_rank, shard.start, shard.end):
            for kind in facts.optimizer:
                found.append(_source(optimizer_key(kind, piece.hf_name), piece, flats[kind]))
    return found


def _source(key: str, piece: Piece, flat: Tensor) -> Source:
    return Source(key, piece.global_shape, piece.offset, piece.shape, flat.dtype, partial(piece.read, flat))


def _is_copy(name: str, row: Param, model: LiveModel) -> bool:
    """True for what another rank of this model copy holds as well and saves."""
    return name != row.name or (not row.is_sharded and model.mesh.tp_rank != 0)


def load_weights(model: LiveModel, folder: Path, facts: Facts) -> None:
    """Fill weights and main weights; empty slots become zero (collective).

    Precision is kept where there is some: an fp32 run's weights, and a bf16 run's main weights, are the stored main
    weights if there are such.
    """
    best = partial(optimizer_key, MAIN) if MAIN in facts.optimizer else weight_key
    weights = best if model.dtype == torch.float32 else weight_key
    targets: list[_Target] = []
    for _, parameter, row in model.rows():
        flat = parameter.data.view(-1).zero_()
        targets.extend(_targets(model, row, 0, parameter.numel(), weights, flat))
    _fill(folder, targets)
    targets = []
    for shard in model.owned():
        if shard.has_separate_main:
            targets.extend(_targets(model, shard.row, shard.start, shard.end, best, shard.main.zero_()))
    if model.dtype != torch.float32:
        _fill(folder, targets)


def load_moments(model: LiveModel, folder: Path, facts: Facts) -> None:
    """Fill Adam's moments and step (collective); one kind after the other, so that one is in host memory at a time."""
    for kind in MOMENTS:
        if kind not in facts.optimizer:
            continue
        flats: list[tuple[OwnedShard, Tensor]] = []
        targets: list[_Target] = []
        for shard in model.owned():
            flat = torch.zeros(shard.end - shard.start, dtype=torch.float32, device=shard.key.device)
            flats.append((shard, flat))
            key = partial(optimizer_key, kind)
            targets.extend(_targets(model, shard.row, shard.start, shard.end, key, flat))
        _fill(folder, targets)
        for shard, flat in flats:
            set_moments(shard, {kind: flat})
    model.set_adam_step(facts.adam_step)


@dataclass(frozen=True)
class _Target:
    """A piece to be filled from `key`."""

    key: str
    piece: Piece
    flat: Tensor


def _targets(
    model: LiveModel, row: Param, start: int, end: int, key: Callable[[str], str], flat: Tensor
) -> Iterator[_Target]:
    for piece in pieces(row, model.layout, model.mesh.tp_rank, start, end):
        yield _Target(key(piece.hf_name), piece, flat)


def _fill(folder: Path, targets: Iterable[_Target]) -> None:
    """Load into views where live elements lie together, else through host memory (collective)."""
    chosen, wanted = list(targets), []
    for target in chosen:
        view = target.piece.view(target.flat)
        data = view if view is not None else torch.empty(target.piece.shape, dtype=target.flat.dtype)
        wanted.append(irregular(target.key, data, target.piece.global_shape, target.piece.offset))
    for target, loaded in zip(chosen, read_into(folder, wanted), strict=True):
        if target.piece.view(target.flat) is None:
            target.piece.write(target.flat, loaded)
