"""What training minimises, and forward and backward passes of one global batch of it, or evaluation, through
megatron-core's pipeline schedules.

An objective's loss function runs on the last pipeline stage only. What it reports is averaged over micro-batches and
ranks and shown, `loss` first; gradients come from the first of what it returns.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.config import Config
from megatron_prune.data.batches import BatchStream, Dataset
from megatron_prune.errors import TrainingStoppedError, UserError
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.mesh import Mesh, agree, all_reduce_sum

Batch = Mapping[str, Tensor]  # tokens, labels [B, S] int64 and loss_mask [B, S] fp32, on the model's device
Batches = Iterator[dict[str, Tensor]]
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Objective(Protocol):
    """A forward pass and the loss of what it gives; `reports` names what that reports (see also `distillation`)."""

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


NEXT_TOKEN = CrossEntropy()


def masked_mean(mask: Tensor, losses: Tensor) -> Tensor:
    """Mean of `losses` [B, S] over the positions that count."""
    return (losses.float() * mask).sum() / mask.sum().clamp(min=1)


def _reported_mean(mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The schedule divides the loss in place, so the report is a copy."""
    loss = masked_mean(mask, losses)
    return loss, {"loss": loss.detach().clone()}


def microbatches(config: Config, mesh: Mesh) -> int:
    """Micro-batches of a rank per global batch."""
    return config.training.global_batch_size // (config.training.micro_batch_size * mesh.dp_size)


def open_stream(
    dataset: Dataset, config: Config, mesh: Mesh, consumed_samples: int = 0, is_single: bool = False
) -> BatchStream:
    """This rank's micro-batches of `dataset`; unless one global batch is all, the next is read while one computes."""
    samples, size = mesh.over("samples"), config.training.micro_batch_size
    ahead = 0 if is_single else microbatches(config, mesh)
    return BatchStream(dataset, size, samples.rank, samples.size, consumed_samples, ahead, mesh.device)


def read_batch(batches: Batches, count: int, mesh: Mesh) -> Batches:
    """The next `count` micro-batches, read before any of them is used, on all ranks or on none; collective. Raises
    TrainingStoppedError: on all ranks, in the words of the first that cannot read its own."""
    found: list[dict[str, Tensor]] = []
    complaint: str | None = None
    try:
        found = [next(batches) for _ in range(count)]
    except UserError as error:
        complaint = str(error)
    if most([int(complaint is not None)], mesh)[0]:
        raise TrainingStoppedError(next(text for text in agree(mesh, complaint) if text is not None))
    return iter(found)


def forward_backward(
    model: LiveModel,
    batches: Batches,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    objective: Objective = NEXT_TOKEN,
) -> dict[str, float]:
    """Gradients of the objective's mean over the global batch, reduced over ranks; returns what it reports, `loss`
    first."""
    batches = objective.prepare(batches, num_microbatches)
    model.ddp.zero_grad_buffer()
    model.optimizer.zero_grad()
    return _run(model, batches, num_microbatches, micro_batch_size, seq_length, objective, forward_only=False)


@torch.no_grad()
def evaluate(
    model: LiveModel, batches: Batches, num_microbatches: int, micro_batch_size: int, seq_length: int
) -> float:
    """Mean cross entropy (nats per token) over the global batch, nothing changed."""
    model.ddp.eval()
    losses = _run(model, batches, num_microbatches, micro_batch_size, seq_length, NEXT_TOKEN, forward_only=True)
    model.ddp.train()
    return losses["loss"]


def validation_loss(model: LiveModel, dataset: Dataset, config: Config) -> tuple[float, float]:
    """(mean loss over the first `eval_iters` global batches of `dataset`, tokens per second)."""
    mesh, training = model.mesh, config.training
    batches, count = open_stream(dataset, config, mesh), microbatches(config, mesh)
    mesh.device.synchronize()
    start = time.perf_counter()
    losses = [
        evaluate(model, read_batch(batches, count, mesh), count, training.micro_batch_size, config.data.seq_length)
        for _ in range(training.eval_iters)
    ]
    elapsed = time.perf_counter() - start
    return sum(losses) / training.eval_iters, training.eval_iters * config.tokens_per_iteration / elapsed


def _run(
    model: LiveModel,
    batches: Batches,
    count: int,
    micro_batch: int,
    seq_length: int,
    objective: Objective,
    **options: Any,
) -> dict[str, float]:
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, model.mesh, objective),
        data_iterator=batches,
        model=[model.ddp],
        num_microbatches=count,
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        **options,
    )
    return _mean(reports, objective.reports, model.mesh)


def _forward_step(mesh: Mesh, objective: Objective, batches: Batches, model: torch.nn.Module) -> tuple[Tensor, Loss]:
    batch = {name: value.to(mesh.device.device, non_blocking=True) for name, value in next(batches).items()}
    return objective.forward(model, batch)


def _mean(reports: list[dict[str, Tensor]], names: tuple[str, ...], mesh: Mesh) -> dict[str, float]:
    """Means over micro-batches and all ranks' tokens, known on every rank (only the last stage computed them)."""
    total = torch.zeros(len(names), dtype=torch.float32, device=mesh.device.device)
    if mesh.is_last_stage:
        total += torch.stack([torch.stack([report[name] for name in names]) for report in reports]).mean(dim=0)
    all_reduce_sum(total, mesh.over("pp"), mesh.over("tokens"))
    return {name: value / mesh.over("tokens").size for name, value in zip(names, total.tolist(), strict=True)}


def most(values: list[int], mesh: Mesh) -> list[int]:
    """The largest of each of `values` over all ranks, on every rank (collective; costs nothing on one rank)."""
    if mesh.world_size == 1:
        return values
    seen = torch.tensor(values, device=mesh.device.device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=mesh.over("world").group)
    return [int(value) for value in seen.tolist()]
