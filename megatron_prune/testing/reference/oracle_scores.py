"""The oracle's decision: element scores, unit scores, candidates, choice. Pure functions on small tensors and floats.

    element_scores   S of one weight, from gradient and Fisher (EfficientLLM Eq. 9, LLM-Pruner's param_*, OBD)
    input_scores     S of one weight, from the inputs it multiplied (OBC, Wanda, FLAP, Minitron)
    unit_scores      S summed per query head, FFN channel and stem channel
    smooth           exponential moving average per unit
    candidates       the least salient group of each kind, with its runner-up and its size
    choose           the least of the three (Eq. 10), and the margin by which it won

Scores are keyed by original ids. Ties go to the lowest id, between kinds to head, ffn, stem, layer in this order.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_prune.testing.reference.oracle_geometry import (
    FFN,
    HEAD,
    KV_HEAD,
    LAYER,
    STEM,
    Geometry,
    LiveUnits,
    costs,
    weight_shapes,
    weight_table,
)

KINDS = (HEAD, FFN, STEM)  # of a run that does not say
ALL_KINDS = (*KINDS, LAYER)
CRITERIA = ("taylor_first", "taylor_second", "taylor_mix", "taylor_signed", "obd", "magnitude")
INPUT_CRITERIA = ("obc", "wanda", "flap", "minitron")

_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")

Units = tuple[tuple[int, ...], ...]


def element_scores(criterion: str, weight: Tensor, gradient: Tensor, fisher: Tensor | None) -> Tensor:
    """S of every element. Removing w is delta = -w: the loss changes by -w g + w^2 F / 2, hence mix's signs; only
    `taylor_signed` keeps the sign."""
    if criterion == "magnitude":
        return weight.abs()
    if criterion == "taylor_first":
        return (weight * gradient).abs()
    assert fisher is not None, f"{criterion} needs a Fisher estimate"
    if criterion == "taylor_second":
        return (weight.square() * fisher).abs()
    if criterion == "obd":
        return (weight.square() * fisher).abs() / 2
    if criterion == "taylor_signed":
        return -weight * gradient + weight.square() * fisher / 2
    assert criterion == "taylor_mix", criterion
    return (weight * gradient - weight.square() * fisher / 2).abs()


def damped_hessian(x: Tensor, damping: float) -> Tensor:
    """X^T X / tokens + damping x mean diagonal, fp64, of X [tokens, features]."""
    gram = x.double().T @ x.double() / len(x)
    return gram + (damping * gram.diagonal().mean().item() or 1.0) * torch.eye(len(gram), dtype=torch.float64)


def input_scores(criterion: str, weight: Tensor, x: Tensor, damping: float) -> Tensor:
    """S >= 0 of every element of W [out, in] whose input over the batch's tokens was X [tokens, in]; fp64.

    Minitron's is the mean activation of the column; `unit_scores` is given another one for the stem.
    """
    w, inputs = weight.double(), x.double()
    if criterion == "wanda":
        return w.abs() * inputs.square().mean(dim=0).sqrt()
    if criterion == "flap":
        return w.square() * inputs.var(dim=0, correction=0)
    if criterion == "minitron":
        return inputs.abs().mean(dim=0).expand_as(w)
    assert criterion == "obc", criterion
    return w.square() / torch.linalg.inv(damped_hessian(x, damping)).diagonal()


def default_cost(kind: str, geometry: Geometry) -> int:
    """Pruning steps that a group of `kind` uses up: one per column that a head owns (of a layer: all its columns,
    shared out over the layers), else one."""
    if kind == LAYER:
        return math.ceil((geometry.heads * geometry.head_dim + geometry.ffn) / geometry.num_layers)
    return geometry.head_dim if kind == HEAD else 1


def is_shared(kind: str) -> bool:
    """Whether all layers share the units of `kind`."""
    return kind in (STEM, LAYER)


@dataclass(frozen=True)
class OracleScores:
    """Sums of S per unit, by original id: heads and FFN channels per layer (over their input columns of W_o and
    W_down), stem channels (over their rows of W_o and W_down of all layers); and where it was asked for the block
    influence of the layers."""

    head: tuple[dict[int, float], ...]
    ffn: tuple[dict[int, float], ...]
    stem: dict[int, float]
    influence: dict[int, float] = field(default_factory=dict)


def block_influence(states: Sequence[Tensor]) -> list[float]:
    """1 - cosine of what enters and what leaves a layer, mean over tokens, of the states [B, S, C] around layers."""
    pairs = [(x.double(), y.double()) for x, y in itertools.pairwise(states)]
    return [(1 - torch.cosine_similarity(x, y, dim=-1)).mean().item() for x, y in pairs]


def unit_scores(
    scores: Mapping[str, Tensor],
    geometry: Geometry,
    live: LiveUnits,
    stem_scores: Mapping[str, Tensor] | None = None,
    influence: Mapping[int, float] | None = None,
) -> OracleScores:
    """Sum S (`scores`: the output projections' names -> [C, H x D] and [C, F]) over the elements of every live unit;
    for stem channels sum `stem_scores` where they are given. `influence` is taken over for the live layers."""
    head: list[dict[int, float]] = []
    ffn: list[dict[int, float]] = []
    stem_sums = torch.zeros(())
    for layer in range(geometry.num_layers):
        if layer not in live.layers:
            head.append({})
            ffn.append({})
            continue
        attention = scores[f"model.layers.{layer}.self_attn.o_proj.weight"]
        down = scores[f"model.layers.{layer}.mlp.down_proj.weight"]
        head_sums = attention.reshape(len(live.stem), -1, geometry.head_dim).sum(dim=(0, 2))
        head.append(dict(zip(live.heads[layer], head_sums.tolist(), strict=True)))
        ffn.append(dict(zip(live.ffn[layer], down.sum(dim=0).tolist(), strict=True)))
        if stem_scores:
            attention, down = (stem_scores[f"model.layers.{layer}.{name}.weight"] for name in _OUTPUTS)
        stem_sums = stem_sums + attention.sum(dim=1) + down.sum(dim=1)
    stem = dict(zip(live.stem, stem_sums.tolist(), strict=True))
    return OracleScores(tuple(head), tuple(ffn), stem, {n: influence[n] for n in live.layers} if influence else {})


def smooth(previous: OracleScores | None, new: OracleScores, momentum: float) -> OracleScores:
    """momentum x previous + (1 - momentum) x new for every unit of `new`; the first time it is `new`."""
    if previous is None or momentum == 0:
        return new

    def blend(old: dict[int, float], fresh: dict[int, float]) -> dict[int, float]:
        return {unit: momentum * old[unit] + (1 - momentum) * score for unit, score in fresh.items()}

    return OracleScores(
        head=tuple(map(blend, previous.head, new.head)),
        ffn=tuple(map(blend, previous.ffn, new.ffn)),
        stem=blend(previous.stem, new.stem),
        influence=blend(previous.influence, new.influence),
    )


@dataclass(frozen=True)
class ChoiceRules:
    """What the choice depends on besides the scores; the fields of `OracleSettings` with the same names."""

    head_score: str
    normalize: str
    gqa: str
    types: tuple[str, ...]
    min_widths: Mapping[str, int]
    target: Mapping[str, float]
    seq_length: int
    finish: str
    balanced: Mapping[str, int] = field(default_factory=dict)
    layer_score: str = "weights"


@dataclass(frozen=True)
class OracleCandidate:
    """The least salient group of one kind; `size` is the model's without it. `runner_up` is its score with the
    second-best unit in the layer where that costs least (infinite without one), on the same scale as `score`. `left`
    units of the kind stay in a layer."""

    kind: str
    units: Units
    score: float
    runner_up: float
    parameters_after: int
    left: int
    size: float


def head_options(
    layer_scores: Mapping[int, float], geometry: Geometry, rules: ChoiceRules
) -> list[tuple[float, tuple]]:
    """What one layer may lose as a head group, (score, query-head ids), least first.

    cluster: any one query head. kv_group: a KV head with all its queries. uniform: the least query head of each KV
    head together; the other options swap one of them for the second least of its cluster.
    """
    clusters: dict[int, list[int]] = {}
    for head in sorted(layer_scores, key=lambda head: (layer_scores[head], head)):
        clusters.setdefault(head // geometry.queries_per_kv, []).append(head)
    sets: list[tuple[int, ...]]
    if rules.gqa == "cluster":
        sets = [(head,) for head in layer_scores]
    elif rules.gqa == "kv_group":
        sets = [tuple(sorted(heads)) for heads in clusters.values()]
    else:
        least = {kv_head: heads[0] for kv_head, heads in clusters.items()}
        swaps = [least | {kv_head: heads[1]} for kv_head, heads in clusters.items() if len(heads) > 1]
        sets = [tuple(sorted(pick.values())) for pick in (least, *swaps)]

    def score(heads: tuple[int, ...]) -> float:
        total = sum(layer_scores[head] for head in heads)
        return total / (len(heads) * geometry.head_dim) if rules.head_score == "per_column" else total

    return sorted((score(heads), heads) for heads in sets)


def candidates(scores: OracleScores, geometry: Geometry, live: LiveUnits, rules: ChoiceRules) -> list[OracleCandidate]:
    """The least salient group of each kind that is switched on and above its floor, in the order head, ffn, stem,
    layer. What layers that are gone may lose is nothing; a layer's score is that of its heads and FFN channels. With
    `layer_score: block_influence` the least influential one is the candidate, and the margin is that of influences."""
    before = costs(geometry, live, rules.seq_length)
    limit = binding(before, rules.target)
    found = []
    nothing: list[tuple[float, tuple]] = [(0.0, ())]
    for kind in ALL_KINDS:
        if kind not in rules.types:
            continue
        if kind == HEAD:
            options = [head_options(layer, geometry, rules) if layer else nothing for layer in scores.head]
        elif kind == FFN:
            options = [
                sorted((score, (unit,)) for unit, score in layer.items()) if layer else nothing for layer in scores.ffn
            ]
        elif kind == STEM:
            options = [sorted((score, (unit,)) for unit, score in scores.stem.items())]
        else:
            sums = {n: sum(scores.head[n].values()) + sum(scores.ffn[n].values()) for n in live.layers}
            options = [sorted((score, (layer,)) for layer, score in sums.items())]
            if rules.layer_score == "block_influence":
                first, *others = sorted(live.layers, key=lambda n: (scores.influence[n], n))
                shares = [scores.influence[n] / scores.influence[first] - 1 for n in others]
                options = [[(sums[first], (first,)), *((sums[first] + abs(sums[first]) * s, ()) for s in shares)]]
        units = tuple(layer[0][1] for layer in options)
        left = len(live.of(kind, live.layers[0])) - max(map(len, units))
        if left < rules.min_widths[kind]:
            continue
        after = costs(geometry, live.without(kind, units), rules.seq_length)
        gone = before[limit] - after[limit]
        if not gone:
            continue
        least = sum(layer[0][0] for layer in options)
        swap = min((layer[1][0] - layer[0][0] for layer in options if len(layer) > 1), default=math.inf)
        score, runner_up = (_normalized(value, gone, rules) for value in (least, least + swap))
        candidate = OracleCandidate(
            kind, units, score, runner_up, int(after["params"]), left, size(after, rules.target)
        )
        found.append(candidate)
    return found


def binding(costs: Mapping[str, float], target: Mapping[str, float]) -> str:
    """The limit that is exceeded most, relatively."""
    return max(target, key=lambda name: costs[name] / target[name])


def size(costs: Mapping[str, float], target: Mapping[str, float]) -> float:
    """How often the binding limit is exceeded, in units of the first limit."""
    first, limit = next(iter(target)), binding(costs, target)
    return costs[first] if limit == first else target[first] * (costs[limit] / target[limit])


def _normalized(score: float, saved: float, rules: ChoiceRules) -> float:
    """`per_parameter` weighs a loss against what it saves; a gain (a negative score) is compared as it is."""
    return score / saved if rules.normalize == "per_parameter" and score > 0 else score


def balanced_widths(geometry: Geometry, live: LiveUnits, rules: ChoiceRules, balance: float) -> dict[str, int]:
    """`balance` times the widths of a model within the target in which every kind of `types` has kept the same share of
    its units, rounded up. That share, of widths that need not be whole, is found by halving an interval."""
    table, shapes = weight_table(geometry, live), weight_shapes(geometry, live)
    shrinking = {*rules.types, *((KV_HEAD,) if HEAD in rules.types else ())}
    idle = () if geometry.tied else ("model.embed_tokens.weight",)
    whole = costs(geometry, live, rules.seq_length)

    def is_within(share: float) -> bool:
        dims = {name: sum(kind in shrinking for kind in table[name].kinds) for name in table}
        for name in table:
            dims[name] += LAYER in shrinking and name.startswith("model.layers.")
        sizes = {name: math.prod(shapes[name]) * share ** dims[name] for name in table}
        matrices = sum(n for name, n in sizes.items() if len(shapes[name]) == 2 and name not in idle)
        heads = share ** ((HEAD in rules.types) + (LAYER in rules.types))
        attended = sum(len(live.of(HEAD, n)) * geometry.head_dim for n in live.layers)
        now = {
            "params": sum(sizes.values()),
            "flops_per_token": 2 * matrices + 4 * rules.seq_length * attended * heads,
            "kv_cache_per_token": whole["kv_cache_per_token"] * heads,
        }
        return all(now[name] <= most for name, most in rules.target.items())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return {kind: math.ceil(balance * low * len(live.of(kind, 0)) - 1e-9) for kind in ALL_KINDS}


def choose(
    found: Sequence[OracleCandidate], rules: ChoiceRules, resting: Collection[str] = ()
) -> tuple[OracleCandidate, float] | None:
    """The candidate to remove, and its margin: the relative gap to the best alternative (0 = a tie).

    `finish: exact`: groups that overshoot target x (1 - 0.5 %) are passed over while another one is left; where all
    do, the one that ends nearest to the target goes. Under other limits than parameters such another one must keep
    80 % of its balanced width; where none does, the nearest one goes of a kind that keeps its balance (of any, if none
    does). Then kinds at their balanced width are passed over while another one is left, then those that rest; None when
    nothing remains.
    """
    eligible = list(found)
    if rules.finish == "exact":
        target = next(iter(rules.target.values()))
        ends_well = [c for c in found if c.size >= target * (1 - 0.005)]
        share = 0 if set(rules.target) <= {"params"} else 0.8
        eligible = [c for c in ends_well if c.left >= share * rules.balanced.get(c.kind, 0)]
        if not eligible:
            in_balance = [c for c in found if c.left >= rules.balanced.get(c.kind, 0)]
            eligible = [max((in_balance if ends_well else []) or found, key=lambda c: c.size)]
    eligible = [c for c in eligible if c.left >= rules.balanced.get(c.kind, 0)] or eligible
    eligible = [c for c in eligible if c.kind not in resting]
    if not eligible:
        return None
    best = min(eligible, key=lambda candidate: (candidate.score, ALL_KINDS.index(candidate.kind)))
    rivals = [candidate.score for candidate in eligible if candidate is not best]
    runner_up = min([best.runner_up, *rivals])
    return best, (runner_up - best.score) / max(abs(best.score), 1e-30)
