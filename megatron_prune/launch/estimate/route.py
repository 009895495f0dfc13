"""The way to the target, before anything is scored: which groups leave, when, and what that costs.

    Route          kinds of groups in the order in which they leave, and the architecture after any number of them
    plan_route     an assumption about final widths -> Route
    removal_iters  the schedule's iteration of each removal
    plan_phases    iterations, tokens and FLOPs of pruning and continued training
    plan_plain     the same when nothing is left to prune

Scores decide the real widths. Unless they were published for this very run, all kinds are assumed to shrink by the same
factor: at every step the kind goes that has kept the largest share of its width. KV heads are assumed to leave in
proportion to their queries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prune.checkpoint.record import CONTINUED, PRUNING, Progress
from megatron_prune.config import Config
from megatron_prune.model.architecture import FFN, GROUP_KINDS, HEAD, STEM, Architecture
from megatron_prune.pruning.schedule import PruningSchedule
from megatron_prune.pruning.selector import OVERSHOOT
from megatron_prune.training.flops import training_flops_per_token

_SAMPLES = 33  # architectures between source and target at which FLOPs per token are computed


@dataclass(frozen=True)
class Widths:
    """Query heads, FFN channels and stem channels of an architecture."""

    head: int
    ffn: int
    stem: int

    @classmethod
    def of(cls, architecture: Architecture) -> Widths:
        """Those of `architecture`."""
        return cls(architecture.num_attention_heads, architecture.ffn_hidden_size, architecture.hidden_size)

    def get(self, kind: str) -> int:
        """The width of `kind`."""
        return {HEAD: self.head, FFN: self.ffn, STEM: self.stem}[kind]


NOTHING = Widths(0, 0, 0)


@dataclass(frozen=True)
class Published:
    """Final widths of a run that someone has published.

    Args:
        layers, source, parameters: the source model's layers and widths, and the size it was pruned to.
        final: the widths it ended with.
        origin: where they stand.
    """

    layers: int
    source: Widths
    parameters: float
    final: Widths
    origin: str


PUBLISHED = (
    Published(
        24,
        Widths(32, 8192, 2048),
        469e6,
        Widths(19, 3018, 1225),
        "read from Figure 7 of EfficientLLM (arXiv 2502.06663)",
    ),
)
_SAME_TARGET = 0.01  # a target this near to a published one is taken for the same


@dataclass(frozen=True)
class Route:
    """Groups on the way to the target.

    Args:
        source: the architecture to start with.
        kinds: kind of each group, in the order of removal; the last one reaches the target.
        rounding: groups that leave together with the last one, for `pruning.round_widths`.
        head_units: query heads per layer that leave with one head group.
        is_uniform: whether a head group takes a query from every KV head.
        assumption: what the widths rest on, for people.
    """

    source: Architecture
    kinds: tuple[str, ...]
    rounding: tuple[str, ...]
    head_units: int
    is_uniform: bool
    assumption: str

    def after(self, removals: int) -> Architecture:
        """The architecture after the first `removals` groups; which units left is immaterial."""
        return _shrunk(self.source, Counter(self.kinds[:removals]), self.head_units, self.is_uniform)

    @property
    def target(self) -> Architecture:
        """The architecture at the end of the pruning phase."""
        return _shrunk(self.source, Counter(self.kinds + self.rounding), self.head_units, self.is_uniform)


@dataclass(frozen=True)
class Phase:
    """What one phase of a run takes."""

    iterations: int
    tokens: int
    flops: float


def plan_route(config: Config, architecture: Architecture) -> Route:
    """The route from `architecture` to `pruning.target_params`, which is below it and can be reached."""
    pruning, target = config.pruning, config.pruning.target_params
    assert target is not None and target < architecture.parameters
    units, is_uniform = _head_units(config, architecture), pruning.gqa == "uniform"
    known = _published(architecture, target)

    def shrunk(kinds: Sequence[str]) -> Architecture:
        return _shrunk(architecture, Counter(kinds), units, is_uniform)

    def onwards(kinds: list[str], types: tuple[str, ...], goals: Widths = NOTHING) -> list[str]:
        return [*kinds, *_order(config, Widths.of(shrunk(kinds)), goals, units, types)]

    order = onwards([], pruning.types, known.final) if known else []
    kinds = _until(target, onwards(order, pruning.types), shrunk)
    if pruning.finish == "exact" and shrunk(kinds).parameters < target * (1 - OVERSHOOT):
        endings = [_until(target, onwards(kinds[:-1], (kind,)), shrunk) for kind in pruning.types]
        reached = [ending for ending in (kinds, *endings) if shrunk(ending).parameters <= target]
        kinds = max(reached, key=lambda ending: shrunk(ending).parameters)
    end, multiples = shrunk(kinds), pruning.round_widths
    rounding = (FFN,) * (end.ffn_hidden_size % multiples.ffn) + (STEM,) * (end.hidden_size % multiples.hidden)
    assumption = f"if {', '.join(pruning.types)} shrink by the same factor; scores will decide"
    return Route(architecture, tuple(kinds), rounding, units, is_uniform, known.origin if known else assumption)


def _until(target: int, order: list[str], shrunk: Callable[[Sequence[str]], Architecture]) -> list[str]:
    """The fewest first groups of `order` that leave at most `target` parameters (all of it when none do)."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if shrunk(order[:middle]).parameters > target else (low, middle)
    return order[:low]


def _published(architecture: Architecture, target: int) -> Published | None:
    for known in PUBLISHED:
        same = known.layers == architecture.shape.num_layers and known.source == Widths.of(architecture)
        if same and math.isclose(known.parameters, target, rel_tol=_SAME_TARGET):
            return known
    return None


def _head_units(config: Config, architecture: Architecture) -> int:
    """Query heads of a layer that leave with one head group."""
    if config.pruning.gqa == "cluster":
        return 1
    return architecture.shape.heads_per_group if config.pruning.gqa == "kv_group" else len(architecture.kv_heads(0))


def _order(config: Config, start: Widths, goals: Widths, head_units: int, types: tuple[str, ...]) -> Iterator[str]:
    """Kinds of groups, each time of the kind that has kept the largest share of what it may lose, down to the goals."""
    pruning = config.pruning
    floors = {HEAD: pruning.min_heads, FFN: pruning.min_ffn, STEM: pruning.min_hidden}
    units = {HEAD: head_units, FFN: 1, STEM: 1}
    width = {kind: start.get(kind) for kind in GROUP_KINDS}
    loss = {kind: width[kind] - goals.get(kind) for kind in GROUP_KINDS}
    least = {kind: max(goals.get(kind), floors[kind], 1) for kind in GROUP_KINDS}
    while True:
        open_kinds = [k for k in GROUP_KINDS if k in types and width[k] - units[k] >= least[k]]
        if not open_kinds:
            return
        kind = max(open_kinds, key=lambda k: (width[k] - goals.get(k)) / loss[k])
        width[kind] -= units[kind]
        yield kind


def _shrunk(source: Architecture, removed: Counter[str], head_units: int, is_uniform: bool) -> Architecture:
    """`source` without so many groups of each kind, the last units of every dimension."""
    heads = source.num_attention_heads - head_units * removed[HEAD]
    ffn = source.ffn_hidden_size - removed[FFN]
    stem = source.stem[: source.hidden_size - removed[STEM]]
    per_group = source.shape.heads_per_group

    def first(ids: np.ndarray) -> np.ndarray:
        if not is_uniform:
            return ids[:heads]
        keep = heads // len(np.unique(ids // per_group))
        return np.concatenate([ids[ids // per_group == kv][:keep] for kv in np.unique(ids // per_group)])

    return Architecture(source.shape, tuple(map(first, source.heads)), tuple(f[:ffn] for f in source.ffn), stem)


def removal_iters(schedule: PruningSchedule, kinds: tuple[str, ...]) -> np.ndarray:
    """int64 iteration (from 1) in which each group of `kinds` leaves."""
    above = schedule.target_params + 1
    reach = max(schedule.first_prune_iter, 1) + schedule.gradient_steps
    first = next(i for i in range(1, reach + 1) if schedule.is_scheduled(i, above))
    iterations = np.zeros(len(kinds), dtype=np.int64)
    credits, iteration = 0.0, first - schedule.gradient_steps
    for number, kind in enumerate(kinds):
        while not schedule.may_prune(credits, above):
            credits = schedule.credited(credits)
            iteration += schedule.gradient_steps
        iterations[number] = iteration
        credits = schedule.spent(credits, kind)
    return iterations


def plan_phases(config: Config, route: Route, iterations: np.ndarray) -> tuple[Phase, Phase]:
    """(pruning, continued training), with the FLOPs of the widths that each iteration trains with.

    Args:
        iterations: `removal_iters` of the route.
    """
    seq_length, tokens = config.data.seq_length, config.tokens_per_iteration
    count = len(route.kinds)
    sampled = np.unique(np.linspace(0, count, _SAMPLES).astype(int))
    flops = [training_flops_per_token(route.after(int(i)), seq_length) for i in sampled]
    per_token = np.interp(np.arange(count), sampled, flops)  # while as many groups are gone
    durations = np.diff(iterations, prepend=0)
    total = int(iterations[-1])
    pruning = Phase(total, total * tokens, float(np.dot(durations, per_token)) * tokens)
    left = Progress(phase=CONTINUED).end(config)
    return pruning, Phase(left, left * tokens, left * tokens * training_flops_per_token(route.target, seq_length))


def plan_plain(config: Config, architecture: Architecture) -> tuple[Phase, Phase]:
    """(training, continued training) without removals; when the target is reached already, only the latter."""
    per_token = training_flops_per_token(architecture, config.data.seq_length)
    end = Progress(phase=CONTINUED if config.pruning.enabled else PRUNING).end(config)
    counts = (0, end) if config.pruning.enabled else (end, 0)
    training, continued = (
        Phase(count, count * config.tokens_per_iteration, count * config.tokens_per_iteration * per_token)
        for count in counts
    )
    return training, continued
