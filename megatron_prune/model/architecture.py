"""Widths: which units of the source model are still alive, and how many parameters that is.

    LlamaShape     the source model as it came (frozen facts: sizes, RoPE, biases, tying)
    Group          what one pruning step removes
    Architecture   LlamaShape + the live units by their ORIGINAL ids; the one owner of widths and of the parameter count

Every layer has the same number of query heads and of FFN channels (EfficientLLM, arXiv 2502.06663, constraint ii);
which ones survive differs per layer. KV heads follow their query heads: a KV head lives while one of its query heads
does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_prune.errors import UserError

HEAD, KV_HEAD, FFN, STEM, VOCAB, FIXED = "head", "kv_head", "ffn", "stem", "vocab", "fixed"
GROUP_KINDS = (HEAD, FFN, STEM)


MOST_UNITS = 1 << 26  # heads and FFN channels: ten times those of the largest models; damaged files say more


@dataclass(frozen=True)
class LlamaShape:
    """The source model's shape, in Megatron's nouns. `kv_channels` is the head dimension and never changes."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_query_groups ({self.num_query_groups}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head in the source model."""
        return self.num_attention_heads // self.num_query_groups

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object with the field names of this class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LlamaShape:
        """Inverse of `to_json`; raises ValueError or TypeError for values that are no model's."""
        for name, value in data.items():
            default = cls.__dataclass_fields__[name].default
            if isinstance(default, (bool, str)):
                is_fit = type(value) is type(default)
            elif isinstance(default, float):
                is_fit = type(value) in (int, float) and 0 < value < 1e18
            elif default is None:
                is_fit = value is None or isinstance(value, dict)
            else:
                is_fit = type(value) is int and 0 < value <= 1 << 31
            if not is_fit:
                raise ValueError(f"{name} is {str(value)[:60]!r}")
        shape = cls(**data)
        if shape.units > MOST_UNITS or shape.hidden_size > MOST_UNITS:
            raise ValueError(f"{shape.units} heads and FFN channels are too many")
        return shape

    @property
    def units(self) -> int:
        """Heads and FFN channels of all layers: what an architecture keeps a number for."""
        return self.num_layers * (self.num_attention_heads + self.ffn_hidden_size)


@dataclass(frozen=True)
class Group:
    """What one pruning step removes.

    Args:
        kind: `head`, `ffn` or `stem`.
        units: original ids; for `head` and `ffn` one tuple per layer, for `stem` one tuple with the one channel.
    """

    kind: str
    units: tuple[tuple[int, ...], ...]

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """Ids that leave `layer` (the stem channel is the same one everywhere)."""
        return self.units[0] if self.kind == STEM else self.units[layer]


def _ids(values: Iterable[int]) -> np.ndarray:
    array = np.array(sorted(int(v) for v in values), dtype=np.int32)
    array.setflags(write=False)
    return array


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, dtype=np.int32)
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class Architecture:
    """The live units of a model being pruned, ascending original ids; equal when shape and live ids are.

    Args:
        shape: the source model.
        heads: per layer, int32 ids of the live query heads.
        ffn: per layer, int32 ids of the live FFN channels.
        stem: int32 ids of the live residual channels.
    """

    shape: LlamaShape
    heads: tuple[np.ndarray, ...]
    ffn: tuple[np.ndarray, ...]
    stem: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.heads) == len(self.ffn) == self.shape.num_layers:
            raise ValueError(f"live units of {len(self.heads)} and {len(self.ffn)} layers, not {self.shape.num_layers}")
        if len({len(h) for h in self.heads}) != 1:
            raise ValueError("layers differ in their number of query heads")
        if len({len(f) for f in self.ffn}) != 1:
            raise ValueError("layers differ in their FFN width")

    @classmethod
    def full(cls, shape: LlamaShape) -> Architecture:
        """The unpruned source model."""
        heads = _frozen(np.arange(shape.num_attention_heads))
        ffn = _frozen(np.arange(shape.ffn_hidden_size))
        return cls(shape, (heads,) * shape.num_layers, (ffn,) * shape.num_layers, _frozen(np.arange(shape.hidden_size)))

    # Widths --------------------------------------------------------------------------------------------------------

    @property
    def num_attention_heads(self) -> int:
        """Live query heads of every layer."""
        return len(self.heads[0])

    @property
    def ffn_hidden_size(self) -> int:
        """Live FFN channels of every layer."""
        return len(self.ffn[0])

    @property
    def hidden_size(self) -> int:
        """Live residual (stem) channels."""
        return len(self.stem)

    def kv_heads(self, layer: int) -> np.ndarray:
        """Original ids of the KV heads of `layer` that still have a live query head, ascending int32."""
        return self._kv_heads[layer]

    @cached_property
    def _kv_heads(self) -> tuple[np.ndarray, ...]:
        return tuple(_frozen(np.unique(heads // self.shape.heads_per_group)) for heads in self.heads)

    def live(self, kind: str, layer: int) -> np.ndarray:
        """Live original ids of `kind` (`head`, `kv_head`, `ffn`, `stem`, `vocab`) in `layer`."""
        if kind == HEAD:
            return self.heads[layer]
        if kind == KV_HEAD:
            return self.kv_heads(layer)
        if kind == FFN:
            return self.ffn[layer]
        if kind == STEM:
            return self.stem
        assert kind == VOCAB, kind
        return np.arange(self.shape.vocab_size, dtype=np.int32)

    @cached_property
    def parameters(self) -> int:
        """Live parameters: padding and empty slots not counted, a tied LM head counted once."""
        s, h = self.shape, self.hidden_size
        kv = [len(k) for k in self._kv_heads]
        qkv_rows = sum((self.num_attention_heads + 2 * k) * s.kv_channels for k in kv)
        attention = qkv_rows * h + s.num_layers * h * self.num_attention_heads * s.kv_channels
        extras = (qkv_rows if s.add_qkv_bias else 0) + (2 * s.num_layers * s.kv_channels if s.qk_layernorm else 0)
        ffn = s.num_layers * 3 * self.ffn_hidden_size * h
        norms = (2 * s.num_layers + 1) * h
        return attention + extras + ffn + norms + s.vocab_size * h * (1 if s.tie_word_embeddings else 2)

    @property
    def kv_cache_channels(self) -> int:
        """Elements that a KV cache holds per token (keys and values of the live KV heads of all layers)."""
        return sum(2 * len(k) * self.shape.kv_channels for k in self._kv_heads)

    # Removal -------------------------------------------------------------------------------------------------------

    def without(self, group: Group) -> Architecture:
        """The architecture after `group` is removed; every unit of it must be alive (asserted)."""

        def drop(live: np.ndarray, units: Sequence[int]) -> np.ndarray:
            at = np.searchsorted(live, units)  # ids ascend
            kept = np.delete(live, at[live.take(at, mode="clip") == units])
            assert len(kept) == len(live) - len(units), f"{group.kind} {units}: not all of them are alive"
            return _frozen(kept)

        if group.kind == STEM:
            return dataclasses.replace(self, stem=drop(self.stem, group.units[0]))
        assert group.kind in (HEAD, FFN) and len(group.units) == self.shape.num_layers
        live = self.heads if group.kind == HEAD else self.ffn
        after = tuple(drop(ids, units) for ids, units in zip(live, group.units, strict=True))
        return dataclasses.replace(self, heads=after) if group.kind == HEAD else dataclasses.replace(self, ffn=after)

    def cost(self, group: Group) -> int:
        """Parameters that leave with `group`, the KV heads that lose their last query head included."""
        return self.parameters - self.without(group).parameters

    # Identity and storage ------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hex digest of shape and live ids; equal on all ranks that agree."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for array in (*self.heads, *self.ffn, self.stem):
            digest.update(np.ascontiguousarray(array).tobytes() + b"|")
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def to_json(self) -> dict[str, Any]:
        """Human-readable JSON object: widths, parameters, and live ids as ranges such as `0-17,19`."""
        return {
            "shape": self.shape.to_json(),
            "parameters": self.parameters,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": [len(k) for k in self._kv_heads],
            "ffn_hidden_size": self.ffn_hidden_size,
            "hidden_size": self.hidden_size,
            "live": {
                "heads": [to_ranges(h) for h in self.heads],
                "ffn": [to_ranges(f) for f in self.ffn],
                "stem": to_ranges(self.stem),
            },
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """Inverse of `to_json`; raises `UserError` when the live ids do not fit the shape or the stated widths."""
        try:
            shape, live = LlamaShape.from_json(data["shape"]), data["live"]
            if not len(live["heads"]) == len(live["ffn"]) == shape.num_layers:
                raise ValueError(f"live units of other than {shape.num_layers} layers")
            result = cls(
                shape,
                tuple(from_ranges(h, shape.num_attention_heads) for h in live["heads"]),
                tuple(from_ranges(f, shape.ffn_hidden_size) for f in live["ffn"]),
                from_ranges(live["stem"], shape.hidden_size),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"architecture.json: not an architecture of this project ({error!r})") from error
        for ids, size in (
            *((h, shape.num_attention_heads) for h in result.heads),
            *((f, shape.ffn_hidden_size) for f in result.ffn),
            (result.stem, shape.hidden_size),
        ):
            if not len(ids) or ids[-1] >= size:
                raise UserError(f"architecture.json: live ids {to_ranges(ids)!r} do not fit the source's {size} units")
        if result.parameters != data.get("parameters", result.parameters):
            raise UserError(
                "architecture.json: `parameters` contradicts the live units; the file was edited or damaged"
            )
        return result


def to_ranges(ids: np.ndarray) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    if not len(ids):
        return ""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    ends = np.append(starts[1:] - 1, len(ids) - 1)
    return ",".join(f"{ids[a]}" if a == b else f"{ids[a]}-{ids[b]}" for a, b in zip(starts, ends, strict=True))


def from_ranges(text: str, size: int | None = None) -> np.ndarray:
    """Inverse of `to_ranges`; raises ValueError on malformed text, or for ids beyond `size`."""
    values: list[int] = []
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        if size is not None and int(last or first) >= size:
            raise ValueError(f"live ids {text!r} do not fit the source's {size} units")
        values.extend(range(int(first), int(last or first) + 1))
    if len(set(values)) != len(values):
        raise ValueError(f"repeated ids in {text!r}")
    return _ids(values)
