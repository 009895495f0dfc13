"""Layers that stay exact while some of their slots are empty.

    RMSNorm                divides by the live width, not the stored one
    HeadsNorm              the same over the heads of all tensor-parallel ranks together
    NormedRowParallelLinear  an output projection with a norm behind it
    CoreAttention          scaled_dot_product_attention; grouped when clusters are uniform, else K and V gathered per
                           query; `set_slots` tells it which
    PrunableSelfAttention  [q | k | v] projection, RoPE, core attention with a live mask, output projection

Tensor names: S sequence, B batch, N query slots, K KV slots, D kv_channels, H stored stem.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prune.model.elementwise import live_rms_norm, rotate
from megatron_prune.model.table import EMPTY


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the live channels of a partly empty stem.

    Empty channels are zero, so sum(x^2) is right and only the divisor differs:
    x / sqrt(sum/live + eps) = sqrt(live/stored) x / sqrt(sum/stored + eps live/stored), one fused kernel either way.
    The arithmetic is fp32 whatever the input dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.live_width = hidden_size
        self.is_compiled = config.persist_layer_norm
        # Under sequence parallelism each rank sees part of the sequence: megatron-core sums the gradients it finds
        # marked.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Normed activations in the input's dtype and shape."""
        if self.is_compiled:
            return live_rms_norm(x_SBH, self.weight, self.live_width, self.eps)
        stored = x_SBH.shape[-1]
        ratio = self.live_width / stored
        weight = self.weight.float() if ratio == 1.0 else self.weight.float() * ratio**0.5
        return F.rms_norm(x_SBH.float(), (stored,), weight, self.eps * ratio).to(x_SBH.dtype)


class HeadsNorm(RMSNorm):
    """Root mean square norm of queries (or keys) over all live heads of all tensor-parallel ranks (OLMo 2).

    `live_width` counts the channels of all ranks; a rank has the weight of its own heads. An empty slot adds nothing to
    the squares, so that the norm is the one of the smaller model. Attention calls these modules other names than
    `q_layernorm`, by which megatron-core finds weights whose gradients it sums over ranks.
    """

    def forward(self, x_SBW: Tensor, squares_SB: Tensor) -> Tensor:  # type: ignore[override]
        """This rank's queries, fp32 in and out; `squares_SB` (fp32) are sums over all ranks."""
        scale = torch.rsqrt(squares_SB / self.live_width + self.eps)
        return x_SBW * scale[..., None] * self.weight.float()


def norm_together(
    pairs: Sequence[tuple[Tensor, HeadsNorm]], group: torch.distributed.ProcessGroup
) -> tuple[Tensor, ...]:
    """Each tensor [S, B, own channels] normed over the channels of all ranks of `group`: one all-reduce of sums of
    squares for all of them, and one of its gradient, since every rank's outputs depend on the sums."""
    wide = [x_SBW.float() for x_SBW, _ in pairs]
    own = torch.stack([x_SBW.square().sum(-1) for x_SBW in wide])
    sums = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(own, group), group)
    given = zip(pairs, wide, sums, strict=True)
    return tuple(norm(x_SBW, squares).to(original.dtype) for (original, norm), x_SBW, squares in given)


class NormedRowParallelLinear(RowParallelLinear):
    """An output projection whose sum over tensor-parallel ranks is normed (OLMo 2)."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Normed output [S, B, H] (scattered over the sequence under sequence parallelism) and no bias."""
        output, bias = super().forward(input_)
        return self.post_layernorm(output if bias is None else output + bias), None


class CoreAttention(torch.nn.Module):
    """Causal attention over query slots that map to KV slots; empty query slots beside a live KV head are silenced."""

    kv_index: Tensor | None
    live_mask: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv_index", None, persistent=False)
        self.register_buffer("live_mask", None, persistent=False)

    def forward(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> Tensor:
        """Attention output [S, B, N * D]."""
        if self.kv_index is not None:
            k_SBKD, v_SBKD = k_SBKD.index_select(2, self.kv_index), v_SBKD.index_select(2, self.kv_index)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBND, k_SBKD, v_SBKD))
        grouped = k.shape[1] != q.shape[1]
        out_BNSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if self.live_mask is not None:
            out_BNSD = out_BNSD * self.live_mask.to(out_BNSD.dtype)[:, None, None]
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


def set_slots(
    modules: list[CoreAttention], slots: list[tuple[np.ndarray, np.ndarray, np.ndarray]], device: torch.device
) -> None:
    """Tell each of `modules` what the slots of this rank hold; two copies to `device` at most, however many they are.

    Args:
        slots: per module int32 ids of query heads [N] and of KV heads [K], -1 if empty, and for each query slot the KV
            slot that serves it, int64 [N].
    """
    indices: list[np.ndarray | None] = []
    masks: list[np.ndarray | None] = []
    for heads, kv_heads, kv_index in slots:
        queries, keys, live = len(heads), len(kv_heads), heads != EMPTY
        grouped = np.arange(queries) // max(queries // keys, 1)
        is_uniform = queries % keys == 0 and np.array_equal(kv_index[live], grouped[live])
        indices.append(None if is_uniform else kv_index)
        # An empty query attends uniformly over live values: its W_o columns, though zero, would get a gradient and
        # grow.
        needs_mask = bool(np.any(~live & (kv_heads[kv_index] != EMPTY)))
        masks.append(live.astype(np.float32) if needs_mask else None)
    for module, index, mask in zip(modules, _uploaded(indices, device), _uploaded(masks, device), strict=True):
        module.kv_index, module.live_mask = index, mask


def _uploaded(arrays: list[np.ndarray | None], device: torch.device) -> list[Tensor | None]:
    """Equally long `arrays` on `device`, copied as one."""
    given = [array for array in arrays if array is not None]
    found = iter(torch.from_numpy(np.stack(given)).to(device).unbind() if given else ())
    return [None if array is None else next(found) for array in arrays]


class PrunableSelfAttention(MegatronModule):
    """Self-attention whose query and KV slots may be any numbers per rank, laid out [q | k | v].

    megatron-core's own SelfAttention wants a regular grid of query groups; clusters of unequal size have none.
    The stored slot counts per rank come from the config (`num_attention_heads`, `num_query_groups` over TP), and which
    norms there are from the names of the table's parameters in a layer, `held`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        held: frozenset[str],
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.knows_positions = True  # else the rotary embedding is left out
        self.pg_collection = pg_collection
        query, kv = config.num_attention_heads, config.num_query_groups
        assert query is not None and kv is not None and config.kv_channels is not None
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            (query + 2 * kv) * config.kv_channels,
            config=config,
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            gather_output=False,
            tp_group=pg_collection.tp,
        )
        self.core_attention = CoreAttention()
        d, tp, eps = config.kv_channels, pg_collection.tp.size(), config.layernorm_epsilon
        each, whole = ("self_attention.q_layernorm.weight" in held, "self_attention.query_norm.weight" in held)
        self.q_layernorm = RMSNorm(config, d, eps) if each else None
        self.k_layernorm = RMSNorm(config, d, eps) if each else None
        self.query_norm = HeadsNorm(config, query // tp * d, eps) if whole else None
        self.key_norm = HeadsNorm(config, kv // tp * d, eps) if whole else None
        for norm in filter(None, (self.q_layernorm, self.k_layernorm, self.query_norm, self.key_norm)):
            # Its input is split over heads, not over the sequence; megatron-core sums the first two over TP by their
            # names.
            norm.weight.sequence_parallel = False  # type: ignore[attr-defined]
        normed = "self_attention.linear_proj.post_layernorm.weight" in held
        self.linear_proj = (NormedRowParallelLinear if normed else RowParallelLinear)(
            query * config.kv_channels,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias="self_attention.linear_proj.bias" in held,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Tensor | None = None, **_unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output [S, B, H] (scattered over the sequence under sequence parallelism) and a bias to add."""
        del attention_mask  # causal by construction
        mixed, _ = self.linear_qkv(hidden_states)
        query, kv, d = self.slots
        q, k, v = mixed.split([query * d, kv * d, kv * d], dim=-1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = norm_together(((q, self.query_norm), (k, self.key_norm)), self.pg_collection.tp)
        q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if rotary_pos_emb is not None and self.knows_positions:
            q, k = (self._rotated(t, rotary_pos_emb) for t in (q, k))
        if self.config.recompute_granularity == "selective" and self.training:
            context = tensor_parallel.checkpoint(self.core_attention, False, q, k, v)
        else:
            context = self.core_attention(q, k, v)
        return self.linear_proj(context)

    def _rotated(self, x_SBND: Tensor, angles: Tensor) -> Tensor:
        if self.config.bias_activation_fusion:
            return rotate(x_SBND, angles)
        return apply_rotary_pos_emb(x_SBND, angles, config=self.config, cp_group=self.pg_collection.cp)

    @property
    def slots(self) -> tuple[int, int, int]:
        """(query slots, KV slots, kv_channels) stored on this rank."""
        d = self.config.kv_channels
        assert d is not None
        query = self.linear_proj.weight.shape[1] // d
        return query, (self.linear_qkv.weight.shape[0] // d - query) // 2, d
