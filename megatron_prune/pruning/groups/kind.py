"""A kind of group: which units leave together, what that is worth, and where it ends.

Rules       what the choice depends on besides scores
Offer       the least salient group of one kind
GroupKind   one unit of a kind in every layer; subclasses take other units together
register_group, find_group, known_groups
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megatron_prune.errors import UserError, did_you_mean, one_line
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import Kind
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.budget import PARAMS, Budget, Limit, parameters
from megatron_prune.saliency.scores import UnitScores


@dataclass(frozen=True)
class Rules:
    """What the choice depends on besides the scores; see `config.pruning` for the meaning of each field.

    Args:
        target_params: parameters that the model may have; None: only `limits` hold.
        limits: what it may cost besides; all of them hold at once.
        types: names of the kinds of groups that may leave, in any order; None: all that do so by default.
        floors: by name, units of every layer that stay.
        widths: by name, units of every layer that stay while another kind has more than its own (see
            `pruning.balance`).
        draw_seed: decide by lot (metric `random`).
        scores: by name, what the groups of a kind are ordered by, of its `GroupKind.scores`; absent: the first.
    """

    target_params: int | None
    types: tuple[str, ...] | None = None
    gqa: str = "kv_group"
    head_score: str = "sum"
    normalize: str = "per_parameter"
    finish: str = "exact"
    floors: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    draw_seed: int | None = None
    limits: tuple[Limit, ...] = ()
    scores: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def budget(self) -> Budget:
        """All limits, that of the parameters first."""
        own = () if self.target_params is None else (Limit(PARAMS, self.target_params, parameters),)
        return Budget((*own, *self.limits))

    def floor(self, name: str) -> int:
        """Units that groups of kind `name` leave in every layer."""
        return max(1, self.floors.get(name, 1))

    def kinds(self, architecture: Architecture) -> tuple[GroupKind, ...]:
        """The kinds of groups that may leave `architecture`, in the order of registration."""
        names = default_names() if self.types is None else self.types
        return tuple(kind for kind in known_groups() if kind.name in names and kind.kind in architecture.live)


@dataclass(frozen=True)
class Offer:
    """The least salient group of one kind.

    Args:
        score: the sum of its units' scores over layers. swap: what the second-best unit would cost more, in the layer
            where that is least; infinite without one.
    """

    group: Group
    score: float
    swap: float


WEIGHTS = "weights"
_NOTHING = 0.0, (), math.inf  # what a layer that is gone may lose


class GroupKind:
    """Groups of one unit of `kind` in every layer that is left (for a shared kind: one unit).

    Per layer the least salient unit is the candidate; the group's score sums those minima over layers (EfficientLLM,
    arXiv 2502.06663, Eq. 10). Ties go to the lowest original id.

    Args:
        name: in files, options and messages.
        kind: the units that leave. What they are is the table's affair.

    Attributes:
        scores: what its groups can be ordered by; the first is the criterion summed over weights.
    """

    scores: tuple[str, ...] = (WEIGHTS,)

    def __init__(self, name: str, kind: Kind) -> None:
        self.name, self.kind = name, kind

    def default_cost(self, shape: LlamaShape) -> int:
        """Pruning steps that one group uses up, where no configuration says."""
        return 1

    @property
    def is_default(self) -> bool:
        """Whether groups of this kind may leave where no configuration says."""
        return True

    @property
    def default_limit(self) -> int | None:
        """Groups that may leave by one batch's scores, where no configuration says; None: any number."""
        return None

    def offer(self, scores: UnitScores, architecture: Architecture, rules: Rules) -> Offer:
        """The least salient group; `scores` are aligned with `architecture`. Raises UserError: layers would lose
        different numbers of units."""
        sites = [
            self.least(values, ids, architecture.shape, rules) if len(ids) else _NOTHING
            for values, ids in zip(scores.values[self.kind], architecture.sites(self.kind), strict=True)
        ]
        group = Group.of(self.kind, (units for _, units, _ in sites), self.name)
        if len({len(units) for _, units, _ in sites if units}) > 1:
            raise UserError(f"pruning: layers would lose different numbers of {self.kind.title} by these options")
        return Offer(group, sum(score for score, _, _ in sites), min(second - score for score, _, second in sites))

    def least(
        self, values: np.ndarray, ids: np.ndarray, shape: LlamaShape, rules: Rules
    ) -> tuple[float, tuple[int, ...], float]:
        """(least score, its ids, second least score) of what a layer may lose; `values` belong to ascending `ids`."""
        at = int(np.argmin(values))
        second = min(values[:at].min(initial=math.inf), values[at + 1 :].min(initial=math.inf))
        return float(values[at]), (int(ids[at]),), float(second)

    def units(self, architecture: Architecture, rules: Rules) -> int:
        """Units of every layer that leave with one group."""
        return 1

    def floor(self, architecture: Architecture, rules: Rules) -> int:
        """Units that stay in every layer."""
        return rules.floor(self.name)

    def left(self, architecture: Architecture, group: Group) -> int:
        """Units that stay after `group`, in the layer where fewest do."""
        sites = zip(architecture.sites(self.kind), group.gone[self.kind], strict=True)
        return min(len(ids) - len(units) for ids, units in sites if len(ids))

    def kept(self, ids: np.ndarray, count: int, shape: LlamaShape, rules: Rules) -> np.ndarray:
        """`count` of the live `ids` of a layer, such as could be left on the way (which ones is immaterial)."""
        return ids[:count]

    def cheapest(self, ids: np.ndarray, count: int, shape: LlamaShape, rules: Rules) -> np.ndarray:
        """`count` of the live `ids` of a layer, such as need the fewest parameters."""
        return self.kept(ids, count, shape, rules)

    def shrunk(self, architecture: Architecture, groups: int, rules: Rules, *, cheapest: bool = False) -> Architecture:
        """`architecture` without so many groups of this kind; which units left is immaterial."""
        pick = self.cheapest if cheapest else self.kept
        units = self.units(architecture, rules) * groups
        sites = tuple(
            np.asarray(pick(ids, len(ids) - units, architecture.shape, rules)) if len(ids) else ids
            for ids in architecture.sites(self.kind)
        )
        return Architecture(architecture.shape, {**architecture.live, self.kind: sites})

    def most(self, architecture: Architecture, rules: Rules) -> int:
        """Groups that can leave before the floor."""
        width, floor = architecture.width(self.kind), self.floor(architecture, rules)
        return max(0, width - floor) // self.units(architecture, rules)


_REGISTRY: dict[str, GroupKind] = {}


def register_group(kind: GroupKind) -> GroupKind:
    """Make `kind` known by its name."""
    assert kind.name not in _REGISTRY, f"group {kind.name} is registered twice"
    _REGISTRY[kind.name] = kind
    return kind


def known_groups() -> tuple[GroupKind, ...]:
    """All kinds of groups, in the order of their registration."""
    return tuple(_REGISTRY.values())


def group_names() -> tuple[str, ...]:
    """Their names, in the same order."""
    return tuple(_REGISTRY)


def default_names() -> tuple[str, ...]:
    """Names of those that leave where no configuration says, in the same order."""
    return tuple(kind.name for kind in known_groups() if kind.is_default)


def find_group(name: str, where: str = "pruning.types") -> GroupKind:
    """The kind of group called `name`. Raises UserError, naming `where` it stands and the known ones."""
    if name not in _REGISTRY:
        near = did_you_mean(name, _REGISTRY)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f'{where}: unknown kind of group "{one_line(name)}"{hint} (known: {", ".join(_REGISTRY)})')
    return _REGISTRY[name]
