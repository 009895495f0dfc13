"""Where a run stands: everything besides weights and optimizer that an exact resume needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.history import Removal
from megatron_prune.pruning.spike_guard import GuardState
from megatron_prune.saliency.hessian import DiagonalCache
from megatron_prune.saliency.scores import UnitScores

PRUNING, CONTINUED = "pruning", "continued"


@dataclass
class RunState:
    """Mutable progress of a run; equal on all ranks.

    Args:
        iteration: finished iterations. consumed_samples, consumed_tokens: seen in training so far.
        phase: `pruning` until the target is reached (also plain training), then `continued`.
        phase_start: iteration after which the phase began; its learning rate counts from there.
        credits: the pruning schedule's account.
        smoothed: smoothed scores of the units that are alive, or None before the first scoring.
        diagonals: inverse Hessians that metric `obc` keeps over several removals, or None.
        history: all removals, in order.
        guard: memory of the guard against loss spikes.
        skipped_iterations, nonfinite_in_a_row: steps not taken because a loss or gradient was not finite.
        stages: measured facts by stage (`source`, `pruned`, `final`): parameters, widths, validation loss, tokens/s.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    phase: str = PRUNING
    phase_start: int = 0
    credits: float = 0.0
    smoothed: UnitScores | None = None
    diagonals: DiagonalCache | None = None
    history: list[Removal] = field(default_factory=list)
    guard: GuardState = field(default_factory=GuardState)
    skipped_iterations: int = 0
    nonfinite_in_a_row: int = 0
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """Plain values and arrays for a checkpoint."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["history"] = [removal.to_json() for removal in self.history]
        values["smoothed"] = None if self.smoothed is None else self.smoothed.to_state()
        values["diagonals"] = None if self.diagonals is None else dataclasses.asdict(self.diagonals)
        values["guard"] = self.guard.to_state()
        return values

    def record_stage(self, stage: str, architecture: Architecture, loss: float, tokens_per_second: float) -> None:
        """Keep what was measured on validation data at this point of the run, under the stage's name."""
        self.stages[stage] = {
            "iteration": self.iteration,
            "tokens": self.consumed_tokens,
            "parameters": architecture.parameters,
            "num_attention_heads": architecture.num_attention_heads,
            "num_query_groups": max(len(architecture.kv_heads(i)) for i in range(architecture.shape.num_layers)),
            "ffn_hidden_size": architecture.ffn_hidden_size,
            "hidden_size": architecture.hidden_size,
            "validation_loss": loss,
            "evaluation_tokens_per_second": tokens_per_second,
        }

    @classmethod
    def from_state(cls, values: dict[str, Any], architecture: Architecture) -> RunState:
        """Inverse of `to_state`; `architecture` is the checkpoint's."""
        values = dict(values)
        values["history"] = [Removal.from_json(removal) for removal in values["history"]]
        values["guard"] = GuardState.from_state(values.get("guard"))
        if values["smoothed"] is not None:
            values["smoothed"] = UnitScores.from_state(architecture, values["smoothed"])
        if values.get("diagonals") is not None:
            values["diagonals"] = DiagonalCache(**values["diagonals"])
        return cls(**values)
