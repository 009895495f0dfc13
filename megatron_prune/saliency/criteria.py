"""Element-wise saliency criteria, as pure functions, and their registry.

A criterion sees one flat fp32 piece of an output projection (attention output or FFN down) at (w_t, g_t) and returns S
of the same shape: what the element adds to its units' scores, not negative except for `taylor_signed`. Removing w is
delta = -w, so the loss changes by -w g + w^2 F / 2 (EfficientLLM, arXiv 2502.06663, Eq. 9): that is where the sign in
`taylor_mix` comes from. Add one by writing a function:

    @criterion("my_score", needs={"gradient"})
    def my_score(elements: Elements) -> Tensor:
        return (elements.weight * elements.gradient).abs().sqrt()

and name it in `pruning.metric`. Sums per unit, reduction over ranks and the choice follow by themselves. What a
criterion may need, and what each of the shipped ones computes and costs, is in docs/criteria.md.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megatron_prune.errors import UserError, did_you_mean

GRADIENT, FISHER, LIVE = "gradient", "fisher", "live"
INPUT_NORM, INPUT_VARIANCE, INPUT_MAGNITUDE = "input_norm", "input_variance", "input_magnitude"
STEM_MAGNITUDE, INVERSE_HESSIAN = "stem_magnitude", "inverse_hessian"

# Means per token of one column's input x, collected in one pass together.
INPUT_MOMENTS = frozenset({INPUT_NORM, INPUT_VARIANCE, INPUT_MAGNITUDE, STEM_MAGNITUDE})
STATISTICS = frozenset({GRADIENT, FISHER, LIVE, INVERSE_HESSIAN}) | INPUT_MOMENTS


@dataclass(frozen=True)
class Elements:
    """Flat fp32 tensors of equal length over one owned range of one output projection.

    Args:
        weight: main weights w_t.
        gradient: reduced gradient of the mean loss over the global batch, before clipping.
        statistics: what else the criterion declared to need, by name; the properties below read it.
    """

    weight: Tensor
    gradient: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def _statistic(self, name: str) -> Tensor:
        assert name in self.statistics, f'a criterion that reads {name} declares it: needs={{"{name}"}}'
        return self.statistics[name]

    @property
    def fisher(self) -> Tensor:
        """Diagonal empirical Fisher F, from the source that `pruning.fisher` names."""
        return self._statistic(FISHER)

    @property
    def live(self) -> Tensor:
        """1 where both the row and the column hold a unit, else 0. Only scores that ignore the weight need it: empty
        slots must add nothing to a sum, and elsewhere their zero weights see to that."""
        return self._statistic(LIVE)

    @property
    def input_norm(self) -> Tensor:
        """Root mean square over the batch's tokens of the input of the element's column."""
        return self._statistic(INPUT_NORM)

    @property
    def input_variance(self) -> Tensor:
        """Variance of that input over the batch's tokens."""
        return self._statistic(INPUT_VARIANCE)

    @property
    def input_magnitude(self) -> Tensor:
        """Mean absolute value of that input."""
        return self._statistic(INPUT_MAGNITUDE)

    @property
    def stem_magnitude(self) -> Tensor:
        """Mean absolute value of the row's stem channel where the attention or FFN block reads it: after its norm."""
        return self._statistic(STEM_MAGNITUDE)

    @property
    def inverse_hessian(self) -> Tensor:
        """[H^-1]_pp of the element's column p, with H = X^T X / tokens + damping (see `saliency.hessian`)."""
        return self._statistic(INVERSE_HESSIAN)


Score = Callable[[Elements], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A registered criterion.

    Args:
        needs: names out of `STATISTICS`.
        score: S of every element; a unit's score is the sum over its elements.
        stem: another S to sum for stem channels (rows), or None where the same one serves all kinds.
    """

    name: str
    needs: frozenset[str]
    score: Score
    stem: Score | None = None


_REGISTRY: dict[str, Criterion] = {}


def criterion(name: str, needs: Iterable[str] = (), stem: Score | None = None) -> Callable[[Score], Criterion]:
    """Decorator that registers an element-wise function under `name`; see `Criterion` for the arguments."""

    unknown = set(needs) - STATISTICS
    assert not unknown, f"criterion {name} needs {sorted(unknown)}; there are {', '.join(sorted(STATISTICS))}"

    def register(function: Score) -> Criterion:
        assert name not in _REGISTRY, f"criterion {name} is registered twice"
        _REGISTRY[name] = Criterion(name, frozenset(needs), function, stem)
        return _REGISTRY[name]

    return register


def known_criteria() -> list[str]:
    """Names of all registered criteria."""
    return sorted(_REGISTRY)


def find_criterion(name: str) -> Criterion:
    """The criterion called `name`. Raises UserError naming the known ones."""
    if name not in _REGISTRY:
        near = did_you_mean(name, _REGISTRY)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"pruning.metric: unknown criterion {name!r}{hint} (known: {', '.join(known_criteria())})")
    return _REGISTRY[name]


@criterion("taylor_first", needs={"gradient"})
def taylor_first(elements: Elements) -> Tensor:
    """|w g|: LLM-Pruner's param_first."""
    return (elements.weight * elements.gradient).abs()


@criterion("taylor_second", needs={"gradient", "fisher"})
def taylor_second(elements: Elements) -> Tensor:
    """|w^2 F|: LLM-Pruner's param_second."""
    return elements.weight.square() * elements.fisher


@criterion("obd", needs={"gradient", "fisher"})
def obd(elements: Elements) -> Tensor:
    """w^2 F / 2: Optimal Brain Damage (LeCun et al. 1990) with the empirical Fisher as the Hessian's diagonal."""
    return elements.weight.square() * elements.fisher / 2


@criterion("taylor_mix", needs={"gradient", "fisher"})
def taylor_mix(elements: Elements) -> Tensor:
    """|w g - w^2 F / 2|: LLM-Pruner's param_mix and EfficientLLM-A."""
    second = elements.weight.square().mul_(elements.fisher).div_(2)
    return (elements.weight * elements.gradient).sub_(second).abs_()


@criterion("taylor_signed", needs={"gradient", "fisher"})
def taylor_signed(elements: Elements) -> Tensor:
    """-w g + w^2 F / 2, with its sign: summed over a unit, the change of the loss that a quadratic model with a
    diagonal Hessian predicts for its removal. Terms of one unit cancel as they do in the loss; absolute values would
    rank units by how much they disagree inside. With `fisher_unit: token` F has the scale of the
    Hessian (docs/criteria.md)."""
    second = elements.weight.square().mul_(elements.fisher).div_(2)
    return second.sub_(elements.weight * elements.gradient)


@criterion("obc", needs={INVERSE_HESSIAN})
def obc(elements: Elements) -> Tensor:
    """w^2 / [H^-1]_pp: how much the layer's squared output error grows (per token) when w goes and the rest of its row
    is re-fitted; Optimal Brain Surgeon per layer (OBC, arXiv 2208.11580; SparseGPT, arXiv 2301.00774)."""
    return elements.weight.square().div_(elements.inverse_hessian)


@criterion("wanda", needs={INPUT_NORM})
def wanda(elements: Elements) -> Tensor:
    """|w| times the norm of its input feature (Wanda, arXiv 2306.11695); the norm is per token, so that scores do not
    grow with the batch."""
    return elements.weight.abs().mul_(elements.input_norm)


@criterion("flap", needs={INPUT_VARIANCE})
def flap(elements: Elements) -> Tensor:
    """w^2 times the variance of its input feature: over a column FLAP's WIFV, variance x ||w_col||^2
    (arXiv 2312.11983)."""
    return elements.weight.square().mul_(elements.input_variance)


def _minitron_stem(elements: Elements) -> Tensor:
    return elements.stem_magnitude * elements.live


@criterion("minitron", needs={INPUT_MAGNITUDE, STEM_MAGNITUDE, LIVE}, stem=_minitron_stem)
def minitron(elements: Elements) -> Tensor:
    """Mean absolute activation, whatever the weights (Minitron, arXiv 2407.14679): of the head's output
    or FFN channel, and for the stem of the normed hidden state."""
    return elements.input_magnitude * elements.live


@criterion("magnitude")
def magnitude(elements: Elements) -> Tensor:
    """|w|."""
    return elements.weight.abs()


@criterion("random")
def random(elements: Elements) -> Tensor:
    """The control: no score at all; the selector draws evenly over the units of all kinds that are switched on."""
    return elements.weight.new_zeros(elements.weight.shape)
