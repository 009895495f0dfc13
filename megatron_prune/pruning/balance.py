"""What stays of every kind of unit, so that none pays for all (`pruning.balance`).

    proportional_share   the share of its units that every kind would keep if all shrank alike
    balanced_widths      the widths down to which the scores decide freely

Scores are the immediate change of the loss. Inside a kind that is what one wants; between kinds it misleads: in a small
model the next to last head is the cheapest group per parameter at that moment, and the dearest after training. So a
kind that has come down to `balance` times its proportional width waits while another one has more to give.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.groups import GroupKind, Rules


def proportional_share(source: Architecture, groups: Collection[GroupKind], target_params: int) -> float:
    """u in [0, 1]: `source` has `target_params` parameters when every kind of `groups` keeps the share u of its units.

    A tensor has as many factors u as it has dims of such kinds, so the count is a polynomial of degree two in u.
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


def balanced_widths(source: Architecture, rules: Rules, balance: float) -> dict[str, int]:
    """By name of the kind of group, the units per layer that stay while another kind has more than its own to lose.

    Args:
        source: the architecture at the beginning of the run.
        balance: share of the proportional width; 0: nothing is held back.
    """
    groups = rules.kinds(source)
    share = balance * proportional_share(source, groups, rules.target_params)
    return {group.name: math.ceil(share * source.width(group.kind) - _ROUNDING) for group in groups}


_ROUNDING = 1e-9  # a share that is a whole number of units but for rounding is that number
