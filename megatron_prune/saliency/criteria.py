"""Element-wise saliency criteria, as pure functions, and their registry.

A criterion sees one flat fp32 piece of an output projection (attention output or FFN down) at (w_t, g_t) and returns a
non-negative S of the same shape. Removing w is delta = -w, so the loss changes by -w g + w^2 F / 2 (EfficientLLM,
arXiv 2502.06663, Eq. 9): that is where the sign in `taylor_mix` comes from. Add one by writing a function:

    @criterion("my_score", needs={"gradient"})
    def my_score(elements: Elements) -> Tensor:
        return (elements.weight * elements.gradient).abs().sqrt()

and name it in `pruning.metric`. Sums per unit, reduction over ranks and the choice follow by themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from megatron_prune.errors import UserError


@dataclass(frozen=True)
class Elements:
    """Flat fp32 tensors of equal length over one owned range of one output projection.

    Args:
        weight: main weights w_t.
        gradient: reduced gradient of the mean loss over the global batch, before clipping.
        fisher: diagonal empirical Fisher, or None when the criterion does not need it.
    """

    weight: Tensor
    gradient: Tensor
    fisher: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A registered criterion: its name, the statistics it needs (`gradient`, `fisher`), and the function."""

    name: str
    needs: frozenset[str]
    score: Callable[[Elements], Tensor]


_REGISTRY: dict[str, Criterion] = {}


def criterion(name: str, needs: Iterable[str] = ()) -> Callable[[Callable[[Elements], Tensor]], Criterion]:
    """Decorator that registers an element-wise function under `name`."""

    def register(function: Callable[[Elements], Tensor]) -> Criterion:
        assert name not in _REGISTRY, f"criterion {name} is registered twice"
        _REGISTRY[name] = Criterion(name, frozenset(needs), function)
        return _REGISTRY[name]

    return register


def known_criteria() -> list[str]:
    """Names of all registered criteria."""
    return sorted(_REGISTRY)


def find_criterion(name: str) -> Criterion:
    """The criterion called `name`. Raises UserError naming the known ones."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"pruning.metric: unknown criterion {name!r}{hint} (known: {', '.join(known_criteria())})")
    return _REGISTRY[name]


def _fisher(elements: Elements) -> Tensor:
    assert elements.fisher is not None
    return elements.fisher


@criterion("taylor_first", needs={"gradient"})
def taylor_first(elements: Elements) -> Tensor:
    """|w g|: LLM-Pruner's param_first."""
    return (elements.weight * elements.gradient).abs()


@criterion("taylor_second", needs={"gradient", "fisher"})
def taylor_second(elements: Elements) -> Tensor:
    """|w^2 F|: LLM-Pruner's param_second."""
    return elements.weight.square() * _fisher(elements)


@criterion("obd", needs={"gradient", "fisher"})
def obd(elements: Elements) -> Tensor:
    """w^2 F / 2: Optimal Brain Damage (LeCun et al. 1990) with the empirical Fisher as the Hessian's diagonal."""
    return elements.weight.square() * _fisher(elements) / 2


@criterion("taylor_mix", needs={"gradient", "fisher"})
def taylor_mix(elements: Elements) -> Tensor:
    """|w g - w^2 F / 2|: LLM-Pruner's param_mix and EfficientLLM-A."""
    second = elements.weight.square().mul_(_fisher(elements)).div_(2)
    return (elements.weight * elements.gradient).sub_(second).abs_()


@criterion("magnitude")
def magnitude(elements: Elements) -> Tensor:
    """|w|."""
    return elements.weight.abs()


@criterion("random")
def random(elements: Elements) -> Tensor:
    """The control: no score at all; the selector draws evenly over the units of all kinds that are switched on."""
    return elements.weight.new_zeros(elements.weight.shape)
