"""How key and value heads are stored in an exported model, whose stock classes know one number of them for all layers.

    native    every layer keeps the same number of KV heads and each serves the same number of query heads: plain GQA
    expand    each KV head is repeated for every query head it serves: plain multi-head attention, the same logits from
              more weights and a larger cache. Where keys are normed over all heads together (OLMo 2), the KV heads of a
              layer must be repeated equally often, or the mean of their squares would be another
    cluster   every layer's live KV heads and nothing else; the model's code comes with it (`trust_remote_code=True`)
    auto      the most portable one that is exact: native, else expand

Cluster attention (EfficientLLM, arXiv 2502.06663) leaves KV heads that serve different numbers of query heads; no stock
class computes that, so its compact form needs code of its own (`remote/`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.huggingface.cluster import queries_per_kv_head, served_by
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.table import QKV, Part

NATIVE, EXPAND, CLUSTER, AUTO = "native", "expand", "cluster", "auto"
POLICIES = (AUTO, NATIVE, EXPAND, CLUSTER)


@dataclass(frozen=True, eq=False)
class KvPlan:
    """The policy in force.

    Args:
        policy: `native`, `expand` or `cluster`.
        kv_heads: stored KV heads of each layer.
        repeats: for `expand`, per layer and stored KV head (that is, per query head) the position of the live KV head
            that it copies, int64; else None.
        obstacle: what keeps the architecture from being native, or None.
    """

    policy: str
    kv_heads: tuple[int, ...]
    repeats: tuple[np.ndarray, ...] | None = None
    obstacle: str | None = None

    @classmethod
    def choose(cls, architecture: Architecture, requested: str = AUTO) -> KvPlan:
        """The plan for `requested`, one of `POLICIES`. Raises UserError: the policy is unknown, or not exact for this
        architecture."""
        if requested not in POLICIES:
            raise UserError(f"--kv-policy {requested}: unknown; use {', '.join(POLICIES)}")
        obstacle = _why_not_native(architecture)
        if requested == NATIVE and obstacle:
            raise UserError(f"--kv-policy {NATIVE}: {obstacle}; use {EXPAND} or {CLUSTER}")
        queries = queries_per_kv_head(architecture)
        if requested == EXPAND or (requested == AUTO and obstacle):
            if architecture.table.norms_followers and any(len(set(layer)) > 1 for layer in queries):
                raise UserError(
                    f"{architecture.shape.model_type}: {obstacle}, and keys are normed over all heads together, which "
                    "repeated ones would change: no export is exact; prune with gqa kv_group or uniform"
                )
            repeats = tuple(served_by(architecture))
            return cls(EXPAND, tuple(map(sum, queries)), repeats, obstacle)
        return cls(CLUSTER if requested == CLUSTER else NATIVE, tuple(map(len, queries)), None, obstacle)

    @property
    def num_key_value_heads(self) -> int:
        """Stored KV heads of the layer that has most (of every layer, but for `cluster`)."""
        return max(self.kv_heads)

    def cache_elements(self, architecture: Architecture) -> int:
        """Elements that the exported model's KV cache holds per token."""
        table, live = architecture.table, architecture.table.hf_shapes(architecture)
        keys_values = ((part, row.site) for row in table.rows if row.role == QKV for part in row.parts[1:])
        return sum(self.stored_shape(part, layer, live[part.hf_name])[0] for part, layer in keys_values)

    def stored_shape(self, part: Part, layer: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the exported file of a tensor whose live shape is `shape`."""
        if part.dims[0].kind.follows is None:
            return shape
        return (self.kv_heads[layer] * part.dims[0].size, *shape[1:])

    def apply(self, part: Part, layer: int, tensor: Tensor) -> Tensor:
        """The tensor as stored: KV rows repeated under `expand`, else as it is."""
        if self.repeats is None or part.dims[0].kind.follows is None:
            return tensor
        rows = tensor.unflatten(0, (-1, part.dims[0].size))
        return rows.index_select(0, torch.from_numpy(self.repeats[layer])).flatten(0, 1)


def _why_not_native(architecture: Architecture) -> str | None:
    """What keeps this architecture from being plain grouped-query attention, or None."""
    queries = queries_per_kv_head(architecture)
    counts = sorted({len(layer) for layer in queries})
    if len(counts) > 1:
        return f"layers keep different numbers of KV heads ({', '.join(map(str, counts))})"
    for layer, served in enumerate(queries):
        sizes = sorted(set(served))
        if len(sizes) > 1:
            return f"KV heads of layer {layer} serve different numbers of query heads ({', '.join(map(str, sizes))})"
    return None
