"""A small run whose pieces can be called, timed and counted one by one, as benchmarks do.

Setup       model, layout and batch of such a run
SteppedRun  one rank of it: whole steps with and without pruning, and scoring, decision, retirement, compaction alone
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megatron_prune.config import Config, GroupConfig, GroupConfigs, OptimizerConfig, PruningConfig, TrainingConfig
from megatron_prune.launch.assembly.assemble import fresh_model
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.sources import RandomWeights
from megatron_prune.pruning.groups import default_names, find_group
from megatron_prune.pruning.selector import choose
from megatron_prune.runtime.mesh import Mesh
from megatron_prune.saliency.collector import MicrobatchFisher
from megatron_prune.saliency.reducer import ElementScores, score_elements
from megatron_prune.saliency.scores import UnitScores, score_length, smooth
from megatron_prune.testing.helpers.meters import Seconds
from megatron_prune.testing.helpers.sharded import Case, RandomTokens
from megatron_prune.training.metrics import Reporter
from megatron_prune.training.state import RunState
from megatron_prune.training.step import forward_backward
from megatron_prune.training.trainer import Datasets, Trainer

Timer = Callable[[Callable[[], Any]], tuple[Any, Seconds]]


@dataclass(frozen=True)
class Setup:
    """What runs.

    Args:
        micro_batches: of the global batch, over all data-parallel ranks.
    """

    shape: LlamaShape
    case: Case
    seq_length: int
    micro_batch_size: int
    micro_batches: int

    @property
    def config(self) -> Config:
        """Every pruning step removes one group, whatever its kind: the most that a ratio of 1:1 can cost."""
        base, batch = Config(), self.micro_batches * self.micro_batch_size
        config = dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, seq_length=self.seq_length),
            training=TrainingConfig(self.micro_batch_size, batch, train_iters=10**6),
            optimizer=OptimizerConfig(lr_decay_style="constant"),
            pruning=PruningConfig(
                target_params=1,
                ratio="1:1",
                metric="taylor_mix",
                fisher_unit="sequence",
                groups=GroupConfigs({name: self._group(name) for name in default_names()}),
            ),
        )
        return self.case.applied(config)

    def _group(self, name: str) -> GroupConfig:
        """Few groups of many units, such as heads, may leave, or there would be none left after some steps."""
        kind = find_group(name)
        size = kind.kind.size(self.shape)
        return GroupConfig(cost=1, floor=size - 2 if kind.default_cost(self.shape) > 1 else 1)


class SteppedRun:
    """One rank of a run on `mesh`. All ranks call the same methods in the same order.

    Args:
        weights: Hugging Face name -> tensor; random ones, the same on every layout, unless given.
    """

    def __init__(self, setup: Setup, mesh: Mesh, weights: Callable[[str], Tensor] | None = None) -> None:
        self.setup, self.mesh, self.config = setup, mesh, setup.config
        weights = weights or RandomWeights(setup.shape, 0)
        self.model = fresh_model(self.config, Architecture.full(setup.shape), mesh, weights)
        data = Datasets(_Endless(RandomTokens(setup.shape.vocab_size, setup.seq_length, 64)), None)
        reporter = Reporter(self.config, mesh.world_size, None, is_active=False)
        self.trainer = Trainer(self.config, self.model, data, RunState(), reporter)
        assert self.trainer.pruner is not None
        self.pruner, self.coordinator = self.trainer.pruner, self.trainer.coordinator
        self._random = np.random.default_rng(0)
        self._smoothed: UnitScores | None = None

    @property
    def architecture(self) -> Architecture:
        """Live units now."""
        return self.model.architecture

    @property
    def is_compaction_due(self) -> bool:
        """Whether the loop would compact now."""
        return self.model.layout.is_due

    # Whole steps, as the loop does them -------------------------------------------------------------------------------

    def plain_step(self) -> None:
        """One iteration without pruning."""
        self.trainer.pruner = None
        self.trainer.iterate()
        self.trainer.pruner = self.pruner

    def pruning_step(self) -> None:
        """One iteration that scores and removes a group, but leaves a compaction to the caller (`compact`)."""
        self.coordinator.compact_if_due = lambda: False  # type: ignore[method-assign]
        self.trainer.iterate()
        del self.coordinator.compact_if_due

    # Pieces -----------------------------------------------------------------------------------------------------------

    def forward_backward(self) -> None:
        """Gradients of one global batch."""
        training = self.config.training
        settings = (self.trainer.num_microbatches, training.micro_batch_size, self.setup.seq_length)
        forward_backward(self.model, self.trainer.batches, *settings)

    def watched_gradients(self) -> _TimedFisher:
        """`forward_backward` with every micro-batch's squares accumulated."""
        fisher = _TimedFisher(self.model, self.trainer.num_microbatches, 1.0)
        fisher.arm()
        self.forward_backward()
        return fisher

    def score(self, squares: dict[str, Tensor]) -> ElementScores:
        """S of the output weights that this rank owns."""
        return score_elements(self.model, self.pruner.settings.criterion, self.config.pruning.fisher, squares)

    def decide(self, sums: UnitScores) -> None:
        """Smooth, choose on one rank, agree on all."""
        self._smoothed = smooth(self._smoothed, sums, self.config.pruning.saliency_momentum)
        rules, is_first = self.pruner.settings.rules, self.mesh.rank == 0
        self.coordinator.prepare(choose(self._smoothed, self.architecture, rules) if is_first else None)

    def group(self, name: str) -> Group:
        """Any group of the kind called `name`, the same on all ranks."""
        random = UnitScores.from_vector(self.architecture, self._random.random(score_length(self.architecture)))
        return find_group(name).offer(random, self.architecture, self.pruner.settings.rules).group

    def retire(self, kind: str, count: int = 1) -> None:
        """Remove `count` groups of `kind`."""
        for _ in range(count):
            self.coordinator.commit(self.group(kind))

    def retire_quantum(self, kind: str) -> None:
        """Remove as many groups of `kind` as the loop does before it compacts for them (one group of heads)."""
        case, unit = self.setup.case, find_group(kind).kind
        takes_several = any(other.follows == unit for other in self.architecture.table.kinds)
        self.retire(kind, 1 if takes_several else case.quanta.get(unit, 1) * unit.ranks(case.tp))

    def compact(self) -> None:
        """Compact, if that frees something."""
        self.coordinator.compact_if_due()

    def time_pieces(self, timer: Timer) -> dict[str, Seconds]:
        """Score, decide, and remove a group of each kind; the time of each piece, by name (a group's by its kind)."""
        spent: dict[str, Seconds] = {}

        def timed(piece: str, job: Callable[[], Any]) -> Any:
            result, spent[piece] = timer(job)
            return result

        fisher = self.watched_gradients()
        spent["squares"] = fisher.spent
        squares = timed("fisher", fisher.reduce)
        elements = timed("elements", lambda: self.score(squares))
        sums = timed("sums", elements.reduce)
        timed("decision", lambda: self.decide(sums))
        for kind in default_names():
            group, layout = self.group(kind), self.model.layout
            timed(kind, lambda: self._remove(group, layout, elements))  # noqa: B023 - called at once
        return spent

    def _remove(self, group: Group, layout: ShardLayout, elements: ElementScores) -> None:
        """Retire `group`, and forget its scores as the loop does before a next choice."""
        self.coordinator.commit(group)
        elements.drop(group, layout)


class _TimedFisher(MicrobatchFisher):
    """Adds up, in `spent`, the time of squaring gradients, which happens within the backward pass."""

    spent = Seconds(0.0, 0.0)

    def _add(self, name: str, grad: Tensor) -> None:
        device = self._model.mesh.device
        device.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        super()._add(name, grad)
        device.synchronize()
        self.spent = Seconds(self.spent.wall + time.perf_counter() - wall, self.spent.cpu + time.process_time() - cpu)


class _Endless:
    """The same few samples again and again."""

    def __init__(self, samples: RandomTokens) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index % len(self.samples)]
