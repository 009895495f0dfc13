"""The record of what was removed: one JSON line per group, flushed at once; `read_history` reads it for analysis.

Removal          one line
HistoryWriter    appends lines to pruning_history.jsonl (one rank only)
read_history     file -> list of Removal; read_removals   its lines
before           what the first removal was taken from
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_prune.errors import UserError, first_line
from megatron_prune.model import first_format
from megatron_prune.model.architecture import Architecture, Group, Units
from megatron_prune.model.kinds import Kind, find_kind
from megatron_prune.reading import read_words
from megatron_prune.runtime.folders import replace_file

logger = logging.getLogger(__name__)

FILE_NAME = "pruning_history.jsonl"
LARGEST = 4 << 30  # bytes: a line for every group that left


@dataclass(frozen=True)
class Removal:
    """One removed group.

    Args:
        iteration: iteration after whose optimizer step it left (from 1). tokens: consumed until then.
        group: what left.
        scores: the saliencies it was chosen by, by kind of group. margin: gap to the runner-up, relative (null: no
            alternative). parameters: live parameters after it. widths: live units by prunable kind after it; a list
            where layers differ.
        layer_errors: with a second-order update, the layers' mean squared output error, `removed` without it and
            `compensated` with it; else null.
    """

    iteration: int
    tokens: int
    group: Group
    scores: dict[str, float]
    margin: float | None
    parameters: int
    widths: dict[str, int | list[int]]
    layer_errors: dict[str, float] | None = None

    @property
    def kind(self) -> str:
        """Name of the kind of group."""
        return self.group.name

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object; units as lists of ids per layer, by kind of unit."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        gone = {kind.name: [list(units) for units in sites] for kind, sites in self.group.gone.items()}
        return {**fields, "group": self.group.name, "gone": gone}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Removal:
        """Inverse of `to_json`; also reads lines of the first format. Raises AttributeError, ValueError, TypeError or
        KeyError for anything else."""
        data = first_format.removal(data)
        if not all(isinstance(data[name], dict) for name in ("gone", "scores", "widths")):
            raise TypeError("gone, scores and widths are mappings")
        counts, errors = ("iteration", "tokens", "parameters"), data.get("layer_errors")
        if not all(_is_count(data[name]) for name in counts):
            raise TypeError(f"{', '.join(counts)} are whole numbers")
        numbers = [*data["scores"].values(), *({} if errors is None else errors).values()]
        if not all(type(number) in (int, float) for number in (*numbers, data["margin"] or 0)):
            raise TypeError("scores, margin and layer_errors are numbers")
        widths = [[width] if _is_count(width) else width for width in data["widths"].values()]
        if not all(isinstance(width, list) and width and all(map(_is_count, width)) for width in widths):
            raise TypeError("widths are whole numbers, or lists of them")
        gone = {find_kind(name): _units(sites) for name, sites in data.pop("gone").items()}
        return cls(group=Group(str(data.pop("group")), gone), **data)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _units(sites: list[list[int]]) -> Units:
    return tuple(tuple(int(i) for i in units) for units in sites)


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
        replace_file(self.path, "".join(_line(removal) for removal in self._all).encode())
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


def widest(width: int | list[int]) -> int:
    """Of a width as `Removal.widths` has it, that of the layer with most."""
    return max(width) if isinstance(width, list) else width


def read_history(path: Path) -> list[Removal]:
    """All removals of a pruning_history.jsonl. Raises UserError naming file and line where one is not readable."""
    try:
        lines = read_words(path, LARGEST).splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    return read_removals(lines, str(path), json.loads)


def read_removals(lines: Sequence[Any], where: str, parse: Callable[[Any], Any] = dict) -> list[Removal]:
    """What `lines` say, each made a JSON object by `parse`. Raises UserError naming `where` and the line's number."""
    removals = []
    for number, line in enumerate(lines, start=1):
        try:
            removals.append(Removal.from_json(parse(line)))
        except (AttributeError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            what = f"not a line of a pruning history ({type(error).__name__}: {first_line(error)})"
            raise UserError(f"{where}:{number}: {what}") from error
    return removals


def before(architecture: Architecture, history: Sequence[Removal]) -> Architecture:
    """What the first removal was taken from, given the architecture after the last one."""

    def whole(kind: Kind, site: int, live: np.ndarray) -> np.ndarray:
        gone = [r.group.gone[kind][site] for r in history if kind in r.group.gone]
        return np.union1d(live, np.concatenate([live[:0], *gone])).astype(np.int32)

    live = architecture.live.items()
    return Architecture(
        architecture.shape, {kind: tuple(whole(kind, at, ids) for at, ids in enumerate(sites)) for kind, sites in live}
    )
