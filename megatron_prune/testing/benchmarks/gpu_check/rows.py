"""Rows of a check, written the moment they are known, and the table of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = "results.jsonl"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Context:
    """What the steps are told.

    Args:
        device: `cuda` or `cpu`. tiny: small shapes everywhere; numbers then mean nothing.
        out: folder of the results. data: folder of real inputs, or None. model: a Hugging Face folder for `science`.
        minutes: of the science step. state: its run's folder, which it goes on from.
    """

    device: str
    tiny: bool
    out: Path
    data: Path | None = None
    model: Path | None = None
    state: Path | None = None
    minutes: float = 2.0

    @property
    def is_cuda(self) -> bool:
        """Whether a GPU is checked."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what was measured. measured: the number as text, with its unit. goal: as text; empty: none.
        passed: verdict, None where there is no goal.
        value: the number itself, where there is one.
    """

    name: str
    measured: str
    goal: str = ""
    passed: bool | None = None
    value: float | None = None
    step: str = ""

    @property
    def verdict(self) -> str:
        """`ok`, `FAILS` or nothing."""
        return {True: "ok", False: "FAILS", None: ""}[self.passed]


def at_least(name: str, value: float, goal: float, text: str = "{:.3f}") -> Row:
    """A row whose value must reach `goal`."""
    return Row(name, text.format(value), f">= {text.format(goal)}", value >= goal, value)


def at_most(name: str, value: float, goal: float, text: str = "{:.3f}") -> Row:
    """A row whose value must not exceed `goal` (nor be NaN)."""
    return Row(name, text.format(value), f"<= {text.format(goal)}", value <= goal, value)


def append(out: Path, row: Row) -> None:
    """Add `row` to the results, at once."""
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read_rows(out: Path) -> list[Row]:
    """All rows so far."""
    path = out / RESULTS
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| step | row | goal | measured | |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {r.step} | {r.name} | {r.goal} | {r.measured} | {r.verdict} |" for r in rows]
    return "\n".join(lines) + "\n"
