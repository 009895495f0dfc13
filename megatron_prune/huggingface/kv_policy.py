"""How key and value heads are stored in an exported model, whose stock classes know one number of them for all layers.

    native   every layer keeps the same number of KV heads and each serves the same number of query heads: plain GQA
    expand   each KV head is repeated for every query head it serves: plain multi-head attention, the same logits from
             more weights and a larger cache
    auto     native where it is exact, else expand

Cluster attention (EfficientLLM, arXiv 2502.06663) leaves KV heads that serve different numbers of query heads; no stock
class computes that, so its compact form needs code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.model.architecture import KV_HEAD, Architecture
from megatron_prune.model.param_axes import Part

NATIVE, EXPAND, CLUSTER, AUTO = "native", "expand", "cluster", "auto"
POLICIES = (AUTO, NATIVE, EXPAND, CLUSTER)


@dataclass(frozen=True, eq=False)
class KvPlan:
    """The policy in force.

    Args:
        policy: `native` or `expand`.
        num_key_value_heads: stored KV heads of every layer.
        repeats: for `expand`, per layer and stored KV head (that is, per query head) the position of the live KV head
            that it copies, int64; None for `native`.
    """

    policy: str
    num_key_value_heads: int
    repeats: tuple[np.ndarray, ...] | None = None

    @classmethod
    def choose(cls, architecture: Architecture, requested: str = AUTO) -> KvPlan:
        """The plan for `requested`, one of `POLICIES`.

        Raises:
            UserError: the policy is unknown, not there yet, or not exact for this architecture.
        """
        if requested == CLUSTER:
            raise UserError(f"--kv-policy {CLUSTER}: not there yet; {EXPAND} gives the same logits without remote code")
        if requested not in POLICIES:
            raise UserError(f"--kv-policy {requested}: unknown; use {', '.join(p for p in POLICIES if p != CLUSTER)}")
        obstacle = _why_not_native(architecture)
        if requested == NATIVE and obstacle:
            raise UserError(f"--kv-policy {NATIVE}: {obstacle}; use {EXPAND}")
        if requested == EXPAND or obstacle:
            return cls(EXPAND, architecture.num_attention_heads, tuple(_served_by(architecture)))
        return cls(NATIVE, len(architecture.kv_heads(0)))

    def stored_shape(self, part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the exported file of a tensor whose live shape is `shape`."""
        if part.dims[0].kind != KV_HEAD:
            return shape
        return (self.num_key_value_heads * part.dims[0].size, *shape[1:])

    def apply(self, part: Part, layer: int, tensor: Tensor) -> Tensor:
        """The tensor as stored: KV rows repeated under `expand`, else as it is."""
        if self.repeats is None or part.dims[0].kind != KV_HEAD:
            return tensor
        rows = tensor.unflatten(0, (-1, part.dims[0].size))
        return rows.index_select(0, torch.from_numpy(self.repeats[layer])).flatten(0, 1)


def _served_by(architecture: Architecture) -> list[np.ndarray]:
    """Per layer: for each live query head the position of its KV head among the live ones."""
    per_group = architecture.shape.heads_per_group
    return [
        np.searchsorted(architecture.kv_heads(layer), heads // per_group).astype(np.int64)
        for layer, heads in enumerate(architecture.heads)
    ]


def _why_not_native(architecture: Architecture) -> str | None:
    """What keeps this architecture from being plain grouped-query attention, or None.

    Live heads are in ascending order, so a KV head's queries stand together; only their numbers can be wrong.
    """
    counts = sorted({len(architecture.kv_heads(layer)) for layer in range(architecture.shape.num_layers)})
    if len(counts) > 1:
        return f"layers keep different numbers of KV heads ({', '.join(map(str, counts))})"
    for layer, served in enumerate(_served_by(architecture)):
        sizes = sorted(set(np.bincount(served).tolist()))
        if len(sizes) > 1:
            return f"KV heads of layer {layer} serve different numbers of query heads ({', '.join(map(str, sizes))})"
    return None
