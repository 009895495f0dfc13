"""From a decision to a smaller model on every rank: prepare, commit, verify.

    prepare          rank 0's decision goes to all ranks; all compare (decision, layout) before a weight is touched
    commit           retire the group
    compact_if_due   compact when a quantum of some kind is free (or when forced, at the end of pruning)

Ranks that disagree raise `DisagreementError` naming who differs; nothing has been changed then. The decision is made
once and broadcast, never recomputed per rank.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from typing import TypeVar

import torch

from megatron_prune.errors import DisagreementError
from megatron_prune.model.architecture import Group
from megatron_prune.resharding.live import LiveModel
from megatron_prune.resharding.verify import verify
from megatron_prune.runtime.mesh import agree, broadcast_object, is_common

logger = logging.getLogger(__name__)

Decision = TypeVar("Decision")


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
        """Rank 0's `decision` on every rank, agreed on together with the layout it refers to.

        Raises:
            DisagreementError: ranks hold different layouts or received different decisions.
        """
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

    def compact_if_due(self, force: bool = False) -> bool:
        """Compact when that frees a quantum, or when `force`d; returns whether it did.

        Raises:
            MemoryError: there was not enough of it; this rank's model is unusable then, checkpoints are untouched.
        """
        if not (force or self.model.layout.is_due):
            return False
        try:
            if not self.model.compact():
                return False
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
