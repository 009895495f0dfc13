"""megatron-core's DDP and optimizer around a model.

    OptimizerOptions   Adam, clipping, distributed optimizer, overlap
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
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_prune.model.llama import inner_model


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
