"""How fast: a 1.7 B model in bf16 at sequence 2048, plain and while it is pruned, and the models it becomes.

MFU is model FLOPs (see `pruning.budget`) over the device's dense bf16 peak. Pruning is compared with plain steps of the
same run in turn; what a compaction costs is measured by itself and spread over the removals between two of them.
"""

import statistics
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_prune.model.architecture import Architecture
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.budget import training_flops
from megatron_prune.pruning.groups import default_names, find_group
from megatron_prune.runtime.mesh import Mesh, meshed
from megatron_prune.testing.benchmarks.costs import Clock
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, Row, at_least
from megatron_prune.testing.benchmarks.gpu_check.shapes import Shapes, plain_seconds, start
from megatron_prune.testing.helpers.meters import Dispatches
from megatron_prune.testing.helpers.stepped_run import SteppedRun
from megatron_prune.training.metrics import known_peak_tflops

GIB = 1 << 30
GOAL_MFU, GOAL_1_1, GOAL_1_9, GOAL_SHRINK = 0.42, 0.97, 0.99, 0.9


def check(context: Context) -> Iterator[Row]:
    """Rows by value: plain, pruning, removals and compactions, the smaller models, attention. A CPU is not judged."""
    for row in _rows(context):
        yield row if context.is_cuda else replace(row, passed=None)


def _rows(context: Context) -> Iterator[Row]:
    shapes = Shapes.of(context)
    with meshed(context.device) as mesh:
        run = start(context, shapes, shapes.source, mesh)
        seconds = yield from _plain(context, shapes, run)
        yield from _pruning(context, shapes, run)
        run = None  # type: ignore[assignment] # lets go of its memory
        _empty(context)
        yield from _smaller(context, shapes, mesh, seconds)
        yield from _attention(context, shapes, mesh)
        yield Row("torch.compile of norm, RoPE, cross entropy", "not built")


def _empty(context: Context) -> None:
    import gc

    gc.collect()
    if context.is_cuda:
        torch.cuda.empty_cache()


def _flops(architecture: Architecture, shapes: Shapes) -> float:
    """Model FLOPs of an iteration."""
    return training_flops(architecture, shapes.seq_length) * shapes.seq_length * shapes.sequences


def _speed(context: Context, shapes: Shapes, architecture: Architecture, seconds: float) -> tuple[str, float | None]:
    """(tokens per second and MFU as text, MFU where the device's peak is known)."""
    tokens = shapes.sequences * shapes.seq_length / seconds
    peak = known_peak_tflops(torch.cuda.get_device_name()) if context.is_cuda else None
    if peak is None:
        return f"{tokens:,.0f} tokens/s", None
    mfu = _flops(architecture, shapes) / seconds / (peak * 1e12)
    return f"{tokens:,.0f} tokens/s, {mfu:.1%} MFU", mfu


def _plain(context: Context, shapes: Shapes, run: SteppedRun) -> Generator[Row, None, float]:
    """Every micro-batch size; returns the seconds of the usual one."""
    repeats, usual = (1 if context.tiny else 4), float("nan")
    for size in shapes.micro_batches:
        name = f"plain, {run.architecture.parameters / 1e9:.2f} B parameters, micro-batch {size}"
        try:
            seconds = plain_seconds(run, size, shapes.sequences, repeats)
        except torch.OutOfMemoryError:
            run.model.ddp.zero_grad_buffer()
            _empty(context)
            yield Row(name, "out of memory")
            continue
        text, mfu = _speed(context, shapes, run.architecture, seconds)
        if size == shapes.usual:
            usual = seconds
            passed = None if mfu is None else mfu >= GOAL_MFU
            yield Row(name, text, f">= {GOAL_MFU:.0%} MFU", passed, mfu)
        else:
            yield Row(name, text, value=mfu)
    return usual


def _pruning(context: Context, shapes: Shapes, run: SteppedRun) -> Iterator[Row]:
    clock, pairs = Clock(run.mesh), 2 if context.tiny else 6
    clock.median(run.plain_step, 1)
    clock.median(run.pruning_step, 1)
    spent = [(clock.time(run.plain_step)[1].wall, clock.time(run.pruning_step)[1].wall) for _ in range(pairs)]
    plain = statistics.median(a for a, _ in spent)
    ratio = statistics.median(a / b for a, b in spent)
    yield Row("pruning step without a compaction, plain / pruning", f"{ratio:.3f}", value=ratio)
    yield from _removals(context, run, clock, plain)
    compactions = []
    for kind in default_names():
        run.retire_quantum(kind)
        if context.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = clock.time(run.compact)[1].wall
        first = clock.time(run.plain_step)[1].wall
        text = f"{1000 * seconds:.0f} ms, the step after it {1000 * (first - plain):+.0f} ms"
        if context.is_cuda:
            stats = torch.cuda.memory_stats()
            text += f"; {torch.cuda.max_memory_allocated() / GIB:.1f} GiB at the peak, reserved but unused "
            text += f"{(stats['reserved_bytes.all.current'] - stats['allocated_bytes.all.current']) / GIB:.1f} GiB"
        yield Row(f"a compaction after a quantum, {kind}", text, value=seconds)
        if find_group(kind).default_cost(run.setup.shape) == 1:  # by far the most groups are of such kinds
            compactions.append(seconds + max(first - plain, 0.0))
    quantum = max(n for kind, n in run.setup.case.quanta.items() if kind.is_prunable)
    extra = statistics.mean(compactions) / plain / quantum
    for every, goal in ((1, GOAL_1_1), (9, GOAL_1_9)):
        value = 1 / (1 + (1 / ratio - 1 + extra) / every)
        yield at_least(f"pruning at 1:{every} / plain, a compaction per {quantum} removals", value, goal)


def _removals(context: Context, run: SteppedRun, clock: Clock, plain: float) -> Iterator[Row]:
    """What one removal is made of: time, kernels, operators, copies, syncs."""
    run.time_pieces(clock.time)
    pieces = run.time_pieces(clock.time)
    text = ", ".join(f"{piece} {1000 * spent.wall:.1f}" for piece, spent in pieces.items())
    total = sum(spent.wall for spent in pieces.values()) / 3
    yield Row("pieces of a removal, ms", text)
    for kind in default_names():
        yield Row(f"retirement of one group, {kind}", counted(context, lambda: run.retire(kind)))  # noqa: B023
    yield Row("three removals with their scoring / plain step", f"{3 * total / plain:.3f}", value=3 * total / plain)


def counted(context: Context, job: Callable[[], Any]) -> str:
    """Operators and, on CUDA, copies, waits of the host and kernels of `job`, run twice."""
    with Dispatches() as dispatches:
        job()
    text = f"{dispatches.total} operators"
    if not context.is_cuda:
        return text
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    syncs = sum("synchroniz" in str(warning.message).lower() for warning in told)
    kernels = sum(event.count for event in profile.key_averages() if "memcpy" not in event.key.lower())
    return f"{text}, {dispatches.copies} copies, {syncs} waits of the host, {kernels} kernels"


def _smaller(context: Context, shapes: Shapes, mesh: Mesh, source_seconds: float) -> Iterator[Row]:
    """The models a source becomes: their speed against the FLOPs they save, and odd widths against aligned ones."""
    repeats, found = (1 if context.tiny else 4), {}
    source = Architecture.full(shapes.source)
    cases: list[tuple[str, LlamaShape, int]] = [
        ("469M, stored at odd widths", shapes.large, 1),
        ("469M, quantum 64", shapes.large, 64),
        ("aligned shape", shapes.aligned, 64),
        ("134M", shapes.small, 64),
    ]
    for name, shape, quantum in cases:
        run = start(context, shapes, shape, mesh, quantum)
        found[name] = plain_seconds(run, shapes.usual, shapes.sequences, repeats)
        text, _ = _speed(context, shapes, run.architecture, found[name])
        widths = f"{shape.num_attention_heads} heads, FFN {shape.ffn_hidden_size}, hidden {shape.hidden_size}"
        yield Row(f"plain, {name} ({widths})", text)
        if quantum == 64 and shape == shapes.large:
            flops = _flops(source, shapes) / _flops(run.architecture, shapes)
            gained = source_seconds / found[name] / flops
            yield at_least("shrinking 1.7 B to 469M: speed-up / FLOPs saved", gained, GOAL_SHRINK)
        del run
        _empty(context)
    odd, stored = (found[name] for name in ("469M, stored at odd widths", "469M, quantum 64"))
    yield Row("469M: step at quantum 64 / step at odd widths", f"{stored / odd:.3f}", value=stored / odd)


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _attention(context: Context, shapes: Shapes, mesh: Mesh) -> Iterator[Row]:
    """Forward and backward of one layer's attention by each backend; which one torch takes by itself."""
    device, shape = mesh.device.device, shapes.source
    size = (shapes.usual, shape.num_attention_heads, shapes.seq_length, shape.kv_channels)
    q, k, v = (torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    clock, texts = Clock(mesh), []
    for name, backends in {"torch's choice": None, **BACKENDS}.items():
        if backends is not None and not context.is_cuda:
            continue
        try:
            with sdpa_kernel(backends) if backends is not None else torch.enable_grad():
                clock.median(attend, 2)
                texts.append(f"{name} {1000 * clock.median(attend, 2 if context.tiny else 8).wall:.2f}")
        except RuntimeError as error:
            texts.append(f"{name}: {' '.join(str(error).split())[:60]}")
    yield Row("attention of one layer, forward and backward, ms", ", ".join(texts))
