"""The oracle's second-order update (EfficientLLM-B): constrained least squares, written as that.

    readers       weights whose input columns are of a kind, and which of those survive a removal
    compensated   those weights with the best surviving columns, and the output error without and with them
    without       inputs of all layers after a removal

Of all W' whose removed columns are zero, the one with the least |(W - W') X|^2 / tokens + ridge |W - W'|^2 is, on the
surviving columns s, W' = W H[:, s] (H[s, s])^-1, with H the damped Hessian of the inputs. Everything is fp64.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits, element_index, weight_table
from megatron_prune.testing.reference.oracle_scores import damped_hessian


def readers(geometry: Geometry, kind: str, before: LiveUnits, after: LiveUnits) -> Iterator[tuple[str, Tensor]]:
    """(name, int64 positions of its surviving columns); the embedding reads nothing, and a tied LM head is one."""
    for name, (layer, kinds) in weight_table(geometry, after).items():
        if len(kinds) == 2 and kinds[1] == kind and name != "model.embed_tokens.weight":
            yield name, element_index(geometry, kind, layer, before, after)


def compensated(
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    geometry: Geometry,
    before: LiveUnits,
    after: LiveUnits,
    kind: str,
    damping: float,
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Weights of the same shapes with updated survivors (removed columns untouched), and the summed output errors."""
    result, errors = {}, [0.0, 0.0]
    for name, kept in readers(geometry, kind, before, after):
        weight, x = weights[name].double(), inputs[name].double()
        hessian = damped_hessian(x, damping)
        best = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        for number, survivors in enumerate((weight[:, kept], best)):
            errors[number] += (x @ weight.T - x[:, kept] @ survivors.T).square().sum().item() / len(x)
        result[name] = weights[name].clone()
        result[name][:, kept] = best.to(weights[name].dtype)
    return result, (errors[0], errors[1])


def without(
    inputs: Mapping[str, Tensor], geometry: Geometry, before: LiveUnits, after: LiveUnits, kind: str
) -> dict[str, Tensor]:
    """The same inputs without the features that left."""
    survivors = dict(readers(geometry, kind, before, after))
    return {name: x[:, survivors[name]] if name in survivors else x for name, x in inputs.items()}
