"""What layer Hessians cost a rank: memory and traffic of the second-order update and of metric `obc`.

    hessian_memory   (bytes of kept inputs, bytes while a Hessian is factorised)
    hessian_traffic  bytes that a rank sends per update of an FFN channel, or per scoring by `obc`

Both are zero in a run that needs no Hessians; see docs/second_order.md for what happens when.
"""

from __future__ import annotations

import math

from megatron_prune.config import Config
from megatron_prune.launch.estimate.activations import FP32, element_size, micro_batch_tokens
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.model.layout import ShardLayout
from megatron_prune.pruning.groups import find_group
from megatron_prune.saliency.criteria import INVERSE_HESSIAN, find_criterion

_BYTES_PER_ELEMENT = 20  # of H: fp64 twice (H and factor, or two partial sums) and fp32 once, while it travels


def needs_hessians(config: Config) -> tuple[bool, bool]:
    """Whether Hessians are needed: (for the second-order update, for the criterion)."""
    pruning = config.pruning
    is_on = pruning.enabled
    return is_on and pruning.second_order.enabled, is_on and INVERSE_HESSIAN in find_criterion(pruning.metric).needs


def kept_tokens(config: Config, placement: Placement) -> int:
    """Tokens per data-parallel rank whose inputs are kept."""
    tokens, wanted = micro_batch_tokens(config), config.pruning.second_order.calibration_tokens
    return tokens * min(placement.micro_batches, math.ceil(wanted / (tokens * placement.dp)))


def hessian_memory(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> tuple[int, int]:
    """Bytes of inputs kept from the forward pass to the removal, and of the widest layer's H while it is alive."""
    update, criterion = needs_hessians(config)
    if not (update or criterion):
        return 0, 0
    shape, layers = layout.architecture.shape, len(placement.stages[stage])
    features = layers * (layout.stored.heads * shape.kv_channels + layout.stored.ffn)
    widest = max(layout.architecture.num_attention_heads * shape.kv_channels, layout.architecture.ffn_hidden_size)
    if (
        update
        and config.pruning.second_order.stem
        and any(find_group(name).kind.is_shared for name in config.pruning.types)
    ):
        inputs = 2 * layers + (placement.is_last(stage) and not shape.tie_word_embeddings)
        features += inputs * layout.stored.hidden // (placement.tp if config.parallel.splits_sequences else 1)
        widest = max(widest, layout.architecture.hidden_size)
    return kept_tokens(config, placement) * features * element_size(config), _BYTES_PER_ELEMENT * widest**2


def hessian_traffic(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> float:
    """Bytes that a rank of `stage` sends for Hessians in a scoring, by rings. Layers are dealt evenly to owners, so a
    rank takes part in one of TP sums; solutions are small."""
    update, criterion = needs_hessians(config)
    architecture = layout.architecture
    heads = architecture.num_attention_heads * architecture.shape.kv_channels
    widths = [architecture.ffn_hidden_size] if update or criterion else []
    widths += [heads] if criterion else []
    sent = 0.0
    for width in widths:
        gathered = kept_tokens(config, placement) * width * element_size(config) * (placement.tp - 1) / placement.tp
        reduced = FP32 * width**2 / placement.tp * (placement.dp - 1) / placement.dp
        sent += len(placement.stages[stage]) * (gathered + reduced)
    return sent
