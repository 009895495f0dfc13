"""Read Megatron's own `torch_dist` checkpoints of a model in Llama's shape, one Hugging Face tensor at a time.

    MegatronCheckpoint   a folder that Megatron-LM (or megatron-core) saved: its shape, and a reader of its weights
    ShapeOptions         what the tensors do not tell and the stored arguments may not either

A GPTModel's layers are stored as one tensor with the layer as its first dimension, or one tensor per layer; in a
HybridModel (pattern `*-*-...`) attention and FFN are layers of their own, numbered in turn. Stock Megatron packs qkv
per KV group as [q of the group | k | v] and gate/up as [gate | up]; the vocabulary is padded at its end. Its arguments
lie in common.pt, from 0.19 on in an object among the tensors. Optimizer state, random states and TransformerEngine's
extra state are left out; any other tensor that is not part of a Llama is an error that names it, so nothing is dropped
in silence.
"""

import argparse
import dataclasses
import enum
import logging
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_prune.checkpoint.files import LATEST, iteration_of, latest_number, step_name
from megatron_prune.checkpoint.guarded_reader import load_object, load_plain, read_metadata
from megatron_prune.checkpoint.storage import irregular, read_into
from megatron_prune.errors import UserError
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.sources import finite

logger = logging.getLogger(__name__)

_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer[._]|rng_state|rerun_state|.*_extra_state")
LAYER = "decoder.layers."
_ARGUMENTS = "common_state/shard_0_1"  # what was common.pt before 0.19
_RENAMED = {"layernorm_epsilon": "norm_epsilon", "layernorm_zero_centered_gamma": "apply_layernorm_1p"}  # later: before
_BLOCKS = ("self_attention", "mlp")  # of a layer of a Llama; layers of their own in a HybridModel
TOP = {  # Hugging Face name -> a GPTModel's, a HybridModel's
    "model.embed_tokens.weight": ("embedding.word_embeddings.weight",),
    "model.norm.weight": ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),
    "lm_head.weight": ("output_layer.weight",),
}
# Hugging Face name in a layer -> (names in a Megatron layer, the first of them in its block, the part of it)
IN_LAYER: dict[str, tuple[tuple[str, ...], str]] = {
    "input_layernorm.weight": (("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"), "all"),
    "post_attention_layernorm.weight": (("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"), "all"),
    **{f"self_attn.{p}_proj.{w}": ((f"self_attention.linear_qkv.{w}",), p) for p in "qkv" for w in ("weight", "bias")},
    "self_attn.q_norm.weight": (("self_attention.q_layernorm.weight",), "all"),
    "self_attn.k_norm.weight": (("self_attention.k_layernorm.weight",), "all"),
    "self_attn.o_proj.weight": (("self_attention.linear_proj.weight",), "all"),
    "mlp.gate_proj.weight": (("mlp.linear_fc1.weight",), "gate"),
    "mlp.up_proj.weight": (("mlp.linear_fc1.weight",), "up"),
    "mlp.down_proj.weight": (("mlp.linear_fc2.weight",), "all"),
}


@dataclass(frozen=True)
class ShapeOptions:
    """Facts of the model, as flags give them; None: from the arguments stored beside the weights."""

    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    norm_epsilon: float | None = None
    rotary_base: float | None = None


class MegatronCheckpoint:
    """A stock Megatron checkpoint, opened.

    Args:
        directory: the folder that was saved to, or one iteration's folder in it.
        options: shape facts that go before the stored ones.

    Raises:
        UserError: no `torch_dist` checkpoint, a model that is no Llama, a fact that nobody states.
    """

    def __init__(self, directory: Path, options: ShapeOptions) -> None:
        self.path = _folder(directory)
        metadata = read_metadata(self.path)
        found = metadata.state_dict_metadata
        self.stored: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in found.items()
            if isinstance(entry, TensorStorageMetadata) and not _NOT_WEIGHTS.match(key)
        }
        self.skipped = len(found) - len(self.stored)
        self._numbers = self._numbered()
        arguments = _stored_arguments(self.path, metadata, options)
        self.shape = self._shape(arguments, options)
        if not arguments:
            logger.warning("%s: no arguments are read; not checked: %s", self.path, ", ".join(_LLAMA))
        self._lock = threading.Lock()
        self._recent: OrderedDict[tuple[str, int | None], Tensor] = OrderedDict()

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in, as told by the embedding."""
        return self._entry("embedding.word_embeddings.weight").properties.dtype

    @property
    def iteration(self) -> int:
        """The iteration that the folder's name states, 0 where it states none."""
        return iteration_of(self.path) or 0

    # The shape -------------------------------------------------------------------------------------------------------

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self.stored:
            raise UserError(f"{self.path}: holds no tensor {key}: this is no Llama that Megatron saved")
        return self.stored[key]

    def _numbered(self) -> dict[str, list[int]]:
        """Per block, the number of each layer's among the stored layers; empty where layers are stored together. Raises
        UserError: the blocks do not take turns."""
        pattern = re.compile(rf"{re.escape(LAYER)}(\d+)\.({'|'.join(_BLOCKS)})\.")
        found = {(m[2], int(m[1])) for key in self.stored if (m := pattern.match(key))}
        if not found:
            return {}
        attention, ffn = (sorted(number for block, number in found if block == name) for name in _BLOCKS)
        turns = [number for pair in zip(attention, ffn) for number in pair]
        if len(attention) != len(ffn) or turns != sorted(turns):
            raise UserError(f"{self.path}: its layers are not attention and FFN in turn: not the shape of a Llama")
        return dict(zip(_BLOCKS, (attention, ffn)))

    def _layers(self) -> int:
        """Number of layers, from any way of storing them."""
        if self._numbers:
            return len(self._numbers[_BLOCKS[0]])
        return int(self._entry(f"{LAYER}mlp.linear_fc2.weight").size[0])

    def _place(self, names: tuple[str, ...], layer: int) -> tuple[str, int | None]:
        """(key, index along its first dimension or None) of the first of `names` that is stored."""
        block = names[0].partition(".")[0]
        for name in names:
            if self._numbers and f"{LAYER}{self._numbers[block][layer]}.{name}" in self.stored:
                return f"{LAYER}{self._numbers[block][layer]}.{name}", None
            if not self._numbers and f"{LAYER}{name}" in self.stored:
                return f"{LAYER}{name}", layer
        raise UserError(f"{self.path}: layer {layer} has no {' or '.join(names)}: not the shape of a Llama")

    def _size(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Shape of a parameter of the first layer."""
        key, index = self._place(names, 0)
        return tuple(self.stored[key].size[0 if index is None else 1 :])

    def _shape(self, arguments: dict[str, Any], options: ShapeOptions) -> LlamaShape:
        _check_kind(self.path, arguments)
        given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
        known = arguments | given

        def fact(name: str, default: Any = None) -> Any:
            value = known.get(name)
            value = default if value is None else value
            if value is None:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{self.path}: does not state {name}; give {flag}")
            return value

        padded, hidden = self._entry("embedding.word_embeddings.weight").size
        heads = fact("num_attention_heads")
        groups = given.get("num_query_groups") or (
            fact("num_query_groups") if arguments.get("group_query_attention", True) else heads
        )
        channels = fact("kv_channels", hidden // heads)
        shape = LlamaShape(
            num_layers=self._layers(),
            hidden_size=int(hidden),
            ffn_hidden_size=self._size(("mlp.linear_fc2.weight",))[1],
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=channels,
            vocab_size=fact("vocab_size"),
            max_position_embeddings=fact("max_position_embeddings"),
            norm_epsilon=fact("norm_epsilon"),
            rotary_base=float(fact("rotary_base")),
            tie_word_embeddings="output_layer.weight" not in self.stored,
            add_qkv_bias=any(key.endswith("linear_qkv.bias") for key in self.stored),
            qk_layernorm=any(key.endswith("q_layernorm.weight") for key in self.stored),
        )
        rows = self._size(("self_attention.linear_qkv.weight",))[0]
        if rows != (heads + 2 * groups) * channels:
            raise UserError(
                f"{self.path}: linear_qkv has {rows} rows, not those of {heads} heads and {groups} KV heads of "
                f"{channels}; give --num-attention-heads, --num-query-groups and --kv-channels"
            )
        if shape.vocab_size > padded:
            raise UserError(
                f"{self.path}: the embedding has {padded} rows, fewer than the vocabulary {fact('vocab_size')}"
            )
        if shape.qk_layernorm or shape.add_qkv_bias:
            shape = dataclasses.replace(shape, model_type="qwen3" if shape.qk_layernorm else "qwen2")
        return shape

    # The weights -----------------------------------------------------------------------------------------------------

    def check(self, hf_names: list[str]) -> None:
        """Every stored tensor must be one that `hf_names` ask for, and the reverse. Raises UserError."""
        used = {self._source(name)[0] for name in hf_names}
        left = sorted(set(self.stored) - used)
        if left:
            raise UserError(
                f"{self.path}: {len(left)} stored tensors belong to no Llama: {', '.join(left[:4])}"
                f"{', ...' if len(left) > 4 else ''}"
            )

    def __call__(self, hf_name: str) -> Tensor:
        """The tensor of that Hugging Face name, in the stored dtype, on the host; torch.distributed must be up."""
        key, layer, part = self._source(hf_name)
        whole, shape = finite(self._whole(key, layer), f"{self.path}: {key}"), self.shape
        if part == "vocab":
            return whole[: shape.vocab_size].clone()
        if part in ("gate", "up"):
            return whole.chunk(2)[part == "up"].clone()
        if part == "all":
            return whole
        per_group = whole.view(shape.num_query_groups, shape.heads_per_group + 2, shape.kv_channels, *whole.shape[1:])
        own = {"q": slice(None, -2), "k": slice(-2, -1), "v": slice(-1, None)}[part]
        return per_group[:, own].reshape(-1, *whole.shape[1:]).clone()

    def _source(self, hf_name: str) -> tuple[str, int | None, str]:
        """(key, index along its first dimension, part) of a Hugging Face tensor."""
        if hf_name in TOP:
            key = next((name for name in TOP[hf_name] if name in self.stored), TOP[hf_name][0])
            self._entry(key)
            return key, None, "all" if hf_name == "model.norm.weight" else "vocab"
        _, _, number, rest = hf_name.split(".", 3)
        names, part = IN_LAYER[rest]
        return (*self._place(names, int(number)), part)

    def _whole(self, key: str, layer: int | None) -> Tensor:
        """One stored parameter; the last few are kept, since q, k and v come out of the same."""
        with self._lock:
            if (key, layer) not in self._recent:
                size, dtype = tuple(self.stored[key].size), self.stored[key].properties.dtype
                start = (0,) * len(size) if layer is None else (layer, *(0,) * (len(size) - 1))
                wanted = torch.empty(size if layer is None else (1, *size[1:]), dtype=dtype)
                (loaded,) = read_into(self.path, [irregular(key, wanted, size, start)])
                self._recent[key, layer] = loaded if layer is None else loaded[0]
                while len(self._recent) > 3:
                    self._recent.popitem(last=False)
            return self._recent[key, layer]


def _folder(directory: Path) -> Path:
    """The folder with `.metadata`: `directory` itself, or the latest iteration's in it."""
    if (directory / LATEST).is_file() and not (directory / ".metadata").exists():
        try:
            step = latest_number(directory)
        except ValueError as error:
            raise UserError(f"{error}; name the folder with .metadata itself") from None
        directory = directory / ("release" if step is None else step_name(step))
    if not (directory / ".metadata").is_file():
        raise UserError(
            f"{directory}: no torch_dist checkpoint (there is no .metadata); convert it to torch_dist first"
        )
    return directory


def _stored_arguments(folder: Path, metadata: Metadata, options: ShapeOptions) -> dict[str, Any]:
    """Megatron's arguments; empty where there are none, or they are not to be had and not needed. Raises UserError:
    they do not load without running code, and `options` leave something open."""
    from megatron.core import enums, rerun_state_machine
    from megatron.core.transformer import enums as transformer_enums

    known = [v for module in (enums, rerun_state_machine, transformer_enums) for v in vars(module).values()]
    enumerations = (v for v in known if isinstance(v, enum.EnumMeta) and v.__module__.startswith("megatron."))
    classes = [argparse.Namespace, *enumerations]
    path, common = folder / "common.pt", None
    try:
        if path.exists() or path.is_symlink():
            common = load_plain(path, classes)
        elif _ARGUMENTS in metadata.state_dict_metadata:
            found = load_object(folder, metadata, _ARGUMENTS, classes)
            common = found[0] if isinstance(found, list) and found else None  # torch keeps a list of one
    except UserError as error:
        open_ = [name for name, value in dataclasses.asdict(options).items() if value is None]
        if open_:
            flags = ", ".join("--" + name.replace("_", "-") for name in open_)
            raise UserError(f"{error}; it is not needed when {flags} are given") from error
        logger.warning("%s; left unread, since the flags say what the model is", error)
    arguments = common.get("args") if isinstance(common, dict) else None
    stored = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return {_RENAMED.get(name, name): value for name, value in stored.items()}


_LLAMA: dict[str, tuple[Any, ...]] = {  # what a Llama has of arguments that no tensor shows
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "apply_layernorm_1p": (False,),
    "use_rope_scaling": (False,),
    "no_rope_freq": (0,),
    "window_size": (),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "use_mup": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
}


def _check_kind(folder: Path, arguments: dict[str, Any]) -> None:
    """Refuse what computes otherwise than a Llama though its tensors look alike."""
    for name, values in _LLAMA.items():
        if arguments.get(name) is not None and arguments[name] not in values:
            only = f"only {values[0]}" if values else "only a model without it"
            raise UserError(f"{folder}: was trained with {name} {arguments[name]}; {only} is a Llama here")
