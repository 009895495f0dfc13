"""The kinds of units a model is made of, registered as criteria are.

    Kind           what a unit of it is: how many there are, how ranks share them, what it follows
    HEAD KV_HEAD FFN STEM VOCAB LAYER   those of a Llama;  FIXED  a dimension without units
    register_kind  adds one;  find_kind  by name;  known_kinds  all

A *unit* is one head, one channel, one row of the vocabulary; it is known by its original id, its number in the source
model. Everything else (which dims of which parameter a kind runs along, layout, scores, resharding, checkpoints,
estimates) follows from the table of parameters, `model.table`, whose dims name their kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_prune.model.shape import LlamaShape

TP = "tp"  # the mesh axis whose ranks hold different units


@dataclass(frozen=True, repr=False)
class Kind:
    """A kind of unit; equal when the names are.

    Args:
        name: in files, options and messages.
        label: a word for its width in log lines. title: for tables that people read.
        size: units that the source model has, in every layer where it has any.
        axis: the mesh axis that splits them (`TP`), or None: each rank holds all of them.
        is_shared: the same units in all layers, and outside of them; else each layer has its own.
        is_prunable: units may leave by themselves; else all stay, or those do that `follows` says.
        follows: a kind whose units these serve: a unit lives while one of those that it serves does.
        served: ids of the followed kind -> for each of them, the id here that serves it.
        quantum: what a stored width is rounded up to where no configuration says, by the units of the source that a
            rank holds.
        round_to: multiple that the live width is brought to at the end of pruning, where no configuration says, by the
            units of the source.
        hf_key: what a `config.json` calls their number; empty: it does not state it.
    """

    name: str
    label: str = field(compare=False)
    title: str = field(compare=False)
    size: Callable[[LlamaShape], int] = field(compare=False)
    axis: str | None = field(default=None, compare=False)
    is_shared: bool = field(default=False, compare=False)
    is_prunable: bool = field(default=True, compare=False)
    follows: Kind | None = field(default=None, compare=False)
    served: Callable[[np.ndarray, LlamaShape], np.ndarray] | None = field(default=None, compare=False)
    quantum: Callable[[int], int] = field(default=lambda _: 1, compare=False)
    round_to: Callable[[int], int] = field(default=lambda _: 1, compare=False)
    hf_key: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], Kind], tuple[str]]:
        return find_kind, (self.name,)  # functions do not travel between processes

    @property
    def varies(self) -> bool:
        """Whether their number changes: they are prunable, or follow a kind that is."""
        return self.is_prunable or self.follows is not None

    def serving(self, ids: np.ndarray, shape: LlamaShape) -> np.ndarray:
        """For each of `ids` of the kind that it follows, the id here that serves it."""
        assert self.served is not None, f"{self} serves no other kind"
        return self.served(ids, shape)

    def site(self, layer: int) -> int:
        """Where the units of `layer` stand among the sites of this kind: one per layer, or one for all."""
        return 0 if self.is_shared else layer

    def sites(self, shape: LlamaShape) -> int:
        """How many sites a model of `shape` has."""
        return 1 if self.is_shared else shape.num_layers

    def ranks(self, tp: int) -> int:
        """Ranks that hold different units of it, of `tp` tensor-parallel ones."""
        return tp if self.axis == TP else 1


_REGISTRY: dict[str, Kind] = {}


def register_kind(kind: Kind) -> Kind:
    """Make `kind` known by its name."""
    assert kind.name not in _REGISTRY, f"kind {kind.name} is registered twice"
    _REGISTRY[kind.name] = kind
    return kind


def find_kind(name: str) -> Kind:
    """The kind called `name`; raises KeyError for an unknown one."""
    return _REGISTRY[name]


def known_kinds() -> tuple[Kind, ...]:
    """All kinds, in the order of their registration."""
    return tuple(_REGISTRY.values())


def in_order(kinds: Iterable[Kind]) -> tuple[Kind, ...]:
    """`kinds` in the order of their registration, each once."""
    wanted = set(kinds)
    return tuple(kind for kind in known_kinds() if kind in wanted)


def aligned(width: int) -> int:
    """64 from 512 units on: matrix products stay aligned, and a compaction comes once in 64 removals. Below that, where
    up to 63 empty slots would be a large share, 1."""
    return 64 if width >= 512 else 1


def even(width: int) -> int:
    """8, or a larger power of two up to 64 that is at most a 128th of the source's width: fast matrix products and FFNs
    that divide by GPUs, for a small part of the model. Below 512 units 1."""
    return min(64, max(8, 1 << ((width // 128).bit_length() - 1))) if width >= 512 else 1


HEAD = register_kind(
    Kind("head", "heads", "query heads", lambda shape: shape.num_attention_heads, TP, hf_key="num_attention_heads")
)
KV_HEAD = register_kind(
    Kind(
        "kv_head",
        "KV heads",
        "KV heads",
        lambda shape: shape.num_query_groups,
        TP,
        is_prunable=False,
        follows=HEAD,
        served=lambda heads, shape: heads // shape.heads_per_group,
        hf_key="num_key_value_heads",
    )
)
FFN = register_kind(
    Kind(
        "ffn",
        "ffn",
        "FFN channels",
        lambda shape: shape.ffn_hidden_size,
        TP,
        quantum=aligned,
        round_to=even,
        hf_key="intermediate_size",
    )
)
STEM = register_kind(
    Kind(
        "stem",
        "hidden",
        "hidden size",
        lambda shape: shape.hidden_size,
        is_shared=True,
        quantum=aligned,
        round_to=even,
        hf_key="hidden_size",
    )
)
VOCAB = register_kind(
    Kind(
        "vocab",
        "vocabulary",
        "vocabulary",
        lambda shape: shape.vocab_size,
        TP,
        is_shared=True,
        is_prunable=False,
        quantum=lambda _: 128,
        hf_key="vocab_size",
    )
)
LAYER = register_kind(  # a whole layer; no dim counts it: rows of a layer that is gone vanish
    Kind("layer", "layers", "layers", lambda shape: shape.num_layers, is_shared=True, hf_key="num_hidden_layers")
)
FIXED = Kind("fixed", "", "", lambda _: 1, is_shared=True, is_prunable=False)
