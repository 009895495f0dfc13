"""The choice of one group: pure functions from unit scores to a decision.

    SelectorSettings   what may be chosen and how scores compare
    Candidate          the least salient group of one kind
    Decision           the group that goes, with the three saliencies and the margin it won by
    choose             UnitScores -> Decision or None

Per layer the least salient head (channel) is a candidate; S_attn (S_ffn) sums those minima over layers, S_stem is the
minimum over channels, and the least of the three is removed (EfficientLLM, arXiv 2502.06663, Eq. 10). Ties go to the
lowest original id, and to head before ffn before stem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_prune.model.architecture import FFN, GROUP_KINDS, HEAD, STEM, Architecture, Group
from megatron_prune.saliency.scores import UnitScores

OVERSHOOT = 0.005  # `finish: exact` avoids groups that end further below the target than this


@dataclass(frozen=True)
class SelectorSettings:
    """What the choice depends on besides the scores; see `config.pruning` for the meaning of each field."""

    target_params: int
    types: tuple[str, ...] = GROUP_KINDS
    gqa: str = "kv_group"
    head_score: str = "per_column"
    normalize: str = "per_parameter"
    finish: str = "exact"
    min_heads: int = 1
    min_ffn: int = 1
    min_hidden: int = 1
    draw_seed: int | None = None

    def floor(self, kind: str) -> int:
        """Units of `kind` that stay."""
        return max(1, {HEAD: self.min_heads, FFN: self.min_ffn, STEM: self.min_hidden}[kind])


@dataclass(frozen=True)
class Candidate:
    """The least salient group of one kind.

    Args:
        score: its saliency, as compared between kinds.
        runner_up: the score with the second-best unit in the layer where that costs least; infinite without one.
    """

    group: Group
    score: float
    runner_up: float
    parameters_after: int


@dataclass(frozen=True)
class Decision:
    """The group to remove.

    Args:
        scores: saliency by kind, of the kinds that had a candidate.
        margin: (runner-up - best) / |best|; infinite without an alternative. Below 1e-4 rounding may decide.
    """

    group: Group
    scores: dict[str, float]
    margin: float
    parameters_after: int


def choose(
    scores: UnitScores, architecture: Architecture, settings: SelectorSettings, step: int = 0
) -> Decision | None:
    """The group to remove now, or None when every kind is off or at its floor.

    Args:
        scores: aligned with `architecture`.
        step: removals so far; only `draw_seed` (metric `random`) uses it.
    """
    if settings.draw_seed is not None:
        scores, kinds = _drawn(architecture, settings, step)
    else:
        kinds = settings.types
    found = {
        kind: c for kind in GROUP_KINDS if kind in kinds and (c := _candidate(kind, scores, architecture, settings))
    }
    if not found:
        return None
    eligible = found
    if settings.finish == "exact":
        least = settings.target_params * (1 - OVERSHOOT)
        eligible = {kind: c for kind, c in found.items() if c.parameters_after >= least} or found
    best_kind = min(eligible, key=lambda kind: (eligible[kind].score, GROUP_KINDS.index(kind)))
    best = eligible[best_kind]
    runner_up = min([best.runner_up, *(c.score for kind, c in eligible.items() if kind != best_kind)])
    margin = (runner_up - best.score) / max(abs(best.score), 1e-30)
    return Decision(best.group, {kind: c.score for kind, c in found.items()}, margin, best.parameters_after)


def _candidate(
    kind: str, scores: UnitScores, architecture: Architecture, settings: SelectorSettings
) -> Candidate | None:
    """The least salient group of `kind`, or None when that would go below the floor."""
    if kind == STEM:
        layers = [_least(scores.stem, architecture.stem)]
    elif kind == FFN:
        layers = [_least(*pair) for pair in zip(scores.ffn, architecture.ffn, strict=True)]
    else:
        rows = zip(scores.head, architecture.heads, strict=True)
        layers = [_least_heads(values, ids, architecture, settings) for values, ids in rows]
    group = Group(kind, tuple(units for _, units, _ in layers))
    width = {HEAD: architecture.num_attention_heads, FFN: architecture.ffn_hidden_size, STEM: architecture.hidden_size}
    if width[kind] - len(group.units[0]) < settings.floor(kind):
        return None
    removed = architecture.cost(group)
    scale = removed if settings.normalize == "per_parameter" else 1
    total = sum(score for score, _, _ in layers)
    swap = min(second - score for score, _, second in layers)
    return Candidate(group, total / scale, (total + swap) / scale, architecture.parameters - removed)


def _least(values: np.ndarray, ids: np.ndarray) -> tuple[float, tuple[int, ...], float]:
    """(least score, its id, second least score); ids ascend, so the first minimum has the lowest id."""
    at = int(np.argmin(values))
    second = float(np.min(np.delete(values, at))) if len(values) > 1 else math.inf
    return float(values[at]), (int(ids[at]),), second


def _least_heads(
    values: np.ndarray, ids: np.ndarray, architecture: Architecture, settings: SelectorSettings
) -> tuple[float, tuple[int, ...], float]:
    """(least score, query-head ids, second least score) of what one layer may lose as a head group, by
    `settings.gqa`.
    """
    scores, names = values.tolist(), ids.tolist()
    options = sorted(
        (_head_score(sum(scores[i] for i in pick), len(pick), architecture, settings), tuple(names[i] for i in pick))
        for pick in _head_picks(values, ids // architecture.shape.heads_per_group, settings.gqa)
    )
    score, units = options[0]
    return score, units, options[1][0] if len(options) > 1 else math.inf


def _head_picks(values: np.ndarray, kv_heads: np.ndarray, gqa: str) -> Iterator[tuple[int, ...]]:
    """Positions of the query heads of each option of one layer.

    cluster: any single query head. kv_group: a KV head with all its queries. uniform: the least query head of every
    KV head together; its other options swap one of them for the second least of its cluster.
    """
    if gqa == "cluster":
        yield from ((i,) for i in range(len(values)))
        return
    clusters = np.split(np.arange(len(kv_heads)), np.flatnonzero(np.diff(kv_heads)) + 1)  # ids ascend
    if gqa == "kv_group":
        yield from (tuple(int(i) for i in cluster) for cluster in clusters)
        return
    ranked = [cluster[np.argsort(values[cluster], kind="stable")] for cluster in clusters]
    least = [int(order[0]) for order in ranked]
    yield tuple(least)
    for number, order in enumerate(ranked):
        if len(order) > 1:
            yield (*least[:number], int(order[1]), *least[number + 1 :])


def _head_score(total: float, heads: int, architecture: Architecture, settings: SelectorSettings) -> float:
    columns = heads * architecture.shape.kv_channels
    return total / columns if settings.head_score == "per_column" else total


def _drawn(architecture: Architecture, settings: SelectorSettings, step: int) -> tuple[UnitScores, tuple[str, ...]]:
    """The control: a kind drawn evenly over all units of the kinds switched on, and random unit scores within it."""
    generator = np.random.default_rng([settings.draw_seed or 0, step])
    layers = architecture.shape.num_layers
    counts = {
        HEAD: layers * architecture.num_attention_heads,
        FFN: layers * architecture.ffn_hidden_size,
        STEM: architecture.hidden_size,
    }
    scores = UnitScores(
        architecture,
        generator.random((layers, architecture.num_attention_heads)),
        generator.random((layers, architecture.ffn_hidden_size)),
        generator.random(architecture.hidden_size),
    )
    open_kinds = [k for k in GROUP_KINDS if k in settings.types and _candidate(k, scores, architecture, settings)]
    if not open_kinds:
        return scores, ()
    weights = np.array([counts[kind] for kind in open_kinds], dtype=np.float64)
    return scores, (str(generator.choice(open_kinds, p=weights / weights.sum())),)


def least_parameters(architecture: Architecture, settings: SelectorSettings) -> int:
    """Parameters when every kind that is switched on is at its floor: no target below it can be reached."""
    shape = architecture.shape
    smallest = {HEAD: architecture.heads, FFN: architecture.ffn, STEM: (architecture.stem,)}
    for kind in settings.types:
        step = 1
        if kind == HEAD and settings.gqa != "cluster":
            step = shape.heads_per_group if settings.gqa == "kv_group" else len(architecture.kv_heads(0))
        width = len(smallest[kind][0])
        keep = width - max(0, width - settings.floor(kind)) // step * step
        if kind == HEAD and settings.gqa == "uniform":  # one query of every KV head goes at a time, the last never does
            keep = max(keep, step)
            smallest[kind] = tuple(_first_of_each(ids, shape.heads_per_group, keep // step) for ids in smallest[kind])
        elif kind == HEAD:
            smallest[kind] = tuple(_on_fewest_kv_heads(ids, shape.heads_per_group, keep) for ids in smallest[kind])
        else:
            smallest[kind] = tuple(ids[: max(keep, 1)] for ids in smallest[kind])
    return Architecture(shape, smallest[HEAD], smallest[FFN], smallest[STEM][0]).parameters


def _first_of_each(heads: np.ndarray, per_group: int, count: int) -> np.ndarray:
    kv_heads = heads // per_group
    return np.concatenate([heads[kv_heads == kv][:count] for kv in np.unique(kv_heads)])


def _on_fewest_kv_heads(heads: np.ndarray, per_group: int, keep: int) -> np.ndarray:
    """`keep` of `heads` (ascending) that need as few KV heads as possible: those of the fullest clusters."""
    kv_heads = heads // per_group
    found, sizes = np.unique(kv_heads, return_counts=True)
    fullest_first = np.argsort(np.argsort(-sizes, kind="stable"))  # rank of each KV head
    order = np.argsort(fullest_first[np.searchsorted(found, kv_heads)], kind="stable")
    return np.sort(heads[order[:keep]])
