"""Wrap a model in megatron-core's DDP and optimizer, and hold the whole as one thing that resharding may rebuild.

    OptimizerOptions   Adam, clipping, distributed optimizer, overlap
    ShardedModel       module + DDP + optimizer + layout of this rank; the only mutable holder of them
    wrap               module -> (DDP, optimizer)

Which Adam runs: TransformerEngine's FusedAdam if installed, else apex's, else torch's AdamW with its fused kernel
(megatron-core makes the choice at import; this module only switches torch's on). The `apex` on the public package
index is an unrelated project; NVIDIA's is built from source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import PrunableLlama, inner_model
from megatron_prune.model.param_axes import ParamTable
from megatron_prune.runtime.mesh import Mesh


@dataclass(frozen=True)
class OptimizerOptions:
    """How weights are stepped. Field names are Megatron's."""

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


@dataclass
class ShardedModel:
    """This rank's part of the model in training. Compaction replaces `ddp`, `optimizer` and `layout`.

    Args:
        module: the bare model (or its Float16 wrapper); stays, while a compaction replaces its parameters.
        ddp: megatron-core's data-parallel wrapper around `module`.
        optimizer: megatron-core's optimizer over `ddp`.
        layout: which unit sits in which slot, for all layers and ranks.
        table: the meaning of every parameter's dims.
    """

    module: torch.nn.Module
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    layout: ShardLayout
    table: ParamTable
    mesh: Mesh
    options: OptimizerOptions
    dtype: torch.dtype

    @classmethod
    def build(
        cls,
        model: PrunableLlama,
        layout: ShardLayout,
        table: ParamTable,
        mesh: Mesh,
        options: OptimizerOptions,
        dtype: torch.dtype,
    ) -> ShardedModel:
        """Wrap `model` for training; its weights must be there already (fp32 main weights are copied from them)."""
        module = Float16Module(model.config, model) if dtype == torch.bfloat16 else model
        ddp, optimizer = wrap(module, options, dtype)
        return cls(module, ddp, optimizer, layout, table, mesh, options, dtype)

    def force_param_sync(self) -> None:
        """Make every rank see the stepped weights: with overlapped gathers, ranks still hold old values of what
        others own.
        """
        if self.options.use_distributed_optimizer and self.options.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)


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


@torch.no_grad()
def clip_and_step(model: ShardedModel) -> tuple[bool, float]:
    """Clip by the global norm and step, unless a gradient is not finite; returns (stepped, gradient norm before
    clipping).

    The norm is over the whole model (tied and tensor-parallel copies counted once), so all ranks take the same branch.
    """
    optimizer = model.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not torch.isfinite(torch.tensor(norm)):
        return False, norm
    for inner in optimizer.chained_optimizers:
        parameters = inner.get_parameters()
        if parameters and model.options.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=model.options.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return True, norm
