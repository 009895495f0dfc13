"""A frozen model beside the one in training: it only computes, on the same layout of ranks.

It has neither DDP nor optimizer nor gradients; its activations are freed layer by layer.
"""

from collections.abc import Callable
from typing import cast

import torch
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import ModelOptions, build_llama, load_parameters
from megatron_prune.runtime.failures import agreed
from megatron_prune.runtime.mesh import Mesh


class Teacher:
    """This rank's stage (collective).

    Args:
        read: Hugging Face name -> the tensor in the shape that `layout`'s architecture was made from.

    Attributes:
        module: what a pipeline schedule runs; its output are hidden states [S, B, hidden] (split along S under sequence
            parallelism), on the last stage normed.
        layout: of its slots; it never changes.

    Raises:
        UserError: on all ranks: a tensor cannot be read on one of them.
    """

    def __init__(self, layout: ShardLayout, mesh: Mesh, options: ModelOptions, read: Callable[[str], Tensor]) -> None:
        self.layout, self.mesh = layout, mesh
        self._llama = llama = build_llama(layout.architecture.shape, layout, mesh, options)
        agreed(mesh, lambda: load_parameters(llama, layout.architecture.table, layout, mesh, read))
        llama.post_process = False  # the LM head waits until the student's logits are there: only then room is needed
        llama.requires_grad_(False).eval()
        is_half = options.dtype == torch.bfloat16
        self.module: torch.nn.Module = Float16Module(llama.config, llama) if is_half else llama

    @torch.no_grad()
    def hidden(self, tokens: Tensor, module: torch.nn.Module | None = None) -> Tensor:
        """This stage's output for int64 tokens [B, S]; `module`: as a schedule passes it."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        return (module or self.module)(tokens, positions, None)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, S, padded vocabulary / TP] of the last stage's hidden states; -inf where no id is."""
        llama, weight = self._llama, None
        if llama.share_embeddings_and_output_weights:
            weight = cast(Callable[[], Tensor], llama.shared_embedding_or_output_weight)()
        head = cast(torch.nn.Module, llama.output_layer)
        logits, _ = head(hidden.to(llama.config.params_dtype), weight=weight)
        return logits.transpose(0, 1)
