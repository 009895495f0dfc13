"""megatron-core's model classes with this project's layers: one Llama, whichever class carries it.

    PrunableLlama   what both have: padded vocabulary rows are silent, modules know their layer
    engine_of       which class a run gets: `gpt`, `hybrid`, or for `auto` the newest that megatron-core has
    construct       this rank's pipeline stage of that class

In a GPTModel a layer is one module; in a HybridModel (megatron-core 0.18 and later) attention and FFN are modules of
their own, in the pattern `*-*-...`. Parameters, their order and their names in the whole model (those of THE table) are
the same, so checkpoints, optimizer ranges and results are, too. HybridStack's own final norm is TransformerEngine's,
hence it is built without (`post_layer_norm`), and ours stands behind it.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import __version__ as megatron_core
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.model.layers import NormedRowParallelLinear, PrunableSelfAttention, RMSNorm
from megatron_prune.model.table import Param

GPT, HYBRID, AUTO = "gpt", "hybrid", "auto"


class PrunableLlama(torch.nn.Module):
    """A model of megatron-core (the next class in the order of inheritance) whose padded vocabulary rows get logits of
    -inf: zero rows would otherwise take part in the softmax and shift the loss."""

    modules_per_layer = 1
    layers: tuple[int, ...] = ()  # original numbers of those in `decoder.layers`
    norms: tuple[tuple[RMSNorm, Param], ...] = ()  # each with its weight's row, which says what it divides by
    config: Any
    decoder: Any
    output_layer: Any
    post_process: bool
    rotary_pos_emb: Any

    def __init__(self, *args: Any, live_vocab: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.live_vocab = live_vocab
        if self.post_process:
            self.output_layer.register_forward_hook(self._silence_padding)

    def _silence_padding(self, _module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
        logits, _ = output
        if self.live_vocab < logits.shape[-1]:
            logits[..., self.live_vocab :] = float("-inf")

    def numbered(self) -> Iterator[tuple[int, Any]]:
        """(original number, from 0, of its layer, module) of each of `decoder.layers`."""
        for at, module in enumerate(self.decoder.layers):
            yield self.layers[at // self.modules_per_layer], module

    def hold(self, layers: tuple[int, ...], first: int) -> None:
        """Have the modules of just these `layers`, which follow on `first` others of earlier stages: others go, and
        those that were not here are built, with undefined weights."""
        self.layers = self.layers or layers  # none are known of a new model: it was built with these
        if self.layers != layers:
            assert self.modules_per_layer == 1, "a HybridModel's layers do not move"
            known = dict(self.numbered())
            self.decoder.layers = torch.nn.ModuleList(known.get(layer) or self._built() for layer in layers)
            self.decoder.num_layers_per_pipeline_rank = len(layers)
            self.layers = layers
        for at, module in enumerate(self.decoder.layers):
            module.layer_number = first * self.modules_per_layer + at + 1

    def _built(self) -> torch.nn.Module:
        decoder = self.decoder
        spec, groups = decoder.submodules.layer_specs[0], decoder.pg_collection
        layer: torch.nn.Module = build_module(spec, config=self.config, layer_number=1, pg_collection=groups)
        return layer


class GptLlama(PrunableLlama, GPTModel):
    """As a GPTModel."""


def engine_of(asked: str) -> str:
    """`gpt` or `hybrid`. Raises UserError: `hybrid` is asked for, and this megatron-core has no HybridModel."""
    has_hybrid = importlib.util.find_spec("megatron.core.models.hybrid") is not None
    if asked == HYBRID and not has_hybrid:
        raise UserError(
            f"model.engine: megatron-core {megatron_core} has no HybridModel (0.18 and later have); use {GPT} or {AUTO}"
        )
    return (HYBRID if has_hybrid else GPT) if asked == AUTO else asked


def construct(engine: str, config: TransformerConfig, held: frozenset[str], **arguments: Any) -> PrunableLlama:
    """This rank's stage, with undefined weights, as a class of `engine` (see `engine_of`).

    Args:
        config: of a GPTModel, whatever the class.
        held: the table's names of parameters in layers: a norm that is none of them is not there.
        arguments: what both classes take.
    """
    down = NormedRowParallelLinear if "mlp.linear_fc2.post_layernorm.weight" in held else RowParallelLinear
    attention: dict[str, Any] = {
        "input_layernorm": RMSNorm if "input_layernorm.weight" in held else IdentityOp,
        "self_attention": ModuleSpec(module=PrunableSelfAttention, params={"held": held}),
        "self_attn_bda": get_bias_dropout_add,
    }
    ffn: dict[str, Any] = {
        "pre_mlp_layernorm": RMSNorm if "pre_mlp_layernorm.weight" in held else IdentityOp,
        "mlp": ModuleSpec(
            module=MLP,
            params={"ffn_hidden_size": config.ffn_hidden_size},
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=down),
        ),
        "mlp_bda": get_bias_dropout_add,
    }
    if engine_of(engine) == HYBRID:
        return _construct_hybrid(config, attention, ffn, **arguments)
    layer = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**attention, **ffn))
    block = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
    return GptLlama(config, block, **arguments)


def _construct_hybrid(
    config: TransformerConfig, attention: dict[str, Any], ffn: dict[str, Any], **arguments: Any
) -> PrunableLlama:
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer

    model, stack = _hybrid_classes()
    submodules = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**attention)),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=TransformerLayerSubmodules(**ffn)),
    )
    layers, stages = config.num_layers, config.pipeline_model_parallel_size
    ends = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    counts = {name: getattr(config, name) for name in ("num_layers", "recompute_num_layers", *ends)}
    is_even = not any(counts[name] for name in ends)
    pattern = "|".join(["*-" * (layers // stages)] * stages) if is_even else "*-" * layers
    doubled = {name: 2 * count for name, count in counts.items() if count}
    return model(
        dataclasses.replace(config, **doubled),
        ModuleSpec(module=stack, submodules=submodules),
        hybrid_layer_pattern=pattern,
        **arguments,
    )


@functools.cache
def _hybrid_classes() -> tuple[Any, Any]:
    """(model, stack of layers); made when asked for, since older releases have neither."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    class LlamaStack(HybridStack):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, post_layer_norm=False, **kwargs)
            self.final_layernorm = None
            if self.post_process:
                config = self.config
                self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            hidden = super().forward(*args, **kwargs)
            return hidden if self.final_layernorm is None else self.final_layernorm(hidden)

    class HybridLlama(PrunableLlama, HybridModel):
        modules_per_layer = 2

    return HybridLlama, LlamaStack
