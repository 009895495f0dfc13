"""The choice of one group: pure functions from unit scores to a decision.

    Decision           the group that goes, with the saliencies of all kinds and the margin it won by
    choose             UnitScores -> Decision or None
    least_architecture what no target can be below

Each kind of group that is switched on offers its least salient group (`pruning.groups`), and the least of those is
removed (EfficientLLM, arXiv 2502.06663, Eq. 10). Ties go to the kind registered first: head before ffn before stem.

Scores may be negative (`taylor_signed`: the loss is predicted to fall). Such groups go first, the most negative one
before all others. `normalize: per_parameter` weighs what a removal costs against the parameters it saves (or what it
saves of another budget that binds, `pruning.budget`; what saves nothing of that stays); where it costs nothing there is
nothing to weigh, and dividing would put the largest groups last among those: negative scores are compared as they are.

What is least may have to wait, in this order: a group that ends too far below the target (`finish: exact`), one of a
kind that has no more than its balanced width (`pruning.balance`), one of a kind of which enough have left by the same
scores (`limit`).
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.pruning.groups import GroupKind, Rules
from megatron_prune.saliency.scores import UnitScores, score_length

OVERSHOOT = 0.005  # `finish: exact` avoids groups that end further below the target than this share of it
STRETCH = 0.8  # for its sake a kind may come down to this share of its balanced width, where not only parameters count


@dataclass(frozen=True)
class Candidate:
    """The least salient group of one kind.

    Args:
        score: its saliency, as compared between kinds.
        runner_up: the score with the second-best unit in the layer where that costs least; infinite without one.
        left: units of the kind that stay in the layer where fewest do.
        size: of the model without it, as `rules.budget` counts.
    """

    group: Group
    score: float
    runner_up: float
    parameters_after: int
    left: int
    size: float


@dataclass(frozen=True)
class Decision:
    """The group to remove.

    Args:
        scores: saliency by name of the kind of group, of those that had a candidate.
        margin: (runner-up - best) / |best|; infinite without an alternative. Below 1e-4 rounding may decide.
    """

    group: Group
    scores: dict[str, float]
    margin: float
    parameters_after: int


def choose(
    scores: UnitScores, architecture: Architecture, rules: Rules, step: int = 0, resting: Collection[str] = ()
) -> Decision | None:
    """The group to remove now, or None when every kind is off or at its floor, or would have to rest.

    Args:
        scores: aligned with `architecture`.
        step: removals so far; only `draw_seed` (metric `random`) uses it.
        resting: names of kinds of which enough have left by the same scores.
    """
    kinds = rules.kinds(architecture)
    if rules.draw_seed is not None:
        scores, kinds = _drawn(architecture, rules, step)
    found = {kind.name: c for kind in kinds if (c := _candidate(kind, scores, architecture, rules))}
    if not found:
        return None
    eligible = _fitting(found, rules) if rules.finish == "exact" else found
    eligible = {name: c for name, c in _balanced(eligible, rules).items() if name not in resting}
    if not eligible:
        return None
    best_name = min(eligible, key=lambda name: eligible[name].score)  # the first of equals: in order of registration
    best = eligible[best_name]
    runner_up = min([best.runner_up, *(c.score for name, c in eligible.items() if name != best_name)])
    margin = (runner_up - best.score) / max(abs(best.score), 1e-30)
    return Decision(best.group, {name: c.score for name, c in found.items()}, margin, best.parameters_after)


def _candidate(kind: GroupKind, scores: UnitScores, architecture: Architecture, rules: Rules) -> Candidate | None:
    """The least salient group of `kind`, or None when that would go below the floor or save nothing that counts."""
    offer = kind.offer(scores, architecture, rules)
    left = kind.left(architecture, offer.group)
    if left < rules.floor(kind.name):
        return None
    after, limit = architecture.without(offer.group), rules.budget.binding(architecture)
    saved = limit.of(architecture) - limit.of(after)
    if saved <= 0:
        return None
    score, runner_up = (normalized(value, saved, rules) for value in (offer.score, offer.score + offer.swap))
    return Candidate(offer.group, score, runner_up, after.parameters, left, rules.budget.size(after))


def normalized(score: float, saved: float, rules: Rules) -> float:
    """A group's score as it is compared between kinds, given what its removal saves of the budget that binds."""
    return score / saved if rules.normalize == "per_parameter" and score > 0 else score


def _fitting(found: dict[str, Candidate], rules: Rules) -> dict[str, Candidate]:
    """Those that end no further than OVERSHOOT below the target, or else the one that ends nearest to it.

    Every group saves parameters, so a few smaller ones close any gap. Of time some save next to nothing, and whole
    kinds would leave to spare one layer: under other limits than parameters, what fits goes no lower than STRETCH of
    its balanced width while another kind keeps its own.
    """
    fitting = {name: c for name, c in found.items() if c.size >= rules.budget.target * (1 - OVERSHOOT)}
    if rules.limits:
        kept = {name: c for name, c in fitting.items() if c.left >= STRETCH * rules.widths.get(name, 0)}
    else:
        kept = fitting
    if kept:
        return kept
    left = _balanced(found, rules) if fitting else found
    nearest = max(left, key=lambda name: left[name].size)
    return {nearest: left[nearest]}


def _balanced(found: dict[str, Candidate], rules: Rules) -> dict[str, Candidate]:
    """Those that keep their balanced width, or else all."""
    return {name: c for name, c in found.items() if c.left >= rules.widths.get(name, 0)} or found


def _drawn(architecture: Architecture, rules: Rules, step: int) -> tuple[UnitScores, tuple[GroupKind, ...]]:
    """The control: a kind drawn evenly over all units of the kinds switched on, and random unit scores within it."""
    generator = np.random.default_rng([rules.draw_seed or 0, step])
    scores = UnitScores.from_vector(architecture, generator.random(score_length(architecture)))
    open_kinds = [kind for kind in rules.kinds(architecture) if _candidate(kind, scores, architecture, rules)]
    if not open_kinds:
        return scores, ()
    weights = np.array([sum(map(len, architecture.sites(kind.kind))) for kind in open_kinds], dtype=np.float64)
    name = str(generator.choice([kind.name for kind in open_kinds], p=weights / weights.sum()))
    return scores, tuple(kind for kind in open_kinds if kind.name == name)


def least_architecture(architecture: Architecture, rules: Rules) -> Architecture:
    """Every kind that is switched on at its floor: no target below it can be reached."""
    smallest = architecture
    for kind in rules.kinds(architecture):
        smallest = kind.shrunk(smallest, kind.most(architecture, rules), rules, cheapest=True)
    return smallest
