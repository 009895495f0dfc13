"""Open what scoring or pruning without training needs: a training run's configuration, reduced to one batch.

one_shot_config   a run's Config -> one that scores one global batch
check_pruning     what pruning needs besides
opened            inputs, model and data on this rank's place in the mesh, closed again at the end
prune_and_save    prune to the target and save a checkpoint that starts a run
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.checkpoint.files import refuse_content
from megatron_prune.config import (
    CheckpointConfig,
    Config,
    ContinuedConfig,
    DistillationConfig,
    LoggingConfig,
    OptimizerConfig,
    validate,
)
from megatron_prune.errors import UserError
from megatron_prune.launch.assembly.alike import insist_alike, insist_shared
from megatron_prune.launch.assembly.assemble import CheckpointSaver, build_datasets, build_model
from megatron_prune.launch.assembly.opening import Inputs, open_inputs, refuse_met
from megatron_prune.launch.assembly.outputs import write_config, write_summary
from megatron_prune.launch.assembly.watch import Watch, launchers, writing
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.history import HistoryWriter, Removal
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.failures import agreed
from megatron_prune.runtime.join import meet
from megatron_prune.runtime.mesh import Mesh
from megatron_prune.training.metrics import Reporter
from megatron_prune.training.one_shot import OneShot
from megatron_prune.training.pruning_settings import selector_rules
from megatron_prune.training.state import RunState
from megatron_prune.training.step import validation_loss
from megatron_prune.training.trainer import Datasets

MOST = 999_999  # batches, and groups per scoring: more than any model has


def check_count(flag: str, value: int | None) -> None:
    """Raise UserError, naming `flag`, for a number that counts nothing."""
    if value is not None and not 1 <= value <= MOST:
        raise UserError(f"{flag} must be between 1 and {MOST}, got {value}")


def one_shot_config(config: Config, batches: int | None) -> Config:
    """`config` for scoring and pruning without training.

    Model, layout, data and the rules of the choice are the run's; its schedule and learning rates mean nothing here.

    Args:
        batches: micro-batches to score on, over all data-parallel ranks; None: the configuration's global batch.

    Raises:
        UserError: a number below 1.
    """
    check_count("--batches", batches)
    training, pruning, checkpoint = config.training, config.pruning, config.checkpoint
    batch = training.global_batch_size if batches is None else batches * training.micro_batch_size
    moments_matter = pruning.fisher == "adam"
    return dataclasses.replace(
        config,
        training=dataclasses.replace(training, global_batch_size=batch, train_iters=2, exit_interval=None),
        optimizer=OptimizerConfig(),
        distillation=DistillationConfig(),
        pruning=dataclasses.replace(pruning, schedule="ratio", first_prune_iter=1, optimizer_state="carry"),
        continued=ContinuedConfig(),
        checkpoint=CheckpointConfig(
            save=checkpoint.save,
            load=checkpoint.load,
            ckpt_step=checkpoint.ckpt_step,
            no_load_optim=checkpoint.load is not None and not moments_matter,
        ),
        logging=LoggingConfig(progress="lines"),
    )


def check_pruning(config: Config, world_size: int) -> Config:
    """Check what pruning and saving need, before anything is built; switches evaluation on where there is data for it.
    Raises UserError: no target, no folder to save to, or one that cannot be written or holds something."""
    if not config.pruning.enabled:
        raise UserError("pruning.target_params (--prune-target-params) is not set: it says where pruning ends")
    if config.checkpoint.save is None:
        raise UserError("checkpoint.save (--save) is not set: give the folder of the pruned model's checkpoint")
    folder = Path(config.checkpoint.save)
    refuse_content(folder, "checkpoint.save")
    present = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if not os.access(present, os.W_OK):
        raise UserError(f"checkpoint.save: {folder} cannot be written: no permission in {present}")
    is_measured = config.data.valid_data_path is not None or float(config.data.split.split(",")[1]) > 0
    training = dataclasses.replace(config.training, eval_interval=int(is_measured))
    config = dataclasses.replace(config, training=training)
    validate(config, world_size)
    return config


@dataclass(frozen=True)
class Opened:
    """What scoring starts from on this rank."""

    mesh: Mesh
    inputs: Inputs
    model: LiveModel
    datasets: Datasets


@contextmanager
def opened(config: Config, writes: bool = True) -> Iterator[Opened]:
    """Build the model of a `one_shot_config` and its data; tears the mesh down at the end. Raises UserError: whatever
    `open_inputs` refuses, and a target that is not below the model's size."""
    with meet(lambda _world_size: config).joined() as mesh:
        inputs = agreed(mesh, lambda: _inputs(config, writes))
        insist_alike(mesh, config, inputs)
        model = build_model(config, inputs, mesh)
        yield Opened(mesh, inputs, model, build_datasets(config, inputs))


def _inputs(config: Config, writes: bool) -> Inputs:
    inputs = open_inputs(config, writes)
    if config.pruning.enabled:
        refuse_met(selector_rules(config, inputs.architecture).budget, inputs.architecture, "model")
    return inputs


@dataclass(frozen=True)
class Pruned:
    """What pruning came to.

    Args:
        state: as saved; its stages `source` and `pruned` hold validation losses where they were measured.
        removed: by this pruning; `state.history` also has what was removed before. scorings: how often was scored.
        path: the checkpoint's folder.
    """

    state: RunState
    removed: list[Removal]
    scorings: int
    architecture: Architecture
    path: Path


def prune_and_save(
    config: Config, run: Opened, on_removal: Callable[[Architecture], None], groups_per_scoring: int | None = None
) -> Pruned:
    """Prune to the target and save: a checkpoint at iteration 0 from which `pretrain --load` trains on (collective).

    Args:
        groups_per_scoring: removals after which the units are scored again; None: all of them after one scoring.

    Raises:
        UserError: the target is not reached (nothing is written then), the checkpoint cannot be written, or another
            process writes there.
    """
    assert config.checkpoint.save is not None
    with Watch(None, launchers(os.environ)) as watch, writing(config.checkpoint.save, run.mesh, watch):
        save = Path(config.checkpoint.save)
        agreed(run.mesh, lambda: refuse_content(save, "checkpoint.save"))  # somebody was faster, perhaps
        insist_shared(run.mesh, config.checkpoint.save)
        return _prune_and_save(config, run, on_removal, groups_per_scoring)


def _prune_and_save(
    config: Config, run: Opened, on_removal: Callable[[Architecture], None], groups_per_scoring: int | None
) -> Pruned:
    assert config.checkpoint.save is not None
    before = [] if run.inputs.record is None else run.inputs.record.history
    state = RunState(history=[Removal.from_json(removal) for removal in before])
    one_shot = OneShot(config, run.model, run.datasets.train, on_removal=on_removal)
    _measure("source", config, run, state)
    scorings = sum(1 for _ in one_shot.rounds(state, groups_per_scoring))
    _measure("pruned", config, run, state)
    saved = RunState(history=state.history, stages=state.stages)  # a run that goes on from here scores anew
    directory, is_writer = Path(config.checkpoint.save), run.mesh.rank == 0
    reporter = Reporter(config, run.mesh.world_size, None, is_active=False)
    saver = CheckpointSaver(config, run.inputs, run.model, run.datasets.train, directory, reporter)
    saver.stops_on_error = True  # there is nothing to go on with
    saver.save(saved)
    if is_writer:
        HistoryWriter(directory, saved.history).close()
        write_config(config, directory)
        write_summary(config, saved, run.model.architecture, directory)
    removed = saved.history[len(before) :]
    return Pruned(saved, removed, scorings, run.model.architecture, directory)


def _measure(stage: str, config: Config, run: Opened, state: RunState) -> None:
    if run.datasets.valid is not None:
        loss, speed = validation_loss(run.model, run.datasets.valid, config)
        state.record_stage(stage, run.model.architecture, loss, speed)
