"""A Llama whose KV heads serve different numbers of query heads, layer by layer ("clusters").

    ClusterAttention          projects and caches the KV heads there are, and repeats them for their query heads
    ClusterLlamaModel         transformers' LlamaModel with that attention
    ClusterLlamaForCausalLM   the same with a language-modelling head

Everything but the attention is transformers' own Llama: masks, cache, generation, gradient checkpointing, device maps.
The names of the weights are a Llama's; only the numbers of rows of k_proj and v_proj differ over layers.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_cluster_llama import ClusterLlamaConfig

# What versions of transformers call the cache that they hand to attention.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value")
# What they hand beside it that attention functions may read; none of these types can hold keys and values of old tokens
# but a tensor, and a tensor of that kind has four dimensions.
PLAIN_TYPES = (bool, int, float, str, torch.dtype, torch.Tensor)


def take_cache(arguments):
    """Take the cache (or None) out of attention's keyword arguments, under whatever name it is there. Raises TypeError:
    an argument that this code does not know could be the cache, or one is wanted and there is none: to go on would
    compute something else without a word."""
    found = [cache for cache in (arguments.pop(name, None) for name in CACHE_NAMES) if cache is not None]
    unknown = [name for name, value in arguments.items() if not _is_plain(value)]
    if unknown or (arguments.get("use_cache") and not found) or any(cache is not found[0] for cache in found):
        import transformers

        what = f"hands {', '.join(unknown)} to attention" if unknown else "hands no cache, or several, to attention"
        raise TypeError(
            f"transformers {transformers.__version__} {what}, which modeling_cluster_llama.py does not know and will "
            "not ignore: use another version of transformers, or newer code (convert_to_hf.py --refresh-code)"
        )
    return found[0] if found else None


def _is_plain(value):
    return value is None or (isinstance(value, PLAIN_TYPES) and getattr(value, "ndim", 0) < 4)


class ClusterAttention(LlamaAttention):
    """Self-attention of one layer: KV head i serves the next `queries[i]` query heads.

    Where all of a layer's KV heads serve the same number, they are handed to the attention function as they are, which
    then treats them as grouped-query attention; else they are repeated after they have gone through the cache.

    Tensors: B batch, S new tokens, T all tokens, N query heads, K KV heads, D head dimension.
    """

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.queries = list(config.queries_per_kv_head[layer_idx])
        self.is_uniform = len(set(self.queries)) == 1
        self.num_key_value_groups = self.queries[0] if self.is_uniform else 1
        stem, width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = len(self.queries) * self.head_dim
        self.q_proj = nn.Linear(stem, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(stem, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(stem, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, stem, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        """[B, S, stem] -> ([B, S, stem], attention weights [B, N, S, T] or None)."""
        cache = take_cache(kwargs)
        B, S, _ = hidden_states.shape
        query_BNSD = self.q_norm(self.q_proj(hidden_states).view(B, S, -1, self.head_dim)).transpose(1, 2)
        key_BKSD = self.k_norm(self.k_proj(hidden_states).view(B, S, -1, self.head_dim)).transpose(1, 2)
        value_BKSD = self.v_proj(hidden_states).view(B, S, -1, self.head_dim).transpose(1, 2)
        cos, sin = position_embeddings
        query_BNSD, key_BKSD = apply_rotary_pos_emb(query_BNSD, key_BKSD, cos, sin)
        key_BKTD, value_BKTD = key_BKSD, value_BKSD
        if cache is not None:
            # transformers 4 says where in a static cache these tokens go; later versions know.
            position = kwargs.get("cache_position")
            where = () if position is None else ({"sin": sin, "cos": cos, "cache_position": position},)
            key_BKTD, value_BKTD = cache.update(key_BKSD, value_BKSD, self.layer_idx, *where)
        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        context_BSND, weights = attend(
            self,
            query_BNSD,
            self._for_queries(key_BKTD),
            self._for_queries(value_BKTD),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(context_BSND.reshape(B, S, -1)), weights

    def _for_queries(self, states_BKTD):
        """Keys or values [B, K, T, D] as the attention function wants them: one per query head unless uniform."""
        if self.is_uniform:
            return states_BKTD
        # Plain numbers instead of an index tensor: nothing to keep on the right device, and no transfer per call.
        each = zip(states_BKTD.split(1, dim=1), self.queries)
        return torch.cat([state.expand(-1, count, -1, -1) for state, count in each], dim=1)


class ClusterLlamaModel(LlamaModel):
    """The decoder without a head."""

    config_class = ClusterLlamaConfig
    _auto_class = "AutoModel"  # so that saving copies the code in every version
    _supports_static_cache = False  # old versions allocate a static cache with one number of KV heads

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = ClusterAttention(config, layer_idx)
        self.post_init()


class ClusterLlamaForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = ClusterLlamaConfig
    _auto_class = "AutoModelForCausalLM"
    _supports_static_cache = False

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)  # past its own: that would build a plain LlamaModel first
        self.model = ClusterLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
