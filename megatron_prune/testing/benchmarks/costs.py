"""What pruning costs on one rank of a small run, as fractions of a plain step: the rows of the benchmarks.

    Preset           what runs, and how often
    CostRow          one line of what was found
    measure          rows of time and traffic
    measure_memory   rows of memory, in a process of its own: memory is only measured well where allocation is slow
    Clock, median    times of jobs of one run

Fractions, not seconds: the machine's speed cancels. docs/benchmarks.md explains the rows.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import default_names, known_groups
from megatron_prune.pruning.second_order import SecondOrderUpdate
from megatron_prune.runtime.mesh import Mesh, meshed
from megatron_prune.saliency.inputs import InputNeeds, InputWatcher
from megatron_prune.saliency.scores import score_length
from megatron_prune.testing.helpers.meters import BytesSent, PeakMemory, Seconds, Stopwatch
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun, Timer
from megatron_prune.training.pruning_settings import collector_settings

MIB = 1 << 20
FP32_BYTES = 4
SETTLED = 3  # plain steps before anything is measured
FORMULA = "bytes: scores by formula, 4 x (layers x (heads + FFN) + hidden)"
CLOCKS = ("wall", "cpu")
THROUGHPUT = "throughput, 1:1 / no pruning:"


@dataclass(frozen=True)
class Preset:
    """A column of the output.

    Args:
        thinned: by kind, groups removed and compacted away first, so that the widths are odd ones.
        pairs: how many pruning steps are compared with plain ones. repeats: how often everything else is timed.
    """

    title: str
    setup: Setup
    device: str
    thinned: Mapping[str, int]
    pairs: int
    repeats: int


@dataclass(frozen=True)
class CostRow:
    """What one column has to say in one line.

    Args:
        cpu: the same by CPU time, where that means something.
    """

    name: str
    value: str
    cpu: str = ""
    goal: str = ""


def tied_shape(hidden: int, ffn: int, heads: int, layers: int, vocab: int, context: int) -> LlamaShape:
    """A tied multi-head Llama."""
    return LlamaShape(layers, hidden, ffn, heads, heads, hidden // heads, vocab, context, tie_word_embeddings=True)


# Time -----------------------------------------------------------------------------------------------------------------


class Clock(Stopwatch):
    """Times jobs of one run, and says what share of a step they are."""

    def median(self, job: Callable[[], Any], count: int) -> Seconds:
        """Median time of `count` calls."""
        return median([self.time(job)[1] for _ in range(count)])


def median(times: Sequence[Seconds]) -> Seconds:
    """Median by either clock."""
    return Seconds(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))


def share(part: Seconds, whole: Seconds) -> tuple[str, str]:
    """`part` / `whole` by either clock, for a row."""
    return f"{part.wall / whole.wall:.2%}", f"{part.cpu / whole.cpu:.2%}"


def measure(_rank: int, _world_size: int, preset: Preset) -> list[CostRow]:
    """A column's rows of time and traffic, on one rank."""
    with meshed(preset.device, preset.setup.case.tp, preset.setup.case.pp) as mesh:
        run, clock = SteppedRun(preset.setup, mesh), Clock(mesh)
        clock.median(run.plain_step, SETTLED)
        before, source = clock.median(run.plain_step, preset.repeats + 2), run.architecture.parameters
        for kind, count in preset.thinned.items():
            run.retire(kind, count)
        run.compact()
        clock.median(run.plain_step, SETTLED)
        step, live = clock.median(run.plain_step, preset.repeats + 2), run.architecture.parameters
        layout = run.model.layout
        rows = [
            CostRow("context: parameters", f"{live:,}"),
            CostRow(
                f"context: slots per rank, {' / '.join(default_names())}",
                " / ".join(str(layout.width(kind.kind)) for kind in known_groups()),
            ),
            CostRow("context: seconds per plain step", f"{step.wall:.3f}", f"{step.cpu:.3f}"),
            CostRow("speed per live parameter: these widths / the source's", *speeds(before, step, live / source)),
        ]
        rows += rows_of_pieces(run, clock, step, preset.repeats + 2)
        rows += rows_of_second_order(run, clock, step, preset.repeats)
        compaction, more = rows_of_compactions(run, clock, step)
        return [*rows, *more, *rows_of_throughput(run, clock, compaction, preset.pairs), *rows_of_traffic(run)]


def speeds(before: Seconds, after: Seconds, live: float) -> tuple[str, str]:
    """What odd stored widths cost: steps per second times parameters that are left, now over before."""
    return f"{before.wall / after.wall * live:.3f}", f"{before.cpu / after.cpu * live:.3f}"


SCORING = {
    "squares": "scoring: squares of the micro-batches' gradients / step",
    "fisher": "scoring: their sum over data parallelism / step",
    "elements": "scoring: S of every output weight / step",
    "sums": "scoring: sums per unit over all ranks / step",
}
DECISION = "decision: choice, broadcast, agreement / step"


def rows_of_pieces(run: SteppedRun, clock: Clock, step: Seconds, repeats: int) -> Iterator[CostRow]:
    """Scoring, decision and retirements."""
    rounds = []
    for _ in range(repeats + 1):  # the first one warms up
        rounds.append(run.time_pieces(clock.time))
        if run.is_compaction_due:
            run.compact()
    pieces = {piece: median([spent[piece] for spent in rounds[1:]]) for piece in rounds[0]}
    for piece, name in SCORING.items():
        yield CostRow(name, *share(pieces[piece], step))
    scoring = [pieces[piece] for piece in SCORING]
    total = Seconds(sum(s.wall for s in scoring), sum(s.cpu for s in scoring))
    yield CostRow("scoring, all of it / step", *share(total, step))
    yield CostRow(DECISION, *share(pieces["decision"], step))
    for kind in default_names():
        yield CostRow(f"retirement of a group, {kind} / step", *share(pieces[kind], step))
    removal = median([pieces[kind] for kind in default_names()])
    added = {by: sum(getattr(piece, by) for piece in (total, pieces["decision"], removal)) for by in CLOCKS}
    expected = (1 / (1 + added[by] / getattr(step, by)) for by in CLOCKS)
    yield CostRow(f"{THROUGHPUT} by the sum of these", *(f"{value:.3f}" for value in expected))


FORWARD, KEEPING = "forward and backward", "forward and backward that keep inputs"


def time_second_order(run: SteppedRun, timer: Timer) -> dict[str, Seconds]:
    """Time by name: `FORWARD`, `KEEPING`, and the update before a group of each kind (`head`, `ffn`, `stem`).

    The inputs are of as many micro-batches as the configuration's calibration tokens make. Groups are chosen at random
    and leave, as in training.
    """
    settings = collector_settings(run.config, run.mesh.dp_size)
    spent = {FORWARD: timer(run.forward_backward)[1]}
    watcher = InputWatcher(run.model, InputNeeds(kept=settings.kept_microbatches, keep_stem=True))
    watcher.arm()
    spent[KEEPING] = timer(run.forward_backward)[1]
    kept = watcher.finish().kept
    assert kept is not None
    update = SecondOrderUpdate(run.model, kept, settings.damping)
    for kind in default_names():
        group = run.group(kind)
        _, spent[kind] = timer(lambda: update.compensate(group))  # noqa: B023 - called at once
        run.coordinator.commit(group)
    return spent


def rows_of_second_order(run: SteppedRun, clock: Clock, step: Seconds, repeats: int) -> Iterator[CostRow]:
    """The second-order update before a removal, and what it leaves of the throughput when every removal has one."""
    rounds = [time_second_order(run, clock.time) for _ in range(repeats)]
    if run.is_compaction_due:
        run.compact()
    spent = {piece: median([times[piece] for times in rounds]) for piece in rounds[0]}
    keeping = {by: max(getattr(spent[KEEPING], by) - getattr(spent[FORWARD], by), 0.0) for by in CLOCKS}
    yield CostRow(
        "second order: keeping the inputs / step", *(f"{keeping[by] / getattr(step, by):.2%}" for by in CLOCKS)
    )
    for kind in default_names():
        yield CostRow(f"second order: update before a removal, {kind} / step", *share(spent[kind], step))
    for every, goal in ((9, "0.90"), (1, "")):
        added = (
            max((keeping[by] + getattr(spent[kind], by)) / getattr(step, by) for kind in default_names()) / every
            for by in CLOCKS
        )
        name = f"throughput with it at 1:{every} / without, costliest kind"
        wall, cpu = (f"{1 / (1 + extra):.3f}" for extra in added)
        yield CostRow(name, wall, cpu, goal)


def rows_of_compactions(run: SteppedRun, clock: Clock, step: Seconds) -> tuple[Seconds, list[CostRow]]:
    """(what a compaction costs in all, in plain steps; rows). The step after one pays for fresh memory."""
    rows, compactions, first_steps = [], [], []
    for kind in default_names():
        run.retire_quantum(kind)
        compactions.append(clock.time(run.compact)[1])
        first_steps.append(clock.time(run.plain_step)[1])
        rows.append(CostRow(f"compaction after a quantum, {kind} / step", *share(compactions[-1], step)))
    usual, first = median(compactions), median(first_steps)
    extra = Seconds(max(first.wall - step.wall, 0.0), max(first.cpu - step.cpu, 0.0))
    rows.append(CostRow("extra time of the step after it / step", *share(extra, step)))
    return Seconds((usual.wall + extra.wall) / step.wall, (usual.cpu + extra.cpu) / step.cpu), rows


@dataclass(frozen=True)
class Pair:
    """A plain step and the pruning step after it; the compaction that was due then, and the plain step after that."""

    plain: Seconds
    pruning: Seconds
    compaction: Seconds | None = None
    first: Seconds | None = None


def rows_of_throughput(run: SteppedRun, clock: Clock, compaction: Seconds, count: int) -> Iterator[CostRow]:
    """Pruning at 1:1 against no pruning at the same stored widths."""
    pairs = []
    for _ in range(count):
        pair = Pair(clock.time(run.plain_step)[1], clock.time(run.pruning_step)[1])
        if run.is_compaction_due:
            pair = Pair(pair.plain, pair.pruning, clock.time(run.compact)[1], clock.time(run.plain_step)[1])
        pairs.append(pair)
    ratios = {by: [getattr(p.plain, by) / getattr(p.pruning, by) for p in pairs] for by in CLOCKS}
    faster = {by: statistics.median(ratios[by]) for by in CLOCKS}
    yield CostRow(f"{THROUGHPUT} A B A B, no compaction", *(f"{faster[by]:.3f}" for by in CLOCKS))
    spread = (statistics.quantiles(ratios[by], n=4) for by in CLOCKS)
    yield CostRow("context: quartiles of its pairs", *(f"{low:.3f} to {high:.3f}" for low, _, high in spread))
    for every in (64, 128):
        values = (f"{1 / (1 / faster[by] + getattr(compaction, by) / every):.3f}" for by in CLOCKS)
        wall, cpu = values
        yield CostRow(f"{THROUGHPUT} A B A B, a compaction per {every} removals", wall, cpu, "0.97")
    quantum = max(n for kind, n in run.setup.case.quanta.items() if kind.is_prunable)
    compactions = sum(pair.compaction is not None for pair in pairs)
    yield CostRow("context: quantum as run, compactions / removals", f"{quantum}, {compactions} / {count}")
    yield CostRow(f"{THROUGHPUT} A B A B, at the quantum as run", *(f"{_as_run(pairs, by):.3f}" for by in CLOCKS))


def _as_run(pairs: Sequence[Pair], by: str) -> float:
    plain = sum(getattr(p.plain, by) for p in pairs)
    spent = sum(getattr(p.pruning, by) for p in pairs)
    for pair in pairs:
        if pair.compaction is not None:
            spent += getattr(pair.compaction, by) + getattr(pair.first, by) - getattr(pair.plain, by)
    return float(plain / spent)


# Bytes ----------------------------------------------------------------------------------------------------------------


def counted(job: Callable[[], Any]) -> tuple[Any, int]:
    """(result of `job`, bytes that this rank put into collectives meanwhile)."""
    with BytesSent() as meter:
        result = job()
    return result, meter.total


def rows_of_traffic(run: SteppedRun) -> Iterator[CostRow]:
    """Bytes of a pruning step, piece by piece."""
    _, plain = counted(run.plain_step)
    fisher = run.watched_gradients()
    squares, fisher_bytes = counted(fisher.reduce)
    elements, silent = counted(lambda: run.score(squares))
    assert silent == 0
    sums, score_bytes = counted(elements.reduce)
    _, decision = counted(lambda: run.decide(sums))
    yield CostRow("context: bytes of a plain step", f"{plain:,}")
    yield CostRow("bytes: scores", f"{score_bytes:,}")
    yield CostRow(FORMULA, f"{FP32_BYTES * score_length(run.architecture):,}")
    yield CostRow("bytes: squares over data parallelism", f"{fisher_bytes:,}")
    yield CostRow("bytes: decision", f"{decision:,}")
    for kind in default_names():
        _, retirement = counted(lambda: run.retire_quantum(kind))  # noqa: B023 - called at once
        yield CostRow(f"bytes: retirements of a quantum, {kind}", f"{retirement:,}")
        yield CostRow(f"bytes: compaction after it, {kind}", f"{counted(run.compact)[1]:,}")


# Memory ---------------------------------------------------------------------------------------------------------------


def measure_memory(_rank: int, _world_size: int, preset: Preset) -> list[CostRow]:
    """A column's rows of memory, on one rank."""
    with meshed(preset.device, preset.setup.case.tp, preset.setup.case.pp) as mesh:
        meter = PeakMemory(mesh.device)
        if not meter.is_available:
            return []
        _warm_up(preset.setup.case, mesh)
        meter.set_rest()
        run = SteppedRun(preset.setup, mesh)
        peaks: dict[str, int] = {}

        def during(name: str, job: Callable[[], Any]) -> None:
            meter.start()
            job()
            peaks[name] = meter.peak()

        for _ in range(2):
            during("plain", run.plain_step)
        during("rest", lambda: None)
        during("pruning", run.pruning_step)
        for kind in default_names():
            run.retire_quantum(kind)
        during("compaction", run.compact)
    plain = peaks.pop("plain")
    return [
        CostRow("context: MiB at the peak of a plain step", f"{plain / MIB:.0f}"),
        CostRow("memory between steps / peak of a plain step", f"{peaks['rest'] / plain:.2f}"),
        CostRow("peak memory of a pruning step / of a plain step", f"{peaks['pruning'] / plain:.2f}"),
        CostRow("peak memory of a compaction / of a plain step", f"{peaks['compaction'] / plain:.2f}", goal="1.00"),
    ]


def _warm_up(case: Case, mesh: Mesh) -> None:
    """Do everything once on a tiny model, so that what libraries keep for good is there before memory is watched."""
    run = SteppedRun(Setup(tied_shape(32, 48, 8, 2, 64, 16), case, 16, 1, 4), mesh)
    run.plain_step()
    run.pruning_step()
    run.compact()
