"""What is kept of a forward pass, in bytes per rank: by autograd, and where Hessians are made of layers' inputs.

    saved_activations        kept of one micro-batch from the forward to the backward pass
    recomputed_activations   recomputed in the backward pass, one chunk of layers at a time
    hessian_memory, hessian_traffic   of the second-order update and of metric `obc` (docs/second_order.md)

Activations are a sum over the tensors that the model's own operations save. They differ between devices: torch's
RMSNorm and megatron-core's SwiGLU are fused on GPUs only and save less there. Attention saves no matrix of scores (on
GPUs: flash attention).
"""

import math

from megatron_prune.config import Config
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.model.layout import ShardLayout
from megatron_prune.pruning.groups import find_group
from megatron_prune.saliency.criteria import INVERSE_HESSIAN, find_criterion

FP32, BF16, INT64 = 4, 2, 8


def element_size(config: Config) -> int:
    """Bytes of a weight or activation in the training dtype."""
    return BF16 if config.training.bf16 else FP32


def micro_batch_tokens(config: Config) -> int:
    """Tokens of a micro-batch."""
    return config.training.micro_batch_size * config.data.seq_length


def saved_activations(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> int:
    """Bytes that autograd keeps of the forward pass of one micro-batch on a rank of `stage`, parameters not counted."""
    layers = placement.stages[stage]
    tokens, local, size = micro_batch_tokens(config), _local_tokens(config), element_size(config)
    hidden, seq_length, d = layout.stored.hidden, config.data.seq_length, layout.architecture.shape.kv_channels
    total = 0
    if placement.is_first(stage):
        total += INT64 * tokens
    if config.model.recompute_granularity == "full":
        chunk = config.model.recompute_num_layers or 1
        uniform = config.model.recompute_method == "uniform"
        inputs = -(-len(layers) // chunk) if uniform else min(chunk, len(layers))
        kept = layers[len(layers) :] if uniform else layers[inputs:]
        total += inputs * size * local * hidden + FP32 * seq_length * d
    else:
        kept = layers
    total += sum(_layer(config, layout, layer) for layer in kept)
    if placement.is_last(stage):
        total += _norm(config, layout, hidden, local) + tokens * (FP32 * layout.stored.vocab + INT64 + 1)
    return total


def recomputed_activations(config: Config, layout: ShardLayout, placement: Placement, stage: int) -> int:
    """Bytes that the backward pass recomputes and holds at once: one chunk of layers, or nothing."""
    layers = placement.stages[stage]
    if config.model.recompute_granularity != "full" or not layers:
        return 0
    chunk = config.model.recompute_num_layers or 1 if config.model.recompute_method == "uniform" else 1
    return sum(_layer(config, layout, layer) for layer in layers[:chunk])


def _layer(config: Config, layout: ShardLayout, layer: int) -> int:
    """Bytes that one layer keeps of one micro-batch."""
    hidden, tokens, local, size = (
        layout.stored.hidden,
        micro_batch_tokens(config),
        _local_tokens(config),
        element_size(config),
    )
    mlp = (3 if _is_fused(config) else 5) * layout.stored.ffn * tokens * size
    return 2 * _norm(config, layout, hidden, local) + _attention(config, layout, layer) + mlp


def _attention(config: Config, layout: ShardLayout, layer: int) -> int:
    shape, tokens, size = layout.architecture.shape, micro_batch_tokens(config), element_size(config)
    d, query, kv = shape.kv_channels, layout.stored.heads, layout.stored.kv_heads
    recomputes = config.model.recompute_granularity == "selective"
    kept = query + kv + (query + 2 * kv) + query  # queries, keys, [q | k | v] of which v is a part, output
    if not _is_grouped(layout, layer) and not recomputes:
        kept = 4 * query  # queries, keys and values gathered per query, output
    total = kept * d * tokens * size + 4 * config.data.seq_length * d * size  # cos and sin, for queries and keys
    if not recomputes:
        total += FP32 * query * tokens  # log-sum-exp
    if shape.qk_layernorm:  # fp32 copies of queries and keys, unfused the quotients, root mean squares
        copies = config.training.bf16 + (not _is_fused(config))
        total += FP32 * (query + kv) * tokens * (d * copies + 1) + 2 * FP32 * d * config.training.bf16
    if layout.architecture.table.norms_followers:  # over all heads together: fp32 copies, quotients, roots, weights
        copies = config.training.bf16 + 1
        total += FP32 * (query + kv) * d * (tokens * copies + config.training.bf16) + 2 * FP32 * tokens
    return total


def _norm(config: Config, layout: ShardLayout, width: int, vectors: int) -> int:
    """An RMSNorm over `vectors` vectors: input in fp32, its root mean square, the output, and unfused the quotient."""
    size = element_size(config)
    scaled = config.training.bf16 or layout.stored.hidden != layout.architecture.hidden_size
    return vectors * (width * (FP32 + size + (0 if _is_fused(config) else FP32)) + FP32) + FP32 * width * scaled


def _is_grouped(layout: ShardLayout, layer: int) -> bool:
    """Whether every KV head of `layer` serves as many query heads, so that attention needs no gathered copies."""
    architecture = layout.architecture
    followers = [kind for kind in architecture.table.kinds if kind.follows]
    return all(len(set(architecture.clusters(kind)[layer].tolist())) == 1 for kind in followers)


def _is_fused(config: Config) -> bool:
    return config.parallel.device != "cpu"


def _local_tokens(config: Config) -> int:
    """Tokens of a micro-batch between tensor-parallel regions, where sequence parallelism splits them."""
    parallel = config.parallel
    return micro_batch_tokens(config) // (parallel.tensor_model_parallel_size if parallel.splits_sequences else 1)


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
    """Bytes of inputs kept from the forward pass to the removal, and of the widest layer's H while it is factorised;
    both 0 in a run that needs no Hessians."""
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
    """Bytes that a rank of `stage` sends for Hessians per update of an FFN channel or scoring by `obc`, by rings.
    Layers are dealt evenly to owners, so a rank takes part in one of TP sums; solutions are small."""
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
