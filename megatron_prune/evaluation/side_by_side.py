"""Several models side by side: what was measured, as Markdown and as JSON.

Report        models, perplexities and scores; `to_json`, `to_markdown`
write_report  both, as `evaluation.json` and `evaluation.md` in a folder
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError
from megatron_prune.evaluation.perplexity import Perplexity
from megatron_prune.evaluation.zero_shot import Failure, Score, average
from megatron_prune.model.kinds import known_kinds
from megatron_prune.runtime.folders import replace_file

JSON_NAME, MARKDOWN_NAME = "evaluation.json", "evaluation.md"


@dataclass(frozen=True)
class Evaluated:
    """One model: what it is (see `models.describe`) and how it did."""

    model: Mapping[str, Any]
    perplexities: tuple[Perplexity, ...] = ()
    scores: tuple[Score, ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Report:
    """All models, what they were measured with, and remarks on what is not there."""

    models: tuple[Evaluated, ...]
    settings: Mapping[str, Any]
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, unrounded; a list of models, each with `perplexity`, `tasks` and `average`."""
        models = []
        for entry in self.models:
            mean = average(entry.scores)
            models.append(
                {
                    **entry.model,
                    "perplexity": [dataclasses.asdict(one) for one in entry.perplexities],
                    "tasks": [dataclasses.asdict(one) for one in entry.scores],
                    "failed": [dataclasses.asdict(one) for one in entry.failures],
                    "average": dataclasses.asdict(mean) if mean else None,
                }
            )
        return {"models": models, "settings": dict(self.settings), "remarks": list(self.remarks)}

    def to_markdown(self) -> str:
        """Tables: the models, then a row per measure with a column per model."""
        parts = [self._models()]
        if any(entry.perplexities for entry in self.models):
            parts.append(self._perplexities())
        if any(entry.scores or entry.failures for entry in self.models):
            parts.append(self._scores())
        parts.extend(self.remarks)
        return "\n\n".join(parts) + "\n"

    def _names(self) -> list[str]:
        return [entry.model["name"] for entry in self.models]

    def _models(self) -> str:
        kinds = [kind for kind in known_kinds() if kind.hf_key in self.models[0].model]
        rows = [
            [
                entry.model["name"],
                f"{entry.model['parameters']:,}",
                *(str(entry.model[kind.hf_key]) for kind in kinds),
                _dtype(entry.model),
            ]
            for entry in self.models
        ]
        return _table(["model", "parameters", *(kind.title for kind in kinds), "dtype"], rows)

    def _perplexities(self) -> str:
        rows: list[list[str]] = []
        measures = {
            "loss (nats per token)": lambda p: _with_error(p.loss, p.loss_stderr, 4),
            "perplexity per token": lambda p: _number(p.perplexity, 3),
            "bits per byte": lambda p: _number(p.bits_per_byte, 4),
            "perplexity per word": lambda p: _number(p.word_perplexity, 2),
        }
        for position, first in enumerate(self.models[0].perplexities):
            column = [entry.perplexities[position] for entry in self.models]
            for measure, show in measures.items():
                cells = [show(one) for one in column]
                if any(cell != "-" for cell in cells):
                    rows.append([first.data, measure, *cells])
            rows.append([first.data, "tokens", *(f"{one.tokens:,}" for one in column)])
        return _table(["data", "measure", *self._names()], rows)

    def _scores(self) -> str:
        keys = list(dict.fromkeys((score.task, score.metric) for entry in self.models for score in entry.scores))
        rows = []
        for task, metric in keys:
            found = [
                next((s for s in entry.scores if (s.task, s.metric) == (task, metric)), None) for entry in self.models
            ]
            examples = next(score.examples for score in found if score is not None)
            cells = [_percent(score) for score in found]
            rows.append([task, metric, f"{examples:,}", *cells])
        for task in dict.fromkeys(failure.task for entry in self.models for failure in entry.failures):
            why = [next((f.reason for f in entry.failures if f.task == task), None) for entry in self.models]
            rows.append([task, "failed", "", *("" if one is None else one.replace("|", "\\|") for one in why)])
        means = [average(entry.scores) for entry in self.models]
        if any(means):
            tasks = len({task for task, _ in keys})
            rows.append([f"average of {tasks}", "acc_norm, else acc", "", *(_percent(mean) for mean in means)])
        return _table(["task", "metric (%)", "examples", *self._names()], rows)


def write_report(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write both forms, each in one piece; returns (JSON, Markdown). Raises UserError: the folder cannot be written."""
    files = Path(folder) / JSON_NAME, Path(folder) / MARKDOWN_NAME
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        replace_file(files[0], (json.dumps(report.to_json(), indent=2) + "\n").encode())
        replace_file(files[1], report.to_markdown().encode())
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written: {error.strerror}") from error
    return files


def _dtype(model: Mapping[str, Any]) -> str:
    """What was computed in, and what is stored where that differs."""
    stored = model["stored_dtype"]
    return model["dtype"] if stored == model["dtype"] else f"{model['dtype']} (stored in {stored})"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.3e}"


def _with_error(value: float, stderr: float | None, digits: int) -> str:
    return _number(value, digits) + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _percent(score: Score | None) -> str:
    if score is None:
        return "-"
    return _with_error(100 * score.value, None if score.stderr is None else 100 * score.stderr, 2)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned Markdown: words to the left, what follows the naming columns to the right."""
    everything = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    right = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) + " |"
        for row in everything
    ]
    rule = "| " + " | ".join("-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit()
