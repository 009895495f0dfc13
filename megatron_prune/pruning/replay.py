"""A recorded sequence of removals, repeated: on another layout, other data, another source of the same shape.

Groups leave at the recorded tokens, or with an end in proportion to them; those of a model that was pruned at once are
spread evenly up to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_prune.config.recipe import read_recipe
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.pruning.history import Removal, read_history, read_removals
from megatron_prune.pruning.schedule import Schedule
from megatron_prune.pruning.selector import Decision

FIELD = "pruning.replay (--prune-replay)"
_OF_SHAPE = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"}


@dataclass(frozen=True)
class Replay:
    """What was recorded.

    Args:
        path: the file. removals: its lines.
    """

    path: Path
    removals: tuple[Removal, ...]

    @classmethod
    def read(cls, path: str | Path, source: Architecture, target_params: int) -> Replay:
        """The removals in `path`, from `source` down to `target_params`. Raises UserError: a line cannot be read, does
        not fit the source, or the target is not reached."""
        path, architecture, kept = Path(path), source, list[Removal]()
        for number, removal in enumerate(_recorded(path, source), start=1):
            if architecture.parameters <= target_params:
                break
            if not _lives(removal.group, architecture):
                raise UserError(
                    f"{FIELD}: {path}:{number}: its group is not in this source; replay on a source of the same shape"
                )
            architecture = architecture.without(removal.group)
            if architecture.parameters != removal.parameters:
                raise UserError(
                    f"{FIELD}: {path}:{number}: {removal.parameters} parameters are left there and "
                    f"{architecture.parameters} here; replay on a source of the same shape"
                )
            kept.append(removal)
        if architecture.parameters > target_params:
            raise UserError(
                f"{FIELD}: {path} ends at {architecture.parameters} parameters, above pruning.target_params "
                f"{target_params}; set that to {architecture.parameters}"
            )
        return cls(path, tuple(kept))

    def next(self, architecture: Architecture) -> Decision | None:
        """The group that was removed from a model of this size; None after the last."""
        removal = next((r for r in self.removals if r.parameters < architecture.parameters), None)
        if removal is None:
            return None
        return Decision(removal.group, {}, math.inf, removal.parameters)

    def shares(self) -> np.ndarray:
        """When each group left, as shares in (0, 1] of the way to the last one."""
        tokens = np.array([removal.tokens for removal in self.removals], dtype=np.float64)
        if len(tokens) and tokens[-1] > tokens[0] >= 0 and np.all(np.diff(tokens) >= 0):
            return tokens / tokens[-1]
        return np.arange(1, len(tokens) + 1) / max(len(tokens), 1)


def _recorded(path: Path, source: Architecture) -> list[Removal]:
    """The removals in a history, or in a recipe, which says the shape as well. Raises UserError."""
    if path.suffix != ".json":
        return read_history(path)
    recipe, own = read_recipe(path), source.shape.to_json()
    for name, value in recipe["shape"].items():
        if name in _OF_SHAPE and own.get(name) != value:
            raise UserError(f"{FIELD}: {path} is for a source with {name} {value}, this one has {own.get(name)}")
    return read_removals(recipe["history"], f"{path}: history")


def _lives(group: Group, architecture: Architecture) -> bool:
    """Whether all units of `group` are alive."""
    return all(
        kind in architecture.live
        and len(sites) == len(architecture.sites(kind))
        and all(np.isin(units, ids).all() for units, ids in zip(sites, architecture.sites(kind), strict=True))
        for kind, sites in group.gone.items()
    )


@dataclass(frozen=True)
class ReplaySchedule(Schedule):
    """The size after so many tokens is the recorded one; see `Schedule`.

    Args:
        replay: what is repeated. end: tokens at which the last group leaves; None: as recorded.
        source_params: of the model at the start. target_params: pruning ends once parameters <= target.
    """

    replay: Replay
    end: int | None
    source_params: int
    target_params: int

    def _due_at(self) -> np.ndarray:
        """Tokens (float64) at which each group leaves."""
        if self.end is not None:
            return self.end * self.replay.shares()
        return np.array([removal.tokens for removal in self.replay.removals], dtype=np.float64)

    def size(self, tokens: int) -> int:
        """Parameters that are left once so many tokens are consumed."""
        due = int(np.sum(self._due_at() <= tokens + _ROUNDING))
        return self.replay.removals[due - 1].parameters if due else self.source_params

    def forecast(self, kinds: Sequence[str], parameters: np.ndarray, tokens_per_iteration: int) -> np.ndarray:
        """See `Schedule.forecast`."""
        first = np.ceil((self._due_at() - _ROUNDING) / tokens_per_iteration).astype(np.int64)
        return np.maximum(first, 1)[: len(kinds)]


_ROUNDING = 1e-6  # tokens are whole numbers; a scaled one that is whole but for rounding counts as that
