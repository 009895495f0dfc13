"""What the linear layers' inputs X [tokens, features] say about their columns, collected in the ordinary forward pass.

    InputWatcher       arm() before the forward passes of a global batch, finish() after them
    InputNeeds         which layers, which of the two below, and how much
    Moments            per feature, means over the tokens of the whole global batch: x^2, |x|, and the variance of x
    KeptInputs         X itself of the first micro-batches, for second-order methods (`saliency.hessian`)
    InfluenceWatcher   of whole layers: how far they turn what they are given

Every token counts once. A recomputed layer runs twice per micro-batch, the second time with gradients on: only calls
with gradients count in training mode, and all calls in evaluation mode. The features of the output projections are
split over TP and see the whole sequence; those of qkv, gate/up and the LM head are whole on each TP rank, which sees a
part of the sequence under sequence parallelism and all of it otherwise. An empty slot's input is exactly zero.

Cost: three fp64 numbers per feature and one all-reduce of them over DP; for kept inputs tokens x features elements in
the model's dtype (no copy: autograd holds the same tensor until the backward pass).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_prune.model.kinds import LAYER, Kind
from megatron_prune.model.llama import inner_model
from megatron_prune.model.table import EMPTY, LM_HEAD, Param
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import Mesh, all_reduce_sum
from megatron_prune.saliency.criteria import INPUT_MOMENTS, INVERSE_HESSIAN, STEM_MAGNITUDE


@dataclass(frozen=True)
class Moments:
    """Per feature, fp64 [local columns], over all tokens of the global batch: mean x^2, variance of x, mean |x|."""

    mean_square: Tensor
    variance: Tensor
    magnitude: Tensor

    @classmethod
    def of_sums(cls, sums: Tensor, tokens: int) -> Moments:
        """From the sums over tokens of x^2, x and |x|, fp64 [3, columns]."""
        mean_square, mean, magnitude = sums / tokens
        return cls(mean_square, (mean_square - mean.square()).clamp_(min=0), magnitude)


@dataclass(frozen=True)
class InputNeeds:
    """What to collect.

    Args:
        moments: of the output projections' inputs. stem_moments: of the inputs of qkv and gate/up.
        kept: micro-batches per data-parallel rank whose inputs to the output projections are kept; 0: none.
        keep_stem: keep those of qkv, gate/up and an untied LM head as well.
    """

    moments: bool = False
    stem_moments: bool = False
    kept: int = 0
    keep_stem: bool = False

    @classmethod
    def of_criterion(cls, needs: frozenset[str], kept: int) -> InputNeeds:
        """What a criterion with these `needs` wants; `kept` counts only where it wants the inverse Hessian."""
        return cls(bool(needs & INPUT_MOMENTS), STEM_MAGNITUDE in needs, kept if INVERSE_HESSIAN in needs else 0)

    def wants_moments(self, row: Param) -> bool:
        """Whether moments of the inputs of `row`'s layer are collected."""
        return self.moments if row.is_output else self.stem_moments and row.role != LM_HEAD

    def wants_inputs(self, row: Param) -> bool:
        """Whether the inputs of `row`'s layer are kept."""
        return self.kept > 0 and (row.is_output or self.keep_stem)

    def __bool__(self) -> bool:
        return self.moments or self.stem_moments or self.kept > 0


class KeptInputs:
    """X of some layers over the kept micro-batches, by weight name; all ranks of a stage hold the same names."""

    def __init__(self, model: LiveModel, pieces: dict[str, list[Tensor]], rows: dict[str, Param]) -> None:
        self._model, self._pieces, self.rows = model, pieces, rows

    def gather(self, name: str) -> Tensor:
        """[tokens of this data-parallel rank, live features in canonical order] in the model's dtype; over TP together.

        Features that were removed after X was kept are left out.
        """
        row, layout, mesh = self.rows[name], self._model.layout, self._model.mesh
        x = torch.cat(self._pieces[name])
        if row.dims[1].is_sharded:
            x = torch.cat(_all_gather(x, mesh), dim=1)
            ids = np.concatenate([row.element_ids(1, layout, rank) for rank in range(mesh.tp_size)])
        else:
            if splits_sequences(self._model):
                x = torch.cat(_all_gather(x, mesh))
            ids = row.element_ids(1, layout, mesh.tp_rank)
        live = torch.from_numpy(np.flatnonzero(ids != EMPTY)).to(x.device)
        return x.index_select(1, live)

    def features(self, name: str) -> int:
        """Live features of the layer now."""
        dim = self.rows[name].dims[1]
        return self._model.architecture.width(dim.kind, self.rows[name].site) * dim.size


def _all_gather(x: Tensor, mesh: Mesh) -> list[Tensor]:
    if mesh.tp_size == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(mesh.tp_size)]
    dist.all_gather(parts, x.contiguous(), group=mesh.over("tp").group)
    return parts


def splits_sequences(model: LiveModel) -> bool:
    """Whether tensor-parallel ranks see different tokens of the normed hidden states."""
    return bool(inner_model(model.module).config.sequence_parallel)


@dataclass(frozen=True)
class InputStatistics:
    """What a watcher found: moments by weight name, and kept inputs (None where none were asked for)."""

    moments: dict[str, Moments]
    kept: KeptInputs | None


class InputWatcher:
    """Watches the inputs of linear layers through one global batch.

    Args:
        model: this rank's part of the model.
        needs: what to collect.
    """

    def __init__(self, model: LiveModel, needs: InputNeeds) -> None:
        self._model, self.needs = model, needs
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = defaultdict(int)
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._rows: dict[str, Param] = {}
        self._handles: list[RemovableHandle] = []

    def arm(self) -> None:
        """Hook the layers."""
        for name, module, row in self._model.linears():
            if self.needs.wants_moments(row) or self.needs.wants_inputs(row):
                self._rows[name] = row

                def hook(module: torch.nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    if torch.is_grad_enabled() or not module.training:
                        self._add(name, args[0].detach().flatten(0, 1))

                self._handles.append(module.register_forward_pre_hook(hook))

    def _add(self, name: str, x: Tensor) -> None:
        row = self._rows[name]
        if self.needs.wants_moments(row):
            norm = torch.linalg.vector_norm
            square, magnitude = (norm(x, order, dim=0, dtype=torch.float64) for order in (2, 1))
            sums = torch.stack([square.square(), x.sum(dim=0, dtype=torch.float64), magnitude])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
            self._tokens[name] += len(x)
        if self.needs.wants_inputs(row) and len(self._kept[name]) < self.needs.kept:
            self._kept[name].append(x)

    @torch.no_grad()
    def finish(self) -> InputStatistics:
        """Unhook; moments are reduced over all ranks that saw other tokens (collectives over DP and TP)."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        moments = {**self._reduced(stem=False), **self._reduced(stem=True)}
        rows = {name: row for name, row in self._rows.items() if name in self._kept}  # model order on every rank
        kept = KeptInputs(self._model, dict(self._kept), rows) if self.needs.kept else None
        self._sums, self._kept = {}, defaultdict(list)
        return InputStatistics(moments, kept)

    def _reduced(self, stem: bool) -> dict[str, Moments]:
        """Moments of the layers whose features are (or are not) stem channels: one all-reduce for all of them."""
        names = [n for n, row in self._rows.items() if n in self._sums and row.dims[1].kind.is_shared == stem]
        if not names:
            return {}
        mesh = self._model.mesh
        axes = [mesh.over("tokens"), *([mesh.over("tp")] if stem and splits_sequences(self._model) else [])]
        flat = all_reduce_sum(torch.cat([self._sums[name].view(-1) for name in names]), *axes)
        tokens = self._tokens[names[0]] * math.prod(axis.size for axis in axes)
        sizes = [self._sums[name].numel() for name in names]
        parts = zip(names, flat.split(sizes), strict=True)
        return {name: Moments.of_sums(part.view(3, -1), tokens) for name, part in parts}


_TINY = 1e-30


class InfluenceWatcher:
    """Block influence: how far each live layer turns what it is given, 1 - cosine of its input and output per token
    (ShortGPT, arXiv 2403.03853), averaged over a global batch. `arm` before its forward passes, `finish` after them.

    Empty stem channels are zero before and after a layer, so the cosine is that of the live ones. One fp64 number per
    layer is summed over the ranks that saw other tokens or have other layers.
    """

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
            if torch.is_grad_enabled() or not module.training:
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
