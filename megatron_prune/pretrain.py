"""Train, prune while training, and train on.

    torchrun --nproc-per-node 8 -m megatron_prune.pretrain --config run.yaml [--some-field value ...]
    srun --ntasks-per-node 8 python -m megatron_prune.pretrain --config run.yaml        (one task per rank)
    python -m megatron_prune.pretrain --config run.yaml        (one rank, no launcher)

Reads a configuration, opens what it names, builds the model on this rank's place in the mesh and runs the loop.
Mistakes end in one line on one rank and exit status 2 on all (see `runtime.failures`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the slow imports wait until the command line has been read
    from megatron_prune.config import Config
    from megatron_prune.launch.assembly.watch import Watch
    from megatron_prune.runtime.mesh import Mesh
    from megatron_prune.training.trainer import Trainer

# Optional accelerators that megatron-core misses are its own remark at every import, not news for the user.
warnings.filterwarnings("ignore", module=r"megatron\.core")


def main(argv: list[str] | None = None) -> int:
    """Run one job on this rank; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words in (["--help"], ["-h"]):  # answered before anything slow is imported
        return _run(words)
    from megatron_prune.runtime.failures import exit_status

    return exit_status(lambda: _run(words))


def _run(argv: list[str]) -> int:
    from megatron_prune.config import Command, parse_command, validate
    from megatron_prune.errors import UserError, log_lines
    from megatron_prune.runtime.places import speaks, stated_ranks

    is_speaker = speaks(os.environ)
    log_lines(logging.ERROR)
    logging.getLogger("megatron_prune").setLevel(logging.INFO if is_speaker else logging.ERROR)
    command: Command | UserError
    try:
        command = parse_command(argv)
    except UserError as error:
        command = error  # told when the other ranks know it, too
    if isinstance(command, Command) and command.text is not None:
        if is_speaker:
            sys.stdout.write(command.text + "\n")
        return 0
    if isinstance(command, Command) and command.dry_run:
        from megatron_prune.launch.estimate.dry_run import dry_run

        world_size = command.world_size or stated_ranks(os.environ)
        validate(command.config, world_size)
        return dry_run(command.config, world_size)

    def read(world_size: int) -> Config:
        if isinstance(command, UserError):
            raise command
        validate(command.config, world_size)
        return command.config

    return _train(read)


def _train(read: Callable[[int], Config]) -> int:
    from megatron_prune.launch.assembly.watch import Watch, launchers
    from megatron_prune.runtime.join import meet
    from megatron_prune.runtime.signals import StopSignals

    started, meeting = time.monotonic(), meet(read)
    with StopSignals() as signals, Watch(None, launchers(os.environ)) as watch, meeting.joined() as mesh:
        _fit(meeting.config, mesh, signals.is_asked, started, watch)
    return 0


def _fit(config: Config, mesh: Mesh, signalled: Callable[[], bool], started: float, watch: Watch) -> None:
    from megatron_prune.launch.assembly.watch import writing

    with writing(config.checkpoint.save, mesh, watch):
        _fit_alone(config, mesh, signalled, started)


def _fit_alone(config: Config, mesh: Mesh, signalled: Callable[[], bool], started: float) -> None:
    from megatron_prune.checkpoint.record import STOPPED
    from megatron_prune.errors import PeerLostError, TrainingStoppedError
    from megatron_prune.launch.assembly import outputs
    from megatron_prune.launch.assembly.alike import insist_alike, insist_shared
    from megatron_prune.launch.assembly.assemble import build_trainer
    from megatron_prune.launch.assembly.opening import open_inputs
    from megatron_prune.runtime.failures import agreed, lost_contact

    insist_shared(mesh, config.checkpoint.save)
    if not _taught(config, mesh, signalled, started):
        return
    inputs = agreed(mesh, lambda: open_inputs(config))
    insist_alike(mesh, config, inputs)
    agreed(mesh, lambda: outputs.check_places(config) if mesh.rank == 0 else None)
    logging.getLogger(__name__).info("%s; %d parameters to start with", mesh.describe(), inputs.architecture.parameters)
    trainer = build_trainer(config, inputs, mesh, signalled, started)
    directory = trainer.history.path.parent if trainer.history is not None else None  # on the rank that writes
    agreed(mesh, lambda: _begin(config, directory))
    status = STOPPED
    try:
        status = trainer.fit()
    except TrainingStoppedError:
        _close(trainer, directory, status)
        raise
    except RuntimeError as error:
        reason = lost_contact(error)
        if reason is None:
            raise
        where = f"iteration {trainer.state.iteration + 1}: {trainer.where_to_resume()}"
        raise PeerLostError(f"another rank died or hung ({reason}) in {where}") from error
    _close(trainer, directory, status)


def _taught(config: Config, mesh: Mesh, signalled: Callable[[], bool], started: float) -> bool:
    """Train the teacher first, where that is asked for and not done; False: told to leave before it was."""
    from megatron_prune.checkpoint.record import FINISHED, write_status
    from megatron_prune.launch.assembly import outputs
    from megatron_prune.launch.assembly.assemble import build_trainer
    from megatron_prune.launch.assembly.opening import open_inputs
    from megatron_prune.launch.assembly.teaching import lesson
    from megatron_prune.runtime.failures import agreed

    first = agreed(mesh, lambda: lesson(config))
    if first is None:
        return True
    agreed(mesh, lambda: open_inputs(config, writes=False))  # what is wrong with the run is told before, not after
    inputs = agreed(mesh, lambda: open_inputs(first))
    logging.getLogger(__name__).info("the source is trained first, for %d iterations", first.training.train_iters)
    trainer = build_trainer(first, inputs, mesh, signalled, started)
    directory = trainer.history.path.parent if trainer.history is not None else None
    agreed(mesh, lambda: outputs.write_config(first, directory) if directory is not None else None)
    status = trainer.fit()
    _close(trainer, directory, status)
    if status != FINISHED and directory is not None:
        write_status(directory.parent, status, 0)
    return status == FINISHED


def _begin(config: Config, directory: Path | None) -> None:
    from megatron_prune.checkpoint.record import clear_status
    from megatron_prune.launch.assembly import outputs

    if directory is not None:
        clear_status(directory)
        outputs.write_config(config, directory)


def _close(trainer: Trainer, directory: Path | None, status: str) -> None:
    from megatron_prune.checkpoint.record import write_status
    from megatron_prune.launch.assembly import outputs

    trainer.reporter.flush()
    report = None
    if trainer.history is not None and directory is not None:
        trainer.history.close()
        try:
            outputs.write_summary(trainer.config, trainer.state, trainer.architecture, directory)
            write_status(directory, status, trainer.state.iteration)
        except OSError as error:
            logging.getLogger(__name__).error("%s: %s", error.filename or directory, error.strerror)
        report = outputs.write_report(trainer.config, directory)
    trainer.reporter.close(report)


if __name__ == "__main__":
    from megatron_prune.runtime.signals import die_of_interrupts

    die_of_interrupts()
    from megatron_prune.runtime.failures import leave  # imports torch

    leave(main())
