"""Block influence: how far each layer turns what it is given, 1 - cosine of its input and output per token
(ShortGPT, arXiv 2403.03853), averaged over the global batch.

    InfluenceWatcher   arm() before the forward passes of a global batch, finish() after them

Every token counts once, by the rule of `saliency.inputs`. Empty stem channels are zero before and after a layer, so the
cosine is that of the live ones. One fp64 number per layer is summed over the ranks that saw other tokens or have other
layers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_prune.model.kinds import LAYER, Kind
from megatron_prune.model.llama import inner_model
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import all_reduce_sum
from megatron_prune.saliency.inputs import splits_sequences

_TINY = 1e-30


class InfluenceWatcher:
    """Watches what enters and leaves every live layer through one global batch."""

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self._sums: dict[int, Tensor] = {}
        self._entered: dict[int, Tensor] = {}
        self._tokens = 0
        self._handles: list[RemovableHandle] = []

    def arm(self) -> None:
        """Hook the layers of this pipeline stage."""
        modules = dict[int, list[torch.nn.Module]]()
        for layer, module in inner_model(self._model.module).numbered():
            modules.setdefault(layer, []).append(module)
        self._first = next(iter(modules))
        for layer in set(self._model.architecture.layers) & modules.keys():
            self._hook(layer, modules[layer][0], modules[layer][-1])

    def _hook(self, layer: int, entrance: torch.nn.Module, exit: torch.nn.Module) -> None:
        def before(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entered[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        def after(module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            x, y = self._entered.pop(layer), (output[0] if isinstance(output, tuple) else output).detach()
            if torch.is_grad_enabled() or not module.training:  # see `saliency.inputs`
                self._sums[layer] = self._sums.get(layer, 0) + _turned(x.flatten(0, 1), y.flatten(0, 1))
                self._tokens += x[..., 0].numel() if layer == self._first else 0

        self._handles.append(entrance.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(exit.register_forward_hook(after))

    @torch.no_grad()
    def finish(self) -> dict[Kind, tuple[np.ndarray, ...]]:
        """Unhook; the block influence of all live layers, fp64, the same on all ranks (collective)."""
        for handle in self._handles:
            handle.remove()
        mesh, layers = self._model.mesh, self._model.architecture.layers
        found = torch.zeros(len(layers), dtype=torch.float64, device=mesh.device.device)
        for layer, total in self._sums.items():
            found[layers.index(layer)] = total
        axes = [mesh.over("tokens"), *([mesh.over("tp")] if splits_sequences(self._model) else [])]
        all_reduce_sum(found, *axes, mesh.over("pp"))
        return {LAYER: ((found / (self._tokens * math.prod(axis.size for axis in axes))).cpu().numpy(),)}


def _turned(x: Tensor, y: Tensor) -> Tensor:
    """The sum over tokens of 1 - cosine of `x` and `y` [tokens, channels], fp64."""
    norm = torch.linalg.vector_norm
    lengths = norm(x, dim=-1, dtype=torch.float64) * norm(y, dim=-1, dtype=torch.float64)
    return (1 - (x.float() * y.float()).sum(dim=-1, dtype=torch.float64) / lengths.clamp_min(_TINY)).sum()
