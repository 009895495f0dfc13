"""Runs that are killed at chosen moments, again and again, and must end as if nothing had happened.

    MOMENTS     named places in a run: in a collective, between decision and commit, in a compaction, while saving, ...
    Kill        which rank dies, where, at the how-manieth time, or after how many seconds
    victim      on one rank: a whole run with a kill in wait
    Traces      what a finished run left behind that must not depend on interruptions

The product knows nothing of this: moments are functions that the forked rank wraps before the run begins.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_CHECKPOINT, _TRAINING = "megatron_prune.checkpoint", "megatron_prune.training"
_RESHARDING = "megatron_prune.resharding"

# name -> (module, dotted attribute, whether death comes after the call instead of before it)
MOMENTS: dict[str, tuple[str, str, bool]] = {
    "in a collective": ("torch.distributed", "all_reduce", False),
    "before the optimizer step": ("megatron_prune.optimizer.wrapped", "WrappedModel.step", False),
    "after the optimizer step": ("megatron_prune.optimizer.wrapped", "WrappedModel.step", True),
    "before the decision": (f"{_RESHARDING}.coordinator", "Coordinator.prepare", False),
    "between decision and commit": (f"{_RESHARDING}.coordinator", "Coordinator.commit", False),
    "after the commit": (f"{_RESHARDING}.live", "LiveModel.retire", True),
    "before a compaction": (f"{_RESHARDING}.live", "LiveModel.compact", False),
    "while a compaction moves weights": (f"{_RESHARDING}.compact", "move", True),
    "while a compaction moves optimizer state": (f"{_RESHARDING}.compact", "_set_state", True),
    "while a layer changes its stage": (f"{_RESHARDING}.compact", "Compaction._carried", True),
    "before a save": (f"{_CHECKPOINT}.save", "plan_save", False),
    "while tensors are written": (f"{_CHECKPOINT}.streams", "SummingFile.write", True),
    "when a rank has written its files": (f"{_CHECKPOINT}.storage", "_Writer.write", True),
    "before the checksums": (f"{_CHECKPOINT}.save", "write_manifest", False),
    "before publishing": (f"{_CHECKPOINT}.save", "publish", False),
    "between the two renames": (f"{_CHECKPOINT}.files", "_sync_folder", True),
    "after publishing": (f"{_CHECKPOINT}.save", "publish", True),
    "while old checkpoints are deleted": ("shutil", "rmtree", False),
    "while loading": (f"{_CHECKPOINT}.tensors", "read_into", True),
}
_MOST_OFTEN = {"in a collective": 400, "while tensors are written": 150, "while a compaction moves weights": 60}
_ON_FIRST_RANK = ("before the checksums", "before publishing", "between the two renames", "after publishing")


@dataclass(frozen=True)
class Kill:
    """SIGKILL to `rank` at the `count`-th passage of `moment`, or `seconds` after its start where that is set."""

    rank: int
    moment: str | None = None
    count: int = 1
    seconds: float = 0.0

    @classmethod
    def draw(cls, random: random.Random, world_size: int, longest: float) -> Kill:
        """Any moment, or (one time in three) any time up to `longest` seconds."""
        rank = random.randrange(world_size)
        if random.random() < 1 / 3:
            return cls(rank, seconds=random.uniform(0.0, longest))
        moment = random.choice(list(MOMENTS))
        count = random.randint(1, _MOST_OFTEN.get(moment, 4))
        return cls(0 if moment in (*_ON_FIRST_RANK, "while old checkpoints are deleted") else rank, moment, count)

    def __str__(self) -> str:
        where = f"after {self.seconds:.2f} s" if self.moment is None else f"{self.moment} ({self.count})"
        return f"rank {self.rank} {where}"


def arm(kill: Kill, rank: int) -> None:
    """Prepare the kill in this process, if `rank` is the one to be killed."""
    if rank != kill.rank:
        return
    if kill.moment is None:
        threading.Timer(kill.seconds, _die).start()
        return
    module, dotted, dies_after = MOMENTS[kill.moment]
    owner: Any = importlib.import_module(module)
    *path, name = dotted.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, _deadly(getattr(owner, name), kill.count, dies_after))


def _deadly(function: Callable[..., Any], count: int, dies_after: bool) -> Callable[..., Any]:
    passages = iter(range(1, count + 1))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        is_time = next(passages, None) == count
        if is_time and not dies_after:
            _die()
        result = function(*args, **kwargs)
        if is_time:
            _die()
        return result

    return wrapped


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def victim(
    rank: int, _world_size: int, main: Callable[[list[str]], int], arguments: list[str], kill: Kill | None = None
) -> None:
    """A whole run on this rank; the process ends with its exit status (call it through `watch_ranks`).

    Args:
        main: `megatron_prune.pretrain.main`.
        kill: when this run is to die, if it is.
    """
    if kill is not None:
        arm(kill, rank)
    status = main(arguments)
    if status:
        os._exit(status)


@dataclass(frozen=True)
class Traces:
    """What a finished run left: removals with their scores, measured losses, and every stored number."""

    history: str
    stages: str
    tensors: str

    @classmethod
    def read(cls, save: Path) -> Traces:
        """What the finished run in `save` left."""
        from megatron_prune.checkpoint.reader import CheckpointReader

        reader, digest = CheckpointReader(save), hashlib.sha256()
        for name in reader.names:
            kinds = [reader.read_optimizer(kind, name) for kind in reader.record.facts.optimizer]
            for tensor in (reader.read(name), *kinds):
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        stages = json.loads((save / "summary.json").read_text())
        for stage in stages["stages"].values():
            stage.pop("evaluation_tokens_per_second")
        return cls((save / "pruning_history.jsonl").read_text(), json.dumps(stages), digest.hexdigest())
