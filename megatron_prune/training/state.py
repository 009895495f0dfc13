"""Where a run stands: everything besides weights and optimizer that an exact resume needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.fields import COUNT, NUMBER, TABLE, check_fields
from megatron_prune.checkpoint.record import PRUNING, STATE_FIELDS, Progress
from megatron_prune.errors import UserError
from megatron_prune.model import first_format
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.history import Removal, read_removals
from megatron_prune.pruning.spike_guard import GuardState
from megatron_prune.saliency.hessian import DiagonalCache
from megatron_prune.saliency.scores import UnitScores

_OWN_FIELDS = {
    **dict.fromkeys(("iteration", "skipped_iterations", "nonfinite_in_a_row"), COUNT),
    "credits": NUMBER,
    **dict.fromkeys(("smoothed", "diagonals", "guard"), TABLE),
}


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

    @property
    def progress(self) -> Progress:
        """How far the run is, which says what is left of it."""
        return Progress(self.iteration, self.phase, self.phase_start)

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
            "widths": architecture.widths(),
            "validation_loss": loss,
            "evaluation_tokens_per_second": tokens_per_second,
        }

    @classmethod
    def from_state(cls, values: dict[str, Any], architecture: Architecture, file: Path = Path("state")) -> RunState:
        """Inverse of `to_state`, for checkpoints of other versions as well: a field that is absent is as in a new run
        (`diagonals` and `guard` came later), one that is not known is ignored, within `diagonals` and `guard` too.

        Args:
            values: may hold other fields of the checkpoint's state besides. architecture: the checkpoint's.
            file: what to name in errors.

        Raises:
            UserError: a field is not what a run stores; names file and field.
        """
        check_fields(values, STATE_FIELDS | _OWN_FIELDS, file)
        read = {
            "history": lambda removals: read_removals(removals, f"{file}: history"),
            "smoothed": lambda scores: UnitScores.from_state(architecture, scores),
            "diagonals": lambda cache: DiagonalCache.from_state(architecture.table, cache),
            "guard": lambda memory: GuardState.from_state(_known(GuardState, memory)),
            "stages": lambda stages: {name: first_format.stage(facts) for name, facts in stages.items()},
        }
        found = {name: value for name, value in _known(cls, values).items() if value is not None}
        for name in read.keys() & found.keys():
            try:
                found[name] = read[name](found[name])
            except UserError:
                raise
            except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
                raise UserError(f"{file}: {name}: not what a run stores ({type(error).__name__}: {error})") from error
        return cls(**found)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Of `values` those that are fields of the dataclass `kind`."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}
