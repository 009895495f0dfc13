"""The live model: a wrapped model whose units leave, and the only writer of its layout.

    LiveModel.build      this rank's part, from a layout and a reader of weights: for runs, estimates and tests alike
    LiveModel.retire     empty the slots of a group, at once and exactly (`zero_units`)
    LiveModel.compact    rebuild weights, optimizer and gradient buffers at the least stored widths (`compact`)
    LiveModel.recompute  from the next pass on, more or less of it
    LiveModel.rebuilt    who wants to know when the optimizer is another one

Retired weights, their fp32 main weights and Adam moments are zero, and zero is a fixed point of training: gradients of
a retired unit are exactly zero, weight decay keeps zero, and where a silenced query head could still get a gradient the
attention masks its output. So training with empty slots is training the smaller model. Weights are in step on all ranks
before a compaction touches them; a retirement needs no gather.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import (
    ModelOptions,
    PrunableLlama,
    bind_layout,
    build_llama,
    hold_layers,
    load_parameters,
    set_recomputation,
    stages_of,
)
from megatron_prune.model.table import Runs
from megatron_prune.optimizer.wrapped import OptimizerOptions, WrappedModel
from megatron_prune.resharding.compact import Compaction
from megatron_prune.runtime.failures import agreed
from megatron_prune.runtime.mesh import Mesh


class LiveModel(WrappedModel):
    """This rank's part of the model in training, and which unit sits in which slot of all ranks.

    Args:
        layout: of the weights in `model`, for all layers and ranks.
        model_options: that it was built with.
    """

    def __init__(
        self,
        model: PrunableLlama,
        layout: ShardLayout,
        mesh: Mesh,
        options: OptimizerOptions,
        model_options: ModelOptions,
    ) -> None:
        super().__init__(model, layout.architecture.table, mesh, options, model_options.dtype)
        self._layout, self._model_options = layout, model_options
        self._lineage: tuple[ShardLayout | None, str] = None, ""
        self.rebuilt: list[Callable[[], None]] = []

    @classmethod
    def build(
        cls,
        layout: ShardLayout,
        mesh: Mesh,
        options: ModelOptions,
        optimizer: OptimizerOptions,
        read: Callable[[str], Tensor] | None = None,
    ) -> LiveModel:
        """The model of `layout`'s architecture, on this rank (collective).

        Args:
            read: Hugging Face name -> the source tensor in the source's shape; None: weights are loaded later.

        Raises:
            UserError: on all ranks: a tensor cannot be read on one of them.
        """
        architecture = layout.architecture
        llama = build_llama(architecture.shape, layout, mesh, options)
        if read is not None:
            agreed(mesh, lambda: load_parameters(llama, architecture.table, layout, mesh, read))
        return cls(llama, layout, mesh, optimizer, options)

    @property
    def layout(self) -> ShardLayout:
        """Slots of all layers and ranks, now."""
        return self._layout

    @property
    def architecture(self) -> Architecture:
        """Live units, now."""
        return self._layout.architecture

    @property
    def lineage(self) -> str:
        """Hex digest of a layout and of the groups that have left since: ranks that agree on it have equal layouts.
        After a removal it costs next to nothing, unlike the layout's fingerprint."""
        if self._lineage[0] is not self._layout:
            self._lineage = self._layout, self._layout.fingerprint()
        return self._lineage[1]

    def recompute(self, granularity: str | None) -> None:
        """Set what the following passes recompute: see `set_recomputation`."""
        plain = replace(self._model_options, recompute_method=None, recompute_num_layers=None)
        self._model_options = replace(plain, recompute_granularity=granularity)
        set_recomputation(self.module, granularity)

    @torch.no_grad()
    def retire(self, group: Group) -> None:
        """Empty the slots of `group` in weights, main weights and moments. No communication.

        Where a rank still holds old values of what others own, those are emptied too, and the owners empty what the
        next gather will bring: gathered before or after, it is the same.
        """
        lineage = hashlib.sha256(f"{self.lineage} without {group!r}".encode()).hexdigest()[:16]
        zero_units(self, group, self._layout)
        self._bind(self._layout.without(group))
        self._lineage = self._layout, lineage

    @torch.no_grad()
    def compact(self) -> bool:
        """Bring the model to the least stored widths of its live units; False when it has them already.

        Raises:
            MemoryError-like torch errors unchanged; the model is unusable then, checkpoints are not touched.
        """
        new = self._layout.compacted()
        if new.fingerprint() == self._layout.fingerprint():
            return False
        self.synchronise()
        before, after = (stages_of(layout, self.mesh, self._model_options) for layout in (self._layout, new))
        compaction = Compaction(self, self._layout, new, before, after)
        compaction.move_weights(lambda: hold_layers(self.module, new, self.mesh, self._model_options))
        self._bind(new)
        compaction.move_optimizer()
        for tell in self.rebuilt:
            tell()
        return True

    def _bind(self, layout: ShardLayout) -> None:
        bind_layout(self.module, layout, self.mesh, before=self._layout)
        self._layout = layout


@torch.no_grad()
def zero_units(model: WrappedModel, group: Group, layout: ShardLayout) -> None:
    """Zero the units of `group` in weights, main weights and moments of `model`, which are in `layout`. No
    communication: old values of what others own become zero here and now, and what comes of the owners later."""
    slots, gone = layout.group_slots(group, model.mesh.tp_rank), dict[str, tuple[Runs, ...]]()
    weights = list[Tensor]()
    for name, parameter, row in model.rows():
        gone[name] = row.group_runs(slots)
        for dim, runs in enumerate(gone[name]):
            weights += [parameter.narrow(dim, first, last - first) for first, last in runs]
    states = [view for shard in model.owned() for view in shard.views(gone[shard.name])]
    for views in filter(None, (weights, states)):
        torch._foreach_zero_(views)
