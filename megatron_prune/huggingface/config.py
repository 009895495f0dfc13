"""`config.json` in both directions: what a Hugging Face folder says the model is, and what we say ours is.

    read_shape     folder -> LlamaShape; everything this project does not compute is refused by the field's name
    read_rope      the rotary embedding's part of that
    read_source    folder -> what a `LlamaShape` leaves out and an export wants back (special ids, generation settings)
    model_class    Architecture -> the stock class that takes its shape
    config_json    Architecture -> the `config.json` of the exported model

Read are the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). Written is the one of
transformers 4, which 5 reads too; `transformers_version` says 5.0.0, because transformers 4.57 and 5 take a Mistral
configuration of an older version for one with a broken tokenizer, and warn.

Of the stock classes `LlamaForCausalLM` is written where hidden is a multiple of heads. transformers 5 refuses a Llama
for which it is not; `MistralForCausalLM` without a sliding window is the same computation and takes any shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.shape import MOST_UNITS, LlamaShape

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# The oldest transformers that computes an export: before, Mistral took no rope_scaling and Qwen2 no head_dim.
OLDEST_TRANSFORMERS = {"llama": "4.45", "mistral": "4.48", "qwen2": "4.48", "qwen3": "4.51"}
WRITTEN_FOR = "5.0.0"
CARD_FIELDS = ("license", "license_name", "license_link", "base_model")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_IGNORED = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Defaults that transformers would fill in silently and that differ between its classes; null stays null.
# Far beyond any model; what is kept per unit stays small, and a damaged file is refused before anything is allocated.
_LARGEST = {"num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14}
_LARGEST |= {"head_dim": 1 << 16, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 26}
_LARGEST_NUMBER = 1e18
_LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "num_key_value_heads": None}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        UserError: there is no such file, or it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if is_lfs_pointer(file):
            raise UserError(f"{file}: {LFS_HINT}") from error
        raise UserError(f"{file}: invalid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: invalid JSON: nested too deeply") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object")
    return content


LFS_HINT = "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a clone without Git LFS left a few lines of text in the place of `file`."""
    with file.open("rb") as content:
        return content.read(23) == b"version https://git-lfs"


def what_else(folder: Path) -> str:
    """What a folder that holds no model may be instead, as the end of a complaint; empty when nothing is known."""
    if (folder / "adapter_config.json").is_file():
        return "; it is an adapter (LoRA): merge it into its base model, save that, and name the result"
    if (folder / "snapshots").is_dir():
        return "; it is a hub's cache of a model: name one of the folders in snapshots"
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)):
        return "; if it is a hub's id: nothing is downloaded here, so fetch the model and name the folder it is in"
    return ""


def hub_id(folder: Path) -> str | None:
    """`ORGANISATION/MODEL` where `folder` is a snapshot in a hub's cache, whose own name is a commit's."""
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$", folder.resolve().as_posix())
    return f"{cached[1]}/{cached[2]}" if cached else None


class _Fields:
    """Typed reading of one `config.json`; every complaint names the file and the field."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def refuse(self, field: str, complaint: str) -> UserError:
        return UserError(f"{self.where}: {field}: {complaint}")

    def get(self, field: str, default: Any = None) -> Any:
        """The field, or the default where it is missing or null."""
        value = self.config.get(field)
        return default if value is None else value

    def whole(self, field: str, default: int | None = None) -> int:
        value = self.get(field, default)
        if value is None:
            raise self.refuse(field, "is missing; a positive whole number is needed")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(field, f"{_shown(value)} is no positive whole number")
        if value > (largest := _LARGEST.get(field, 1 << 31)):
            raise self.refuse(field, f"{_shown(value)} is beyond all models computed here (at most {largest})")
        return value

    def number(self, field: str, default: float) -> float:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST_NUMBER:
            raise self.refuse(field, f"{_shown(value)} is no positive number of sensible size")
        return float(value)

    def switch(self, field: str, default: bool = False) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.refuse(field, f"{_shown(value)} is neither true nor false")
        return value

    def word(self, field: str, default: str | None = None) -> str | None:
        value = self.get(field, default)
        if value is not None and not isinstance(value, str):
            raise self.refuse(field, f"{_shown(value)} is no text")
        return value


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def read_shape(folder: str | Path) -> LlamaShape:
    """The source model's shape from `config.json` in `folder`.

    Raises:
        UserError: no such file, a field is missing or senseless, or the model is of a kind not computed here.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        hint = what_else(Path(folder)) or "; name the folder of a Hugging Face model"
        raise UserError(f"{file}: does not exist{hint}")
    return shape_from_config(read_json(file), str(file))


def shape_from_config(config: Mapping[str, Any], where: str = "config.json") -> LlamaShape:
    """`read_shape` for a `config.json` already read; `where` begins every complaint."""
    fields = _Fields(config, where)
    model_type = fields.word("model_type")
    if model_type is None or model_type not in CLASSES:
        supported = ", ".join(CLASSES)
        raise fields.refuse("model_type", f"{_shown(model_type)} is not supported ({supported} are)")
    _refuse_unsupported(fields, model_type)
    defaults: dict[str, Any] = _LLAMA_DEFAULTS if model_type == "llama" else {}
    heads = fields.whole("num_attention_heads")
    if "num_key_value_heads" not in config and "num_key_value_heads" not in defaults:
        raise fields.refuse("num_key_value_heads", f"is missing; for {model_type} it has no sensible default")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads ({heads})")
    context = fields.whole("max_position_embeddings", defaults.get("max_position_embeddings"))
    _check_window(fields, model_type, context)
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
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        rotary_base=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.switch("tie_word_embeddings"),
        add_qkv_bias=model_type == "qwen2",
        qk_layernorm=model_type == "qwen3",
        model_type=model_type,
    )


def _refuse_unsupported(fields: _Fields, model_type: str) -> None:
    if fields.get("quantization_config") is not None:
        raise fields.refuse("quantization_config", "quantized weights cannot be trained; take the unquantized model")
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        if fields.get(field):
            raise fields.refuse(field, "mixtures of experts are not supported")
    activation = fields.word("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.refuse("hidden_act", f"{activation!r} is not supported (silu is)")
    if fields.switch("mlp_bias"):
        raise fields.refuse("mlp_bias", "biases of the feed-forward layer are not supported")
    if model_type != "qwen2" and fields.switch("attention_bias"):
        raise fields.refuse("attention_bias", "a bias on the attention output is not supported")
    layer_types = fields.get("layer_types", [])
    if not isinstance(layer_types, list):
        raise fields.refuse("layer_types", f"{_shown(layer_types)} is no list")
    kinds = {_shown(kind) if not isinstance(kind, str) else kind for kind in layer_types}
    if kinds - {"full_attention"}:
        raise fields.refuse("layer_types", f"{', '.join(sorted(kinds))}: only full_attention is supported")


def _check_window(fields: _Fields, model_type: str, context: int) -> None:
    """Refuse attention that does not reach back over the whole context."""
    window = fields.get("sliding_window")
    if model_type == "mistral" and "sliding_window" not in fields.config:
        window = 4096  # the default of transformers' MistralConfig
    if model_type.startswith("qwen") and not fields.switch("use_sliding_window"):
        return
    if model_type != "llama" and window is not None and fields.whole("sliding_window", window) < context:
        raise fields.refuse(
            "sliding_window",
            f"{window} is less than max_position_embeddings ({context}), and windowed attention is not supported; set "
            f"it to null, and max_position_embeddings to at most {window} so that the model stays the same",
        )


def _head_dim(fields: _Fields, model_type: str) -> int:
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
    fields = _Fields(config, where)
    return _rope(fields, fields.whole("max_position_embeddings"))


def _rope(fields: _Fields, context: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling in transformers 4's form or None); `rope_scaling` beats the newer field, as in transformers 5."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name, {})
    if not isinstance(rope, dict):
        raise fields.refuse(name, f"{_shown(rope)} is no JSON object")
    thetas = {fields.number("rope_theta", 10000.0)} if "rope_theta" in fields.config else set()
    for section in ("rope_scaling", "rope_parameters"):
        inner = fields.get(section, {})
        if isinstance(inner, dict) and inner.get("rope_theta") is not None:
            thetas.add(_Fields(inner, f"{fields.where}: {section}").number("rope_theta", 10000.0))
    if len(thetas) > 1:
        raise fields.refuse("rope_theta", f"stated more than once and differently: {sorted(thetas)}")
    for partial in (fields.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise fields.refuse("partial_rotary_factor", f"{partial} is not supported (1.0 is: all channels turn)")
    theta = thetas.pop() if thetas else 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        raise fields.refuse(name, f"rope_type {_shown(kind)} is not supported (default, linear, llama3 are)")
    unknown = sorted(set(rope) - set(_ROPE_NUMBERS[kind]) - _ROPE_IGNORED)
    if unknown:
        raise fields.refuse(name, f"{', '.join(unknown)}: unknown for rope_type {kind!r}")
    # Beside the scaling instead of in it, the original context goes first: transformers 5 computes so.
    outer = fields.get("original_max_position_embeddings")
    rope = {"original_max_position_embeddings": context} | rope
    rope |= {} if outer is None else {"original_max_position_embeddings": outer}
    inner_fields = _Fields(rope, f"{fields.where}: {name}")
    scaling: dict[str, Any] = {"rope_type": kind}
    for number in _ROPE_NUMBERS[kind]:
        if inner_fields.get(number) is None:
            raise inner_fields.refuse(number, f"is missing; rope_type {kind!r} needs it")
        is_length = number == "original_max_position_embeddings"
        scaling[number] = inner_fields.whole(number) if is_length else inner_fields.number(number, 1.0)
    return theta, scaling


def read_source(folder: str | Path) -> dict[str, Any]:
    """What an export wants back and `LlamaShape` does not hold, as a JSON object for the checkpoint's meta.

    Returns:
        `name` (the folder's own name, no path; the model's where the folder is a hub's cache), `card` (of
        `CARD_FIELDS`, what is known), `special_ids` (those of `SPECIAL_IDS` that are set), `dtype` (that most
        of the weights are stored in; without weights as stated in `config.json`, or None), `dtypes` (name -> dtype of
        the weights that are in another), `generation_config` (its content, {} where the file is missing).

    Raises:
        UserError: a file cannot be read, or a special id or dtype is none.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    fields, cached = _Fields(config, str(folder / "config.json")), hub_id(folder)
    return {
        "name": cached.partition("/")[2] if cached else folder.resolve().name,
        "card": _read_card(folder),
        "special_ids": {name: config[name] for name in SPECIAL_IDS if _is_id(fields, name)},
        **_stored_dtypes(folder, fields.word("dtype") or fields.word("torch_dtype")),
        "generation_config": generation,
    }


def _stored_dtypes(folder: Path, stated: str | None) -> dict[str, Any]:
    """`dtype` and `dtypes` of `read_source`; the files' own, since config.json may state another one."""
    from megatron_prune.huggingface.shards import dtype_name
    from megatron_prune.huggingface.weights import FolderWeights  # which reads config.json through this module

    try:
        main, others = FolderWeights(folder).dtypes
    except UserError:  # absent or damaged, which is for those to say who need the weights
        return {"dtype": stated, "dtypes": {}}
    return {"dtype": dtype_name(main), "dtypes": {name: dtype_name(dtype) for name, dtype in others.items()}}


def _is_id(fields: _Fields, name: str) -> bool:
    """Whether a special id is set; raises UserError when that is neither an id nor a list of ids."""
    value = fields.get(name)
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(one) is int and -1 <= one < 1 << 31 for one in ids):
        raise fields.refuse(name, f"{_shown(value)} is no token's id")
    return value is not None


def _read_card(folder: Path) -> dict[str, str]:
    """Of `CARD_FIELDS`, what the metadata at the head of the folder's README.md states.

    `base_model` is the model's own id where the folder is a hub's cache, else the id of the model it was made from. A
    card is written for people, so what cannot be read in it keeps nobody from using the model; nothing local is taken.
    """
    try:
        head = re.match(r"---\n(.*?)\n---", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        content = yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        content = None
    stated = content if isinstance(content, dict) else {}
    base = stated.get("base_model")
    stated = stated | {"base_model": base[0] if isinstance(base, list) and len(base) == 1 else base}
    if cached := hub_id(folder):
        stated["base_model"] = cached
    found = {name: stated[name] for name in CARD_FIELDS if isinstance(stated.get(name), str)}
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", found.get("base_model", "")):
        found.pop("base_model", None)
    if "://" not in found.get("license_link", ""):  # a file that does not travel along
        found.pop("license_link", None)
    return found


def model_class(architecture: Architecture) -> str:
    """`model_type` of the stock class that takes this shape."""
    kind = architecture.shape.model_type
    if kind == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        return "mistral"
    return kind


def config_json(
    architecture: Architecture,
    dtype: str,
    num_key_value_heads: int,
    special_ids: Mapping[str, Any] | None = None,
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
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": shape.kv_channels,
        "vocab_size": shape.vocab_size,
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
        config |= {"attention_bias": False, "mlp_bias": False}
    elif kind == "mistral":
        config["sliding_window"] = None
    else:
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": shape.num_layers}
        config |= {"attention_bias": False} if kind == "qwen3" else {}
    return config | {name: (special_ids or {}).get(name) for name in SPECIAL_IDS}
