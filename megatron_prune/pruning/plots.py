"""Figures of a pruning history: saliencies and widths over tokens (the paper's Figure 7, left and right), or over
removals where no training came between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_prune.model.architecture import GROUP_KINDS
from megatron_prune.pruning.history import Removal

_WIDTHS = {
    "num_attention_heads": "query heads",
    "ffn_hidden_size": "FFN channels",
    "hidden_size": "stem channels",
}


def plot_history(history: Sequence[Removal], directory: Path) -> list[Path]:
    """Write pruning_saliencies.png and pruning_widths.png into `directory`; returns their paths.

    Each file is replaced in one piece, so a run may redraw them while somebody looks. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    is_one_shot = len(history) > 1 and history[0].tokens == history[-1].tokens  # no training in between
    xlabel = "removed groups" if is_one_shot else "training tokens"
    times = [number if is_one_shot else removal.tokens for number, removal in enumerate(history, start=1)]
    saliencies = Figure(figsize=(7, 4.2), layout="constrained")
    axes = saliencies.add_subplot(xlabel=xlabel, ylabel="saliency of the least group", yscale="log")
    for kind in GROUP_KINDS:
        points = [(t, r.scores[kind]) for t, r in zip(times, history, strict=True) if r.scores.get(kind, 0) > 0]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, linewidth=1)
    chosen = [(t, r.scores[r.kind]) for t, r in zip(times, history, strict=True) if r.scores.get(r.kind, 0) > 0]
    if chosen:
        axes.plot(*zip(*chosen, strict=True), ".", color="black", markersize=3, label="removed")
    axes.legend()

    widths = Figure(figsize=(7, 4.2), layout="constrained")
    axes = widths.add_subplot(xlabel=xlabel, ylabel="width, relative to the first removal")
    for field, label in _WIDTHS.items():
        values = [getattr(removal, field) for removal in history]
        axes.step(times, [v / values[0] for v in values], where="post", label=f"{label} ({values[0]} to {values[-1]})")
    parameters = [removal.parameters for removal in history]
    axes.plot(times, [p / parameters[0] for p in parameters], "--", color="black", linewidth=1, label="parameters")
    axes.set_ylim(0, 1.05)
    axes.legend()

    paths = [directory / "pruning_saliencies.png", directory / "pruning_widths.png"]
    for figure, path in zip((saliencies, widths), paths, strict=True):
        temporary = path.with_suffix(".tmp")
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(path)
    return paths
