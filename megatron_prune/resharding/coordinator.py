"""From a decision to a smaller model on every rank: prepare, commit, verify.

    prepare          rank 0's decision goes to all ranks; all compare (decision, layout) before a weight is touched
    commit           retire the group
    compact_if_due   compact when a quantum of some kind is free
    verify           see that the model is what its architecture says, after each of them

Ranks that disagree raise `DisagreementError` naming who differs; nothing has been changed then. The decision is made
once and broadcast, never recomputed per rank.
"""

import hashlib
import logging
from collections import Counter
from typing import TypeVar

import numpy as np
import torch

from megatron_prune.errors import DisagreementError
from megatron_prune.model.architecture import Group
from megatron_prune.model.table import EMPTY
from megatron_prune.optimizer.owned import OwnedShard
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import agree, all_reduce_sum, broadcast_object, is_common

logger = logging.getLogger(__name__)

Decision = TypeVar("Decision")


def live_parameters(model: LiveModel) -> int:
    """Live elements in this model's optimizers, over all ranks, copies not counted (a collective)."""
    mesh, total = model.mesh, 0
    names = {row.name for row in model.table.rows}
    for shard in model.owned():
        is_tied_copy = shard.name not in names
        is_tp_copy = not shard.row.is_sharded and mesh.tp_rank != 0
        is_dp_copy = not model.options.use_distributed_optimizer and mesh.over("replicas").rank != 0
        if not (is_tied_copy or is_tp_copy or is_dp_copy):
            total += _live_elements(shard, model)
    count = torch.tensor([total], dtype=torch.int64, device=mesh.device.device)
    return int(all_reduce_sum(count, mesh.over("world")))


def _live_elements(shard: OwnedShard, model: LiveModel) -> int:
    masks = _live_masks(shard, model)
    columns = masks[1] if len(masks) > 1 else np.ones(1, dtype=bool)
    return sum(int(masks[0][rows].sum()) * int(columns[cols].sum()) for _, _, rows, cols in shard.blocks())


def _live_masks(shard: OwnedShard, model: LiveModel) -> list[np.ndarray]:
    rank = model.mesh.tp_rank
    return [shard.row.element_ids(dim, model.layout, rank) != EMPTY for dim in range(shard.parameter.dim())]


@torch.no_grad()
def verify(model: LiveModel, thorough: bool = False) -> None:
    """Raise AssertionError, on all ranks, when the model is not what its architecture says (a collective).

    Args:
        thorough: also look at every weight, main weight and moment; meant for debugging and tests.
    """
    counted, stated = live_parameters(model), model.architecture.parameters
    if counted != stated:  # raised, not asserted: a run that asks for these checks keeps them under python -O
        raise AssertionError(f"the optimizer holds {counted} live parameters, the architecture has {stated}")
    if not thorough:
        return
    dirty = [f"weight {name}" for name in _dirty_weights(model)] + _dirty_state(model)
    found = torch.tensor([len(dirty)], dtype=torch.int64, device=model.mesh.device.device)
    total = int(all_reduce_sum(found, model.mesh.over("world")))
    if total:
        raise AssertionError(f"{total} tensors have non-zero elements in empty slots, on this rank: {dirty}")


def _dirty_weights(model: LiveModel) -> list[str]:
    names = []
    for name, parameter, row in model.rows():
        for dim in range(parameter.dim()):
            empty = np.flatnonzero(row.element_ids(dim, model.layout, model.mesh.tp_rank) == EMPTY)
            index = torch.from_numpy(empty).to(parameter.device)
            if len(empty) and bool(parameter.data.index_select(dim, index).any()):
                names.append(name)
    return names


def _dirty_state(model: LiveModel) -> list[str]:
    names = []
    for shard in model.owned():
        masks = [~torch.from_numpy(mask).to(shard.key.device) for mask in _live_masks(shard, model)]
        for key, tensor in {**shard.moments, "main": shard.main}.items():
            for offset, length, rows, cols in shard.blocks():
                block = tensor[offset : offset + length].view(rows.stop - rows.start, cols.stop - cols.start)
                in_columns = len(masks) > 1 and bool(block[:, masks[1][cols]].any())
                if in_columns or bool(block[masks[0][rows]].any()):
                    names.append(f"{key} {shard.name}")
                    break
    return names


class Coordinator:
    """Applies removals to `model` on all ranks.

    Args:
        check_invariants: after every change, look at every element of every empty slot (slow, for debugging).

    Attributes:
        last_checkpoint: iteration of the newest complete checkpoint, if there is one; named in errors.
    """

    def __init__(self, model: LiveModel, check_invariants: bool = False) -> None:
        self.model, self.check_invariants = model, check_invariants
        self.compactions = 0
        self.last_checkpoint: int | None = None

    def prepare(self, decision: Decision | None) -> Decision | None:
        """Rank 0's `decision` on every rank, agreed on together with the layout it refers to. Raises DisagreementError:
        ranks hold different layouts or received different decisions."""
        agreed = broadcast_object(self.model.mesh, decision)
        text = f"{agreed!r} on layout {self.model.lineage}"
        mark = int(hashlib.sha256(text.encode()).hexdigest()[:15], base=16)
        if is_common(self.model.mesh, mark):
            return agreed
        marks = agree(self.model.mesh, mark)
        ((common, _),) = Counter(marks).most_common(1)
        different = [rank for rank, mark in enumerate(marks) if mark != common]
        raise DisagreementError(
            f"ranks {different} disagree with the other {len(marks) - len(different)} on what to remove or on the "
            "layout; no weight was touched: resume from the last checkpoint and report this"
        )

    def commit(self, group: Group) -> None:
        """Retire `group` everywhere."""
        self.model.retire(group)
        if self.check_invariants:
            verify(self.model, thorough=True)

    def compact_if_due(self) -> bool:
        """Compact when that frees a quantum; returns whether it did. Raises MemoryError: there was not enough of it;
        this rank's model is unusable then, checkpoints are untouched."""
        if not self.model.layout.is_due:
            return False
        try:
            self.model.compact()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise MemoryError(f"out of memory while compacting; {self._what_is_safe()}") from error
        self.compactions += 1
        verify(self.model, thorough=self.check_invariants)
        return True

    def _what_is_safe(self) -> str:
        if self.last_checkpoint is None:
            return "no checkpoint was written yet, start again on more ranks"
        return (
            f"the checkpoint of iteration {self.last_checkpoint} is untouched, resume from it "
            "(on more ranks if this happens again)"
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
