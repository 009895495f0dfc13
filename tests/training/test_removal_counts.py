"""A removal costs the host few operators and copies, however wide the model; its scores are not summed anew for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import group_names
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import close_mesh, init_mesh
from megatron_prune.saliency.reducer import ElementScores
from megatron_prune.testing.helpers.meters import Dispatches
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun
from megatron_prune.training.pruner import Scored

LAYERS = 24
SHAPE = LlamaShape(LAYERS, 64, 96, 8, 4, 8, 64, 16, tie_word_embeddings=True)
MOST_OPERATORS, MOST_COPIES = 600, 4
WAYS = ("from_numpy", "tensor", "as_tensor")  # how the package brings numbers of the host to a device


class HostCopies:
    """Counts, while entered, the tensors made of numbers of the host: on a GPU each is a copy that waits."""

    def __enter__(self) -> HostCopies:
        self.count, self._real = 0, {name: getattr(torch, name) for name in WAYS}
        for name, real in self._real.items():
            setattr(torch, name, self._counting(real))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, real in self._real.items():
            setattr(torch, name, real)

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return real(*args, **kwargs)

        return counted


def scored_run(gqa: str = "kv_group") -> tuple[SteppedRun, ElementScores, Callable[[str], Any]]:
    """A run whose batch is scored, its scores, and what removes the least salient group of a kind by them."""
    run = SteppedRun(Setup(SHAPE, Case(), 8, 1, 2), init_mesh(choose_device("cpu"), 1, 1))
    run.plain_step()
    elements = run.score(run.watched_gradients().reduce())
    run.model.step()
    scored = Scored(run.coordinator, run.pruner.settings, run.trainer.state, run.trainer.clock, elements, None)
    rules = dataclasses.replace(run.pruner.settings.rules, gqa=gqa, finish="first", floors={}, widths={})
    return run, elements, lambda kind: scored.remove(dataclasses.replace(rules, types=(kind,)))


def counts(_rank: int, _world_size: int, gqa: str) -> dict[str, list[tuple[int, int]]]:
    """By kind of group: (operators, copies) of its first and its second removal by one batch's scores."""
    _, _, remove = scored_run(gqa)
    found: dict[str, list[tuple[int, int]]] = {}
    for kind in group_names() * 2:
        with Dispatches() as operators, HostCopies() as copies:
            assert remove(kind) is not None
        found.setdefault(kind, []).append((operators.total, copies.count))
    close_mesh()
    return found


@pytest.mark.parametrize("gqa", ["kv_group", "cluster"])
def test_a_removal_dispatches_few_operators_and_copies_little(gqa: str) -> None:
    (found,) = run_ranks(counts, 1, gqa)
    assert set(found) == set(group_names())
    for kind, removals in found.items():
        for operators, copies in removals:
            assert LAYERS < operators <= MOST_OPERATORS, (kind, removals)  # each layer has something to zero
            assert copies <= MOST_COPIES, (kind, removals)


def kept_and_fresh(_rank: int, _world_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(sums kept through removals, sums formed anew from the same elements), at first and after every few removals."""
    run, elements, remove = scored_run()
    found = []
    for count in range(50):
        if count % 8 < 2:
            sums = (elements.reduce(), ElementScores(run.model, elements.pieces).reduce())
            kept, fresh = (np.concatenate([site for sites in s.values.values() for site in sites]) for s in sums)
            found.append((kept, fresh))
        for kind in ("stem", "ffn", *(["head"] if count in (10, 20) else [])):
            assert remove(kind) is not None
    close_mesh()
    return found


def test_kept_sums_are_those_of_what_is_left() -> None:
    (found,) = run_ranks(kept_and_fresh, 1)
    first = found[0][0].max()
    assert len(found[-1][0]) < len(found[0][0]) / 2, "much must be gone"
    for kept, fresh in found:  # elements are not negative: what is subtracted is no larger than the first sums
        assert np.abs(kept - fresh).max() <= 4 * 2.0**-24 * first
