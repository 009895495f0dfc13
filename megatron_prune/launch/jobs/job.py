"""A job as users start it: `megatron-prune launch CONFIG [--stage NAMES] [-- training flags]`, however it was launched.

    main      be what `places.find_place` says: start torchrun on this node, or be a rank
    _Rank     agree with the others, train, then (rank 0) export and evaluate

All ranks compare configuration and code before anything is built (`agreement`), rank 0 alone decides what is left to
do (`stages`) and keeps SAVE/launch_status.json. Training is `megatron_prune.pretrain`; the stages after it are
commands, each in a process of its own, while the other ranks have left.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_prune.checkpoint.files import holds_checkpoint
from megatron_prune.checkpoint.lease import acquire, live_owner
from megatron_prune.checkpoint.record import FINISHED, PREEMPTED, STOPPED, Progress, clear_status, read_status
from megatron_prune.config import Config, dump
from megatron_prune.errors import UserError, log_lines
from megatron_prune.launch.assembly.watch import Watch, announce, launchers
from megatron_prune.launch.jobs import after, stages
from megatron_prune.launch.jobs.request import LINE, Request
from megatron_prune.launch.jobs.stages import Ledger, Plan, make_plan
from megatron_prune.launch.jobs.supervisor import supervise
from megatron_prune.runtime.agreement import consult, own_facts
from megatron_prune.runtime.places import Rank, Torchrun, find_place, grace_seconds, rank_settings, search_path, speaks
from megatron_prune.runtime.rendezvous import NotMetError, check_port
from megatron_prune.runtime.signals import STOP_SIGNALS, heeded_signals

logger = logging.getLogger(__name__)

PROGRAM = ("-m", "megatron_prune", "launch")  # what torchrun starts for each rank
_NO_RUN = {"--dry-run", "--help", "-h", "--print-default-config"}  # training flags that start nothing

Train = Callable[[list[str]], int]


class ToldToLeave(BaseException):
    """One of `STOP_SIGNALS` arrived while this process was not training.

    Args:
        number: the signal; `status` is a shell's for a process that it ended.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class NodeError(UserError):
    """A node's own variables are wrong: it says so itself, since it cannot meet the others."""


def main(argv: Sequence[str], train: Train) -> int:
    """Run a job, or this process's part of it.

    Args:
        train: runs a training from its command line in this process and returns the exit status.

    Returns:
        Exit status: 0 done, or told to leave and saved; 2 a mistake of the user; else a failure.
    """
    log_lines(logging.ERROR)
    is_speaker = speaks(os.environ)
    logging.getLogger("megatron_prune").setLevel(logging.INFO if is_speaker else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\..*")
    for number in heeded_signals():
        signal.signal(number, _leave)
    try:
        request = Request.parse(argv)
        if request is None:
            sys.stdout.write(LINE.help_text() if is_speaker else "")
            return 0
        if request.asks_requeue:  # asked outside of the job's container, maybe
            return _should_requeue(request)
        missing = [name for name in ("torch", "megatron.core") if not _is_installed(name)]
        if missing:
            raise UserError(f"{sys.executable} has no {missing[0]}; name the right interpreter: PYTHON=.../bin/python")
        if _NO_RUN & set(request.flags):
            return train(request.training_arguments())
        place = _own_place()
        if isinstance(place, Torchrun):
            return _node(request, place)
        os.environ.update(place.environment)
        return _Rank(request, place.rank, place.world_size, train).run()
    except UserError as error:
        if is_speaker or isinstance(error, (NodeError, NotMetError)):
            sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        from megatron_prune.runtime.failures import mishap  # imports torch

        reason = mishap(error)
        if reason is None:
            raise
        sys.stderr.write(f"error: {reason}\n")
        return 2
    except ToldToLeave as told:  # before any rank was there
        return told.status


def _own_place() -> Torchrun | Rank:
    try:
        return find_place(os.environ)
    except UserError as error:
        if {"RANK", "SLURM_PROCID"} & set(os.environ):
            raise
        raise NodeError(str(error)) from error


def _leave(number: int, _frame: FrameType | None) -> None:
    raise ToldToLeave(number)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _should_requeue(request: Request) -> int:
    config = request.read()
    save = Path(str(config.checkpoint.save))
    signalled = bool(os.environ.get("JOB_SIGNALLED"))
    ledger, progress = Ledger.read(save), Progress.read(save)
    wanted = stages.wants_requeue(request.stages, config, progress, ledger, signalled)
    logger.info("job %s at iteration %s: %s", ledger.status, progress.iteration, "requeue" if wanted else "no requeue")
    return 0 if wanted else 1


# A node ---------------------------------------------------------------------------------------------------------------


def _node(request: Request, place: Torchrun) -> int:
    """Start torchrun and see it through."""
    if place.nnodes == 1:
        request.read()  # a mistake in it is told before anything starts; with several nodes their ranks agree on it
    elif place.node_rank == 0 and place.master_port is not None:
        check_port(place.master_port)
    grace = grace_seconds(os.environ)
    nproc = place.nproc_per_node or _visible_gpus(os.environ) or 1
    # torchrun would take the PET_ variables for flags, beside those it gets.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    environment["PYTHONPATH"] = search_path(environment)
    environment.update(announce(environment))  # ranks end when this process is gone
    logs = environment.get("LOG_DIR")
    if logs is not None:
        logs = str(Path(logs) / f"node-{place.node_rank}")
        Path(logs).mkdir(parents=True, exist_ok=True)
    command = place.command(sys.executable, nproc, [*PROGRAM, *request.words], logs, _patience(request))
    if logs is not None and place.node_rank:
        command.remove("--tee=0:3")
    before = _written(request)
    outcome = supervise(command, environment, grace)
    if outcome.told is None or outcome.code == 0:
        return outcome.code if outcome.code >= 0 else 128 - outcome.code
    save = Path(str(request.read().checkpoint.save))
    if _written(request) == before:  # the ranks were not together yet: nothing was trained, nothing saved
        return 128 + outcome.told
    ledger = Ledger.read(save)
    if ledger.status == stages.RUNNING and place.node_rank == 0 and live_owner(save) is None:
        ledger.with_status(PREEMPTED).write(save)
    return 1 if ledger.status == stages.FAILED else 0


def _patience(request: Request) -> float:
    """Minutes that nodes may be late."""
    try:
        return request.read().parallel.distributed_timeout_minutes
    except UserError:  # the ranks say so, together
        return 10


def _written(request: Request) -> int | None:
    """When ranks have last written how the job stands (nanoseconds); None: never, or the folder is not known."""
    try:
        return (Path(str(request.read().checkpoint.save)) / stages.LEDGER_FILE).stat().st_mtime_ns
    except (OSError, UserError):
        return None


def _visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs this process may use, without starting CUDA."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


# A rank ---------------------------------------------------------------------------------------------------------------


class _Rank:
    """One rank of a job."""

    def __init__(self, request: Request, rank: int, world_size: int, train: Train) -> None:
        self.request, self.rank, self.world_size, self.train = request, rank, world_size, train
        self.ledger = Ledger()
        self._held, self._holds = contextlib.ExitStack(), False  # the lease of `save`, on rank 0
        self.has_trained = False  # or had nothing left to train
        self._config: Config | None = None
        self._store: Any = None

    @property
    def config(self) -> Config:
        """The effective configuration."""
        assert self._config is not None
        return self._config

    @property
    def save(self) -> Path:
        """The job's folder."""
        return Path(str(self.config.checkpoint.save))

    def run(self) -> int:
        """Everything this rank has to do; returns the exit status."""
        with self._held:
            try:
                return self._run()
            except ToldToLeave as told:
                logger.info("told to leave; the same command goes on from here")
                self._note(PREEMPTED)
                return 0 if self.has_trained else told.status

    def _run(self) -> int:
        plan = self._agree()
        for note in plan.notes:
            logger.info("%s", note)
        self._note(stages.RUNNING)
        if plan.train is not None:
            self._forget_unsaved()
            # From here to where training listens, a signal waits: a rank that left now would let the others wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                code = self.train(self.request.training_arguments(plan.train))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            if code != 0:
                from megatron_prune.runtime.failures import leave  # imports torch, as the training has

                self._note(stages.FAILED)
                self._held.close()
                leave(code)
        self.has_trained = True
        if self.rank != 0:
            return 0
        if self._plan().train is not None:
            status = read_status(self.save) or STOPPED
            self._note(status)
            logger.info("training stopped (%s); the same command goes on from here", status)
            return 0
        with Watch(None, launchers(os.environ)):
            return self._after(plan.after)

    def _agree(self) -> Plan:
        """Compare configuration and code with the other ranks, and learn what rank 0 plans."""
        facts = own_facts(self._read)
        minutes = self._config.parallel.distributed_timeout_minutes if self._config is not None else 10
        if self._config is not None:
            os.environ.update(rank_settings(self._config, os.environ))
        plan, self._store = consult(
            self.rank, self.world_size, facts, lambda: self._first_plan().to_json(), os.environ, minutes
        )
        return Plan.from_json(plan)

    def _read(self) -> str:
        self._config = self.request.read()
        return dump(self._config)

    def _first_plan(self) -> Plan:
        """The plan, and what it cannot do; raises UserError, before any training, for what `evaluate` cannot read."""
        lease = self._held.enter_context(acquire(self.save, launchers(os.environ)))
        self._held.enter_context(Watch(lease, ()))
        self._holds = True
        plan = self._plan()
        left_out = after.check(self.config) if stages.EVALUATE in plan.after else None
        if left_out is None:
            return plan
        return dataclasses.replace(
            plan, notes=(*plan.notes, f"stage {stages.EVALUATE} will leave something out: {left_out}")
        )

    def _plan(self) -> Plan:
        return make_plan(self.request.stages, self.config, Progress.read(self.save), Ledger.read(self.save))

    def _note(self, status: str) -> None:
        """Rank 0 writes down how the job stands."""
        if self.rank == 0 and self._holds:
            self.ledger = Ledger.read(self.save).with_status(status)
            self.ledger.write(self.save)

    def _forget_unsaved(self) -> None:
        """Put aside what is of no use to anyone: the last status, and the history of a run that never saved."""
        if self.rank != 0:
            return
        clear_status(self.save)
        history = self.save / "pruning_history.jsonl"
        if history.exists() and not holds_checkpoint(self.save):
            logger.info("%s: of a run that left no checkpoint; set aside, training starts anew", history)
            history.replace(history.with_name(history.name + ".unsaved"))

    # After training ---------------------------------------------------------------------------------------------------

    def _after(self, todo: Sequence[str]) -> int:
        iteration = Progress.read(self.save).iteration
        assert iteration is not None
        for stage in todo:
            job = (after.export if stage == stages.EXPORT else after.evaluate)(self.config)
            if job.words:
                logger.info("stage %s: iteration %d", stage, iteration)
                code = after.run(job.words)
                if code != 0:
                    sys.stderr.write(f"error: stage {stage}: megatron-prune {job.words[3]} ended with status {code}\n")
                    self._note(stages.FAILED)
                    return code if code > 0 else 1
            if job.left_out is None:
                self.ledger = self.ledger.with_done(stage, iteration)
            else:
                logger.info("stage %s: %s, %s", stage, "incomplete" if job.words else "skipped", job.left_out)
                self.ledger = self.ledger.with_skipped(stage, job.left_out)
            self.ledger.write(self.save)
        words = after.page(self.config).words if stages.EVALUATE in todo else ()
        if words and after.run(words) != 0:
            logger.warning("%s: the page could not be written anew; it lacks the evaluation", self.save)
        self._note(FINISHED)
        logger.info("done: stages %s; everything is in %s", ", ".join(self.request.stages), self.save)
        return 0
