"""This rank's part of the model in training: the module, megatron-core's DDP and optimizer around it, and what it owns.

    OptimizerOptions   Adam, clipping, distributed optimizer, overlap
    WrappedModel       everything that walks over parameters, linear layers or optimizer state does so through it; the
                       layout and what changes it are added by `resharding.live`
    wrap               module -> (DDP, optimizer)

Which Adam runs: TransformerEngine's FusedAdam if installed, else apex's, else torch's AdamW with its fused kernel
(megatron-core makes the choice at import; this module only switches torch's on). The `apex` on the public package
index is an unrelated project; NVIDIA's is built from source.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_prune.model.llama import (
    NamedRow,
    PrunableLlama,
    inner_model,
    named_linears,
    named_rows,
    replace_parameters,
)
from megatron_prune.model.table import Param, ParamTable
from megatron_prune.optimizer.owned import OwnedShard, Spans, forget, owned_shards, owned_spans, set_steps, steps_taken
from megatron_prune.runtime.mesh import Mesh


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of AdamW, gradient clipping and DDP. Field names are Megatron's."""

    lr: float
    min_lr: float = 0.0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: int | None = None


class WrappedModel:
    """A module with DDP and optimizer.

    Args:
        model: this rank's stage; its weights must be there already (fp32 main weights are copied from them).
        table: the meaning of every parameter's dims.
        dtype: that training computes in.

    Attributes:
        module: the bare model (or its Float16 wrapper).
        ddp, optimizer: megatron-core's, around `module`; others after `rewrap`.
    """

    def __init__(
        self, model: PrunableLlama, table: ParamTable, mesh: Mesh, options: OptimizerOptions, dtype: torch.dtype
    ) -> None:
        self.module = Float16Module(model.config, model) if dtype == torch.bfloat16 else model
        self.table, self.mesh, self.options, self.dtype = table, mesh, options, dtype
        self.ddp, self.optimizer = wrap(self.module, options, dtype)
        self._is_in_step = True
        self._rows = list(named_rows(self.module, table))

    def rows(self) -> Iterator[NamedRow]:
        """(name, parameter, row) of each local parameter, in model order (see `llama.named_rows`)."""
        return iter(self._rows)

    def linears(self) -> Iterator[tuple[str, torch.nn.Module, Param]]:
        """(name of its weight, module, row) of each local linear layer, in model order (see `llama.named_linears`)."""
        return named_linears(self.module, self.table)

    def replace_parameters(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """New parameters in the place of the old ones (see `llama.replace_parameters`); `rewrap` afterwards."""
        replace_parameters(self.module, self.table, change)
        self._rows = list(named_rows(self.module, self.table))

    def owned(self) -> Iterator[OwnedShard]:
        """What this rank's optimizer steps, in model order."""
        return owned_shards(self.rows(), self.optimizer)

    def owned_spans(self) -> dict[str, Spans]:
        """By name, which flat range of each local parameter each of the distributed optimizer's owners steps."""
        return owned_spans(self.rows(), self.ddp, self.mesh.over("owners").size)

    def rewrap(self, before_optimizer: Callable[[DistributedDataParallel], None]) -> None:
        """New DDP and optimizer for the parameters that the module has now; see `wrap`."""
        with torch.enable_grad():  # DDP finds the gradient accumulators through a graph
            self.ddp, self.optimizer = wrap(self.module, self.options, self.dtype, before_optimizer)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def step(self) -> tuple[bool, float]:
        """Clip by the global norm and step, unless a gradient is not finite; returns (stepped, gradient norm before
        clipping).

        The norm is over the whole model (tied and tensor-parallel copies counted once), so all ranks take the same
        branch.
        """
        optimizer = self.optimizer
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not torch.isfinite(torch.tensor(norm)):
            return False, norm
        for inner in optimizer.chained_optimizers:
            parameters = inner.get_parameters()
            if parameters and self.options.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.options.clip_grad, total_norm=norm)
        self._is_in_step = False
        optimizer.step_with_ready_grads()
        return True, norm

    def synchronise(self) -> None:
        """Make every rank see the stepped weights (a collective over DP): with overlapped gathers, ranks hold old
        values of what others own until the next forward pass. Costs nothing a second time."""
        if not self._is_in_step and self.options.use_distributed_optimizer and self.options.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        self._is_in_step = True

    def adam_step(self) -> int:
        """Adam steps taken so far (bias correction), agreed over all ranks; 0 before the first (a collective)."""
        latest = torch.tensor([steps_taken(self.optimizer)], dtype=torch.int64, device=self.mesh.device.device)
        dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=self.mesh.over("world").group)
        return int(latest)

    def set_adam_step(self, step: int) -> None:
        """Continue the bias correction at `step`; call after the moments were set. Does nothing for step 0."""
        set_steps(self.optimizer, self.owned(), step)

    def reset_adam(self) -> None:
        """Adam begins anew at the next step, bias correction included; call it on all ranks. No communication."""
        forget(self.optimizer)


def wrap(
    module: torch.nn.Module,
    options: OptimizerOptions,
    dtype: torch.dtype,
    before_optimizer: Callable[[DistributedDataParallel], None] | None = None,
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """megatron-core's DDP and optimizer around `module`, with the schedule's callbacks set on the model's config.

    Args:
        before_optimizer: called with the DDP before main weights are allocated (to make room for them).
    """
    config = inner_model(module).config
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=options.overlap_grad_reduce,
            overlap_param_gather=options.overlap_param_gather,
            use_distributed_optimizer=options.use_distributed_optimizer,
            bucket_size=options.ddp_bucket_size,
        ),
        module,
        pg_collection=groups,
    )
    if before_optimizer is not None:
        before_optimizer(ddp)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            clip_grad=options.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=options.use_distributed_optimizer,
            overlap_param_gather=options.overlap_param_gather,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, torch.optim.AdamW):
            for group in inner.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = ddp.no_sync if options.overlap_grad_reduce else None
    return ddp, optimizer
