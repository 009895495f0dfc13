"""The oracle's forward pass: a Llama, written so that it can be checked line by line against the formulas.

    rope_frequencies   inverse frequencies of the rotary embedding, unscaled, linear or llama3
    rms_norm           x / sqrt(mean(x^2) + eps) * weight, over the channels that are there
    attention          causal attention; every query head finds its KV head through `kv_index`
    mlp                SwiGLU: W_down (silu(W_gate x) * W_up x)
    linear             x W^T, and a bias where there is one, told to whoever records the inputs of weights
    residual_stream    what enters each layer, and what leaves the last
    logits             the whole model

Tensors: B batch, S sequence, C live stem channels, H live query heads, G live KV heads, D head_dim, V vocabulary.
Weights are physically small: a removed unit is nowhere, so the RMSNorm width is right by itself.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron_prune.errors import UserError
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits

Record = Callable[[str, Tensor], None]  # takes a weight's name and its input [B, S, features]


def rope_frequencies(geometry: Geometry) -> Tensor:
    """Angle per position of each of the head_dim / 2 rotated pairs, [D/2], fp32 (as Hugging Face stores them). Raises
    UserError: a `rope_type` other than default, linear and llama3."""
    rope, dim = geometry.rope, geometry.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    plain = 1.0 / float(rope["rope_theta"]) ** exponents
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return plain
    if rope_type == "linear":
        return plain / rope["factor"]
    if rope_type != "llama3":
        raise UserError(f"rope_scaling: rope_type {rope_type!r} is none of default, linear, llama3")
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns_in_context = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((turns_in_context - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / rope["factor"])


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square normalisation over the last dim."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rotate(x_BHSD: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's convention: element i is paired with element i + D/2."""
    positions = torch.arange(x_BHSD.shape[2], dtype=x_BHSD.dtype)
    angles_SD = torch.outer(positions, frequencies.to(x_BHSD.dtype)).repeat(1, 2)
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * angles_SD.cos() + torch.cat((-second, first), dim=-1) * angles_SD.sin()


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str, record: Record | None) -> Tensor:
    """x W^T, plus the bias of the same name where the model has one."""
    if record is not None:
        record(name, x)
    bias = weights.get(name.removesuffix("weight") + "bias")
    return x @ weights[name].T if bias is None else x @ weights[name].T + bias


def attention(
    x_BSC: Tensor,
    weights: Mapping[str, Tensor],
    prefix: str,
    geometry: Geometry,
    kv_index: list[int],
    record: Record | None = None,
    rotates: bool = True,
) -> Tensor:
    """Causal self-attention of one layer; `kv_index[h]` is the position of query head h's KV head. [B, S, C].

    Without `rotates` (NoPE) queries and keys know nothing of their positions.
    """
    B, S, _ = x_BSC.shape
    D = geometry.head_dim

    def project(name: str) -> Tensor:
        y = linear(x_BSC, weights, f"{prefix}{name}_proj.weight", record)
        if geometry.norms_after and name != "v":  # over the heads that are there
            y = rms_norm(y, weights[f"{prefix}{name}_norm.weight"], geometry.epsilon)
        y = y.view(B, S, -1, D)
        if geometry.qk_norm and name != "v":
            y = rms_norm(y, weights[f"{prefix}{name}_norm.weight"], geometry.epsilon)
        return y.transpose(1, 2)

    frequencies = rope_frequencies(geometry) if rotates else torch.zeros(D // 2)
    q_BHSD = rotate(project("q"), frequencies)
    k_BHSD = rotate(project("k"), frequencies)[:, kv_index]
    v_BHSD = project("v")[:, kv_index]
    scores_BHSS = q_BHSD @ k_BHSD.transpose(2, 3) / math.sqrt(D)
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    probabilities = scores_BHSS.masked_fill(future, -math.inf).softmax(-1)
    heads_BSHD = (probabilities @ v_BHSD).transpose(1, 2)
    return linear(heads_BSHD.reshape(B, S, -1), weights, f"{prefix}o_proj.weight", record)


def mlp(x_BSC: Tensor, weights: Mapping[str, Tensor], prefix: str, record: Record | None = None) -> Tensor:
    """SwiGLU feed-forward of one layer, [B, S, C]."""
    gate = silu(linear(x_BSC, weights, f"{prefix}gate_proj.weight", record))
    up = linear(x_BSC, weights, f"{prefix}up_proj.weight", record)
    return linear(gate * up, weights, f"{prefix}down_proj.weight", record)


def residual_stream(
    tokens_BS: Tensor, weights: Mapping[str, Tensor], geometry: Geometry, live: LiveUnits, record: Record | None = None
) -> list[Tensor]:
    """[B, S, C] before each live layer, and after the last one."""
    x_BSC = weights["model.embed_tokens.weight"][tokens_BS]
    states = [x_BSC]

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, weights[name], geometry.epsilon)

    for layer in live.layers:
        prefix = f"model.layers.{layer}."
        how = (geometry, live.kv_index(layer), record, layer not in geometry.no_rope)
        if geometry.norms_after:
            attended = attention(x_BSC, weights, prefix + "self_attn.", *how)
            x_BSC = x_BSC + norm(attended, prefix + "post_attention_layernorm.weight")
            fed = mlp(x_BSC, weights, prefix + "mlp.", record)
            x_BSC = x_BSC + norm(fed, prefix + "post_feedforward_layernorm.weight")
        else:
            normed = norm(x_BSC, prefix + "input_layernorm.weight")
            x_BSC = x_BSC + attention(normed, weights, prefix + "self_attn.", *how)
            normed = norm(x_BSC, prefix + "post_attention_layernorm.weight")
            x_BSC = x_BSC + mlp(normed, weights, prefix + "mlp.", record)
        states.append(x_BSC)
    return states


def logits(
    tokens_BS: Tensor, weights: Mapping[str, Tensor], geometry: Geometry, live: LiveUnits, record: Record | None = None
) -> Tensor:
    """Logits [B, S, V] of int64 tokens [B, S]; `record` is told the input of every linear layer's weight."""
    x_BSC = residual_stream(tokens_BS, weights, geometry, live, record)[-1]
    normed = rms_norm(x_BSC, weights["model.norm.weight"], geometry.epsilon)
    return linear(normed, weights, "model.embed_tokens.weight" if geometry.tied else "lm_head.weight", record)
