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

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_prune.checkpoint.record import CONTINUED, PRUNING, Progress
from megatron_prune.config import Config
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.budget import training_flops
from megatron_prune.pruning.groups import GroupKind, Rules, find_group
from megatron_prune.pruning.schedule import Schedule
from megatron_prune.pruning.selector import OVERSHOOT
from megatron_prune.training.pruning_settings import live_multiples, recorded, selector_rules

_SAMPLES = 33  # architectures between source and target at which parameters and FLOPs per token are computed


Widths = Mapping[str, int]  # by kind of unit


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
        {"head": 32, "ffn": 8192, "stem": 2048},
        469e6,
        {"head": 19, "ffn": 3018, "stem": 1225},
        "read from Figure 7 of EfficientLLM (arXiv 2502.06663)",
    ),
)
_SAME_TARGET = 0.01  # a target this near to a published one is taken for the same


@dataclass(frozen=True)
class Route:
    """Groups on the way to the target.

    Args:
        source: the architecture to start with. rules: of the choice.
        kinds: kind of each group, in the order of removal; the last one reaches the target.
        rounding: groups that leave together with the last one, for `round_to` of their kinds.
        assumption: what the widths rest on, for people.
    """

    source: Architecture
    rules: Rules
    kinds: tuple[str, ...]
    rounding: tuple[str, ...]
    assumption: str

    def after(self, removals: int) -> Architecture:
        """The architecture after the first `removals` groups; which units left is immaterial."""
        return _shrunk(self.source, Counter(self.kinds[:removals]), self.rules)

    @cached_property
    def target(self) -> Architecture:
        """The architecture at the end of the pruning phase."""
        return _shrunk(self.source, Counter(self.kinds + self.rounding), self.rules)

    @cached_property
    def uneven(self) -> dict[str, int]:
        """By name of kind, the multiple that its width at the target is none of, of those that keep matrix products
        fast (the kind's own quantum; of a small model none)."""
        kinds = {group.name: group.kind for group in self.rules.kinds(self.source)}
        multiples = {name: kind.quantum(kind.size(self.source.shape)) for name, kind in kinds.items()}
        return {name: multiple for name, multiple in multiples.items() if self.target.width(kinds[name]) % multiple}

    @property
    def even(self) -> Architecture:
        """The target with these widths brought down to their multiples."""
        return _shrunk(self.target, _above(self.target, self.uneven), self.rules)


@dataclass(frozen=True)
class Phase:
    """What one phase of a run takes."""

    iterations: int
    tokens: int
    flops: float


def plan_route(config: Config, architecture: Architecture) -> Route:
    """The route from `architecture` to `pruning.target`, which is below it and can be reached."""
    pruning, rules = config.pruning, selector_rules(config, architecture)
    budget = rules.budget
    target = budget.target
    assert not budget.is_met(architecture)
    replay = recorded(config, architecture)
    if replay is not None:
        repeated = tuple(removal.kind for removal in replay.removals)
        return Route(architecture, rules, repeated, (), f"as recorded in {replay.path}")
    known = None if rules.limits else _published(architecture, target)

    def shrunk(kinds: Sequence[str]) -> Architecture:
        return _shrunk(architecture, Counter(kinds), rules)

    def size(kinds: Sequence[str]) -> float:
        return budget.size(shrunk(kinds))

    def onwards(kinds: list[str], groups: Sequence[GroupKind], goals: Widths | None = None) -> list[str]:
        return [*kinds, *_order(shrunk(kinds), architecture, rules, goals or {}, groups)]

    every = rules.kinds(architecture)
    order = onwards([], every, known.final) if known else []
    kinds = _until(target, onwards(order, every), size)
    if pruning.finish == "exact" and size(kinds) < target * (1 - OVERSHOOT):
        endings = [_until(target, onwards(kinds[:-1], (find_group(name),)), size) for name in pruning.types]
        reached = [ending for ending in (kinds, *endings) if size(ending) <= target]
        kinds = max(reached, key=size)
    end = shrunk(kinds)
    rounding = _above(end, live_multiples(config, architecture)).elements()
    assumption = f"if {', '.join(pruning.types)} shrink by the same factor; scores will decide"
    return Route(architecture, rules, tuple(kinds), tuple(rounding), known.origin if known else assumption)


def _until(target: float, order: list[str], size: Callable[[Sequence[str]], float]) -> list[str]:
    """The fewest first groups of `order` that leave a size of at most `target` (all of it when none do)."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if size(order[:middle]) > target else (low, middle)
    return order[:low]


def _published(architecture: Architecture, target: float) -> Published | None:
    for known in PUBLISHED:
        same = known.layers == architecture.shape.num_layers and all(
            architecture.width(kind) == known.source.get(kind.name)
            for kind in architecture.table.kinds
            if kind.is_prunable
        )
        if same and math.isclose(known.parameters, target, rel_tol=_SAME_TARGET):
            return known
    return None


def _order(
    start: Architecture, source: Architecture, rules: Rules, goals: Widths, groups: Sequence[GroupKind]
) -> Iterator[str]:
    """Kinds of groups, each time of the kind that has kept the largest share of what it may lose, down to the goals.

    Args:
        start: where the order begins. source: what says how many units a group takes.
        groups: the kinds that may go.
    """
    units = {group.name: group.units(source, rules) for group in groups}
    goal = {group.name: goals.get(group.kind.name, 0) for group in groups}
    width = {group.name: start.width(group.kind) for group in groups}
    loss = {name: width[name] - goal[name] for name in width}
    least = {name: max(goal[name], rules.floor(name)) for name in width}
    while True:
        open_kinds = [name for name in width if width[name] - units[name] >= least[name]]
        if not open_kinds:
            return
        kind = max(open_kinds, key=lambda name: (width[name] - goal[name]) / loss[name])
        width[kind] -= units[kind]
        yield kind


def _shrunk(source: Architecture, removed: Counter[str], rules: Rules) -> Architecture:
    """`source` without so many groups of each kind."""
    left = source
    for name, count in removed.items():
        left = find_group(name).shrunk(left, count, rules) if count else left
    return left


def _above(architecture: Architecture, multiples: Mapping[str, int]) -> Counter[str]:
    """By name of a kind of group, units above the last multiple."""
    return Counter({name: architecture.width(find_group(name).kind) % to for name, to in multiples.items()})


def removal_iters(schedule: Schedule, route: Route, tokens_per_iteration: int) -> np.ndarray:
    """int64 iteration (from 1) in which each group of the route leaves."""
    count = len(route.kinds)
    sampled = np.unique(np.linspace(0, count, _SAMPLES).astype(int))
    sizes = [route.rules.budget.size(route.after(int(i))) for i in sampled]
    return schedule.forecast(route.kinds, np.interp(np.arange(count), sampled, sizes), tokens_per_iteration)


def plan_phases(config: Config, route: Route, iterations: np.ndarray, teacher: float = 0.0) -> tuple[Phase, Phase]:
    """(pruning, continued training), with the FLOPs of the widths that each iteration trains with.

    Args:
        iterations: `removal_iters` of the route. teacher: FLOPs per token of its forward pass.
    """
    seq_length, tokens = config.data.seq_length, config.tokens_per_iteration
    count = len(route.kinds)
    sampled = np.unique(np.linspace(0, count, _SAMPLES).astype(int))
    flops = [training_flops(route.after(int(i)), seq_length) for i in sampled]
    per_token = np.interp(np.arange(count), sampled, flops)  # while as many groups are gone
    durations = np.diff(iterations, prepend=0)
    total = int(iterations[-1])
    pruning = Phase(total, total * tokens, float(np.dot(durations, per_token + teacher)) * tokens)
    left = max(0, Progress(phase=CONTINUED, phase_start=total).end(config) - total)
    return pruning, Phase(left, left * tokens, left * tokens * (training_flops(route.target, seq_length) + teacher))


def plan_plain(config: Config, architecture: Architecture, teacher: float = 0.0) -> tuple[Phase, Phase]:
    """(training, continued training) without removals; when the target is reached already, only the latter."""
    per_token = training_flops(architecture, config.data.seq_length) + teacher
    end = Progress(phase=CONTINUED if config.pruning.enabled else PRUNING).end(config)
    counts = (0, end) if config.pruning.enabled else (end, 0)
    training, continued = (
        Phase(count, count * config.tokens_per_iteration, count * config.tokens_per_iteration * per_token)
        for count in counts
    )
    return training, continued
