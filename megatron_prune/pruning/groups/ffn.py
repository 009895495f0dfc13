"""One channel of the FFN's intermediate activation in every layer."""

from megatron_prune.model.kinds import FFN
from megatron_prune.pruning.groups.kind import GroupKind

FFN_CHANNELS = GroupKind("ffn", FFN)
