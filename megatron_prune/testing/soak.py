"""Chains of killed runs: every resumed run is the next victim, until one reaches its end; then all must be as if
nothing had happened.

    VARIANTS   layouts and ways of saving
    Soak       a folder with a chain in it; `attempt` runs it once more, `check` what it left

What is checked after every kill: the other ranks end by themselves within `PATIENCE` seconds, with one line each (in
start-up, before there are connections that could break, the launcher ends them); the last checkpoint is whole, and no
older than before. At the end of a chain: removals with their scores, measured losses, and every stored number (weights,
moments) are those of a run that was never interrupted.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.checkpoint import CheckpointReader
from megatron_prune.checkpoint.files import LATEST
from megatron_prune.launch.agreement import code_version
from megatron_prune.testing.kills import Kill, Traces, victim
from megatron_prune.testing.ranks import Fate, watch_ranks
from megatron_prune.testing.tiny_runs import TinyRun, prepare

PATIENCE = 20.0  # seconds that ranks may go on after one has died; gloo notices at once, a loaded machine may not
_KILLED, _LOST = -9, 3
_LONGEST_ATTEMPT = 240.0


@dataclass(frozen=True)
class Variant:
    """A layout of two ranks and how it saves; an uninterrupted run saves at other iterations."""

    name: str
    flags: tuple[object, ...]
    saving: tuple[object, ...]


VARIANTS = (
    Variant(
        "tp2-sp",
        ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
        ("--save-interval", 2, "--keep-last", 2),
    ),
    Variant(
        "dp2-distributed-overlap-async",
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        ("--save-interval", 3, "--async-save", "--keep-last", 1),
    ),
    Variant("pp2-bf16", ("--pipeline-model-parallel-size", 2, "--bf16"), ("--save-interval", 1, "--keep-last", 1)),
)


@dataclass(frozen=True)
class Attempt:
    """One run of a chain: who was meant to die where, whether it did, and whether the run reached its end instead."""

    kill: Kill | None
    was_killed: bool
    is_finished: bool
    seconds: float
    iteration: int | None


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
            self.run = prepare(folder / "inputs")
            made_by.write_text(code_version())
        self.longest = 5.0

    def uninterrupted(self) -> Traces:
        """Traces of a run that nobody disturbs; it runs at the first call."""
        if not (self.reference / "run_status.json").exists():
            shutil.rmtree(self.reference, ignore_errors=True)
            fates, _ = self._run(self.reference, ("--save-interval", 100), None)
            if [fate.exit_code for fate in fates] != [0, 0]:
                raise SoakError(f"the uninterrupted run failed\n{_outputs(fates)}")
        return Traces.read(self.reference)

    def attempt(self, kill: Kill | None) -> Attempt:
        """Run the chain once more, from where it stands. Raises SoakError when a rank does not end as it should."""
        before = self.iteration()
        fates, seconds = self._run(self.save, self.variant.saving, kill)
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
        return Attempt(kill, was_killed, is_finished, seconds, after)

    def iteration(self) -> int | None:
        """Of the last checkpoint, which is read whole; None before the first."""
        if not (self.save / LATEST).exists():
            return None
        return CheckpointReader(self.save).header.iteration

    def close_chain(self) -> None:
        """After a finished attempt: compare with the uninterrupted run and begin a new chain."""
        expected, found = self.uninterrupted(), Traces.read(self.save)
        if found != expected:
            names = [name for name in vars(expected) if getattr(found, name) != getattr(expected, name)]
            raise SoakError(f"{self.variant.name}: after its kills the chain's {' and '.join(names)} differ")
        leftovers = [path.name for path in self.save.iterdir() if ".tmp" in path.name or ".replaced" in path.name]
        if leftovers:
            raise SoakError(f"{self.variant.name}: left behind: {leftovers}")
        shutil.rmtree(self.save)

    def draw(self, generator: random.Random) -> Kill:
        """The next kill."""
        return Kill.draw(generator, 2, self.longest)

    def _run(self, save: Path, saving: tuple[object, ...], kill: Kill | None) -> tuple[list[Fate], float]:
        arguments, begin = self.run.arguments(save, *self.variant.flags, *saving), time.monotonic()
        fates = watch_ranks(victim, 2, self.main, arguments, kill, timeout=_LONGEST_ATTEMPT)
        return fates, time.monotonic() - begin


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
