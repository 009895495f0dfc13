"""Where a run's pieces lie: sizes of the mesh axes, layers of each pipeline stage, micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prune.config import Config, data_parallel_size
from megatron_prune.errors import UserError
from megatron_prune.model.layout import stage_layers


@dataclass(frozen=True)
class Placement:
    """The mesh of a run and what each stage of it holds.

    Args:
        tp, pp, dp: sizes of the tensor-, pipeline- and data-parallel axis.
        micro_batches: per iteration and data-parallel rank.
        stages: per pipeline stage, the layers it holds, by their numbers in the source.
    """

    tp: int
    pp: int
    dp: int
    micro_batches: int
    stages: tuple[Sequence[int], ...]

    @classmethod
    def plan(cls, config: Config, world_size: int, num_layers: int) -> Placement:
        """The placement of a valid `config` on `world_size` processes. Raises UserError: the layers do not split over
        the pipeline stages."""
        parallel, training = config.parallel, config.training
        dp = data_parallel_size(config, world_size)
        micro_batches = training.global_batch_size // (training.micro_batch_size * dp)
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        return cls(tp, pp, dp, micro_batches, _stages(config, num_layers))

    def of(self, config: Config, layers: Sequence[int]) -> Placement:
        """The same for a model that these layers are left of."""
        parallel = config.parallel
        ends = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
        if len(layers) == sum(map(len, self.stages)):
            return self
        return dataclasses.replace(self, stages=stage_layers(layers, self.pp, *ends))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations `stage` holds at once (one forward, one backward in turn)."""
        return min(self.micro_batches, self.pp - stage)

    def is_first(self, stage: int) -> bool:
        """True for the stage that embeds tokens."""
        return stage == 0

    def is_last(self, stage: int) -> bool:
        """True for the stage that computes the loss."""
        return stage == self.pp - 1


def _stages(config: Config, num_layers: int) -> tuple[range, ...]:
    """Layers per stage: first and last as given, the others even, as megatron-core deals them out."""
    parallel = config.parallel
    pp = parallel.pipeline_model_parallel_size
    given = {0: parallel.num_layers_in_first_pipeline_stage, pp - 1: parallel.num_layers_in_last_pipeline_stage}
    fixed = {stage: count for stage, count in given.items() if count is not None}
    rest, others = num_layers - sum(fixed.values()), pp - len(fixed)
    if rest < 0 or (others and (rest % others or rest < others)) or (not others and rest):
        what = f"the {rest} layers left over by first and last stage do" if fixed else f"{num_layers} layers do"
        raise UserError(
            f"parallel.pipeline_model_parallel_size: {what} not divide by {others} stages; set "
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage so that they do"
        )
    counts = [fixed.get(stage, rest // others if others else 0) for stage in range(pp)]
    starts = [sum(counts[:stage]) for stage in range(pp)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))
