"""Build a Llama on megatron-core at the stored widths of a layout, and keep it in step with the layout.

transformer_config   LlamaShape + layout + run options -> megatron-core's TransformerConfig
build_llama          this rank's pipeline stage as a `PrunableLlama` (of a class of megatron-core's: see `classes`)
bind_layout          after slots changed: live widths, masks and KV maps of every layer
named_rows           each local parameter with its row of THE table
named_linears        the layers among them that multiply by a weight [out, in], whose inputs may be watched
load_parameters      fill the stage from any source of canonical tensors
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.model.classes import AUTO, HYBRID, PrunableLlama, construct, engine_of
from megatron_prune.model.elementwise import NONE, fusions
from megatron_prune.model.kinds import VOCAB
from megatron_prune.model.layers import CoreAttention, PrunableSelfAttention, RMSNorm, set_slots
from megatron_prune.model.layout import ShardLayout, stage_layers
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import EMPTY, LINEARS, QKV, Param, ParamTable
from megatron_prune.runtime.mesh import Mesh


@dataclass(frozen=True)
class ModelOptions:
    """How the model is run (not what it is): dtype, sequence parallelism, recomputation, pipeline split, and which of
    megatron-core's classes it is (see `classes`)."""

    seq_length: int
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    engine: str = AUTO
    kernels: str = NONE  # made by torch.compile: see `elementwise`


def stored_sizes(layout: ShardLayout) -> dict[str, int]:
    """megatron-core's config fields that follow the stored widths (all ranks' slots together)."""
    stored, tp = layout.stored, layout.tp
    return {
        "num_attention_heads": stored.heads * tp,
        "num_query_groups": stored.kv_heads * tp,
        "ffn_hidden_size": stored.ffn * tp,
        "hidden_size": stored.hidden,
    }


def transformer_config(shape: LlamaShape, layout: ShardLayout, mesh: Mesh, options: ModelOptions) -> TransformerConfig:
    """megatron-core's configuration at the stored widths. Raises UserError: the layers do not split over the pipeline
    stages, or megatron-core has no such class."""
    engine, is_whole, stages = engine_of(options.engine), len(layout.layers) == shape.num_layers, mesh.pp_size
    uneven = options.num_layers_in_first_pipeline_stage or options.num_layers_in_last_pipeline_stage
    if is_whole and shape.num_layers % stages and not uneven:
        raise UserError(
            f"pipeline_model_parallel_size: {shape.num_layers} layers do not divide by {mesh.pp_size} stages; set "
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    ends = options.num_layers_in_first_pipeline_stage, options.num_layers_in_last_pipeline_stage
    num_layers = shape.num_layers
    if not is_whole:  # stages of any numbers: each builds as many as it has, and numbers them itself
        if engine == HYBRID:
            raise UserError("model.engine: a model that has lost layers is built as gpt only, so far; use gpt")
        num_layers, ends = stages * len(stages_of(layout, mesh, options)[mesh.pp_rank]), (None, None)
    try:
        return TransformerConfig(
            num_layers=num_layers,
            **stored_sizes(layout),
            kv_channels=shape.kv_channels,
            layernorm_epsilon=shape.norm_epsilon,
            add_qkv_bias=shape.add_qkv_bias,
            qk_layernorm=shape.qk_layernorm,
            tensor_model_parallel_size=mesh.tp_size,
            pipeline_model_parallel_size=mesh.pp_size,
            sequence_parallel=options.sequence_parallel and mesh.tp_size > 1,
            num_layers_in_first_pipeline_stage=ends[0],
            num_layers_in_last_pipeline_stage=ends[1],
            recompute_granularity=options.recompute_granularity,
            recompute_method=options.recompute_method,
            recompute_num_layers=options.recompute_num_layers,
            params_dtype=options.dtype,
            pipeline_dtype=options.dtype,
            bf16=options.dtype == torch.bfloat16,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=shape.add_ffn_bias,
            normalization="RMSNorm",
            attention_dropout=0.0,
            hidden_dropout=0.0,
            perform_initialization=False,  # weights always come from a source: see load_parameters
            use_cpu_initialization=mesh.device.kind == "cpu",
            **fusions(options.kernels, options.dtype),
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,  # the micro-batch's own gradient must exist for the Fisher estimate
            apply_rope_fusion=False,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"model and parallel options do not fit together: {error}") from error


def set_recomputation(model: PrunableLlama, granularity: str | None) -> None:
    """What is recomputed from the next forward pass on: None, or "selective" (the core attention)."""
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    for config in {id(config): config for config in found}.values():
        config.recompute_granularity = granularity
        config.recompute_method = config.recompute_num_layers = None


def build_llama(shape: LlamaShape, layout: ShardLayout, mesh: Mesh, options: ModelOptions) -> PrunableLlama:
    """This rank's pipeline stage, on the mesh's device, with undefined weights (see `load_parameters`)."""
    config = transformer_config(shape, layout, mesh, options)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = construct(
        options.engine,
        config,
        layout.architecture.table.names_in_layers,
        vocab_size=layout.stored.vocab * layout.tp,
        max_sequence_length=options.seq_length,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        parallel_output=True,
        pg_collection=groups,
        live_vocab=int((layout.slots(VOCAB, 0, mesh.tp_rank) != EMPTY).sum()),
    ).to(mesh.device.device)
    hold_layers(model, layout, mesh, options)
    model.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(mesh.device.device)
    bind_layout(model, layout, mesh)
    return model


def hold_layers(model: torch.nn.Module, layout: ShardLayout, mesh: Mesh, options: ModelOptions) -> None:
    """Let the stage have the layers that `layout` stores and that are its own (see `PrunableLlama.hold`)."""
    llama, stages = inner_model(model), stages_of(layout, mesh, options)
    llama.hold(stages[mesh.pp_rank], first=sum(map(len, stages[: mesh.pp_rank])))
    for layer, module in llama.numbered():
        if hasattr(module, "self_attention"):  # a HybridModel's FFN has none
            module.self_attention.knows_positions = layer not in layout.architecture.shape.no_rope_layers
    llama.to(mesh.device.device)
    table = layout.architecture.table
    _mark_sharding(llama, table)
    holders = ((llama.get_submodule(name.rpartition(".")[0]), row) for name, _, _, row in _local_rows(llama, table))
    llama.norms = tuple((module, row) for module, row in holders if isinstance(module, RMSNorm))


def stages_of(layout: ShardLayout, mesh: Mesh, options: ModelOptions) -> tuple[tuple[int, ...], ...]:
    """Which of the stored layers each pipeline stage has."""
    ends = options.num_layers_in_first_pipeline_stage, options.num_layers_in_last_pipeline_stage
    return stage_layers(layout.layers, mesh.pp_size, *ends)


def _mark_sharding(model: PrunableLlama, table: ParamTable) -> None:
    """Tell megatron-core's gradient norm which parameters are pieces and which are copies over tensor-parallel
    ranks.
    """
    for _, parameter, row in named_rows(model, table):
        parameter.tensor_model_parallel = row.is_sharded  # type: ignore[attr-defined]


def inverse_frequencies(shape: LlamaShape) -> Tensor:
    """fp32 [kv_channels / 2] rotary frequencies, with `linear` or `llama3` scaling as Hugging Face applies it. Raises
    UserError: another kind of `rope_scaling`."""
    exponents = torch.arange(0, shape.kv_channels, 2, dtype=torch.int64).float() / shape.kv_channels
    frequencies = 1.0 / (shape.rotary_base**exponents)
    scaling = shape.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    factor = float(scaling["factor"])
    if kind == "linear":
        return frequencies / factor
    if kind != "llama3":
        raise UserError(f"config.json: rope_scaling type {kind!r} is not supported (default, linear, llama3 are)")
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    # 0 where the wavelength exceeds context / low (scaled fully), 1 where it is below context / high (kept).
    blend = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def inner_model(model: torch.nn.Module) -> PrunableLlama:
    """The `PrunableLlama` inside megatron-core's DDP and Float16 wrappers."""
    while not isinstance(model, PrunableLlama):
        wrapped = model.module
        assert isinstance(wrapped, torch.nn.Module)
        model = wrapped
    return model


def bind_layout(model: torch.nn.Module, layout: ShardLayout, mesh: Mesh, before: ShardLayout | None = None) -> None:
    """Make the model compute with `layout`: live norm widths, head masks, KV maps, and the config's stored sizes.

    Args:
        before: the layout that it computed with; what that has in common is left alone.
    """
    llama = inner_model(model)
    for name, value in stored_sizes(layout).items():
        setattr(llama.config, name, value)
    modules, slots = list[CoreAttention](), list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
    for index, module in llama.numbered():
        if isinstance(module.self_attention, PrunableSelfAttention):
            queries, keys = (part.dims[0].kind for part in layout.architecture.table.find(QKV, index).parts[:2])
            if before is None or layout.placed[queries] is not before.placed[queries]:
                modules.append(module.self_attention.core_attention)
                heads, kv_heads = (layout.slots(kind, index, mesh.tp_rank) for kind in (queries, keys))
                slots.append((heads, kv_heads, layout.serving(keys, index, mesh.tp_rank)))
    set_slots(modules, slots, mesh.device.device)
    for norm, row in llama.norms:
        norm.live_width = layout.architecture.width(row.dims[0].kind, row.site) * row.dims[0].size
    if llama.post_process:  # megatron-core checks a tied weight against it
        llama.output_layer.input_size = llama.config.hidden_size


NamedRow = tuple[str, torch.nn.Parameter, Param]


def named_rows(model: torch.nn.Module, table: ParamTable) -> Iterator[NamedRow]:
    """(name, parameter, row) of each local parameter, in model order; layers are numbered over all stages.

    The second copy of a tied embedding (last stage of a pipeline) comes under its own name `output_layer.weight` with
    the embedding's row.
    """
    for _, name, parameter, row in _local_rows(inner_model(model), table):
        yield name, parameter, row


def named_linears(model: torch.nn.Module, table: ParamTable) -> Iterator[tuple[str, torch.nn.Module, Param]]:
    """(name of its weight, module, row) of each local linear layer, in model order: qkv, attention output, gate/up,
    FFN down of every layer, and an LM head of its own (a tied one is the embedding)."""
    llama = inner_model(model)
    for local_name, name, _, row in _local_rows(llama, table):
        if row.role in LINEARS:
            yield name, llama.get_submodule(local_name.removesuffix(".weight")), row


def _local_rows(llama: PrunableLlama, table: ParamTable) -> Iterator[tuple[str, str, torch.nn.Parameter, Param]]:
    """(name inside this stage, name in the whole model, parameter, row)."""
    numbers = [layer for layer, _ in llama.numbered()]
    for local_name, parameter in list(llama.named_parameters()):
        name = local_name
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{numbers[int(local)]}.{rest}"
        yield local_name, name, parameter, table.row(name)


def replace_parameters(model: torch.nn.Module, table: ParamTable, change: Callable[[str, Tensor], Tensor]) -> None:
    """Put a new parameter, with data `change(name, old data)`, in the place of each one and empty the old.

    New objects, because autograd remembers the shape a parameter had. Marks that megatron-core left on a parameter are
    kept, links into a DDP or optimizer are not.
    """
    llama = inner_model(model)
    links = {"main_grad", "main_param", "main_param_sharded", "grad_added_to_main_grad"}
    for local_name, name, old, _ in _local_rows(llama, table):
        new = torch.nn.Parameter(change(name, old.data), requires_grad=old.requires_grad)
        for mark, value in vars(old).items():
            if mark not in links:
                setattr(new, mark, value)
        path, _, attribute = local_name.rpartition(".")
        setattr(llama.get_submodule(path), attribute, new)
        for link in links & set(vars(old)):
            delattr(old, link)
        old.grad, old.data = None, old.data.new_empty(0)


def load_parameters(
    model: torch.nn.Module, table: ParamTable, layout: ShardLayout, mesh: Mesh, read: Callable[[str], Tensor]
) -> None:
    """Fill this rank's shards from full source tensors, one tensor in memory at a time.

    Args:
        read: Hugging Face name -> the source tensor in the source's shape (any float dtype); empty slots become zero.
    """
    with torch.no_grad():
        for _, parameter, row in named_rows(model, table):
            for part, start, end in row.part_rows(layout, mesh.tp_rank):
                piece = Param(row.name, row.layer, row.role, (part,))
                ids = [piece.element_ids(dim, layout, mesh.tp_rank) for dim in range(len(part.dims))]
                parameter[start:end].copy_(take(read(part.hf_name), ids))


def take(source: Tensor, ids: list[np.ndarray]) -> Tensor:
    """The elements `ids` (per dim; -1 gives zeros) of `source`."""
    result = source
    for dim, wanted in enumerate(ids):
        if np.array_equal(wanted, np.arange(result.shape[dim])):
            continue
        result = result.index_select(dim, torch.from_numpy(np.maximum(wanted, 0)).to(result.device))
        empty = np.flatnonzero(wanted == EMPTY)
        if len(empty):
            result.index_fill_(dim, torch.from_numpy(empty).to(result.device), 0)
    return result
