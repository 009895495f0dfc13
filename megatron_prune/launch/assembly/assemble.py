"""Put a run together: mesh -> model -> data -> trainer, from checked inputs.

fresh_model      this rank's LiveModel on a packed layout, as the configuration has it computed and stepped
build_model      the same with the weights of what the run starts from, a checkpoint's layout and optimizer state
build_datasets   training and validation data, sized for the longest the run can take
build_trainer    all of it, resumed where the checkpoint says
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_prune.checkpoint.load import load_checkpoint
from megatron_prune.checkpoint.record import COMMON_FILE
from megatron_prune.config import Config
from megatron_prune.config.options import filled
from megatron_prune.data import datasets as data
from megatron_prune.launch.assembly.data_order import check_shuffle, shuffle_of, splits_read, wanted_samples
from megatron_prune.launch.assembly.opening import Inputs
from megatron_prune.launch.assembly.saving import CheckpointSaver
from megatron_prune.launch.assembly.teaching import build_objective
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.elementwise import kernels_for
from megatron_prune.model.kinds import VOCAB
from megatron_prune.model.layout import Quanta, ShardLayout
from megatron_prune.model.llama import ModelOptions
from megatron_prune.optimizer.wrapped import OptimizerOptions
from megatron_prune.pruning.groups import find_group
from megatron_prune.pruning.history import HistoryWriter
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.failures import agreed
from megatron_prune.runtime.mesh import Mesh
from megatron_prune.training.metrics import Reporter
from megatron_prune.training.state import RunState
from megatron_prune.training.stopping import StepAgreement
from megatron_prune.training.trainer import Datasets, Trainer

logger = logging.getLogger(__name__)


def quanta(config: Config) -> Quanta:
    """What stored widths are rounded up to, by kind of unit: `pruning.groups.NAME.quantum` where it is set, and for the
    vocabulary `model.make_vocab_size_divisible_by`."""
    named = ((find_group(name, "pruning.groups").kind, group.quantum) for name, group in config.pruning.groups.items())
    return {
        **{kind: quantum for kind, quantum in named if quantum is not None},
        VOCAB: config.model.make_vocab_size_divisible_by,
    }


def model_options(config: Config, device: str | None = None) -> ModelOptions:
    """What `build_llama` wants of the configuration: sequence length, dtype, sequence parallelism, recomputation, how
    layers are dealt to pipeline stages, and which kernels are made (for `device`, cuda or cpu; None: none). Raises
    UserError: `model.compile: on`, and this machine cannot."""
    return filled(
        ModelOptions,
        *(config.data, config.model, config.parallel),
        dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        sequence_parallel=config.parallel.splits_sequences,
        kernels=kernels_for(config.model.compile, device),
    )


def optimizer_options(config: Config) -> OptimizerOptions:
    """What DDP and AdamW want of the configuration; learning rates are those of the first phase (the scheduler changes
    them)."""
    return filled(OptimizerOptions, config.optimizer, config.parallel)


def fresh_model(config: Config, architecture: Architecture, mesh: Mesh, read: Callable[[str], Tensor]) -> LiveModel:
    """This rank's part of a model of `architecture`, filled through `read` (Hugging Face name -> source tensor)."""
    return _built(config, ShardLayout.pack(architecture, mesh.tp_size, quanta(config)), mesh, read)


def build_model(config: Config, inputs: Inputs, mesh: Mesh) -> LiveModel:
    """This rank's part of the model, with the source's weights or the checkpoint's weights and optimizer state."""
    if inputs.record is None:
        assert inputs.read is not None
        return fresh_model(config, inputs.architecture, mesh, inputs.read)
    model = _built(config, inputs.record.layout(mesh.tp_size, quanta(config)), mesh, None)
    restores = inputs.resumes and not config.checkpoint.no_load_optim
    load_checkpoint(model, inputs.record.path, load_optim=restores)
    return model


def _built(config: Config, layout: ShardLayout, mesh: Mesh, read: Callable[[str], Tensor] | None) -> LiveModel:
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
    return LiveModel.build(layout, mesh, model_options(config, mesh.device.kind), optimizer_options(config), read)


def build_datasets(config: Config, inputs: Inputs, train_samples: int | None = None) -> Datasets:
    """megatron-core's data sets; the training set holds `train_samples` or more (None: for a run from its start)."""
    if train_samples is None:
        train_samples = wanted_samples(config, RunState(), None)
    build = partial(
        data.build_datasets,
        tokenizer=inputs.tokenizer,
        seq_length=config.data.seq_length,
        seed=config.training.seed,
        cache_path=config.data.data_cache_path,
        eod_mask_loss=config.data.eod_mask_loss,
    )
    train, valid = splits_read(config, train_samples)
    training, validation, _ = build(inputs.train, split=train.split, samples=train.samples)
    if valid is not None and inputs.valid is not None:
        _, validation, _ = build(inputs.valid, split=valid.split, samples=valid.samples)
    return Datasets(training, validation)


def build_trainer(
    config: Config,
    inputs: Inputs,
    mesh: Mesh,
    signalled: Callable[[], bool] = lambda: False,
    started: float | None = None,
) -> Trainer:
    """The trainer, at the point where the run starts or goes on.

    Args:
        signalled, started: see `StepAgreement`; None: it starts now.
    """
    model = build_model(config, inputs, mesh)
    state = RunState()
    if inputs.record is not None and inputs.resumes:
        state = RunState.from_state(inputs.record.state, inputs.architecture, inputs.record.path / COMMON_FILE)
    directory = Path(config.checkpoint.save) if config.checkpoint.save else None
    is_writer = mesh.rank == 0
    reporter = agreed(mesh, lambda: Reporter(config, mesh.world_size, directory, is_writer, state.iteration))
    history = agreed(mesh, lambda: HistoryWriter(directory, state.history) if directory and is_writer else None)
    samples = wanted_samples(config, state, inputs.shuffle)
    datasets = build_datasets(config, inputs, samples)
    shuffle = shuffle_of(datasets.train, samples)
    check_shuffle(config, shuffle, inputs.shuffle)
    saver = None
    if directory is not None:
        saver = CheckpointSaver(config, inputs, model, datasets.train, directory, reporter, shuffle)
    agreement = StepAgreement(config.training, mesh, signalled, time.monotonic() if started is None else started)
    options = model_options(config, mesh.device.kind)
    objective = build_objective(config, inputs.teacher, mesh, options, quanta(config))
    return Trainer(config, model, datasets, state, reporter, saver, history, agreement, objective)
