"""What the server of `ranks` imports once, so that no rank has to: torch, the slow parts of megatron-core, and what a
whole run imports.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core's remarks on absent accelerators
    import megatron.core
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.parallel_state
    import megatron.core.pipeline_parallel
    import torch
    import torch.distributed
    import torch.utils.tensorboard

    import megatron_prune.launch.assembly.assemble

__all__ = ["megatron", "megatron_prune", "torch"]
