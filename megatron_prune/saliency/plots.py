"""Pictures of unit scores: what a researcher looks at before a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.model.kinds import Kind
from megatron_prune.runtime.folders import replace_figure
from megatron_prune.saliency.scores import UnitScores

_BY_ID = 256  # up to so many units of a layer, each stands at its own number


def plot_scores(scores: Mapping[str, UnitScores], path: Path, title: str = "", *, per_column: bool = False) -> None:
    """Draw the scores of one model by each criterion into `path` (png, svg, pdf). Needs matplotlib.

    Colours and the curve are logarithmic, to both sides of zero where scores are negative; units without a score (zero,
    or removed already) stay white. Where a layer has few units, such as heads, they stand at their original numbers,
    else in the order of their scores.

    Args:
        per_column: divide a unit's score by the columns it owns (`head_score: per_column`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.4 + 2.6 * len(scores)), layout="constrained")
    kinds = next(iter(scores.values())).architecture.table.scored
    grid = figure.subplots(len(scores), len(kinds), squeeze=False)
    for row, (name, units) in zip(grid, scores.items(), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            if kind.is_shared:
                _curve(axes, np.sort(units.of(kind)), f"{name}: {kind.title}, sorted")
                continue
            values, is_sorted = _by_layer(units, kind)
            size = units.architecture.table.columns(kind) if per_column else 1
            label = f"{name}: {kind.title}{', per column' if size > 1 else ''}{', sorted' if is_sorted else ''}"
            _heat_map(figure, axes, values / size, label, "unit by score" if is_sorted else "unit")
    if title:
        figure.suptitle(title)
    replace_figure(path, figure, dpi=100)


def _by_layer(units: UnitScores, kind: Kind) -> tuple[np.ndarray, bool]:
    """Scores [layers, units], NaN where there is none, and whether they are sorted instead of at their numbers."""
    size, sites = kind.size(units.architecture.shape), units.values[kind]
    is_sorted = size > _BY_ID
    values = np.full((len(sites), max(map(len, sites)) if is_sorted else size), np.nan)
    for row, ids, found in zip(values, units.architecture.sites(kind), sites, strict=True):
        row[np.arange(len(found)) if is_sorted else ids] = np.sort(found) if is_sorted else found
    return values, is_sorted


def _curve(axes: Any, values: np.ndarray, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="unit by score", ylabel="score")
    if (values < 0).any():
        axes.plot(values, linewidth=1.2)
        axes.set_yscale("symlog", linthresh=_smallest(values))
    elif (values > 0).any():
        axes.semilogy(np.where(values > 0, values, np.nan), linewidth=1.2)


def _smallest(values: np.ndarray) -> float:
    """Below this size scores are drawn on a linear scale: a hundredth of the usual one."""
    return float(np.median(np.abs(values[np.isfinite(values) & (values != 0)]))) / 100


def _heat_map(figure: Any, axes: Any, values: np.ndarray, title: str, across: str) -> None:
    from matplotlib.colors import SymLogNorm

    axes.set_title(title, fontsize=9)
    axes.set(xlabel=across, ylabel="layer")
    if (values < 0).any():  # NaN compares as False
        largest = np.nanmax(np.abs(values))
        norm = SymLogNorm(_smallest(values), vmin=-largest, vmax=largest)
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="coolwarm", norm=norm)
        figure.colorbar(image, ax=axes, label="score")
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.where(values > 0, np.log10(values), np.nan)
    if np.isfinite(logarithms).any():
        image = axes.imshow(logarithms, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=axes, label="log10 score")
