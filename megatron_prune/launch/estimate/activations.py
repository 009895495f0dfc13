"""What autograd keeps of a micro-batch's forward pass, in bytes per rank.

    saved_activations        kept from the forward to the backward pass
    recomputed_activations   recomputed in the backward pass, one chunk of layers at a time

A sum over the tensors that the model's own operations save. They differ between devices: torch's RMSNorm and
megatron-core's SwiGLU are fused on GPUs only and save less there. Attention saves no matrix of scores (on GPUs: flash
attention).
"""

from __future__ import annotations

from megatron_prune.config import Config
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.model.layout import ShardLayout

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
