"""The oracle's geometry: what each dim of each Hugging Face tensor stands for, which units live, counting, slicing.

    Geometry       the source model's sizes, read from a Hugging Face `config.json`
    LiveUnits      the units still alive, by their original ids
    weight_table   name -> (layer, kind of each dim), e.g. q_proj.weight -> (head, stem): W is [out, in]
    element_index  where the survivors of a dim stand before a removal
    shrink         any dict {name: tensor} of one geometry, from one set of live units to a smaller one
    count          parameters of a geometry with these live units

A removal is `shrink(tensors, before, after)` for weights, moments and scores alike, and its cost is
`count(before) - count(after)`: no kind of group needs a formula of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_prune.errors import UserError

HEAD, KV_HEAD, FFN, STEM, VOCAB, FIXED = "head", "kv_head", "ffn", "stem", "vocab", "fixed"
LAYER = "layer"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2")


@dataclass(frozen=True)
class Geometry:
    """Sizes of the source model. `queries_per_kv` query heads in a row share one KV head; `head_dim` never changes.

    `rope` holds `rope_theta` and, where the frequencies are scaled, `rope_type` and its parameters; `no_rope` are the
    layers without rotary embedding (`no_rope_layers`, where 0 says so). `norms_after`: norms stand behind attention and
    FFN instead of before them, and those of queries and keys run over all heads together (OLMo 2).
    """

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    epsilon: float
    rope: Mapping[str, Any]
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    no_rope: tuple[int, ...] = ()
    norms_after: bool = False
    proj_bias: bool = False
    ffn_bias: bool = False

    @property
    def queries_per_kv(self) -> int:
        """Query heads per KV head in the source model."""
        return self.heads // self.kv_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Geometry:
        """Read a `config.json` in the notation of transformers 4 or 5. Raises UserError: a model type, activation, bias
        or window that the oracle does not compute."""
        model_type = config.get("model_type", "llama")
        if model_type not in MODEL_TYPES:
            raise UserError(f"model_type: {model_type!r} is none of {', '.join(MODEL_TYPES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act: {config['hidden_act']!r} is not silu")
        if model_type == "qwen2" and config.get("mlp_bias"):
            raise UserError("mlp_bias: Qwen2 has biases on q, k and v only; set it to false")
        windowed = config.get("use_sliding_window", model_type == "mistral") and config.get("sliding_window")
        if windowed:
            raise UserError("sliding_window: only full attention is supported, set it to null")
        heads = int(config["num_attention_heads"])
        rope = {"rope_theta": config.get("rope_theta", 10000.0)}
        rope.update(config.get("rope_scaling") or {})
        rope.update(config.get("rope_parameters") or {})
        return cls(
            num_layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab=int(config["vocab_size"]),
            epsilon=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope,
            tied=bool(config.get("tie_word_embeddings", model_type == "smollm3")),
            qkv_bias=model_type == "qwen2" or bool(config.get("attention_bias")),
            qk_norm=model_type == "qwen3",
            no_rope=tuple(n for n, turns in enumerate(config.get("no_rope_layers") or ()) if not turns),
            norms_after=model_type == "olmo2",
            proj_bias=bool(config.get("attention_bias")) and model_type != "qwen2",
            ffn_bias=bool(config.get("mlp_bias")),
        )


@dataclass(frozen=True)
class LiveUnits:
    """Original ids of the units alive, ascending: query heads and FFN channels per layer (none in a layer that is
    gone), residual (stem) channels."""

    heads: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]
    stem: tuple[int, ...]
    queries_per_kv: int

    @classmethod
    def full(cls, geometry: Geometry) -> LiveUnits:
        """All units of the source model."""
        layers = geometry.num_layers
        return cls(
            heads=(tuple(range(geometry.heads)),) * layers,
            ffn=(tuple(range(geometry.ffn)),) * layers,
            stem=tuple(range(geometry.hidden)),
            queries_per_kv=geometry.queries_per_kv,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Original numbers of the layers that are left."""
        return tuple(layer for layer, heads in enumerate(self.heads) if heads)

    def kv_heads(self, layer: int) -> tuple[int, ...]:
        """KV heads of `layer` that still have a live query head."""
        return tuple(sorted({head // self.queries_per_kv for head in self.heads[layer]}))

    def kv_index(self, layer: int) -> list[int]:
        """For each live query head of `layer`, the position of its KV head among the live ones."""
        position = {kv_head: index for index, kv_head in enumerate(self.kv_heads(layer))}
        return [position[head // self.queries_per_kv] for head in self.heads[layer]]

    def of(self, kind: str, layer: int) -> tuple[int, ...]:
        """Live ids of a prunable kind in `layer` (the stem is the same in all layers)."""
        if kind in (STEM, LAYER):
            return self.stem if kind == STEM else self.layers
        return {HEAD: self.heads, FFN: self.ffn}[kind][layer] if kind != KV_HEAD else self.kv_heads(layer)

    def without(self, kind: str, units: tuple[tuple[int, ...], ...]) -> LiveUnits:
        """What is left after a group: `units` holds one tuple per layer (`head`, `ffn`) or one (`stem`, `layer`)."""
        if kind == STEM:
            return dataclasses.replace(self, stem=_drop(self.stem, units[0]))
        if kind == LAYER:
            kept = _drop(self.layers, units[0])
            heads = tuple(ids if layer in kept else () for layer, ids in enumerate(self.heads))
            ffn = tuple(ids if layer in kept else () for layer, ids in enumerate(self.ffn))
            return dataclasses.replace(self, heads=heads, ffn=ffn)
        live = self.heads if kind == HEAD else self.ffn
        left = tuple(_drop(ids, gone) for ids, gone in zip(live, units, strict=True))
        assert len({len(ids) for ids in left if ids}) == 1, "all layers must keep the same width"
        return dataclasses.replace(self, heads=left) if kind == HEAD else dataclasses.replace(self, ffn=left)


def _drop(live: tuple[int, ...], gone: tuple[int, ...]) -> tuple[int, ...]:
    assert set(gone) <= set(live), f"units {sorted(set(gone) - set(live))} are not alive"
    return tuple(unit for unit in live if unit not in gone)


class WeightDims(NamedTuple):
    """The layer a tensor belongs to (0 for those outside the layers) and the kind of units along each of its dims."""

    layer: int
    kinds: tuple[str, ...]


def weight_table(geometry: Geometry, live: LiveUnits) -> dict[str, WeightDims]:
    """All tensors of the model by their Hugging Face names in the source (layers keep their numbers when others leave).
    Rows of heads are `head_dim` elements per unit."""
    table = {"model.embed_tokens.weight": WeightDims(0, (VOCAB, STEM)), "model.norm.weight": WeightDims(0, (STEM,))}
    if not geometry.tied:
        table["lm_head.weight"] = WeightDims(0, (VOCAB, STEM))
    kinds = {
        "input_layernorm.weight": (STEM,),
        "self_attn.q_proj.weight": (HEAD, STEM),
        "self_attn.k_proj.weight": (KV_HEAD, STEM),
        "self_attn.v_proj.weight": (KV_HEAD, STEM),
        "self_attn.o_proj.weight": (STEM, HEAD),
        "post_attention_layernorm.weight": (STEM,),
        "mlp.gate_proj.weight": (FFN, STEM),
        "mlp.up_proj.weight": (FFN, STEM),
        "mlp.down_proj.weight": (STEM, FFN),
    }
    if geometry.qkv_bias:
        kinds |= {"self_attn.q_proj.bias": (HEAD,), "self_attn.k_proj.bias": (KV_HEAD,)}
        kinds |= {"self_attn.v_proj.bias": (KV_HEAD,)}
    if geometry.qk_norm:
        kinds |= {"self_attn.q_norm.weight": (FIXED,), "self_attn.k_norm.weight": (FIXED,)}
    if geometry.proj_bias:
        kinds["self_attn.o_proj.bias"] = (STEM,)
    if geometry.ffn_bias:
        kinds |= {"mlp.gate_proj.bias": (FFN,), "mlp.up_proj.bias": (FFN,), "mlp.down_proj.bias": (STEM,)}
    if geometry.norms_after:
        del kinds["input_layernorm.weight"]
        kinds |= {"post_feedforward_layernorm.weight": (STEM,)}
        kinds |= {"self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (KV_HEAD,)}
    for layer in live.layers:
        table |= {f"model.layers.{layer}.{name}": WeightDims(layer, dims) for name, dims in kinds.items()}
    return table


def output_projections(live: LiveUnits) -> list[str]:
    """Names of the output layer group, on which saliency is computed: every layer's W_o and W_down."""
    return [f"model.layers.{n}.{name}.weight" for n in live.layers for name in ("self_attn.o_proj", "mlp.down_proj")]


def weight_shapes(geometry: Geometry, live: LiveUnits) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that is there when these units live."""

    def size(kind: str, layer: int) -> int:
        if kind == VOCAB:
            return geometry.vocab
        if kind == FIXED:
            return geometry.head_dim
        per_unit = geometry.head_dim if kind in (HEAD, KV_HEAD) else 1
        return len(live.of(kind, layer)) * per_unit

    table = weight_table(geometry, live)
    return {name: tuple(size(kind, layer) for kind in kinds) for name, (layer, kinds) in table.items()}


def count(geometry: Geometry, live: LiveUnits) -> int:
    """Parameters of the model with these live units; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in weight_shapes(geometry, live).values())


def costs(geometry: Geometry, live: LiveUnits, seq_length: int) -> dict[str, float]:
    """What a model may be limited in: parameters; FLOPs per token of a forward pass (2 per multiply-add of every matrix
    that multiplies, logits included, and of scores and mixing over `seq_length` tokens); KV cache elements per token.
    """
    shapes = weight_shapes(geometry, live)
    idle = () if geometry.tied else ("model.embed_tokens.weight",)
    matrices = sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and name not in idle)
    attended = sum(len(live.of(HEAD, n)) * geometry.head_dim for n in live.layers)
    return {
        "params": count(geometry, live),
        "flops_per_token": 2 * matrices + 4 * seq_length * attended,
        "kv_cache_per_token": sum(2 * len(live.of(KV_HEAD, n)) * geometry.head_dim for n in live.layers),
    }


def element_index(geometry: Geometry, kind: str, layer: int, before: LiveUnits, after: LiveUnits) -> Tensor:
    """Positions, along a dim of `kind` that holds `before`, of the elements of the units in `after` (int64)."""
    position = {unit: index for index, unit in enumerate(before.of(kind, layer))}
    units = torch.tensor([position[unit] for unit in after.of(kind, layer)], dtype=torch.long)
    if kind not in (HEAD, KV_HEAD):
        return units
    within_head = torch.arange(geometry.head_dim)
    return (units[:, None] * geometry.head_dim + within_head).flatten()


def shrink(geometry: Geometry, tensors: Mapping[str, Tensor], before: LiveUnits, after: LiveUnits) -> dict[str, Tensor]:
    """Physically smaller copies of `tensors` (any of the model's names), holding only the units of `after`; those of
    layers that are gone are left out."""
    table = weight_table(geometry, after)
    result = {}
    for name, tensor in tensors.items():
        if name not in table:
            continue
        layer, kinds = table[name]
        for dim, kind in enumerate(kinds):
            if kind not in (VOCAB, FIXED):
                tensor = tensor.index_select(dim, element_index(geometry, kind, layer, before, after))
        result[name] = tensor
    return result
