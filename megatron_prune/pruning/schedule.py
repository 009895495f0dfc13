"""When to prune: what is due at the end of an iteration.

    Schedule        what a pruner asks: may groups leave, does one have to, what is left of the credits
    RatioSchedule   p pruning steps for every g gradient steps (EfficientLLM, arXiv 2502.06663)
    CurveSchedule   the size as a function of the tokens consumed (Zhu and Gupta, arXiv 1710.01878)

Where another budget than parameters binds (`pruning.budget`), the parameters here are sizes as that counts them. All
are pure: credits are the only state, and the run keeps them. An iteration is named by its number, from 1, and the
tokens consumed when it ends, both known before it begins.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


class Schedule(ABC):
    """What a pruner asks after every iteration; one that goes by sizes alone has no account of credits."""

    target_params: float  # pruning ends once there are no more parameters than this

    def size(self, tokens: Any) -> Any:
        """Parameters that are allowed once so many tokens are consumed, where that is what decides."""
        raise NotImplementedError

    def is_open(self, iteration: int, tokens: int, parameters: float) -> bool:
        """Whether groups may leave at the end of this iteration at all, so that it earns its credits."""
        return bool(parameters > self.size(tokens))

    def credited(self, credits: float) -> float:
        """Credits with the income of an open iteration."""
        return credits

    def is_due(self, credits: float, tokens: int, parameters: float) -> bool:
        """Whether a group goes now, at the end of an open iteration."""
        return bool(parameters > self.size(tokens))

    def spent(self, credits: float, kind: str) -> float:
        """Credits after removing a group of `kind`."""
        return credits

    @abstractmethod
    def forecast(self, kinds: Sequence[str], parameters: np.ndarray, tokens_per_iteration: int) -> np.ndarray:
        """int64 iteration (from 1) in which each of these groups leaves, if every iteration goes well.

        Args:
            kinds: of the groups, in order. parameters: of the model before each of them leaves.
        """


@dataclass(frozen=True)
class RatioSchedule(Schedule):
    """Ratio p:g as a small account of credits.

    At every g-th iteration p pruning steps are credited; a group is removed while there is at least one, and uses up
    its cost (by default a head costs kv_channels, an FFN or stem channel 1): after a head the account is in debt and
    pruning pauses until it is paid. This reproduces the published token counts and the flat stretches after each head
    in the paper's Figure 7.

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
    target_params: float

    def is_open(self, iteration: int, tokens: int, parameters: float) -> bool:
        """Every g-th iteration while above the target."""
        since = iteration - self.first_prune_iter
        return since >= 0 and since % self.gradient_steps == 0 and parameters > self.target_params

    def credited(self, credits: float) -> float:
        """`credits` and the p pruning steps that a scheduled iteration earns."""
        return credits + self.pruning_steps

    def is_due(self, credits: float, tokens: int, parameters: float) -> bool:
        """While there is a credit and the target is not reached."""
        return credits >= 1 and parameters > self.target_params

    def spent(self, credits: float, kind: str) -> float:
        """`credits` less the pruning steps that a group of `kind` uses up; may be negative."""
        return credits - self.group_cost[kind]

    def forecast(self, kinds: Sequence[str], parameters: np.ndarray, tokens_per_iteration: int) -> np.ndarray:
        """See `Schedule.forecast`: plays the account through, group by group."""
        above = self.target_params + 1
        reach = max(self.first_prune_iter, 1) + self.gradient_steps
        first = next(i for i in range(1, reach + 1) if self.is_open(i, 0, above))
        iterations = np.zeros(len(kinds), dtype=np.int64)
        credits, iteration = 0.0, first - self.gradient_steps
        for number, kind in enumerate(kinds):
            while not self.is_due(credits, 0, above):
                credits = self.credited(credits)
                iteration += self.gradient_steps
            iterations[number] = iteration
            credits = self.spent(credits, kind)
        return iterations


@dataclass(frozen=True)
class CurveSchedule(Schedule):
    """The size that the model may have after so many tokens: whatever is above it leaves, one group or many or none.

    With u the share of the way from `start` to `end`, size = target + (source - target) (1 - u)^p; p is 3 for `cubic`
    (fast first, slow last) and 1 for `linear`. The target is reached at the first iteration with `end` tokens at the
    latest; the last group before it may take the model there a little earlier. What could not leave in time (a step was
    skipped, a spike of the loss, too many heads at once) leaves later. Costs of groups play no part.

    Args:
        shape: of the curve. start, end: tokens, start < end. source_params: of the model at the start.
        target_params: pruning ends once parameters <= target.
    """

    shape: Literal["cubic", "linear"]
    start: int
    end: int
    source_params: float
    target_params: float

    def size(self, tokens: int | np.ndarray) -> np.ndarray:
        """Parameters (float64) that are allowed once so many tokens are consumed."""
        left = 1 - (np.asarray(tokens, dtype=np.float64) - self.start) / (self.end - self.start)
        power = 3 if self.shape == "cubic" else 1
        return self.target_params + (self.source_params - self.target_params) * np.clip(left, 0, 1) ** power

    def forecast(self, kinds: Sequence[str], parameters: np.ndarray, tokens_per_iteration: int) -> np.ndarray:
        """See `Schedule.forecast`: where the curve falls below each number of parameters, solved for the tokens."""
        power = 3 if self.shape == "cubic" else 1
        above = (np.asarray(parameters, dtype=np.float64) - self.target_params) / (
            self.source_params - self.target_params
        )
        tokens = self.start + (self.end - self.start) * (1 - np.clip(above, 0, 1) ** (1 / power))
        first = np.floor(tokens / tokens_per_iteration).astype(np.int64) + 1  # the size must be below, not equal
        return np.maximum.accumulate(np.minimum(first, -(-self.end // tokens_per_iteration)))
