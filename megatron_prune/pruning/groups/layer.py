"""A whole layer: both its output projections become zero, so that it hands on what it gets, and then it is gone.

With `score: block_influence` the layer that turns what it is given least is the candidate (`InfluenceWatcher`). What
it is worth against groups of other kinds is still the criterion's sum, since a cosine is no change of the loss.
"""

import math

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import LAYER
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups.kind import WEIGHTS, GroupKind, Offer, Rules
from megatron_prune.saliency.scores import UnitScores

BLOCK_INFLUENCE = "block_influence"


class LayerGroups(GroupKind):
    """One layer with all its units. Its score is the criterion summed over the columns of its output projections, that
    is over the units that own them."""

    scores = (WEIGHTS, BLOCK_INFLUENCE)

    def default_cost(self, shape: LlamaShape) -> int:
        """As a head costs one per column and layer that it takes: the columns of one layer, shared out over all."""
        columns = shape.num_attention_heads * shape.kv_channels + shape.ffn_hidden_size
        return -(-columns // shape.num_layers)

    @property
    def is_default(self) -> bool:
        """Not: a configuration has to name it."""
        return False

    @property
    def default_limit(self) -> int:
        """One: what a layer is worth depends on those that are left."""
        return 1

    def offer(self, scores: UnitScores, architecture: Architecture, rules: Rules) -> Offer:
        """The layer with the least score, or block influence; then `swap` is as large a share of the layer's score as
        the second least influence is above the least."""
        outputs = [row for row in architecture.table.rows if row.is_output]
        sums = {
            layer: math.fsum(float(scores.of(row.dims[1].kind, layer).sum()) for row in outputs if row.layer == layer)
            for layer in architecture.layers
        }
        order, scale = sums, 1.0
        if rules.scores.get(self.name) == BLOCK_INFLUENCE:
            order = dict(zip(architecture.layers, scores.of(self.kind).tolist(), strict=True))
        first, *others = sorted(order, key=lambda layer: (order[layer], layer))
        if order is not sums:
            scale = abs(sums[first]) / max(abs(order[first]), _TINY)
        swap = scale * (order[others[0]] - order[first]) if others else math.inf
        return Offer(group_of(architecture, first), sums[first], swap)

    def shrunk(self, architecture: Architecture, groups: int, rules: Rules, *, cheapest: bool = False) -> Architecture:
        """`architecture` without so many layers: the last ones, or those with most parameters (`cheapest`)."""
        layers = list(architecture.layers)
        if cheapest:
            layers.sort(key=lambda layer: architecture.cost(group_of(architecture, layer)))
        for layer in reversed(layers[len(layers) - groups :]):
            architecture = architecture.without(group_of(architecture, layer))
        return architecture


def group_of(architecture: Architecture, layer: int) -> Group:
    """`layer` and all units that it has of its own."""
    gone = {
        kind: tuple(tuple(ids.tolist()) if at == layer else () for at, ids in enumerate(sites))
        for kind, sites in architecture.live.items()
        if not kind.is_shared
    }
    return Group(LAYER.name, {LAYER: ((layer,),), **gone})


_TINY = 1e-30
LAYERS = LayerGroups("layer", LAYER)
