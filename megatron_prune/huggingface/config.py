"""`config.json` in both directions: what a Hugging Face folder says the model is, and what we say ours is.

    read_shape     folder -> LlamaShape; everything this project does not compute is refused by the field's name
    read_rope      the rotary embedding's part of that
    Fields         one such file, field by field
    model_class    Architecture -> the stock class that takes its shape
    config_json    Architecture -> the `config.json` of the exported model

Read are the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). Written is the one of
transformers 4, which 5 reads too; `transformers_version` says 5.0.0, because transformers 4.57 and 5 take a Mistral
configuration of an older version for one with a broken tokenizer, and warn.

Of the stock classes `LlamaForCausalLM` is written where hidden is a multiple of heads. transformers 5 refuses a Llama
for which it is not; `MistralForCausalLM` without a sliding window is the same computation and takes any shape. So is,
where there are biases, `SmolLM3ForCausalLM` with a rotary embedding in every layer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.data.hub_files import present, read_json, what_else
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.shape import MOST_UNITS, SCALING_NUMBERS, LlamaShape

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
BIASED = ("llama", "smollm3")  # may have attention_bias, that of the output included, and mlp_bias
# Read as another family that computes the same; only names and packing of weights differ (see `weights.split_fused`).
SAME_AS = {"phi3": "llama"}
# What users ask for, and why it is not computed here.
REFUSED = {
    "gemma": "norms scale by 1 + weight, and embeddings by the root of hidden_size",
    "gemma2": "norms stand on both sides of a block, logits are capped, and half of the layers attend in windows",
    "gemma3": "it is a model of text and images",
    "gemma3_text": "norms stand on both sides of a block and scale by 1 + weight, FFNs are GeGLU, and most layers "
    "attend in windows, with a rotary base of their own",
    "olmo": "its LayerNorms have no weights, and it may clip queries, keys and values",
    "olmo3": "most layers attend in windows",
    "phi": "attention and FFN stand side by side, with LayerNorm and biases",
}
# The oldest transformers that computes an export: before, Mistral took no rope_scaling and Qwen2 no head_dim.
OLDEST_TRANSFORMERS = {"llama": "4.45", "mistral": "4.48", "qwen2": "4.48", "qwen3": "4.51", "smollm3": "4.53"}
OLDEST_TRANSFORMERS["olmo2"] = "4.48"
WRITTEN_FOR = "5.0.0"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_IGNORED = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Far beyond any model; what is kept per unit stays small, and a damaged file is refused before anything is allocated.
_LARGEST = {"num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14}
_LARGEST |= {"head_dim": 1 << 16, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 26}
_LARGEST_NUMBER = 1e18
# Defaults that transformers would fill in silently and that differ between its classes; null stays null.
_DEFAULTS = {"max_position_embeddings": 2048, "num_key_value_heads": None}
_WITH_DEFAULTS = ("llama", "olmo2")
_EPSILONS = {"olmo2": 1e-5, "phi3": 1e-5}


class Fields:
    """Typed reading of one `config.json`. Missing and null fields have the default; UserErrors name file and field."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def refuse(self, field: str, complaint: str) -> UserError:
        """The UserError to raise about `field`."""
        return UserError(f"{self.where}: {field}: {complaint}")

    def get(self, field: str, default: Any = None) -> Any:
        """The field, or the default where it is missing or null."""
        value = self.config.get(field)
        return default if value is None else value

    def whole(self, field: str, default: int | None = None) -> int:
        """The field as a positive whole number, at most its limit in `_LARGEST`."""
        value = self.get(field, default)
        if value is None:
            raise self.refuse(field, "is missing; a positive whole number is needed")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(field, f"{shown(value)} is no positive whole number")
        if value > (largest := _LARGEST.get(field, 1 << 31)):
            raise self.refuse(field, f"{shown(value)} is beyond all models computed here (at most {largest})")
        return value

    def number(self, field: str, default: float) -> float:
        """The field as a positive finite number."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST_NUMBER:
            raise self.refuse(field, f"{shown(value)} is no positive number of sensible size")
        return float(value)

    def switch(self, field: str, default: bool = False) -> bool:
        """The field as a boolean."""
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.refuse(field, f"{shown(value)} is neither true nor false")
        return value

    def word(self, field: str, default: str | None = None) -> str | None:
        """The field as text; None where there is neither the field nor a default."""
        value = self.get(field, default)
        if value is not None and not isinstance(value, str):
            raise self.refuse(field, f"{shown(value)} is no text")
        return value


def shown(value: Any) -> str:
    """`value` as messages show it: 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def read_shape(folder: str | Path) -> LlamaShape:
    """The source model's shape from `config.json` in `folder`. Raises UserError: no such file, a field is missing or
    senseless, or the model is of a kind not computed here."""
    file = Path(folder) / "config.json"
    if not present(file):
        hint = what_else(Path(folder)) or "; name the folder of a Hugging Face model"
        raise UserError(f"{file}: does not exist{hint}")
    return shape_from_config(read_json(file), str(file))


def shape_from_config(config: Mapping[str, Any], where: str = "config.json") -> LlamaShape:
    """`read_shape` for a `config.json` already read; `where` begins every complaint."""
    fields = Fields(config, where)
    model_type = fields.word("model_type")
    if model_type in SAME_AS:
        model_type = SAME_AS[model_type]
    if model_type in REFUSED:
        raise fields.refuse("model_type", f"{model_type} is not supported: {REFUSED[model_type]}")
    if model_type is None or model_type not in CLASSES:
        supported = ", ".join((*CLASSES, *SAME_AS))
        raise fields.refuse("model_type", f"{shown(model_type)} is not supported ({supported} are)")
    _refuse_unsupported(fields, model_type)
    defaults: dict[str, Any] = _DEFAULTS if model_type in _WITH_DEFAULTS else {}
    heads = fields.whole("num_attention_heads")
    if "num_key_value_heads" not in config and "num_key_value_heads" not in defaults:
        raise fields.refuse("num_key_value_heads", f"is missing; for {model_type} it has no sensible default")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads ({heads})")
    context = fields.whole("max_position_embeddings", defaults.get("max_position_embeddings"))
    stated = str(fields.word("model_type"))
    _check_window(fields, stated, context)
    theta, scaling = _rope(fields, context)
    layers, ffn = fields.whole("num_hidden_layers"), fields.whole("intermediate_size")
    if layers * (heads + ffn) > MOST_UNITS:
        raise fields.refuse(
            "num_hidden_layers", f"{layers} layers of {heads} heads and {ffn} FFN channels are too many"
        )
    return LlamaShape(
        num_layers=layers,
        hidden_size=fields.whole("hidden_size"),
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=_head_dim(fields, model_type),
        vocab_size=fields.whole("vocab_size"),
        max_position_embeddings=context,
        norm_epsilon=fields.number("rms_norm_eps", _EPSILONS.get(stated, 1e-6)),
        rotary_base=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.switch("tie_word_embeddings", model_type == "smollm3"),
        add_qkv_bias=model_type == "qwen2" or (model_type in BIASED and fields.switch("attention_bias")),
        add_proj_bias=model_type in BIASED and fields.switch("attention_bias"),
        add_ffn_bias=model_type in BIASED and fields.switch("mlp_bias"),
        qk_layernorm=model_type == "qwen3",
        model_type=model_type,
        no_rope_layers=_without_rope(fields, layers) if model_type == "smollm3" else (),
    )


def _without_rope(fields: Fields, layers: int) -> tuple[int, ...]:
    """Layers that know no positions: a 0 in `no_rope_layers`, else every `no_rope_layer_interval`th."""
    if not any(name in fields.config for name in ("rope_theta", "rope_parameters", "rope_scaling")):
        raise fields.refuse("rope_theta", "is missing; SmolLM3's default is not Llama's")
    turns = fields.get("no_rope_layers")
    if turns is None:
        interval = fields.whole("no_rope_layer_interval", 4)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(turns, list) or len(turns) < layers or any(one not in (0, 1) for one in turns):
        raise fields.refuse("no_rope_layers", f"{shown(turns)} is no list of 0 and 1 for {layers} layers")
    return tuple(layer for layer, turn in enumerate(turns[:layers]) if not turn)


def _refuse_unsupported(fields: Fields, model_type: str) -> None:
    if fields.get("quantization_config") is not None:
        raise fields.refuse("quantization_config", "quantized weights cannot be trained; take the unquantized model")
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        if fields.get(field):
            raise fields.refuse(field, "mixtures of experts are not supported")
    activation = fields.word("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.refuse("hidden_act", f"{activation!r} is not supported (silu is)")
    if model_type not in BIASED:
        for field in ("mlp_bias", *(() if model_type == "qwen2" else ("attention_bias",))):
            if fields.switch(field):
                raise fields.refuse(field, f"biases are supported with {' and '.join(BIASED)} only, not {model_type}")
    layer_types = fields.get("layer_types", [])
    if not isinstance(layer_types, list):
        raise fields.refuse("layer_types", f"{shown(layer_types)} is no list")
    kinds = {shown(kind) if not isinstance(kind, str) else kind for kind in layer_types}
    if kinds - {"full_attention"}:
        raise fields.refuse("layer_types", f"{', '.join(sorted(kinds))}: only full_attention is supported")


def _check_window(fields: Fields, model_type: str, context: int) -> None:
    """Refuse attention that does not reach back over the whole context."""
    window = fields.get("sliding_window")
    if model_type == "mistral" and "sliding_window" not in fields.config:
        window = 4096  # the default of transformers' MistralConfig
    if model_type.startswith(("qwen", "smollm")) and not fields.switch("use_sliding_window"):
        return
    if model_type not in ("llama", "olmo2") and window is not None and fields.whole("sliding_window", window) < context:
        raise fields.refuse(
            "sliding_window",
            f"{window} is less than max_position_embeddings ({context}), and windowed attention is not supported; set "
            f"it to null, and max_position_embeddings to at most {window} so that the model stays the same",
        )


def _head_dim(fields: Fields, model_type: str) -> int:
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if fields.get("head_dim") is None:
        if model_type == "qwen3":
            raise fields.refuse("head_dim", "is missing; Qwen3 states it, since it is not hidden_size / heads")
        if hidden % heads:
            raise fields.refuse(
                "head_dim", f"is missing, and hidden_size ({hidden}) / num_attention_heads ({heads}) is not whole"
            )
    head_dim = fields.whole("head_dim", hidden // heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", f"{head_dim} is odd; rotary embeddings turn pairs of channels")
    return head_dim


def read_rope(config: Mapping[str, Any], where: str = "config.json") -> tuple[float, dict[str, Any] | None]:
    """`rotary_base` and `rope_scaling` as a `LlamaShape` holds them; raises UserError as `read_shape` does."""
    fields = Fields(config, where)
    return _rope(fields, fields.whole("max_position_embeddings"))


def _rope(fields: Fields, context: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling in transformers 4's form or None); `rope_scaling` beats the newer field, as in transformers 5."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name, {})
    if not isinstance(rope, dict):
        raise fields.refuse(name, f"{shown(rope)} is no JSON object")
    thetas = {fields.number("rope_theta", 10000.0)} if "rope_theta" in fields.config else set()
    for section in ("rope_scaling", "rope_parameters"):
        inner = fields.get(section, {})
        if isinstance(inner, dict) and inner.get("rope_theta") is not None:
            thetas.add(Fields(inner, f"{fields.where}: {section}").number("rope_theta", 10000.0))
    if len(thetas) > 1:
        raise fields.refuse("rope_theta", f"stated more than once and differently: {sorted(thetas)}")
    for partial in (fields.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise fields.refuse("partial_rotary_factor", f"{partial} is not supported (1.0 is: all channels turn)")
    theta = thetas.pop() if thetas else 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in SCALING_NUMBERS:
        raise fields.refuse(name, f"rope_type {shown(kind)} is not supported (default, linear, llama3 are)")
    unknown = sorted(set(rope) - set(SCALING_NUMBERS[kind]) - _ROPE_IGNORED)
    if unknown:
        raise fields.refuse(name, f"{', '.join(unknown)}: unknown for rope_type {kind!r}")
    # Beside the scaling instead of in it, the original context goes first: transformers 5 computes so.
    outer = fields.get("original_max_position_embeddings")
    rope = {"original_max_position_embeddings": context} | rope
    rope |= {} if outer is None else {"original_max_position_embeddings": outer}
    inner_fields = Fields(rope, f"{fields.where}: {name}")
    scaling: dict[str, Any] = {"rope_type": kind}
    for number in SCALING_NUMBERS[kind]:
        if inner_fields.get(number) is None:
            raise inner_fields.refuse(number, f"is missing; rope_type {kind!r} needs it")
        is_length = number == "original_max_position_embeddings"
        scaling[number] = inner_fields.whole(number) if is_length else inner_fields.number(number, 1.0)
    return theta, scaling


def model_class(architecture: Architecture) -> str:
    """`model_type` of the stock class that takes this shape."""
    kind = architecture.shape.model_type
    shape = architecture.shape
    if kind == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        return "smollm3" if shape.add_proj_bias or shape.add_ffn_bias else "mistral"
    return kind


def config_json(
    architecture: Architecture, dtype: str, num_key_value_heads: int, special_ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The `config.json` of the exported model; nothing about its shape is left to a default.

    Args:
        dtype: torch's name of the stored dtype, e.g. `bfloat16`.
        num_key_value_heads: stored KV heads of every layer (see `kv_policy`).
        special_ids: values for `SPECIAL_IDS`; null where absent.

    Raises:
        UserError: layers keep different numbers of units, of which these files state one.
    """
    for unit in architecture.table.prunable:
        if len(set(map(len, architecture.sites(unit)))) > 1:
            raise UserError(
                f"layers keep {architecture.span(unit)} {unit.title}; Hugging Face's classes want one number of them"
            )
    shape, kind = architecture.shape, model_class(architecture)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **{unit.hf_key: architecture.width(unit) for unit in architecture.table.kinds if unit.hf_key},
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": shape.num_layers,
        "head_dim": shape.kv_channels,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary_base,
        "rope_scaling": shape.rope_scaling,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "use_cache": True,
        "torch_dtype": dtype,
        "transformers_version": WRITTEN_FOR,
    }
    if kind == "llama":
        config |= {"attention_bias": shape.add_proj_bias, "mlp_bias": shape.add_ffn_bias}
    elif kind == "mistral":
        config["sliding_window"] = None
    elif kind == "olmo2":
        config["attention_bias"] = False
    else:
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": shape.num_layers}
        config |= {} if kind == "qwen2" else {"attention_bias": shape.add_proj_bias}
    if kind == "smollm3":
        turns = [int(layer not in shape.no_rope_layers) for layer in range(shape.num_layers)]
        config |= {"mlp_bias": shape.add_ffn_bias, "no_rope_layers": turns, "no_rope_layer_interval": 4}
    return config | {name: (special_ids or {}).get(name) for name in SPECIAL_IDS}
