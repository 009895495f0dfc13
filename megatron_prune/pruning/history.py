"""The record of what was removed: one JSON line per group, flushed at once, readable again for analysis and replay.

Removal          one line
HistoryWriter    appends lines to pruning_history.jsonl (one rank only)
read_history     lines -> list of Removal
before           what the first removal was taken from
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.model.architecture import FFN, HEAD, STEM, Architecture, Group

logger = logging.getLogger(__name__)

FILE_NAME = "pruning_history.jsonl"


@dataclass(frozen=True)
class Removal:
    """One removed group.

    Args:
        iteration: iteration after whose optimizer step it left (from 1). tokens: consumed until then.
        kind, units: see `Group`.
        scores: the saliencies it was chosen by, per kind. margin: gap to the runner-up, relative (null: no
        alternative). parameters: live parameters after it; the three widths after it follow.
        layer_errors: with a second-order update, the layers' mean squared output error, `removed` without it and
            `compensated` with it; else null.
    """

    iteration: int
    tokens: int
    kind: str
    units: tuple[tuple[int, ...], ...]
    scores: dict[str, float]
    margin: float | None
    parameters: int
    num_attention_heads: int
    ffn_hidden_size: int
    hidden_size: int
    layer_errors: dict[str, float] | None = None

    @property
    def group(self) -> Group:
        """The removed group."""
        return Group(self.kind, self.units)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Removal:
        """Inverse of `to_json`."""
        return cls(**{**data, "units": tuple(tuple(int(i) for i in units) for units in data["units"])})


class HistoryWriter:
    """Appends removals to `directory`/pruning_history.jsonl; on resume, lines after the checkpoint are cut off
    first.

    Args:
        so_far: the run's own list of removals. Where a line cannot be written (disk full), the whole file is written
            again from it at the next one: checkpoints hold the history too, so nothing depends on the file.
    """

    def __init__(self, directory: Path, so_far: list[Removal]) -> None:
        self.path, self._all = directory / FILE_NAME, so_far
        directory.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = self._written()
        self._is_whole = True

    def _written(self) -> IO[str]:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(_line(removal) for removal in self._all))
        temporary.replace(self.path)
        return self.path.open("a")

    def append(self, removal: Removal) -> None:
        """Write one line and flush it; `removal` is in the list already. A failure is logged once."""
        try:
            if not self._is_whole:
                self._file = self._written()
                self._is_whole = True
                return
            self._file.write(_line(removal))
            self._file.flush()
        except OSError as error:
            if self._is_whole:
                logger.warning("%s: %s; written again as soon as it can be", self.path, error.strerror)
            self._is_whole = False
            self._discard()

    def close(self) -> None:
        """Close the file, whole if it can be."""
        if not self._is_whole:
            try:
                self._file = self._written()
            except OSError as error:
                logger.warning("%s: %s; checkpoints hold the history", self.path, error.strerror)
        self._discard()

    def _discard(self) -> None:
        """Close the file; what a full disk refused stays in its buffer and is refused again here."""
        with contextlib.suppress(OSError):
            self._file.close()


def _line(removal: Removal) -> str:
    return json.dumps(removal.to_json()) + "\n"


def read_history(path: Path) -> list[Removal]:
    """All removals of a pruning_history.jsonl. Raises UserError naming file and line where one is not readable."""
    removals = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            removals.append(Removal.from_json(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a line of a pruning history ({error})") from error
    return removals


def before(architecture: Architecture, history: Sequence[Removal]) -> Architecture:
    """What the first removal was taken from, given the architecture after the last one."""

    def whole(kind: str, layer: int) -> np.ndarray:
        gone: Iterable[int] = (u for r in history if r.kind == kind for u in r.group.of_layer(layer))
        return np.union1d(architecture.live(kind, layer), np.fromiter(gone, np.int32)).astype(np.int32)

    layers = range(architecture.shape.num_layers)
    heads, ffn = (tuple(whole(kind, layer) for layer in layers) for kind in (HEAD, FFN))
    return Architecture(architecture.shape, heads, ffn, whole(STEM, 0))
