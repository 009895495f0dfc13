"""What may leave in one step: a module per kind of group, registered as criteria are.

    kind   GroupKind: the least salient group of a kind, floors, costs; the registry
    head   one query head of every layer, or whole KV heads (`pruning.gqa`)
    ffn    one FFN channel of every layer
    stem   one channel of the residual stream
    layer  a whole layer

A new kind is a module here and its place in `SHIPPED`. Selector, schedule, history, estimates and reports loop over
what is registered; ties go to what was registered first.
"""

from megatron_prune.pruning.groups.ffn import FFN_CHANNELS
from megatron_prune.pruning.groups.head import HEADS
from megatron_prune.pruning.groups.kind import (
    GroupKind,
    Offer,
    Rules,
    default_names,
    find_group,
    group_names,
    known_groups,
    register_group,
)
from megatron_prune.pruning.groups.layer import BLOCK_INFLUENCE, LAYERS
from megatron_prune.pruning.groups.stem import STEM_CHANNELS

SHIPPED = (HEADS, FFN_CHANNELS, STEM_CHANNELS, LAYERS)
for _kind in SHIPPED:
    register_group(_kind)
