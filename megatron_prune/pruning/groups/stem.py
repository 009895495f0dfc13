"""One channel of the residual stream (hidden size), everywhere at once."""

from megatron_prune.model.kinds import STEM
from megatron_prune.pruning.groups.kind import GroupKind

STEM_CHANNELS = GroupKind("stem", STEM)
