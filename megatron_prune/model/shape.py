"""The source model's shape: frozen facts, as its configuration states them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron_prune.errors import UserError

MOST_UNITS = 1 << 26  # heads and FFN channels: ten times those of the largest models; damaged files say more

SCALING_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of `rope_scaling`, and the numbers that belong to each."""


@dataclass(frozen=True)
class LlamaShape:
    """The source model's shape, in Megatron's nouns. `kv_channels` is the head dimension and never changes;
    `no_rope_layers` are those whose attention knows no positions (NoPE); `add_proj_bias` and `add_ffn_bias` say whether
    the attention output, and gate, up and down have biases."""

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
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    tie_word_embeddings: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    model_type: str = "llama"
    no_rope_layers: tuple[int, ...] = ()
    add_proj_bias: bool = False
    add_ffn_bias: bool = False

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
        found = dataclasses.asdict(self)
        later = {name: found.pop(name) for name in ("no_rope_layers", "add_proj_bias", "add_ffn_bias")}
        return found | {name: list(v) if isinstance(v, tuple) else v for name, v in later.items() if v}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LlamaShape:
        """Inverse of `to_json`; raises ValueError or TypeError for values that are no model's."""
        for name, value in data.items():
            default = cls.__dataclass_fields__[name].default
            if isinstance(default, (bool, str)):
                is_fit = type(value) is type(default)
            elif isinstance(default, float):
                is_fit = type(value) in (int, float) and 0 < value < 1e18
            elif isinstance(default, tuple):
                is_fit = isinstance(value, (list, tuple)) and all(type(n) is int and 0 <= n < 1 << 12 for n in value)
                data = {**data, name: tuple(value)} if is_fit else data
            elif default is None:
                is_fit = value is None or _is_scaling(value)
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
        """Query heads and FFN channels of all layers: how many ids an architecture keeps."""
        return self.num_layers * (self.num_attention_heads + self.ffn_hidden_size)


def _is_scaling(value: Any) -> bool:
    """Whether a stored `rope_scaling` is of a kind that is known, with all the numbers that it needs."""
    if not isinstance(value, dict):
        return False
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALING_NUMBERS:
        return False
    numbers: list[Any] = [value.get(name) for name in SCALING_NUMBERS[kind]]
    are_numbers = all(type(number) in (int, float) and 0 < number < 1e18 for number in numbers)
    return are_numbers and (kind != "llama3" or value["low_freq_factor"] != value["high_freq_factor"])
