"""What training minimises, micro-batch by micro-batch.

    Objective      a forward pass and the loss of what it gives; the seam for other losses, such as a teacher's
    CrossEntropy   of the next token, averaged over the positions that count

The loss function runs on the last pipeline stage only. Whatever it reports under `loss` is averaged over micro-batches
and ranks and shown; gradients come from the first of what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]  # tokens, labels [B, S] int64 and loss_mask [B, S] fp32, on the model's device
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Objective(Protocol):
    """What a micro-batch is trained on (see the module)."""

    def forward(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Loss]:
        """(output of this stage, how its last one becomes (loss to minimise, what to report))."""


class CrossEntropy:
    """Mean negative log-likelihood of the labels, in nats per token."""

    def forward(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Loss]:
        """megatron-core computes the loss of each position where it has the logits, split over the vocabulary."""
        positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device).unsqueeze(0)
        output = model(batch["tokens"], positions, None, labels=batch["labels"])
        return output, partial(_masked_mean, batch["loss_mask"])


def _masked_mean(mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over the positions that count. The schedule divides the loss in place, so the report is a copy."""
    loss = (losses.float() * mask).sum() / mask.sum().clamp(min=1)
    return loss, {"loss": loss.detach().clone()}
