"""Model FLOPs, by the usual convention: 2 per multiply-add, backward twice the forward, attention not halved for
causality.
"""

from __future__ import annotations

from megatron_prune.model.architecture import Architecture


def training_flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """FLOPs to train on one token: matrix multiplications of live widths, logits and attention included."""
    shape, h = architecture.shape, architecture.hidden_size
    heads, d = architecture.num_attention_heads, shape.kv_channels
    forward = 2 * h * shape.vocab_size
    for layer in range(shape.num_layers):
        kv = len(architecture.kv_heads(layer))
        forward += 2 * h * d * (2 * heads + 2 * kv) + 4 * seq_length * heads * d + 6 * h * architecture.ffn_hidden_size
    return 3.0 * forward
