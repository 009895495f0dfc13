"""Time as a budget: a table of measured models, and what it says about widths in between.

    Point          a measured model: its shape, and milliseconds
    LatencyTable   the points in a file; `measure` is the `Measure` of `pruning.budget`
    features       what time may grow with
    fit            non-negative weights of the features

Time is a sum of non-negative terms, each of which grows with the widths, so no removal is ever predicted to cost time.
The file holds the points; the fit is made when it is read, and a table that it misses by more than WORST is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.errors import UserError, first_line
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import LAYER
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import ATTENTION_OUTPUT, EMBEDDING, FFN_DOWN, FFN_UP, LM_HEAD, NORM, QKV, ParamTable
from megatron_prune.pruning.budget import Counts
from megatron_prune.reading import read_words

WORST = 0.25  # relative error of a point beyond which a table is refused


def features(table: ParamTable, counts: Counts) -> np.ndarray:
    """fp64 [7]: 1, layers, channels of all norms, elements of the LM head, of attention and of FFNs, KV channels of all
    layers."""
    head = EMBEDDING if table.shape.tie_word_embeddings else LM_HEAD
    roles = ((NORM,), (head,), (QKV, ATTENTION_OUTPUT), (FFN_UP, FFN_DOWN))
    elements = [table.elements(counts, together) for together in roles]
    kv = table.channels(counts, QKV, dim=0, after=1)
    return np.array([1.0, counts[LAYER].sum(), *elements, kv], dtype=np.float64)


def fit(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The non-negative weights whose relative errors over the points [points, features] have the least squares: of all
    subsets of features, the best that needs no negative weight."""
    scaled = rows / values[:, None]
    best, least = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for chosen in map(list, combinations(range(rows.shape[1]), size)):
            found, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(rows)), rcond=None)
            error = float(np.square(scaled[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(rows.shape[1]), error
                best[chosen] = found
    return best


@dataclass(frozen=True)
class Point:
    """A measured model.

    Args:
        shape: it has all units of it. milliseconds: of what the table is about.
    """

    shape: LlamaShape
    milliseconds: float

    @cached_property
    def features(self) -> np.ndarray:
        """See `features`."""
        architecture = Architecture.full(self.shape)
        return features(architecture.table, architecture.counts)


@dataclass(frozen=True)
class LatencyTable:
    """Measured models.

    Args:
        what: what was timed, on what, for people.
        points: at least two.
    """

    what: str
    points: tuple[Point, ...]

    @cached_property
    def weights(self) -> np.ndarray:
        """fp64 [features]: milliseconds for one of each."""
        return fit(np.stack([point.features for point in self.points]), self._values)

    @property
    def _values(self) -> np.ndarray:
        return np.array([point.milliseconds for point in self.points])

    @property
    def worst(self) -> float:
        """The largest relative error of the fit."""
        fitted = np.stack([point.features for point in self.points]) @ self.weights
        return float(np.abs(fitted / self._values - 1).max())

    def measure(self, table: ParamTable, counts: Counts) -> float:
        """Milliseconds of a model with these widths, by the fit."""
        return float(features(table, counts) @ self.weights)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object."""
        points = [{"shape": point.shape.to_json(), "milliseconds": point.milliseconds} for point in self.points]
        return {"what": self.what, "points": points}

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """The table in a file. Raises UserError, naming it, if it is none, or if no sum of the features fits it."""
        try:
            data = json.loads(read_words(path))
            table = cls(str(data["what"]), tuple(_point(entry) for entry in data["points"]))
            if len(table.points) <= 1:
                raise ValueError("fewer than two points")
        except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError) as error:
            raise UserError(f"pruning.target: latency_table {path}: no table ({first_line(error)})") from error
        if table.worst > WORST:
            raise UserError(
                f"pruning.target: latency_table {path}: its points are up to {table.worst:.0%} off what widths "
                "explain; measure again, on a machine that does nothing else"
            )
        return table


def _point(entry: dict[str, Any]) -> Point:
    milliseconds = entry["milliseconds"]
    if type(milliseconds) not in (int, float) or not 0 < milliseconds < 1e12:
        raise ValueError(f"milliseconds {str(milliseconds)[:60]!r}")
    return Point(LlamaShape.from_json(entry["shape"]), float(milliseconds))


def around(shape: LlamaShape, shares: Sequence[float]) -> list[LlamaShape]:
    """The shapes to measure: `shape` itself, and for every share one with only its heads (whole KV heads), its FFN, its
    hidden size or its layers so much smaller, and one with all of them."""
    found = [shape]
    for share in shares:
        kv_heads = max(1, round(share * shape.num_query_groups))
        smaller: list[dict[str, int]] = [
            {"num_query_groups": kv_heads, "num_attention_heads": kv_heads * shape.heads_per_group},
            {"ffn_hidden_size": max(1, round(share * shape.ffn_hidden_size))},
            {"hidden_size": max(2, 2 * round(share * shape.hidden_size / 2))},
            {"num_layers": max(1, round(share * shape.num_layers))},
        ]
        smaller.append({name: value for changes in smaller for name, value in changes.items()})
        fields = shape.to_json()
        found += [LlamaShape(**{**fields, **changes}) for changes in smaller]
    return list(dict.fromkeys(found))
