"""Group scores as plain arrays: one number per live unit, the same on every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import Kind

_OLD_FORM = 2  # dimensions of a kind's scores in old checkpoints: [layers, units]; [units] for shared kinds


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Sums of S, fp64, aligned with the live ids of `architecture` (ascending).

    Args:
        values: for each scored kind of the table and each of its sites [live units]: sums over the columns of the
            output projections that hold a unit (heads and FFN channels of a layer), or over their rows in all layers
            (stem channels). Layers are here only with their block influence, where that is asked for.
    """

    architecture: Architecture
    values: Mapping[Kind, tuple[np.ndarray, ...]]

    def of(self, kind: Kind, layer: int = 0) -> np.ndarray:
        """Scores of the live units of `kind` in `layer`."""
        return self.values[kind][kind.site(layer)]

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Kinds of units of which a sum is NaN or infinite, with the layers: ("head in layers 0, 3", "stem")."""
        found = []
        for kind, sites in self.values.items():
            bad = [str(site) for site, values in enumerate(sites) if not np.isfinite(values).all()]
            if bad:
                found.append(kind.name if kind.is_shared else f"{kind} in layer{'s' * (len(bad) > 1)} {', '.join(bad)}")
        return tuple(found)

    @classmethod
    def from_vector(cls, architecture: Architecture, vector: np.ndarray) -> UnitScores:
        """Split one flat vector, the form in which scores travel: kind after kind, site after site (`places`)."""
        starts, flat = places(architecture), vector.astype(np.float64)
        return cls(
            architecture,
            {
                kind: tuple(
                    flat[start : start + len(ids)]
                    for start, ids in zip(starts[kind], architecture.sites(kind), strict=True)
                )
                for kind in architecture.table.scored
            },
        )

    def restricted(self, architecture: Architecture) -> UnitScores:
        """The same scores without the units that `architecture` no longer has."""

        def keep(values: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
            if before is after:
                return values
            if len(before) == len(after) + 1:
                differs = before[:-1] != after
                return np.delete(values, differs.argmax() if differs.any() else len(after))
            return values[_among(before, after)]

        before = self.architecture
        values = {kind: map(keep, at, before.sites(kind), architecture.sites(kind)) for kind, at in self.values.items()}
        return UnitScores(architecture, {kind: tuple(sites) for kind, sites in values.items()})

    def to_state(self) -> dict[str, Any]:
        """Plain arrays for a checkpoint: by kind, one per site."""
        return {kind.name: list(sites) for kind, sites in self.values.items()}

    @classmethod
    def from_state(cls, architecture: Architecture, state: dict[str, Any]) -> UnitScores:
        """Inverse of `to_state`; raises KeyError or ValueError for scores of other units."""
        values, scored = {}, architecture.table.scored
        for kind in architecture.live:
            if kind not in scored and kind.name not in state:
                continue
            sites = state[kind.name]
            if isinstance(sites, np.ndarray) and sites.ndim < _OLD_FORM:
                sites = [sites]
            values[kind] = tuple(np.asarray(site, dtype=np.float64) for site in sites)
            if [site.shape for site in values[kind]] != [(len(ids),) for ids in architecture.sites(kind)]:
                raise ValueError(f"scores of other units than the live ones: {kind}")
        return cls(architecture, values)


def _among(ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Bool per id: is it in `kept`?"""
    if not len(ids) or not len(kept):
        return np.zeros(len(ids), dtype=bool)
    is_kept = np.zeros(int(max(ids[-1], kept[-1])) + 1, dtype=bool)
    is_kept[kept] = True
    return is_kept[ids]


def places(architecture: Architecture) -> dict[Kind, list[int]]:
    """Where the scores of each site of each scored kind begin in the flat vector."""
    starts: dict[Kind, list[int]] = {}
    at = 0
    for kind in architecture.table.scored:
        starts[kind] = []
        for ids in architecture.sites(kind):
            starts[kind].append(at)
            at += len(ids)
    return starts


def score_length(architecture: Architecture) -> int:
    """Numbers that travel per scoring: one per live unit of the scored kinds."""
    return sum(len(ids) for kind in architecture.table.scored for ids in architecture.sites(kind))


def smooth(previous: UnitScores | None, new: UnitScores, momentum: float) -> UnitScores:
    """momentum x previous + (1 - momentum) x new, unit by unit; the first time (of all, or of a kind) it is `new`."""
    if previous is None or momentum == 0:
        return new
    old = previous.restricted(new.architecture)
    return UnitScores(
        new.architecture,
        {
            kind: tuple(_mean(a, b, momentum) for a, b in zip(old.values[kind], sites, strict=True))
            if kind in old.values
            else sites
            for kind, sites in new.values.items()
        },
    )


def _mean(old: np.ndarray, new: np.ndarray, momentum: float) -> np.ndarray:
    mean = (1 - momentum) * new
    mean += momentum * old
    return mean
