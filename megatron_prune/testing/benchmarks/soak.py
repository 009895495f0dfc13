"""Chains of killed runs: every resumed run is the next victim, until one reaches its end; then all must be as if
nothing had happened.

    VARIANTS   layouts and ways of saving; `any-layout` draws another at every restart, and two lose layers
    LAYOUTS    what it draws from: ranks and flags
    Soak       a folder with a chain in it; `attempt` runs it once more, `close_chain` compares what it left
    SecondStarter   the same command again, while an attempt runs

What is checked after every kill: the other ranks end by themselves within `PATIENCE` seconds, with one line each (in
start-up, before there are connections that could break, the launcher ends them); the last checkpoint is whole, and no
older than before. At the end of a chain: removals with their scores, measured losses, and every stored number (weights,
moments) are those of a run that was never interrupted. Where layouts change the order of sums does, so there the
removals are the same and losses equal to `LOSSES_AGREE`.

Where a kill says so, another process starts in the same folder meanwhile: it must be refused in one line that names the
owner, and nothing may come of it. `kill_launcher` is the real torchrun, killed: its ranks must save and leave.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.checkpoint.files import holds_checkpoint
from megatron_prune.checkpoint.lease import is_lease, live_owner
from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.record import read_status
from megatron_prune.runtime.agreement import code_version
from megatron_prune.testing.benchmarks.kills import Kill, Traces, victim
from megatron_prune.testing.helpers.ranks import Fate, watch_ranks
from megatron_prune.testing.helpers.tiny_runs import TinyRun, prepare

PATIENCE = 20.0  # seconds that ranks may go on after one has died; gloo notices at once, a loaded machine may not
_KILLED, _LOST = -9, 3
_LONGEST_ATTEMPT = 240.0
LOSSES_AGREE = 1e-5  # relative: fp32 sums in another order, over some tens of steps
_TP, _PP, _DISTRIBUTED = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--use-distributed-optimizer"
LAYOUTS: tuple[tuple[int, tuple[object, ...]], ...] = (
    (1, ()),
    (2, (_TP, 2)),
    (2, (_TP, 2, "--sequence-parallel")),
    (2, (_PP, 2)),
    (2, ()),
    (2, (_DISTRIBUTED,)),
    (4, (_TP, 2, "--sequence-parallel", _PP, 2)),
    (4, (_TP, 2, _DISTRIBUTED)),
    (4, (_PP, 2, _DISTRIBUTED)),
)


@dataclass(frozen=True)
class Variant:
    """A layout of two ranks and how it saves; an uninterrupted run saves at other iterations.

    With `draws` every attempt draws one of `LAYOUTS` instead. `pruning` is said after what a `TinyRun` says of it, and
    the source has so many `layers`.
    """

    name: str
    flags: tuple[object, ...]
    saving: tuple[object, ...]
    draws: bool = False
    pruning: Sequence[object] = ()
    layers: int = 2


# FFN channels go first here, then two of four layers; on two stages one changes its stage.
_LOSES_LAYERS = shlex.split(
    "--engine gpt --prune-types ffn layer --prune-groups layer.cost=2 ffn.floor=40 --prune-target-params 17000 "
    "--prune-balance 0"
)
_EVERY_TWO = ("--save-interval", 2, "--keep-last", 2)
VARIANTS = (
    Variant("tp2-sp", (_TP, 2, "--sequence-parallel"), _EVERY_TWO),
    Variant(
        "dp2-distributed-overlap-async",
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        ("--save-interval", 3, "--async-save", "--keep-last", 1),
    ),
    Variant("pp2-bf16", ("--pipeline-model-parallel-size", 2, "--bf16"), ("--save-interval", 1, "--keep-last", 1)),
    Variant("any-layout", (_TP, 2), _EVERY_TWO, draws=True),
    Variant("pp2-layers", (_PP, 2), _EVERY_TWO, pruning=_LOSES_LAYERS, layers=4),
    Variant("any-layout-layers", (_PP, 2), _EVERY_TWO, draws=True, pruning=_LOSES_LAYERS, layers=4),
)


@dataclass(frozen=True)
class Attempt:
    """One run of a chain: who was meant to die where, whether it did, and whether the run reached its end instead."""

    kill: Kill | None
    was_killed: bool
    is_finished: bool
    seconds: float
    iteration: int | None
    was_refused: bool = False  # the second starter, where there was one
    layout: str = ""


class SoakError(AssertionError):
    """Something was lost, or a rank did not end as it should."""


class Soak:
    """Chains of one variant in `folder`, which keeps everything needed to go on after an interruption.

    Args:
        main: `megatron_prune.pretrain.main`.
    """

    def __init__(self, folder: Path, variant: Variant, main: Callable[[list[str]], int]) -> None:
        self.variant, self.main, self.folder = variant, main, folder
        self.save, self.reference = folder / "chain", folder / "uninterrupted"
        self.run = TinyRun(folder / "inputs")
        made_by = folder / "code_version.txt"  # other code may write other histories: then all begins anew
        if not made_by.exists() or made_by.read_text() != code_version():
            shutil.rmtree(folder, ignore_errors=True)
            self.run = prepare(folder / "inputs", variant.layers)
            made_by.write_text(code_version())
        self.longest = 5.0

    def uninterrupted(self) -> Traces:
        """Traces of a run that nobody disturbs; it runs at the first call."""
        if read_status(self.reference) is None:
            shutil.rmtree(self.reference, ignore_errors=True)
            fates, _ = self._run(self.reference, ("--save-interval", 100), None)
            if [fate.exit_code for fate in fates] != [0, 0]:
                raise SoakError(f"the uninterrupted run failed\n{_outputs(fates)}")
        return Traces.read(self.reference)

    def attempt(self, kill: Kill | None, layout: int | None = None, second_after: float | None = None) -> Attempt:
        """Run the chain once more, from where it stands.

        Args:
            layout: number in `LAYOUTS`; None: the variant's.
            second_after: a second starter comes so many seconds after the first has the folder; None: none does.

        Raises:
            SoakError: a rank does not end as it should, or the second starter was not refused.
        """
        before, ranks, flags = self.iteration(), 2, self.variant.flags
        if layout is not None:
            ranks, flags = LAYOUTS[layout]
        second = None if second_after is None else SecondStarter(self, second_after, ranks, flags)
        fates, seconds = self._run(self.save, self.variant.saving, kill, ranks, flags)
        was_refused = second is not None and second.outcome()
        was_killed = kill is not None and fates[kill.rank].exit_code == _KILLED
        is_finished = all(fate.exit_code == 0 for fate in fates)
        if was_killed:
            assert kill is not None
            _check_survivors(fates, kill)
        elif not is_finished:
            raise SoakError(f"{self.variant.name}, {kill}: ranks failed\n{_outputs(fates)}")
        self.longest = max(self.longest, seconds) if is_finished else self.longest
        after = self.iteration()
        if (before or 0) > (after or 0):
            raise SoakError(f"{self.variant.name}, {kill}: the last checkpoint went from {before} to {after}")
        shown = " ".join(map(str, (ranks, *flags)))
        return Attempt(kill, was_killed, is_finished, seconds, after, was_refused, shown)

    def kill_launcher(self, seconds: float, layout: int | None = None) -> Attempt:
        """Run the chain under the real torchrun, which is killed `seconds` after its ranks have the folder. Raises
        SoakError: ranks are still there after `PATIENCE` seconds, or a checkpoint was lost."""
        before, begin, ranks, flags = self.iteration(), time.monotonic(), 2, self.variant.flags
        if layout is not None:
            ranks, flags = LAYOUTS[layout]
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        words = self.run.arguments(self.save, *flags, *self.variant.pruning, *self.variant.saving)
        log = self.folder / "launcher.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                (*launcher, "-m", "megatron_prune.pretrain", *words), stdout=output, stderr=subprocess.STDOUT
            )
            _wait(lambda: live_owner(self.save) is not None or process.poll() is not None, 120.0)
            _wait(lambda: process.poll() is not None, seconds)
            children = _children(process.pid)
            process.kill()
            code = process.wait()
        if not _wait(lambda: not any(map(_is_there, children)), PATIENCE):
            for pid in filter(_is_there, children):
                os.kill(pid, signal.SIGKILL)
            raise SoakError(f"launcher killed: ranks {children} went on\n{log.read_text()[-4000:]}")
        after = self.iteration()
        if (before or 0) > (after or 0) or "Traceback" in log.read_text().partition("torch.distributed.elastic")[0]:
            raise SoakError(f"launcher killed: from {before} to {after}\n{log.read_text()[-4000:]}")
        kill = Kill(0, "the launcher")
        return Attempt(kill, code != 0, code == 0, time.monotonic() - begin, after)

    def iteration(self) -> int | None:
        """Iteration of the last checkpoint, which is read whole; None before the first."""
        if not holds_checkpoint(self.save):
            return None
        return CheckpointReader(self.save).record.iteration

    def close_chain(self) -> None:
        """After a finished attempt: compare with the uninterrupted run and begin a new chain."""
        expected, found = self.uninterrupted(), Traces.read(self.save)
        if self.variant.draws:
            _check_close(found, expected)
        elif found != expected:
            names = [name for name in vars(expected) if getattr(found, name) != getattr(expected, name)]
            raise SoakError(f"{self.variant.name}: after its kills the chain's {' and '.join(names)} differ")
        leftovers = [
            path.name
            for path in self.save.iterdir()
            if ".tmp" in path.name or ".replaced" in path.name or is_lease(path)
        ]
        if leftovers:
            raise SoakError(f"{self.variant.name}: left behind: {leftovers}")
        shutil.rmtree(self.save)

    def draw(self, generator: random.Random) -> tuple[Kill, int | None, float | None]:
        """The next kill, layout and second starter, as `attempt` takes them."""
        layout = generator.randrange(len(LAYOUTS)) if self.variant.draws else None
        ranks = 2 if layout is None else LAYOUTS[layout][0]
        second = generator.uniform(0.0, self.longest / 2) if generator.random() < 1 / 3 else None
        return Kill.draw(generator, ranks, self.longest), layout, second

    def draw_launcher(self, generator: random.Random) -> tuple[float, int | None]:
        """When the launcher dies, and on which layout, as `kill_launcher` takes them."""
        return generator.uniform(0.0, self.longest), (generator.randrange(len(LAYOUTS)) if self.variant.draws else None)

    def _run(
        self,
        save: Path,
        saving: tuple[object, ...],
        kill: Kill | None,
        ranks: int = 2,
        flags: Sequence[object] | None = None,
    ) -> tuple[list[Fate], float]:
        flags, begin = self.variant.flags if flags is None else flags, time.monotonic()
        arguments = self.run.arguments(save, *flags, *self.variant.pruning, *saving)
        fates = watch_ranks(victim, ranks, self.main, arguments, kill, timeout=_LONGEST_ATTEMPT)
        return fates, time.monotonic() - begin


class SecondStarter:
    """Another start of the attempt's command, on the same layout, in the chain's folder while the chain runs.

    Where the first dies before it comes, it takes the folder over and goes on: on another layout it would not do so bit
    for bit.
    """

    def __init__(self, soak: Soak, after: float, ranks: int, flags: Sequence[object]) -> None:
        self.soak, self.after, self.ranks, self.flags = soak, after, ranks, flags
        self.fates: list[Fate] = []
        self._over = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while live_owner(self.soak.save) is None:
            if self._over.wait(0.05):
                return
        if self._over.wait(self.after):
            return
        self.fates, _ = self.soak._run(self.soak.save, self.soak.variant.saving, None, self.ranks, self.flags)

    def outcome(self) -> bool:
        """Whether it was refused; False where it came too late. Raises SoakError for anything else."""
        self._over.set()
        self.thread.join()
        codes = {fate.exit_code for fate in self.fates}
        if codes <= {0}:  # nobody came, or the first was gone: it went on itself
            return False
        lines = [line for fate in self.fates for line in fate.output.splitlines() if line.startswith("error: ")]
        if 2 not in codes or not codes <= {2, _LOST} or len(lines) != 1 or "is being written by pid" not in lines[0]:
            raise SoakError(f"the second starter was not refused in one line\n{_outputs(self.fates)}")
        return True


def _check_close(found: Traces, expected: Traces) -> None:
    """The same removals; losses to `LOSSES_AGREE`."""
    removed = [
        [(line["iteration"], line["group"], line["gone"]) for line in map(json.loads, traces.history.splitlines())]
        for traces in (found, expected)
    ]
    if removed[0] != removed[1]:
        raise SoakError("any-layout: after its kills the chain has removed other groups")
    ours, theirs = json.loads(found.stages), json.loads(expected.stages)
    for stage, facts in theirs["stages"].items():
        loss, wanted = ours["stages"][stage]["validation_loss"], facts["validation_loss"]
        if abs(loss - wanted) > LOSSES_AGREE * abs(wanted):
            raise SoakError(f"any-layout: the loss of {stage} is {loss!r}, uninterrupted {wanted!r}")


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_there(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _check_survivors(fates: list[Fate], kill: Kill) -> None:
    """They ended soon, by themselves, and each that was interrupted said so in one line."""
    for rank, fate in enumerate(fates):
        if rank == kill.rank:
            continue
        late = fate.seconds - fates[kill.rank].seconds
        if fate.exit_code is None and " iteration " not in fates[0].output:
            continue
        if fate.exit_code is None or late > PATIENCE:
            raise SoakError(f"{kill}: rank {rank} went on for {late:.1f} s\n{_outputs(fates)}")
        lines = [line for line in fate.output.splitlines() if line.startswith("error: ")]
        is_clear = fate.exit_code == _LOST and len(lines) == 1 and "Traceback" not in fate.output
        if fate.exit_code != 0 and not is_clear:
            raise SoakError(f"{kill}: rank {rank} ended with {fate.exit_code}\n{_outputs(fates)}")


def _outputs(fates: list[Fate]) -> str:
    return "".join(f"--- rank {rank}, exit code {f.exit_code}\n{f.output[-4000:]}" for rank, f in enumerate(fates))
