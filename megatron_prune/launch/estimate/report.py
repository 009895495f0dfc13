"""The dry run's report, as text.

Finding    a thing that the run reads, and how it stands with it
Estimate   the numbers of a run, as `dry_run.estimate` computes them
render     both as lines for people
"""

from collections import Counter
from dataclasses import dataclass

from megatron_prune.config import Config
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.launch.estimate.rank_memory import RankMemory
from megatron_prune.launch.estimate.route import Phase, Route
from megatron_prune.launch.estimate.traffic import Traffic
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import ShardLayout, StoredWidths
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.budget import LATENCY
from megatron_prune.pruning.groups import find_group, group_names
from megatron_prune.training.pruning_settings import group_costs

MFU = 0.4
PEAK_FLOPS, PEAK_NAME = 312e12, "A800/A100, dense bf16"
# Seconds per layer of what pruning adds, of one H100 and 24 layers (docs/gpu.md): bound by the host, whatever the GPU.
SCORING, REMOVAL, COMPACTION = 57e-3 / 24, 34e-3 / 24, 326e-3 / 24


@dataclass(frozen=True)
class Finding:
    """One line about `what` the run reads."""

    what: str
    state: str


@dataclass(frozen=True)
class Estimate:
    """What a run will take; the fields about pruning are None or empty when it prunes nothing.

    Args:
        layout, target_layout: stored widths at the start and at the target.
        memory, target_memory: of the fullest rank then.
        phases: (pruning or plain training, continued training).
        traffic: of the fullest rank per iteration; `pruning_traffic` on top where it scores.
        compaction: what one compaction sends; `compactions`: how many there are; `scorings`: iterations that score.
        stage_moves: what a rank of the busiest stage sends while layers change their stages, on the whole way.
    """

    world_size: int
    placement: Placement
    layout: ShardLayout
    target_layout: ShardLayout | None
    route: Route | None
    memory: RankMemory
    target_memory: RankMemory | None
    phases: tuple[Phase, Phase]
    traffic: list[Traffic]
    pruning_traffic: list[Traffic]
    compaction: Traffic | None
    compactions: int
    scorings: int
    stage_moves: Traffic | None = None


def render(config: Config, findings: tuple[Finding, ...], estimate: Estimate) -> str:
    """The whole report, ending in a newline."""
    placement = estimate.placement
    processes = "1 process" if estimate.world_size == 1 else f"{estimate.world_size} processes"
    title = f"dry run for {processes}: TP {placement.tp} x PP {placement.pp} x DP {placement.dp}"
    batch = (
        f"{config.training.global_batch_size} sequences of {config.data.seq_length} = {config.tokens_per_iteration:,} "
        f"tokens per iteration, {placement.micro_batches} micro-batches of {config.training.micro_batch_size}"
    )
    later = config.after_target.training.micro_batch_size
    if later != config.training.micro_batch_size:
        count = config.training.global_batch_size // (later * placement.dp)
        batch += f"; from the target on {count} of {later}"
    sections = [
        [title, batch],
        ["reads", *_columns([[finding.what, finding.state] for finding in findings])],
        _model(estimate),
        _memory(estimate),
        _time(config, estimate),
        _traffic(estimate),
        _notes(config, estimate),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _model(estimate: Estimate) -> list[str]:
    layouts = [layout for layout in (estimate.layout, estimate.target_layout) if layout is not None]
    live: list[Architecture] = [layout.architecture for layout in layouts]
    rows = [
        ["parameters", *(f"{a.parameters:,}" for a in live)],
        *([kind.title, *(a.span(kind) for a in live)] for kind in live[0].table.varying),
        ["stored per rank: heads/KV/FFN/hidden", *(_stored(layout.stored) for layout in layouts)],
    ]
    limits = estimate.route.rules.limits if estimate.route is not None else ()
    for limit in limits:
        digits = 2 if limit.name == LATENCY else 0
        rows.append([limit.title, *(f"{limit.of(a):,.{digits}f}" for a in live)])
    titles = ["model", "start", "target"] if len(layouts) == 2 else ["model", "start"]
    lines = _columns([titles, *rows], right=True)
    if estimate.route is not None:
        lines.append(f"  widths at the target: {estimate.route.assumption}")
        lines += [_rounding(estimate.route)] if estimate.route.uneven else []
    if limits and estimate.route is not None:
        budget = estimate.route.rules.budget
        first, last = (budget.binding(a).title for a in (live[0], live[-1]))
        lines.append(f"  target: {budget.described()}; {first} bind at the start, {last} at the end")
    return lines


def _stored(widths: StoredWidths) -> str:
    return f"{widths.heads}/{widths.kv_heads}/{widths.ffn}/{widths.hidden}"


def _memory(estimate: Estimate) -> list[str]:
    ranks = [rank for rank in (estimate.memory, estimate.target_memory) if rank is not None]
    unit, scale = ("GiB", 2**30) if ranks[0].peak >= 2**30 else ("MiB", 2**20)
    kinds = {
        "weights": "weights",
        "gradients": "gradients, fp32",
        "optimizer": "optimizer and main weights",
        "activations": "activations",
        "temporary": "largest temporaries",
    }
    rows = [[title, *(f"{getattr(rank, kind) / scale:.2f}" for rank in ranks)] for kind, title in kinds.items()]
    if ranks[0].teacher:
        rows.append(["teacher and its logits", *(f"{rank.teacher / scale:.2f}" for rank in ranks)])
    rows.append(["sum while training", *(f"{rank.training / scale:.2f}" for rank in ranks)])
    if estimate.route is not None:
        rows.append(["Fisher buffer, on iterations that score", f"{ranks[0].fisher / scale:.2f}", ""])
        if ranks[0].kept:
            for kind, title in (("kept", "inputs kept for Hessians"), ("hessian", "a Hessian, while it is factorised")):
                rows.append([f"{title}, on the same", f"{getattr(ranks[0], kind) / scale:.2f}", ""])
        rows.append(["peak on iterations that score", f"{ranks[0].peak / scale:.2f}", ""])
    where = f"fullest rank (stage {ranks[0].stage}, DP rank {ranks[0].dp_rank})"
    return _columns([[f"memory of the {where}, {unit}", "start", *["target"][: len(ranks) - 1]], *rows], right=True)


def _time(config: Config, estimate: Estimate) -> list[str]:
    names = ["pruning" if estimate.route else "training", "continued"]
    rows = [["phase", "iterations", "tokens", "FLOPs", "hours"]]
    for name, phase in zip(names, estimate.phases, strict=True):
        if phase.iterations:
            hours = _hours(config, estimate, phase)
            rows.append([name, f"{phase.iterations:,}", _count(phase.tokens), f"{phase.flops:.2e}", hours])
    lines = _columns(rows, right=True)
    if config.parallel.device == "cpu":
        lines.append("  hours: not estimated for the CPU")
    else:
        lines.append(
            f"  hours: model FLOPs at {MFU:.0%} of {estimate.world_size} x {PEAK_FLOPS / 1e12:.0f} TFLOP/s "
            f"({PEAK_NAME}), without restarts and evaluation"
        )
        lines += _host(estimate)
    if estimate.route is not None:
        lines.append(f"  {_pace(config, estimate.layout.architecture.shape, Counter(estimate.route.kinds))}")
    return lines


def _host(estimate: Estimate) -> list[str]:
    """What scoring, removing and compacting add to the pruning phase."""
    if estimate.route is None:
        return []
    removals, layers = len(estimate.route.kinds), estimate.layout.architecture.shape.num_layers
    seconds = SCORING * estimate.scorings + REMOVAL * removals + COMPACTION * estimate.compactions
    return [
        f"  and {layers * seconds / 3600:,.2f} hours more for {estimate.scorings:,} scorings, {removals:,} removals "
        f"and {estimate.compactions:,} compactions"
    ]


def _pace(config: Config, shape: LlamaShape, groups: Counter[str]) -> str:
    """When groups leave, in a sentence."""
    pruning = config.pruning
    if pruning.replay:
        return f"pruning: {groups.total():,} groups as {pruning.replay} has them"
    if pruning.follows_curve:
        start, end = map(_count, config.curve_tokens)
        return f"pruning: {groups.total():,} groups along a {pruning.curve.shape} curve from {start} to {end} tokens"
    cost = group_costs(config, shape)
    counted = ", ".join(f"{groups[kind]:,} {kind} x {cost[kind]}" for kind in group_names() if groups[kind])
    steps, ratio = sum(groups[kind] * cost[kind] for kind in group_names()), pruning.ratio or "1:1"
    return (
        f"pruning steps: {counted} = {steps:,} at {ratio} (pruning : gradient steps), from iteration "
        f"{pruning.first_prune_iter} on"
    )


def _hours(config: Config, estimate: Estimate, phase: Phase) -> str:
    if config.parallel.device == "cpu":
        return "-"
    return f"{phase.flops / (estimate.world_size * PEAK_FLOPS * MFU) / 3600:,.2f}"


def _traffic(estimate: Estimate) -> list[str]:
    rows = [["sent by that rank per iteration", "MB"]]
    rows += [[line.what, f"{line.bytes / 1e6:,.2f}"] for line in estimate.traffic]
    rows += [[f"{line.what} (when scoring)", f"{line.bytes / 1e6:,.2f}"] for line in estimate.pruning_traffic]
    lines = _columns(rows, right=True) if len(rows) > 1 else []
    if estimate.compaction is not None and estimate.compaction.bytes:
        each = f"{estimate.compaction.what}, {estimate.compaction.bytes / 1e6:,.2f} MB"
        lines.append(f"  {each}; about {estimate.compactions:,} of them on the way to the target")
    if estimate.stage_moves is not None and estimate.stage_moves.bytes:
        lines.append(f"  {estimate.stage_moves.what}: {estimate.stage_moves.bytes / 1e6:,.2f} MB on the whole way")
    return lines


def _notes(config: Config, estimate: Estimate) -> list[str]:
    notes = []
    pruning, limit = estimate.phases[0], config.training.train_iters
    if estimate.route is not None and pruning.iterations > limit:
        notes.append(
            f"training.train_iters {limit:,} ends the pruning phase before the target is reached, by this estimate; "
            "raise it, or prune faster (pruning.ratio, pruning.curve)"
        )
    if config.pruning.enabled and estimate.route is None:
        notes.append("the target is reached already: only continued training is left")
    return [f"note: {note}" for note in notes]


def _rounding(route: Route) -> str:
    """What would make the target's widths multiples, and what it costs."""
    target, even = route.target, route.even
    kinds = [find_group(name).kind for name in route.uneven]
    widths = ", ".join(f"{kind.title} {target.width(kind):,} to {even.width(kind):,}" for kind in kinds)
    words = " ".join(f"{name}.round_to={multiple}" for name, multiple in route.uneven.items())
    fewer = target.parameters - even.parameters
    return (
        f"  faster where it will run: --prune-groups {words} brings {widths}, about {fewer:,} parameters less "
        f"({fewer / target.parameters:.1%})"
    )


def _count(number: int) -> str:
    """1_234_000_000 -> `1.23 B`."""
    for scale, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def _columns(rows: list[list[str]], right: bool = False) -> list[str]:
    """Rows in columns; with `right` the first row is a title and all columns but the first end on a line."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for number, row in enumerate(rows):
        lead = "" if right and number == 0 else "  "
        first = f"{lead}{row[0]}".ljust(widths[0] + 2)
        rest = [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([first, *rest]).rstrip())
    return lines
