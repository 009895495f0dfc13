"""When to prune: ratio p:g as a small account of credits.

At every g-th iteration p pruning steps are credited; a group is removed while there is at least one, and uses up its
cost (by default a head costs kv_channels, an FFN or stem channel 1): after a head the account is in debt and pruning
pauses until it is paid. This reproduces the published token counts and the flat stretches after each head in the
paper's Figure 7. Credits are the schedule's whole state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PruningSchedule:
    """Ratio p:g.

    Args:
        pruning_steps: p. gradient_steps: g.
        first_prune_iter: every g-th iteration from this one on is scheduled, itself included; iterations count from 1.
        group_cost: pruning steps that a group of each kind uses up.
        target_params: pruning ends once parameters <= target.
    """

    pruning_steps: int
    gradient_steps: int
    first_prune_iter: int
    group_cost: Mapping[str, float]
    target_params: int

    def is_scheduled(self, iteration: int, parameters: int) -> bool:
        """Whether `iteration` (from 1) earns credits."""
        since = iteration - self.first_prune_iter
        return since >= 0 and since % self.gradient_steps == 0 and parameters > self.target_params

    def credited(self, credits: float) -> float:
        """Credits after a scheduled iteration's income."""
        return credits + self.pruning_steps

    def may_prune(self, credits: float, parameters: int) -> bool:
        """Whether a group may go now."""
        return credits >= 1 and parameters > self.target_params

    def may_prune_several(self, credits: float) -> bool:
        """Whether more than one group could go in the iteration that starts with `credits` (income included)."""
        return credits - min(self.group_cost.values()) >= 1

    def spent(self, credits: float, kind: str) -> float:
        """Credits after removing a group of `kind`."""
        return credits - self.group_cost[kind]
