"""Heads of every layer, under grouped-query attention by `pruning.gqa`:

    cluster    any single query head (EfficientLLM's cluster attention, arXiv 2502.06663)
    kv_group   a KV head with all its queries
    uniform    the least query head of every KV head together

A KV head leaves by itself with the last query head that it serves.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import HEAD, KV_HEAD
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups.kind import GroupKind, Rules


class HeadGroups(GroupKind):
    """Groups of query heads, by `pruning.gqa` (see the module)."""

    def default_cost(self, shape: LlamaShape) -> int:
        """One per column of the head."""
        return shape.kv_channels

    @property
    def default_limit(self) -> int:
        """One: several would empty the layers of heads before a single step shows what that did."""
        return 1

    def least(
        self, values: np.ndarray, ids: np.ndarray, shape: LlamaShape, rules: Rules
    ) -> tuple[float, tuple[int, ...], float]:
        """As `GroupKind.least`, over the options of `rules.gqa`; scores as `rules.head_score` says."""
        scores = values.tolist()
        options = [
            (_score(sum([scores[i] for i in pick]), len(pick), shape, rules), pick)
            for pick in _picks(values, ids // shape.heads_per_group, rules.gqa)
        ]
        score, least = min(options)
        second = min((other for other, pick in options if pick is not least), default=math.inf)
        return score, tuple(ids[list(least)].tolist()), second

    def units(self, architecture: Architecture, rules: Rules) -> int:
        """Query heads of every layer that leave with one group."""
        if rules.gqa == "cluster":
            return 1
        shape = architecture.shape
        return shape.heads_per_group if rules.gqa == "kv_group" else architecture.width(KV_HEAD)

    def floor(self, architecture: Architecture, rules: Rules) -> int:
        """Query heads that stay: under `uniform` one of every KV head."""
        return max(super().floor(architecture, rules), self.units(architecture, rules) if rules.gqa == "uniform" else 1)

    def kept(self, ids: np.ndarray, count: int, shape: LlamaShape, rules: Rules) -> np.ndarray:
        """The first ones; under `uniform` the first ones of every KV head."""
        if rules.gqa != "uniform":
            return ids[:count]
        kv_heads = ids // shape.heads_per_group
        each = count // len(np.unique(kv_heads))
        return np.concatenate([ids[kv_heads == kv][:each] for kv in np.unique(kv_heads)])

    def cheapest(self, ids: np.ndarray, count: int, shape: LlamaShape, rules: Rules) -> np.ndarray:
        """Those that need as few KV heads as possible: of the fullest clusters."""
        if rules.gqa == "uniform":
            return self.kept(ids, count, shape, rules)
        kv_heads = ids // shape.heads_per_group
        found, sizes = np.unique(kv_heads, return_counts=True)
        fullest_first = np.argsort(np.argsort(-sizes, kind="stable"))  # rank of each KV head
        order = np.argsort(fullest_first[np.searchsorted(found, kv_heads)], kind="stable")
        return np.sort(ids[order[:count]])


def _picks(values: np.ndarray, kv_heads: np.ndarray, gqa: str) -> Iterator[tuple[int, ...]]:
    """Positions of the query heads of each option of one layer; the other options of `uniform` swap one head for the
    second least of its cluster."""
    if gqa == "cluster":
        yield from ((i,) for i in range(len(values)))
        return
    edges = [0, *(np.flatnonzero(kv_heads[1:] != kv_heads[:-1]) + 1).tolist(), len(kv_heads)]  # ids ascend
    clusters = [tuple(range(first, last)) for first, last in itertools.pairwise(edges)]
    if gqa == "kv_group":
        yield from clusters
        return
    scores = values.tolist()
    ranked = [sorted(cluster, key=scores.__getitem__) for cluster in clusters]
    least = [order[0] for order in ranked]
    yield tuple(least)
    for number, order in enumerate(ranked):
        if len(order) > 1:
            yield (*least[:number], order[1], *least[number + 1 :])


def _score(total: float, heads: int, shape: LlamaShape, rules: Rules) -> float:
    return total / (heads * shape.kv_channels) if rules.head_score == "per_column" else total


HEADS = HeadGroups("head", HEAD)
