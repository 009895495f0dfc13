"""Knowledge distillation: the small model learns from the teacher's whole distribution, not only from the next token.

    Distillation     objective: (1 - weight) x cross entropy + weight x T^2 x KL(teacher || student), at temperature T
    distilled_loss   the loss of each position from both models' logits, split over the vocabulary

T^2 keeps the gradient's size when T changes (Hinton et al., arXiv 1503.02531). The divergence is the forward one, over
all logits. No logits are gathered: over tensor-parallel ranks only maxima and sums travel, five numbers per position.

Without pipeline stages the teacher's forward pass runs right before the student's, micro-batch by micro-batch. With
stages it runs as a pipeline of its own before the global batch, and its last stage keeps the hidden states (in the
model's dtype, `hidden` numbers per token and rank); logits exist for one micro-batch at a time.
"""

import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.model.teacher import Teacher
from megatron_prune.runtime.mesh import Mesh, Ranks, all_reduce_sum
from megatron_prune.training.step import Batch, Batches, Loss, masked_mean

PARTS = ("lm loss", "divergence")  # of the loss, as they are shown


class Distillation:
    """Learn from `teacher`.

    Args:
        weight: in [0, 1], of the divergence. temperature: T > 0 of both distributions.
    """

    reports: tuple[str, ...] = ("loss", *PARTS)

    def __init__(self, teacher: Teacher, weight: float, temperature: float) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self._hidden: deque[Tensor] = deque()  # of the micro-batches to come, on the last of several stages

    def prepare(self, batches: Batches, count: int) -> Batches:
        """With pipeline stages: the teacher's hidden states of all micro-batches of a global batch (a collective)."""
        mesh = self.teacher.mesh
        if mesh.pp_size == 1:
            return batches
        read = list(itertools.islice(batches, count))
        rows, columns = read[0]["tokens"].shape
        with torch.no_grad():
            found = get_forward_backward_func()(
                forward_step_func=partial(self._teacher_step, mesh),
                data_iterator=iter(read),
                model=[self.teacher.module],
                num_microbatches=count,
                seq_length=columns,
                micro_batch_size=rows,
                forward_only=True,
                collect_non_loss_data=True,
            )
        self._hidden = deque(found)
        return iter(read)

    def _teacher_step(self, mesh: Mesh, batches: Any, module: torch.nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
        tokens = next(batches)["tokens"].to(mesh.device.device, non_blocking=True)
        return self.teacher.hidden(tokens, module), lambda output, non_loss_data: output.to(self._kept_dtype)

    @property
    def _kept_dtype(self) -> torch.dtype:
        return next(self.teacher.module.parameters()).dtype

    def forward(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Loss]:
        """The student's logits (on earlier stages its hidden states), and how they become the loss."""
        tokens, mesh = batch["tokens"], self.teacher.mesh
        hidden = None
        if mesh.pp_size == 1:
            hidden = self.teacher.hidden(tokens)
        elif mesh.is_last_stage:
            hidden = self._hidden.popleft()
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        return model(tokens, positions, None), partial(self._loss, batch, hidden)

    def _loss(self, batch: Batch, hidden: Tensor | None, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert hidden is not None
        both, cross_entropy, divergence = distilled_loss(
            logits, self.teacher.logits(hidden), batch["labels"], self.weight, self.temperature, self.teacher.mesh
        )
        mask = batch["loss_mask"]
        loss = masked_mean(mask, both)
        parts = (masked_mean(mask, part) for part in (cross_entropy, divergence))
        return loss, {"loss": loss.detach().clone(), **dict(zip(PARTS, parts, strict=True))}


def distilled_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: float, temperature: float, mesh: Mesh
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross entropy, divergence) of each position, fp32 [B, S], in nats; only the first has gradients.

    Args:
        student, teacher: logits [B, S, vocabulary / TP] of any float dtype, -inf in padded columns; this rank's
            columns begin where the ranks before it end.
        labels: int64 [B, S], numbers in the whole vocabulary.
    """
    tp = mesh.over("tp")
    return _Distilled.apply(student, teacher, labels, weight, temperature, tp)


class _Distilled(torch.autograd.Function):
    """The gradient is known with the loss: (1 - w) (p - onehot) + w T (p_T - q_T)."""

    @staticmethod
    def forward(ctx, student, teacher, labels, weight, temperature, tp):  # type: ignore[no-untyped-def]
        start = tp.rank * student.shape[-1]
        logits = student.float()
        log_p = _log_softmax(logits, tp)
        log_pt = log_p if temperature == 1 else _log_softmax(logits / temperature, tp)
        log_q = _log_softmax(teacher.float() / temperature, tp)
        q = log_q.exp()
        divergence = all_reduce_sum(torch.where(q > 0, q * (log_q - log_pt), 0.0).sum(dim=-1), tp)
        is_here = (labels >= start) & (labels < start + student.shape[-1])
        column = torch.where(is_here, labels - start, 0).unsqueeze(-1)
        own = torch.where(is_here, log_p.gather(-1, column).squeeze(-1), 0.0)
        cross_entropy = -all_reduce_sum(own, tp)
        gradient = log_p.exp().mul_(1 - weight)
        gradient.scatter_add_(-1, column, (is_here.float() * (weight - 1)).unsqueeze(-1))
        gradient.add_(log_pt.exp_().sub_(q), alpha=weight * temperature)
        ctx.save_for_backward(gradient.to(student.dtype))
        loss = (1 - weight) * cross_entropy + weight * temperature**2 * divergence
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss, cross_entropy, divergence

    @staticmethod
    def backward(ctx, upstream, *_unused):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.unsqueeze(-1).to(gradient.dtype), None, None, None, None, None)


def _log_softmax(logits: Tensor, tp: Ranks) -> Tensor:
    """Over the vocabulary of all ranks."""
    most = logits.amax(dim=-1, keepdim=True)
    if tp.size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=tp.group)
    shifted = logits - most
    return shifted - all_reduce_sum(shifted.exp().sum(dim=-1, keepdim=True), tp).log()
