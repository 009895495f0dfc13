"""Which parameters a model has, by family: the rows of THE table (`model.table`)."""

import functools
from collections.abc import Callable, Iterable, Iterator

from megatron_prune.model.kinds import FFN, FIXED, HEAD, KV_HEAD, STEM, VOCAB
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import (
    ATTENTION_OUTPUT,
    BIAS,
    EMBEDDING,
    FFN_DOWN,
    FFN_UP,
    HEAD_NORM,
    HF_LM_HEAD,
    LM_HEAD,
    NORM,
    QKV,
    QKV_BIAS,
    TIED_COPY,
    Dim,
    Param,
    ParamTable,
    Part,
)

Rows = Callable[[LlamaShape], Iterator[Param]]
_FAMILIES: dict[str, Rows] = {}


def register_rows(model_type: str, rows: Rows) -> None:
    """List the parameters of models whose shape has this `model_type` by `rows`, in model order, instead of Llama's."""
    assert model_type not in _FAMILIES, f"rows of {model_type} are registered twice"
    _FAMILIES[model_type] = rows


@functools.lru_cache(maxsize=64)
def table_of(shape: LlamaShape) -> ParamTable:
    """The parameters of a model of `shape`; the same object every time."""
    return ParamTable(shape, tuple(_FAMILIES.get(shape.model_type, llama_rows)(shape)))


def llama_rows(shape: LlamaShape) -> Iterator[Param]:
    """The parameters of a Llama, Mistral, Qwen2 or Qwen3."""
    ffn = Dim(FFN)
    return _model_rows(shape, lambda layer: (*attention_rows(shape, layer), *ffn_rows(layer, ffn, shape.add_ffn_bias)))


def olmo2_rows(shape: LlamaShape) -> Iterator[Param]:
    """Norms stand behind attention and FFN, and those of queries and keys have a weight for every head's channels."""

    def rows(layer: int) -> Iterator[Param]:
        theirs, d = f"model.layers.{layer}.", shape.kv_channels
        qkv, output = (row for row in attention_rows(shape, layer) if row.role in (QKV, ATTENTION_OUTPUT))
        yield qkv
        for name, kind in (("query", HEAD), ("key", KV_HEAD)):  # see `layers.HeadsNorm` on their names
            hf_name = f"{theirs}self_attn.{name[0]}_norm.weight"
            ours = f"decoder.layers.{layer}.self_attention.{name}_norm.weight"
            yield single(ours, layer, HEAD_NORM, hf_name, Dim(kind, d))
        yield output
        yield _norm_behind(output, f"{theirs}post_attention_layernorm.weight")
        up, down = (row for row in ffn_rows(layer, Dim(FFN)) if row.role in (FFN_UP, FFN_DOWN))
        yield from (up, down, _norm_behind(down, f"{theirs}post_feedforward_layernorm.weight"))

    return _model_rows(shape, rows)


def _norm_behind(output: Param, hf_name: str) -> Param:
    name = output.name.removesuffix("weight") + "post_layernorm.weight"  # as Megatron-Bridge calls it
    return single(name, output.layer, NORM, hf_name, output.dims[0])


def _model_rows(shape: LlamaShape, of_layer: Callable[[int], Iterable[Param]]) -> Iterator[Param]:
    """What stands around the layers, and in between the rows of each layer."""
    ids, stem = Dim(VOCAB), Dim(STEM)
    yield single("embedding.word_embeddings.weight", None, EMBEDDING, "model.embed_tokens.weight", ids, stem)
    for layer in range(shape.num_layers):
        yield from of_layer(layer)
    yield single("decoder.final_layernorm.weight", None, NORM, "model.norm.weight", stem)
    if not shape.tie_word_embeddings:
        yield single(TIED_COPY, None, LM_HEAD, HF_LM_HEAD, ids, stem)


def single(name: str, layer: int | None, role: str, hf_name: str, *dims: Dim) -> Param:
    """A parameter that is one Hugging Face tensor."""
    return Param(name, layer, role, (Part(hf_name, dims),))


def attention_rows(shape: LlamaShape, layer: int) -> Iterator[Param]:
    """The attention block of `layer`, its norm first."""
    ours, theirs, d = f"decoder.layers.{layer}.", f"model.layers.{layer}.", shape.kv_channels
    stem, head, kv = Dim(STEM), Dim(HEAD, d), Dim(KV_HEAD, d)
    qkv = (("q_proj", head), ("k_proj", kv), ("v_proj", kv))
    yield single(f"{ours}input_layernorm.weight", layer, NORM, f"{theirs}input_layernorm.weight", stem)
    parts = tuple(Part(f"{theirs}self_attn.{name}.weight", (out, stem)) for name, out in qkv)
    yield Param(f"{ours}self_attention.linear_qkv.weight", layer, QKV, parts)
    if shape.add_qkv_bias:
        parts = tuple(Part(f"{theirs}self_attn.{name}.bias", (out,)) for name, out in qkv)
        yield Param(f"{ours}self_attention.linear_qkv.bias", layer, QKV_BIAS, parts)
    for name in ("q", "k") if shape.qk_layernorm else ():
        hf_name = f"{theirs}self_attn.{name}_norm.weight"
        yield single(f"{ours}self_attention.{name}_layernorm.weight", layer, HEAD_NORM, hf_name, Dim(FIXED, d))
    hf_name = f"{theirs}self_attn.o_proj.weight"
    yield single(f"{ours}self_attention.linear_proj.weight", layer, ATTENTION_OUTPUT, hf_name, stem, head)
    if shape.add_proj_bias:
        yield single(f"{ours}self_attention.linear_proj.bias", layer, BIAS, f"{theirs}self_attn.o_proj.bias", stem)


def ffn_rows(layer: int, channel: Dim, biased: bool = False) -> Iterator[Param]:
    """The gated FFN of `layer` with `channel` along its intermediate activation, its norm first."""
    ours, theirs, stem = f"decoder.layers.{layer}.", f"model.layers.{layer}.", Dim(STEM)
    yield single(f"{ours}pre_mlp_layernorm.weight", layer, NORM, f"{theirs}post_attention_layernorm.weight", stem)
    parts = tuple(Part(f"{theirs}mlp.{name}_proj.weight", (channel, stem)) for name in ("gate", "up"))
    yield Param(f"{ours}mlp.linear_fc1.weight", layer, FFN_UP, parts)
    if biased:
        parts = tuple(Part(f"{theirs}mlp.{name}_proj.bias", (channel,)) for name in ("gate", "up"))
        yield Param(f"{ours}mlp.linear_fc1.bias", layer, BIAS, parts)
    yield single(f"{ours}mlp.linear_fc2.weight", layer, FFN_DOWN, f"{theirs}mlp.down_proj.weight", stem, channel)
    if biased:
        yield single(f"{ours}mlp.linear_fc2.bias", layer, BIAS, f"{theirs}mlp.down_proj.bias", stem)


register_rows("olmo2", olmo2_rows)
