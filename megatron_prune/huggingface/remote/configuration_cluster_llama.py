"""Configuration of a Llama whose KV heads serve different numbers of query heads, layer by layer.

Besides the fields of a Llama: `queries_per_kv_head`, `qkv_bias` (as Qwen2 has them) and `qk_norm` (as Qwen3).
"""

from transformers import PretrainedConfig


class ClusterLlamaConfig(PretrainedConfig):
    """A Llama's configuration with clusters of query heads.

    Args:
        queries_per_kv_head: per layer, for each KV head in order, how many query heads in a row it serves. Query heads
            stand in the order of their KV heads, so each layer's numbers add up to `num_attention_heads`. None: one
            each.
        num_key_value_heads: KV heads of the layer that has most; for information.
        qkv_bias: biases on the query, key and value projections.
        qk_norm: RMSNorm over each query's and key's head dimension, before the rotary embedding.
        rope_theta, rope_scaling, rope_parameters: in the notation of transformers 4 or 5.

    Raises:
        ValueError: `queries_per_kv_head` does not fit the numbers of layers and query heads.
    """

    model_type = "cluster_llama"
    _auto_class = "AutoConfig"  # so that saving copies the code in every version
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads it from the class)

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=None,
        queries_per_kv_head=None,
        head_dim=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        qkv_bias=False,
        qk_norm=False,
        hidden_act="silu",
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.queries_per_kv_head = queries_per_kv_head or [[1] * num_attention_heads] * num_hidden_layers
        self._check_clusters()
        self.num_key_value_heads = num_key_value_heads or max(map(len, self.queries_per_kv_head))
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.hidden_act = hidden_act
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # Read by the Llama classes that the model is built from; here they are always off.
        self.attention_bias = False
        self.mlp_bias = False
        self.pretraining_tp = 1
        self._set_rope(rope_theta, rope_parameters or rope_scaling or {})
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            kwargs.pop(name, None)
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check_clusters(self):
        if len(self.queries_per_kv_head) != self.num_hidden_layers:
            raise ValueError(
                f"queries_per_kv_head: {len(self.queries_per_kv_head)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        for layer, queries in enumerate(self.queries_per_kv_head):
            if sum(queries) != self.num_attention_heads or min(queries) < 1:
                raise ValueError(
                    f"queries_per_kv_head: {queries} of layer {layer} are not positive numbers that add up to "
                    f"num_attention_heads ({self.num_attention_heads})"
                )

    def _set_rope(self, theta, rope):
        """Take the rotary embedding's parameters over in the notation of the transformers that is installed."""
        rope = dict(rope)
        theta = rope.pop("rope_theta", None) or theta
        kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        if hasattr(PretrainedConfig, "convert_rope_params_to_dict"):  # transformers 5
            self.rope_parameters = {"rope_type": kind, "rope_theta": theta, **rope}
        else:
            self.rope_theta = theta
            self.rope_scaling = None if kind == "default" else {"rope_type": kind, **rope}
