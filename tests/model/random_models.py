"""Random shapes and random removals, for property tests.

shapes          LlamaShapes of every family and head grouping, small
groups          the removals of a history, one after the other, by one of the three rules for heads
architectures   a shape after some of them
layouts         the same as it is stored: packed at the start, slots emptied since, maybe compacted between
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, STEM, Kind, find_kind
from megatron_prune.model.layout import Quanta, ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import default_names
from megatron_prune.testing.helpers.sharded import rounded

RULES = ("cluster", "uniform", "kv_group")


@st.composite
def shapes(draw) -> LlamaShape:
    kv_heads, queries = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return LlamaShape(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 12)),
        ffn_hidden_size=draw(st.integers(1, 14)),
        num_attention_heads=kv_heads * queries,
        num_query_groups=kv_heads,
        kv_channels=2 * draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(1, 9)),
        max_position_embeddings=16,
        rope_scaling=draw(st.sampled_from([None, {"rope_type": "linear", "factor": 2.0}])),
        tie_word_embeddings=draw(st.booleans()),
        add_qkv_bias=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
    )


def the_one(group: Group) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """(name of its one kind of unit, units) of a group, as the oracle takes it."""
    ((kind, units),) = group.gone.items()
    return kind.name, units


def random_group(architecture: Architecture, kind: Kind, rule: str, random: np.random.Generator) -> Group | None:
    """A group of `kind` drawn by `rule`, or None where that would leave nothing."""
    if kind == STEM:
        return (
            Group.of(kind, ((int(random.choice(architecture.ids(STEM, 0))),),))
            if architecture.hidden_size > 1
            else None
        )
    if kind == FFN:
        picks = [[random.choice(ids)] for ids in architecture.sites(FFN)]
    else:
        picks = [_heads(ids, architecture.shape.heads_per_group, rule, random) for ids in architecture.sites(HEAD)]
    width = architecture.ffn_hidden_size if kind == FFN else architecture.num_attention_heads
    if len(picks[0]) >= width:
        return None
    return Group.of(kind, tuple(tuple(sorted(int(unit) for unit in pick)) for pick in picks))


def _heads(ids: np.ndarray, per_group: int, rule: str, random: np.random.Generator) -> list[int]:
    clusters = [ids[ids // per_group == kv_head] for kv_head in np.unique(ids // per_group)]
    if rule == "uniform":
        return [int(random.choice(cluster)) for cluster in clusters]
    return [int(random.choice(ids))] if rule == "cluster" else random.permutation(clusters)[0].tolist()


def removals(architecture: Architecture, rule: str, seed: int, count: int) -> Iterator[Group]:
    """Up to `count` groups, each fit to be removed after those before."""
    random = np.random.default_rng(seed)
    for name in random.choice(default_names(), size=count):
        group = random_group(architecture, find_kind(str(name)), rule, random)
        if group is not None:
            architecture = architecture.without(group)
            yield group


@st.composite
def groups(draw, architecture: Architecture, at_most: int = 12) -> list[Group]:
    rule, seed = draw(st.sampled_from(RULES)), draw(st.integers(0, 2**16))
    return list(removals(architecture, rule, seed, draw(st.integers(0, at_most))))


@st.composite
def architectures(draw) -> Architecture:
    architecture = Architecture.full(draw(shapes()))
    for group in draw(groups(architecture)):
        architecture = architecture.without(group)
    return architecture


@st.composite
def quanta(draw) -> Quanta:
    return rounded(**{name: draw(st.integers(1, 4)) for name in ("vocab", *default_names())})


@st.composite
def layouts(draw) -> ShardLayout:
    architecture = Architecture.full(draw(shapes()))
    layout = ShardLayout.pack(architecture, draw(st.integers(1, 4)), draw(quanta()))
    compacts = draw(st.integers(1, 5))
    for number, group in enumerate(draw(groups(architecture))):
        layout = layout.without(group)
        if number % compacts == compacts - 1 and layout.is_due:
            layout = layout.compacted()
    return layout
