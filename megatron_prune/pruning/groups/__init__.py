"""What may leave in one step: the kinds of groups, registered as criteria are.

    kind   GroupKind: the least salient group of a kind, floors, costs; the registry
    head   one query head of every layer, or whole KV heads (`pruning.gqa`)
    layer  a whole layer

What takes one unit of its kind at a time needs no module. A new kind is a `GroupKind` and its place in `SHIPPED`.
Selector, schedule, history, estimates and reports loop over what is registered; ties go to what was registered first.
"""

from megatron_prune.model.kinds import FFN, STEM
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

FFN_CHANNELS = GroupKind("ffn", FFN)  # one channel of the FFN's intermediate activation in every layer
STEM_CHANNELS = GroupKind("stem", STEM)  # one channel of the residual stream (hidden size), everywhere at once
SHIPPED = (HEADS, FFN_CHANNELS, STEM_CHANNELS, LAYERS)
for _kind in SHIPPED:
    register_group(_kind)
