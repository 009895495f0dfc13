"""Figures of a pruning history: saliencies and widths over tokens (the paper's Figure 7, left and right), or over
removals where tokens do not tell their order (no training in between, or another run before)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.groups import default_names, group_names
from megatron_prune.pruning.history import Removal, before, widest
from megatron_prune.runtime.folders import replace_figure


def plot_history(history: Sequence[Removal], architecture: Architecture, directory: Path) -> list[Path]:
    """Write pruning_saliencies.png and pruning_widths.png into `directory`; returns their paths.

    Each file is replaced in one piece, so a run may redraw them while somebody looks. Needs matplotlib.

    Args:
        history: at least one removal. architecture: the model after the last of them.
    """
    from matplotlib.figure import Figure

    at, xlabel = positions(history)
    saliencies, widths = Figure(figsize=(7, 4.2), layout="constrained"), Figure(figsize=(7, 4.2), layout="constrained")
    axes = saliencies.add_subplot(xlabel=xlabel, ylabel="saliency of the least group")
    _draw_saliencies(axes, at, history, xlabel)
    axes = widths.add_subplot(xlabel=xlabel, ylabel="width, relative to the source")
    _draw_widths(axes, at, history, before(architecture, history))

    paths = [directory / "pruning_saliencies.png", directory / "pruning_widths.png"]
    for figure, path in zip((saliencies, widths), paths, strict=True):
        replace_figure(path, figure, dpi=120)
    return paths


def positions(history: Sequence[Removal]) -> tuple[list[int], str]:
    """Where removals stand on an axis, and what that counts: tokens, or removals where tokens do not
    tell their order."""
    tokens = [removal.tokens for removal in history]
    if tokens != sorted(tokens) or (len(tokens) > 1 and tokens[0] == tokens[-1]):
        return list(range(1, len(history) + 1)), "removed groups"
    return tokens, "training tokens"


def _draw_saliencies(axes: Any, times: Sequence[int], history: Sequence[Removal], unit: str) -> None:
    """A curve per kind. The legend says where a kind could not be chosen, and which points a log axis cannot show (with
    scores below 0 it is logarithmic to both sides, and linear near 0)."""
    sizes = [abs(score) for removal in history for score in removal.scores.values() if score]
    is_signed = any(score < 0 for removal in history for score in removal.scores.values())
    axes.set_yscale(**({"value": "symlog", "linthresh": median(sizes) / 100} if is_signed else {"value": "log"}))

    def is_shown(score: float) -> bool:
        return is_signed or score > 0

    passed_over: list[tuple[int, float]] = []
    for kind in group_names():
        if kind not in default_names() and not any(kind in removal.scores for removal in history):
            continue
        scored = [(time, removal) for time, removal in zip(times, history, strict=True) if kind in removal.scores]
        if not scored:
            axes.plot([], [], " ", label=f"{kind}: off, or at its floor")
            continue
        points = [(time, removal.scores[kind]) for time, removal in scored if is_shown(removal.scores[kind])]
        label = kind
        if kind not in history[-1].scores:
            label += f", at its floor after {scored[-1][0]:,} {unit}"
        if len(points) < len(scored):
            label += f", {len(scored) - len(points):,} of {len(scored):,} not above 0"
        axes.plot(*_columns(points), label=label, linewidth=1)
        passed_over += [
            (time, removal.scores[kind])
            for time, removal in scored
            if is_shown(removal.scores[kind]) and removal.scores[kind] < removal.scores.get(removal.kind, 0)
        ]
    chosen = zip(times, (removal.scores.get(removal.kind, 0) for removal in history), strict=True)
    removed = [(time, score) for time, score in chosen if is_shown(score)]
    if removed:
        axes.plot(*_columns(removed), ".", color="black", markersize=3, label="removed")
    if passed_over:
        label = "less salient, but had to wait (target, balance, limit)"
        axes.plot(*_columns(passed_over), "x", color="red", markersize=4, label=label)
    axes.legend()


def _draw_widths(axes: Any, times: Sequence[int], history: Sequence[Removal], source: Architecture) -> None:
    """Steps from the source's widths, at the left end, to what is there now."""
    told = [kind for kind in source.table.prunable if all(kind.name in removal.widths for removal in history)]
    for kind in told:
        values = [source.width(kind), *(widest(removal.widths[kind.name]) for removal in history)]
        if kind not in source.table.kinds and values[-1] == values[0]:
            continue  # no layer has left, which most runs do not ask for
        _step(axes, times, values, kind.title)
    parameters = [source.parameters, *(removal.parameters for removal in history)]
    _step(axes, times, parameters, "parameters", color="black", linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.legend(loc="lower left")


def _step(axes: Any, times: Sequence[int], values: Sequence[int], label: str, **style: Any) -> None:
    label = f"{label} ({values[0]:,} to {values[-1]:,})"
    axes.step([0, *times], [value / values[0] for value in values], where="post", label=label, **style)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [time for time, _ in points], [value for _, value in points]
