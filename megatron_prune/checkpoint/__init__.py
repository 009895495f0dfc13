"""Checkpoints: live units only, in canonical order, so that any layout loads what any layout saved.

    save_checkpoint, save_weights, AsyncSaver   write (`save`)
    RunRecord                                   what to build the model with, before there is one (`record`)
    load_checkpoint                             fill the model (`load`)
    CheckpointReader                            one tensor at a time, in a single process (`reader`)

Below them: `pieces` (where a rank's tensors lie in the canonical ones: pure), `tensors` (what a rank saves and loads),
`storage` (megatron-core's torch_dist format), `streams` (memory and files on the way there), `files` (names, checksums,
publishing, keeping), `lease` and `owner` (one writer per folder), `fields` (what stored values must be),
`guarded_reader` and `plain` (reading without running what is read), `crc`, `rng`. Importing the package imports none of
them: launchers read `files`, `lease` and `record` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_prune.checkpoint.files import CheckpointSaveError, Retention
    from megatron_prune.checkpoint.load import load_checkpoint
    from megatron_prune.checkpoint.reader import CheckpointReader
    from megatron_prune.checkpoint.record import Progress, RunRecord
    from megatron_prune.checkpoint.save import AsyncSaver, save_checkpoint, save_weights

__all__ = [
    "AsyncSaver",
    "CheckpointReader",
    "CheckpointSaveError",
    "Progress",
    "Retention",
    "RunRecord",
    "load_checkpoint",
    "save_checkpoint",
    "save_weights",
]
_MODULES = {
    "AsyncSaver": "save",
    "CheckpointReader": "reader",
    "CheckpointSaveError": "files",
    "Progress": "record",
    "Retention": "files",
    "RunRecord": "record",
    "load_checkpoint": "load",
    "save_checkpoint": "save",
    "save_weights": "save",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
