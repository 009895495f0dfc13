"""Read a checkpoint in one process, without torch.distributed: conversion, inspection, evaluation."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint

from megatron_prune.checkpoint.files import damages, refuse_damaged
from megatron_prune.checkpoint.guarded_reader import GuardedReader
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.checkpoint.storage import one_line_each, quiet
from megatron_prune.checkpoint.tensors import MAIN, optimizer_key, weight_key
from megatron_prune.model.architecture import Architecture

_WEIGHTS = weight_key("")


class CheckpointReader:
    """A checkpoint opened for reading.

    Args:
        directory: the folder that was saved to, or one `iter_...` folder in it.
        step: iteration; None: the newest complete one.
        verify: sum up all files first (about a second per gigabyte); False: only the record's.

    Raises:
        UserError: there is no such checkpoint, or a file is damaged; names the newest good one.
    """

    def __init__(self, directory: str | Path, step: int | None = None, *, verify: bool = True) -> None:
        self.record = RunRecord.read(directory, step)
        if verify:
            refuse_damaged(self.path.parent, self.record.iteration, damages(self.path))

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.record.path

    @property
    def architecture(self) -> Architecture:
        """Live units of the stored model."""
        return self.record.architecture

    @property
    def meta(self) -> dict[str, Any]:
        """The run's state (configuration text, tokens, history, ...) and `iteration`."""
        return {**self.record.state, "iteration": self.record.iteration}

    @cached_property
    def _reader(self) -> GuardedReader:
        refuse_damaged(self.path.parent, self.record.iteration, damages(self.path, [".metadata"]))
        return GuardedReader(self.path)

    @cached_property
    def names(self) -> list[str]:
        """Hugging Face names of the stored weights."""
        return [
            key.removeprefix(_WEIGHTS)
            for key in self._reader.read_metadata().state_dict_metadata
            if key.startswith(_WEIGHTS)
        ]

    def read(self, hf_name: str) -> Tensor:
        """The model weight `hf_name`: live units only, canonical order, the stored dtype, on the host. Raises
        UserError: there is no such tensor."""
        return self._read(weight_key(hf_name))

    def read_optimizer(self, kind: str, hf_name: str) -> Tensor:
        """Optimizer state of `hf_name`, fp32 [live shape]; kind `exp_avg`, `exp_avg_sq` or `main`.

        `main` of an fp32 checkpoint is the weight itself. Raises UserError: there is no such tensor."""
        if kind == MAIN and MAIN not in self.record.facts.optimizer:
            return self.read(hf_name).float()
        return self._read(optimizer_key(kind, hf_name))

    def _read(self, key: str) -> Tensor:
        entry = self._reader.tensor(key)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with quiet(), one_line_each():
            checkpoint.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor
