"""Plans of single ranks of runs on 512: what they send, what they write, and that it does not grow with the others."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_prune.checkpoint.tensors import facts_of, sources
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import default_names
from megatron_prune.testing.benchmarks.planning import SHAPES, WORLD, Planned, compaction_of, random_group, worn
from megatron_prune.testing.helpers.many_ranks import one_of, wide_model
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import rounded

SMALL = Planned(LlamaShape(8, 256, 512, 16, 8, 16, 1000, 64), tp=4, pp=4, quanta=rounded(ffn=8, stem=8))
WHOLE = [pytest.param(planned, [5, 300], id=name, marks=pytest.mark.full) for name, planned in SHAPES.items()]


def all_compactions(_rank: int, _world: int, planned: Planned, ranks: list[int]) -> list[Any]:
    """(bytes, messages) by receiver, counted and by what changes its owner, of each kind of group on each rank."""
    found = list[Any]()
    for kind in default_names():
        layout = worn(planned, kind)
        for rank in ranks:
            with one_of(WORLD, rank, planned.tp, planned.pp) as (mesh, sent):
                cost = compaction_of(wide_model(mesh, layout), sent)
            found.append((kind, rank, cost))
    return found


@pytest.mark.parametrize(("planned", "ranks"), [pytest.param(SMALL, [0, 201, 350, 511], id="small"), *WHOLE])
@pytest.mark.timeout(600)
def test_a_compaction_sends_what_changes_its_owner_once_and_nothing_else(planned: Planned, ranks: list[int]) -> None:
    (found,) = run_ranks(all_compactions, 1, planned, ranks, timeout=580)
    for kind, rank, cost in found:
        assert cost.bytes == cost.changing, (kind, rank)
        assert cost.messages == cost.pairs, (kind, rank)  # one per parameter and receiver
    assert sum(sum(cost.bytes.values()) for _, _, cost in found) > 0, "nothing moves: the case shows nothing"


def listed(_rank: int, _world: int, planned: Planned) -> list[tuple[int, int, list[Any]]]:
    """(owners, elements of the parameter, what is listed of it) of each parameter of a rank."""
    with one_of(WORLD, 130, planned.tp, planned.pp) as (mesh, _):
        model = wide_model(mesh, planned.layout)
        spans, owners = model.owned_spans(), mesh.over("owners")
        mine = {shard.name: (shard.start, shard.end) for shard in model.owned()}
        assert mine == {name: own[owners.rank] for name, own in spans.items() if owners.rank in own}
        return [(owners.size, p.numel(), list(spans[name].items())) for name, p, _ in model.rows()]


def test_who_owns_nothing_of_a_parameter_is_not_listed() -> None:
    (found,) = run_ranks(listed, 1, SMALL)
    for owners, elements, spans in found:
        ends = [0, *(last for _, (_, last) in spans)]
        assert [first for _, (first, _) in spans] == ends[:-1] and ends[-1] == elements
        assert all(first < last for _, (first, last) in spans)
        numbers = [number for number, _ in spans]
        assert numbers == sorted(set(numbers)) and numbers[-1] < owners
    assert sum(len(spans) for *_, spans in found) <= len(found) + found[0][0]


def written(_rank: int, _world: int, planned: Planned, world: int) -> dict[str, tuple[int, int, int]]:
    """By key of a checkpoint of all `world` ranks: (elements, how often the least written one is written, the most)."""
    layout, covered = worn(planned, "ffn"), dict[str, np.ndarray]()
    for rank in range(world):
        with one_of(world, rank, planned.tp, planned.pp) as (mesh, _):
            model = wide_model(mesh, layout)
            for source in sources(model, facts_of(model)):
                counts = covered.setdefault(source.key, np.zeros(source.global_shape, dtype=np.uint8))
                counts[tuple(slice(a, a + n) for a, n in zip(source.offset, source.shape, strict=True))] += 1
    return {key: (counts.size, int(counts.min()), int(counts.max())) for key, counts in covered.items()}


@pytest.mark.parametrize("world", [32, pytest.param(WORLD, marks=pytest.mark.full)])
@pytest.mark.timeout(600)
def test_all_ranks_together_write_each_element_once(world: int) -> None:
    (found,) = run_ranks(written, 1, SMALL, world, timeout=580)
    architecture = worn(SMALL, "ffn").architecture
    elements = Counter[str]()
    for key, (size, least, most) in found.items():
        assert (least, most) == (1, 1), key
        elements[key.split("/")[-2]] += size
    assert elements == dict.fromkeys(("model", "exp_avg", "exp_avg_sq", "main"), architecture.parameters)


def calls(job: Callable[[], Any]) -> int:
    """Python functions that `job` calls."""
    count = 0

    def counted(_frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        job()
    finally:
        sys.setprofile(None)
    return count


def effort(_rank: int, _world: int, planned: Planned, world: int) -> dict[str, int]:
    """Functions called for a retirement, a compaction and a checkpoint's plan on the last rank of `world`."""
    with one_of(world, world - 1, planned.tp, planned.pp) as (mesh, _):
        model = wide_model(mesh, worn(planned, "ffn"))
        group = random_group(model.architecture, "ffn", np.random.default_rng(1))
        return {
            "retirement": calls(lambda: model.retire(group)),
            "compaction": calls(model.compact),
            "checkpoint": calls(lambda: sources(model, facts_of(model))),
        }


def test_plans_do_not_grow_with_the_ranks() -> None:
    few, many = (run_ranks(effort, 1, SMALL, world)[0] for world in (64, WORLD))
    for what, count in few.items():
        assert many[what] <= 1.2 * count, (what, few, many)
