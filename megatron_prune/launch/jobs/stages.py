"""The stages of a job, which of them are done, and what is left to do: pure decisions over small files in SAVE.

    prune      train and prune until the target is reached
    continue   train the small model for `continue_tokens` (the same run goes on)
    export     the newest checkpoint as a Hugging Face folder, SAVE/hf
    evaluate   source and exported model side by side, SAVE/evaluation (`after` has both stages' commands)

    parse_stages    `prune,continue` -> stages in order
    Ledger          SAVE/launch_status.json: how the job stands, and which checkpoint was exported and evaluated
    make_plan       stages, progress (`checkpoint.record`), ledger -> Plan: how to train (or not), what to do afterwards
    wants_requeue   whether a job that has ended should be started again

Training is one process group and one run, whichever stages are asked for: `prune` alone stops it at the target
(training.exit_at_target), everything else lets it go on. So a job that is started again asks for the same stages and
does what is left.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.record import PREEMPTED, TIME_LIMIT, Progress
from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.reading import read_words
from megatron_prune.runtime.folders import replace_file

PRUNE, CONTINUE, EXPORT, EVALUATE = STAGES = ("prune", "continue", "export", "evaluate")
ALL = "all"
LEDGER_FILE = "launch_status.json"
EXPORTED, EVALUATION = "hf", "evaluation"
_FOLDERS = {EXPORT: EXPORTED, EVALUATE: EVALUATION}
RUNNING, FAILED = "running", "failed"  # beside a run's own, with which training ends


def parse_stages(text: str) -> tuple[str, ...]:
    """Stages named in `text`, each once, in the order in which they run. Raises UserError for an unknown one."""
    words = text.split(",")
    unknown = [word for word in words if word not in (*STAGES, ALL)]
    if unknown:
        raise UserError(f'--stage: unknown stage "{unknown[0]}"; there are {", ".join(STAGES)} and {ALL}')
    return STAGES if ALL in words else tuple(stage for stage in STAGES if stage in words)


@dataclass(frozen=True)
class Ledger:
    """How the job stands; written by one process at a time.

    Args:
        status: `running`, `finished`, `failed`, or why training stopped (`preempted`, `time_limit`, `exit_interval`,
            `stopped`).
        done: stage -> iteration of the checkpoint that was exported (evaluated).
        skipped: stage -> why it was left out.
    """

    status: str = RUNNING
    done: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, save: Path) -> Ledger:
        """The ledger in `save`; an empty one where there is none, or none that can be read. A stage whose folder has
        been removed is not done."""
        try:
            values = json.loads(read_words(save / LEDGER_FILE))
            done = {stage: at for stage, at in values["done"].items() if (save / _FOLDERS[stage]).exists()}
            skipped = {stage: str(why) for stage, why in values["skipped"].items()}
            is_whole = isinstance(values["status"], str) and all(type(at) is int for at in done.values())
            return cls(values["status"], done, skipped) if is_whole else cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    def write(self, save: Path) -> None:
        """Replace the ledger in `save` at once."""
        save.mkdir(parents=True, exist_ok=True)
        replace_file(save / LEDGER_FILE, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    def with_status(self, status: str) -> Ledger:
        """The same with another status."""
        return dataclasses.replace(self, status=status)

    def with_done(self, stage: str, iteration: int) -> Ledger:
        """The same with `stage` done for the checkpoint of `iteration`."""
        skipped = {name: why for name, why in self.skipped.items() if name != stage}
        return dataclasses.replace(self, done={**self.done, stage: iteration}, skipped=skipped)

    def with_skipped(self, stage: str, why: str) -> Ledger:
        """The same with `stage` left out."""
        return dataclasses.replace(self, skipped={**self.skipped, stage: why})


@dataclass(frozen=True)
class Plan:
    """What this job does.

    Args:
        train: flags to append to the training's command line; None: no training.
        after: stages for one process, once training is finished.
        notes: lines about stages that are done already.
    """

    train: tuple[str, ...] | None
    after: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Inverse of `to_json`."""
        train = None if values["train"] is None else tuple(values["train"])
        return cls(train, tuple(values["after"]), tuple(values["notes"]))


def make_plan(stages: Sequence[str], config: Config, progress: Progress, ledger: Ledger) -> Plan:
    """Decide what is left of `stages`. Raises UserError: a stage was asked for whose input does not exist yet."""
    notes, at = [], f"iteration {progress.iteration}"
    training = [stage for stage in stages if stage in (PRUNE, CONTINUE)]
    pruned, finished = progress.is_pruned(config), progress.is_finished(config)
    if CONTINUE in stages and PRUNE not in stages and not pruned:
        reached = "there is no checkpoint yet" if progress.iteration is None else f"the newest checkpoint is of {at}"
        raise UserError(f"--stage {CONTINUE}: the target is not reached ({reached}); run --stage {PRUNE} first, or all")
    for stage, is_done in ((PRUNE, pruned), (CONTINUE, finished)):
        if stage in training and is_done:
            notes.append(f"stage {stage}: done ({at}), skipped")
            training.remove(stage)
    flags = None
    if training:
        flags = _resume_flags(config, progress)
        flags += ("--exit-at-target",) if training == [PRUNE] and CONTINUE not in stages else ()
    after = []
    for stage in (EXPORT, EVALUATE):
        if stage not in stages:
            continue
        if flags is None and progress.iteration is None:
            raise UserError(f"--stage {stage}: there is no checkpoint yet in {config.checkpoint.save}")
        is_done = flags is None and ledger.done.get(stage) == progress.iteration
        if is_done and EXPORT not in after:
            notes.append(f"stage {stage}: done ({at}), skipped")
        else:
            after.append(stage)
    if after == [EVALUATE] and flags is None and ledger.done.get(EXPORT) is None:
        raise UserError(f"--stage {EVALUATE}: nothing is exported yet; run --stage {EXPORT},{EVALUATE}")
    return Plan(flags, tuple(after), tuple(notes))


def _resume_flags(config: Config, progress: Progress) -> tuple[str, ...]:
    """Go on from the run's own newest checkpoint once there is one, whatever the run started from."""
    if progress.iteration is None:
        return ()
    assert config.checkpoint.save is not None
    return ("--load", config.checkpoint.save, "--ckpt-step", "null", "--no-finetune", "--load-optim")


def wants_requeue(stages: Sequence[str], config: Config, progress: Progress, ledger: Ledger, signalled: bool) -> bool:
    """Whether a job that has just ended was asked to leave before its stages were done.

    Args:
        signalled: the job was told to leave. It then counts as preempted even when it was killed before it could write
            so.
    """
    plan = make_plan(stages, config, progress, ledger)
    if plan.train is None and not [stage for stage in plan.after if stage not in ledger.skipped]:
        return False
    return ledger.status in (PREEMPTED, TIME_LIMIT) or (signalled and ledger.status == RUNNING)
