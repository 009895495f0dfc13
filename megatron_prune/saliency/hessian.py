"""The layer Hessian H = X^T X / tokens + damping x mean diagonal, of all tokens on all ranks, one layer at a time.

    Hessian              damped H of one layer, fp64, with what second-order methods ask of it
    solve_on_owners      layer by layer: build the global H on one rank, solve there, hand the small result to all
    inverse_diagonals    [H^-1]_pp per column of every output projection (criterion `obc`)
    DiagonalCache        the same, kept over some removals and in checkpoints

H is the Hessian of a layer's mean squared output error in any row of its weight. It belongs to all TP and DP ranks
together, so the work is dealt out: each layer is owned by one of the tp x dp ranks of its pipeline stage, in turn. X
(tokens x features) is gathered over TP, the partial X^T X of the owner's TP rank is reduced over DP to the owner, who
factorises it; only the solution is broadcast. So a rank holds one H and one partial at a time, and all ranks factorise
in parallel. X^T X is multiplied in fp32 (fp64 is slow on many GPUs), summed in fp64 over chunks of tokens, and travels
in fp32; rounding there is as large as that of X itself and far below the damping. All that follows is fp64.

The damping makes H positive definite where features are collinear or never active; a layer that saw nothing but zeros
gets the identity. A layer with non-finite inputs gives NaN, which callers treat as "do nothing".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.model.table import EMPTY, Param, ParamTable, positions
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import Mesh, all_reduce_sum
from megatron_prune.saliency.inputs import KeptInputs

CHUNK = 1024  # tokens whose products are added up in fp32 before they are in fp64
COLUMNS = 1024  # columns of an inverse that are alive at once


@dataclass(frozen=True)
class Hessian:
    """H, fp64 [features, features], and its lower Cholesky factor.

    Args:
        damped: X^T X / tokens + ridge x I. ridge: damping x mean diagonal of X^T X / tokens.
        factor: NaN throughout where H is not finite or cannot be factorised.
    """

    damped: Tensor
    ridge: float
    factor: Tensor

    @classmethod
    def of_gram(cls, gram: Tensor, damping: float) -> Hessian:
        """Damp X^T X / tokens (fp64, changed in place) and factorise it."""
        assert gram.dtype == torch.float64 and damping > 0
        ridge = damping * float(gram.diagonal().mean()) or 1.0
        gram.diagonal().add_(ridge)
        factor, failure = torch.linalg.cholesky_ex(gram)
        if int(failure) or not bool(torch.isfinite(factor.diagonal()).all()):
            factor.fill_(torch.nan)
        return cls(gram, ridge, factor)

    def inverse_diagonal(self) -> Tensor:
        """[H^-1]_pp for all p: the squared norms of the columns of the inverse factor, some columns at a time."""
        every = torch.arange(len(self.factor), device=self.factor.device)
        parts = [
            torch.linalg.solve_triangular(self.factor, self._unit(columns), upper=False).square_().sum(dim=0)
            for columns in every.split(COLUMNS)
        ]
        return torch.cat(parts)

    def inverse_columns(self, columns: Tensor) -> Tensor:
        """Y = H^-1 E_p: the columns p of the inverse, [features, |p|]."""
        return torch.cholesky_solve(self._unit(columns), self.factor)

    def _unit(self, columns: Tensor) -> Tensor:
        """E_p: the columns p of the identity."""
        unit = torch.zeros(len(self.factor), len(columns), dtype=self.factor.dtype, device=self.factor.device)
        unit[columns, torch.arange(len(columns), device=unit.device)] = 1
        return unit


def solve_on_owners(
    kept: KeptInputs,
    model: LiveModel,
    names: Sequence[str],
    damping: float,
    solve: Callable[[str, Hessian], Tensor],
    shape: Callable[[str], tuple[int, ...]],
) -> Iterator[tuple[str, Tensor]]:
    """(name, solution) for each layer of `names`, the same bits on all TP and DP ranks (collectives over both).

    Args:
        solve: runs on the layer's owner; returns an fp64 tensor of `shape(name)`.
    """
    mesh = model.mesh
    team = mesh.tp_size * mesh.over("replicas").size
    for start in range(0, len(names), team):
        batch = names[start : start + team]
        solutions = {name: torch.empty(shape(name), dtype=torch.float64, device=mesh.device.device) for name in batch}
        gram = None
        for number, name in enumerate(batch):
            partial = _reduced_gram(kept, name, mesh, *_owner(number, mesh))
            gram = partial if partial is not None else gram
        for number, name in enumerate(batch):
            if _owner(number, mesh) == (mesh.tp_rank, mesh.over("replicas").rank):
                assert gram is not None
                solutions[name].copy_(solve(name, Hessian.of_gram(gram, damping)))
        gram = None
        for number, name in enumerate(batch):
            yield name, _broadcast(solutions[name], mesh, *_owner(number, mesh))


def _owner(number: int, mesh: Mesh) -> tuple[int, int]:
    """(TP rank, number among its replicas) of the owner of the number-th layer of a round."""
    return number % mesh.tp_size, number // mesh.tp_size


def _reduced_gram(kept: KeptInputs, name: str, mesh: Mesh, tp_rank: int, replica: int) -> Tensor | None:
    """X^T X / tokens on its owner, None elsewhere."""
    x = kept.gather(name)
    if mesh.tp_rank != tp_rank:
        return None
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(CHUNK):
        own = chunk.float()
        gram += own.T @ own
    tokens = mesh.over("tokens")
    gram /= len(x) * tokens.size
    if tokens.size == 1:
        return gram
    travelling = gram.float()
    dist.reduce(travelling, tokens.global_rank(replica), group=tokens.group)
    return travelling.double() if tokens.rank == replica else None


def _broadcast(solution: Tensor, mesh: Mesh, tp_rank: int, replica: int) -> Tensor:
    """The owner's solution on all ranks: over its replicas first, then over TP."""
    replicas, tp = mesh.over("replicas"), mesh.over("tp")
    if replicas.size > 1 and tp.rank == tp_rank:
        dist.broadcast(solution, replicas.global_rank(replica), group=replicas.group)
    if tp.size > 1:
        dist.broadcast(solution, tp.global_rank(tp_rank), group=tp.group)
    return solution


@torch.no_grad()
def inverse_diagonals(kept: KeptInputs, model: LiveModel, damping: float) -> dict[str, Tensor]:
    """[H^-1]_pp per live column, fp64 in canonical order, of every output projection on this stage (collective)."""
    names = [name for name, row in kept.rows.items() if row.is_output]
    found = solve_on_owners(
        kept, model, names, damping, lambda _, hessian: hessian.inverse_diagonal(), lambda name: (kept.features(name),)
    )
    return dict(found)


def _source_columns(model: LiveModel, name: str) -> np.ndarray:
    """Source positions (int64, ascending) of the live columns of weight `name`: their canonical order."""
    row = model.table.row(name)
    dim = row.dims[1]
    return positions(model.architecture.ids(dim.kind, row.site), dim.size)


def local_columns(values: Tensor, model: LiveModel, name: str, empty: float) -> Tensor:
    """`values` [..., live columns in canonical order] of weight `name`, as this rank stores its columns; `empty` in
    empty slots."""
    stored = model.table.row(name).element_ids(1, model.layout, model.mesh.tp_rank)
    at = np.flatnonzero(stored != EMPTY)
    result = values.new_full((*values.shape[:-1], len(stored)), empty)
    take = torch.from_numpy(np.searchsorted(_source_columns(model, name), stored[at])).to(values.device)
    result[..., torch.from_numpy(at).to(values.device)] = values.index_select(-1, take)
    return result


@dataclass
class DiagonalCache:
    """[H^-1]_pp of all output projections, kept over some removals; equal on all ranks, and part of a checkpoint.

    Args:
        values: fp64 [layers, columns of W_o + columns of W_down], by source position (0 where removed before).
        removals: groups that had been removed when it was computed.
    """

    values: np.ndarray
    removals: int

    @classmethod
    def of_stages(cls, diagonals: dict[str, Tensor], model: LiveModel, removals: int) -> DiagonalCache:
        """From each stage's `inverse_diagonals` (collective over PP)."""
        table = model.table
        values = np.zeros(cls._shape(table))
        for name, found in diagonals.items():
            values[table.row(name).site, cls._places(model, name)] = found.cpu().numpy()
        total = torch.from_numpy(values).to(model.mesh.device.device)
        return cls(all_reduce_sum(total, model.mesh.over("pp")).cpu().numpy(), removals)

    @classmethod
    def from_state(cls, table: ParamTable, state: dict[str, Any]) -> DiagonalCache:
        """Inverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for values of another model."""
        values, removals = np.asarray(state["values"], dtype=np.float64), state["removals"]
        if values.shape != cls._shape(table) or type(removals) is not int:
            raise ValueError(f"inverse diagonals [{values.shape}], the model has {cls._shape(table)}")
        return cls(values, removals)

    @property
    def is_finite(self) -> bool:
        """False when some layer's inputs were not."""
        return bool(np.isfinite(self.values).all())

    def of_stage(self, model: LiveModel) -> dict[str, Tensor]:
        """This stage's part for the columns that are still alive, as `inverse_diagonals` returns it."""
        found = {}
        for name, parameter, row in model.rows():
            if row.is_output:
                own = self.values[row.site, self._places(model, name)]
                found[name] = torch.from_numpy(own).to(parameter.device)
        return found

    @classmethod
    def _shape(cls, table: ParamTable) -> tuple[int, int]:
        ends = [cls._start(table, row) + _columns(table, row) for row in table.rows if row.is_output]
        return table.shape.num_layers, max(ends)

    @staticmethod
    def _start(table: ParamTable, row: Param) -> int:
        """Where the columns of an output projection begin among those of its layer."""
        before = [other for other in table.rows if other.is_output and other.layer == row.layer]
        return sum(_columns(table, other) for other in before[: before.index(row)])

    @classmethod
    def _places(cls, model: LiveModel, name: str) -> np.ndarray:
        return _source_columns(model, name) + cls._start(model.table, model.table.row(name))


def _columns(table: ParamTable, row: Param) -> int:
    """Columns of an output projection of the source model."""
    return row.dims[1].kind.size(table.shape) * row.dims[1].size
