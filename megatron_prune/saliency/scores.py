"""Group scores as plain arrays: one number per live unit, the same on every layout.

UnitScores   sums of S per head, FFN channel and stem channel, aligned with an Architecture's live ids
smooth       exponential moving average over scoring steps; scores follow their units through removals
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_prune.model.architecture import FFN, HEAD, STEM, Architecture


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Sums of S, fp64, aligned with the live ids of `architecture` (ascending).

    Args:
        head: [layers, live query heads], sums over a head's kv_channels columns of W_o.
        ffn: [layers, live FFN channels], sums over a channel's column of W_down.
        stem: [live stem channels], sums over a channel's rows of W_o and W_down of all layers.
    """

    architecture: Architecture
    head: np.ndarray
    ffn: np.ndarray
    stem: np.ndarray

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Kinds of groups of which a sum is NaN or infinite, with the layers: ("head in layers 0, 3", "stem")."""
        found = []
        for kind, values in ((HEAD, self.head), (FFN, self.ffn)):
            layers = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(layers):
                found.append(f"{kind} in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}")
        return tuple(found) if np.isfinite(self.stem).all() else (*found, STEM)

    @classmethod
    def from_vector(cls, architecture: Architecture, vector: np.ndarray) -> UnitScores:
        """Split one flat vector [layers * heads | layers * ffn | stem], the form in which scores travel."""
        layers = architecture.shape.num_layers
        heads, ffn = layers * architecture.num_attention_heads, layers * architecture.ffn_hidden_size
        head, channel, stem = np.split(vector.astype(np.float64), [heads, heads + ffn])
        return cls(architecture, head.reshape(layers, -1), channel.reshape(layers, -1), stem)

    def restricted(self, architecture: Architecture) -> UnitScores:
        """The same scores without the units that `architecture` no longer has."""
        layers = range(architecture.shape.num_layers)
        mine = self.architecture

        def keep(values: np.ndarray, before: tuple[np.ndarray, ...], after: tuple[np.ndarray, ...]) -> np.ndarray:
            if all(before[i] is after[i] for i in layers):  # the removed group was of another kind
                return values
            return np.stack([values[i][_among(before[i], after[i])] for i in layers])

        return UnitScores(
            architecture,
            keep(self.head, mine.heads, architecture.heads),
            keep(self.ffn, mine.ffn, architecture.ffn),
            self.stem[_among(mine.stem, architecture.stem)],
        )

    def to_state(self) -> dict[str, Any]:
        """Plain arrays for a checkpoint."""
        return {"head": self.head, "ffn": self.ffn, "stem": self.stem}

    @classmethod
    def from_state(cls, architecture: Architecture, state: dict[str, Any]) -> UnitScores:
        """Inverse of `to_state`."""
        return cls(architecture, *(np.asarray(state[name], dtype=np.float64) for name in ("head", "ffn", "stem")))


def _among(ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Bool per id: is it in `kept`?"""
    is_kept = np.zeros(int(max(ids[-1], kept[-1])) + 1, dtype=bool)
    is_kept[kept] = True
    return is_kept[ids]


def score_length(architecture: Architecture) -> int:
    """Numbers that travel per scoring: layers x (heads + ffn) + hidden."""
    per_layer = architecture.num_attention_heads + architecture.ffn_hidden_size
    return architecture.shape.num_layers * per_layer + architecture.hidden_size


def smooth(previous: UnitScores | None, new: UnitScores, momentum: float) -> UnitScores:
    """momentum x previous + (1 - momentum) x new, unit by unit; the first time it is `new`."""
    if previous is None or momentum == 0:
        return new
    old = previous.restricted(new.architecture)

    def blend(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return momentum * a + (1 - momentum) * b

    return UnitScores(new.architecture, blend(old.head, new.head), blend(old.ffn, new.ffn), blend(old.stem, new.stem))
