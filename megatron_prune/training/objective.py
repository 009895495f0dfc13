"""What training minimises, micro-batch by micro-batch.

    Objective      a forward pass and the loss of what it gives; the seam for other losses (see `distillation`)
    CrossEntropy   of the next token, averaged over the positions that count

The loss function runs on the last pipeline stage only. What it reports is averaged over micro-batches and ranks and
shown, `loss` first; gradients come from the first of what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]  # tokens, labels [B, S] int64 and loss_mask [B, S] fp32, on the model's device
Batches = Iterator[dict[str, Tensor]]
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Objective(Protocol):
    """What a micro-batch is trained on (see the module); `reports` names what its loss reports."""

    reports: tuple[str, ...]

    def prepare(self, batches: Batches, count: int) -> Batches:
        """Before the first forward pass of a global batch: its `count` micro-batches, from what was read. May be a
        collective."""

    def forward(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Loss]:
        """(output of this stage, how its last one becomes (loss to minimise, what to report))."""


class CrossEntropy:
    """Mean negative log-likelihood of the labels, in nats per token."""

    reports: tuple[str, ...] = ("loss",)

    def prepare(self, batches: Batches, count: int) -> Batches:
        """As they are."""
        return batches

    def forward(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Loss]:
        """megatron-core computes the loss of each position where it has the logits, split over the vocabulary."""
        positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device).unsqueeze(0)
        output = model(batch["tokens"], positions, None, labels=batch["labels"])
        return output, partial(_reported_mean, batch["loss_mask"])


def masked_mean(mask: Tensor, losses: Tensor) -> Tensor:
    """Mean of `losses` [B, S] over the positions that count."""
    return (losses.float() * mask).sum() / mask.sum().clamp(min=1)


def _reported_mean(mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The schedule divides the loss in place, so the report is a copy."""
    loss = masked_mean(mask, losses)
    return loss, {"loss": loss.detach().clone()}
