"""What stays of every kind of unit, so that none pays for all (`pruning.balance`).

Scores are the immediate change of the loss. Inside a kind that is what one wants; between kinds it misleads: in a small
model the next to last head is the cheapest group per parameter at that moment, and the dearest after training. So a
kind that has come down to `balance` times its proportional width waits while another one has more to give.
"""

import math
from collections import Counter
from collections.abc import Collection

from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.budget import PARAMS, Limit
from megatron_prune.pruning.groups import GroupKind, Rules


def proportional_share(source: Architecture, groups: Collection[GroupKind], target_params: float) -> float:
    """u in [0, 1]: `source` has `target_params` parameters when every kind of `groups` keeps the share u of its units.

    A tensor has as many factors u as it has dims of such kinds, so the count is a polynomial of degree two in u (of
    three with layers among the kinds: see `share_within`).
    """
    shrinking = {group.kind for group in groups}
    terms = Counter[int]()  # power of u -> elements
    for name, shape in source.table.hf_shapes(source).items():
        part, _ = source.table.parts[name]
        terms[sum(dim.kind in shrinking or dim.kind.follows in shrinking for dim in part.dims)] += math.prod(shape)
    rest = target_params - terms[0]
    if rest <= 0 or not shrinking:
        return 0.0
    return min(1.0, 2 * rest / (terms[1] + math.sqrt(terms[1] ** 2 + 4 * terms[2] * rest)))


def share_within(source: Architecture, groups: Collection[GroupKind], limit: Limit) -> float:
    """u in [0, 1]: as `proportional_share` for whatever `limit` counts, which grows with u."""
    if limit.name == PARAMS and all(group.kind in source.table.kinds for group in groups):
        return proportional_share(source, groups, limit.most)
    shrinking, low, high = {group.kind for group in groups}, 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        counts = {
            kind: live * (middle if kind in shrinking or kind.follows in shrinking else 1.0)
            for kind, live in source.counts.items()
        }
        low, high = (low, middle) if limit.measure(source.table, counts) > limit.most else (middle, high)
    return low if limit.of(source) > limit.most else 1.0


def balanced_widths(source: Architecture, rules: Rules, balance: float) -> dict[str, int]:
    """By name of the kind of group, the units per layer that stay while another kind has more than its own to lose.

    Args:
        source: the architecture at the beginning of the run.
        balance: share of the proportional width; 0: nothing is held back.
    """
    groups = rules.kinds(source)
    share = balance * min(share_within(source, groups, limit) for limit in rules.budget.limits)
    return {group.name: math.ceil(share * source.width(group.kind) - _ROUNDING) for group in groups}


_HALVINGS = 60  # of the interval that a share is looked for in
_ROUNDING = 1e-9  # a share that is a whole number of units but for rounding is that number
