"""Pictures of unit scores: what a researcher looks at before a run.

plot_scores   one row per criterion: heat maps of heads and FFN channels by layer, a curve of stem channels
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.saliency.scores import UnitScores


def plot_scores(scores: Mapping[str, UnitScores], path: Path, title: str = "", *, per_column: bool = False) -> None:
    """Draw the scores of one model by each criterion into `path` (png, svg, pdf). Needs matplotlib.

    Colours and the curve are logarithmic; units without a score (zero, or removed already) stay white. Heads stand at
    their original numbers, FFN and stem channels in the order of their scores.

    Args:
        per_column: divide a head's score by the columns it owns (`head_score: per_column`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.4 + 2.6 * len(scores)), layout="constrained")
    grid = figure.subplots(len(scores), 3, squeeze=False, width_ratios=(1, 1.6, 1))
    for row, (name, units) in zip(grid, scores.items(), strict=True):
        heads = _by_original_id(units) / (units.architecture.shape.kv_channels if per_column else 1)
        _heat_map(figure, row[0], heads, f"{name}: query heads{', per column' if per_column else ''}", "query head")
        _heat_map(figure, row[1], np.sort(units.ffn, axis=1), f"{name}: FFN channels, sorted", "channel by score")
        stem = np.sort(units.stem)
        row[2].set_title(f"{name}: stem channels, sorted", fontsize=9)
        row[2].set(xlabel="channel by score", ylabel="score")
        if (stem > 0).any():
            row[2].semilogy(np.where(stem > 0, stem, np.nan), linewidth=1.2)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=100)


def _by_original_id(units: UnitScores) -> np.ndarray:
    """Head scores [layers, source's query heads]; NaN where a head is gone."""
    shape = units.architecture.shape
    heads = np.full((shape.num_layers, shape.num_attention_heads), np.nan)
    for row, ids, values in zip(heads, units.architecture.heads, units.head, strict=True):
        row[ids] = values
    return heads


def _heat_map(figure: Any, axes: Any, values: np.ndarray, title: str, across: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set(xlabel=across, ylabel="layer")
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.where(values > 0, np.log10(values), np.nan)
    if np.isfinite(logarithms).any():
        image = axes.imshow(logarithms, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=axes, label="log10 score")
