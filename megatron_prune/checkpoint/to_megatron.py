"""Write a model as Megatron-LM keeps a GPTModel: a `torch_dist` checkpoint that stock classes load.

    stock_misfit       what keeps a shape from being tensor-parallel on some ranks, and what to prune it to
    AdamState          Adam of a run, to go beside the weights
    save_for_megatron  weights, Megatron's arguments and, where given, Adam -> DIR/iter_...

The reverse of `checkpoint.megatron`, by the same names. megatron-core's own `dist_checkpointing` writes, so that the
format is that of the installed release: arguments in common.pt, or from 0.19 on among the tensors. A HybridModel loads
the folder, too, as megatron-core 0.19 lets it load a GPTModel's. Adam is written in the form `fully_reshardable` of
the distributed optimizer, where each tensor is of its weight's shape and name. All is in memory at once.
"""

import argparse
import contextlib
import logging
import multiprocessing
import queue
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.distributed import checkpoint

from megatron_prune.checkpoint.files import begin, publish
from megatron_prune.checkpoint.megatron import IN_LAYER, LAYER, TOP
from megatron_prune.checkpoint.storage import quiet
from megatron_prune.errors import UserError, first_line
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.sources import finite
from megatron_prune.runtime.folders import naming, probe_folder

# Stock layers expect an extra state of each, which is empty but for fp8.
_WITH_EXTRA_STATE = (
    *(f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "core_attention")),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
# Megatron-Bridge reads these without asking whether they are there.
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(
        ("fp16_lm_cross_entropy", "fp8_param_gather", "init_method_xavier_uniform", "is_hybrid_model"), False
    ),
    **dict.fromkeys(("init_model_with_meta_device", "moe_grouped_gemm", "multi_latent_attention"), False),
    **dict.fromkeys(("bias_gelu_fusion", "no_persist_layer_norm", "overlap_p2p_comm", "qk_l2_norm"), False),
    **dict.fromkeys(("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "mtp_num_layers"), None),
    **dict.fromkeys(("heterogeneous_layers_config_path", "hybrid_layer_pattern", "spec"), None),
    "bias_swiglu_fusion": True,
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "transformer_impl": "transformer_engine",
}
_ADAM = {"main": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # ours -> Megatron's
_ADAM_FORM = "fully_reshardable"


@dataclass(frozen=True)
class AdamState:
    """Adam as a run left it, with what it was trained with; field names are Megatron's.

    Args:
        read: (`exp_avg`, `exp_avg_sq` or `main`, Hugging Face name) -> fp32 tensor of the weight's shape.
        step: steps taken.
    """

    read: Callable[[str, str], Tensor]
    step: int
    lr: float
    min_lr: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float

    def common(self) -> dict[str, Any]:
        """What is of no weight's shape: parameter groups, and a learning rate schedule that a run overrides."""
        adam = torch.optim.AdamW(
            [torch.zeros(1)], self.lr, (self.adam_beta1, self.adam_beta2), self.adam_eps, self.weight_decay
        )
        group = {name: value for name, value in adam.param_groups[0].items() if name != "params"}
        group |= {"step": self.step, "bias_correction": True, "max_lr": self.lr, "min_lr": self.min_lr}
        group |= {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "default_config": True}
        schedule = {"max_lr": self.lr, "min_lr": self.min_lr, "lr_decay_style": "constant", "lr_warmup_steps": 0}
        schedule |= {"lr_decay_steps": 1, "num_steps": 0, "start_wd": self.weight_decay, "end_wd": self.weight_decay}
        schedule |= {"wd_incr_style": "constant", "wd_incr_steps": 1}
        with_decay, without = ({**group, "wd_mult": wd, "weight_decay": wd * self.weight_decay} for wd in (1.0, 0.0))
        groups = {"optimizer": {"param_groups": [with_decay, without]}, "param_state_sharding_type": _ADAM_FORM}
        return {"optimizer": groups, "opt_param_scheduler": schedule}


def stock_misfit(shape: LlamaShape, tp: int) -> str | None:
    """What `tp` tensor-parallel ranks cannot share out evenly, and which rounding makes it fit; None when all fits."""
    counts = {
        "query heads": (shape.num_attention_heads, f"head.round_to={tp * shape.heads_per_group}"),
        "KV heads": (shape.num_query_groups, f"head.round_to={tp * shape.heads_per_group}"),
        "FFN channels": (shape.ffn_hidden_size, f"ffn.round_to={tp}"),
    }
    wrong = {name: (count, cure) for name, (count, cure) in counts.items() if count % tp}
    if not wrong:
        return None
    cures = dict.fromkeys(cure for _, cure in wrong.values())
    many = ", ".join(f"{count} {name}" for name, (count, _) in wrong.items())
    return f"{many} do not divide by {tp}; a run with --prune-groups {' '.join(cures)} ends where they do"


def save_for_megatron(
    directory: Path,
    iteration: int,
    shape: LlamaShape,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    padded_vocab_size: int,
    more: dict[str, Any],
    adam: AdamState | None = None,
) -> Path:
    """Write DIR/iter_... and move `latest` on to it; torch.distributed must be up, with one rank.

    Args:
        shape: of the model as it is written, every layer alike.
        read: Hugging Face name -> tensor of `shape`.
        padded_vocab_size: rows of the stored embedding; those beyond the vocabulary are zero.
        more: further arguments to store.
        adam: of the same shape; None: weights alone.

    Raises:
        UserError: the model's rotary scaling is none of Megatron's, or the folder cannot be written.
        OSError: the same.
    """
    more = {"no_save_rng": True, "no_save_optim": adam is None, "use_distributed_optimizer": adam is not None} | more
    known = vars(arguments_for(shape, dtype)) | {"padded_vocab_size": padded_vocab_size, "iteration": iteration} | more
    state: dict[str, Any] = {"args": argparse.Namespace(**known), "checkpoint_version": 3.0, "iteration": iteration}
    for key, tensor in _tensors(shape, read, dtype, padded_vocab_size):
        state[key] = ShardedTensor.from_rank_offsets(key, tensor)
    content = None
    if adam:
        for ours, theirs in _ADAM.items():
            for name, tensor in _tensors(shape, partial(adam.read, ours), torch.float32, padded_vocab_size):
                key = f"optimizer.state.{theirs}.{name}"
                state[key] = ShardedTensor.from_rank_offsets(key, tensor)
        state |= adam.common()
        content = {"distrib_optim_sharding_type": _ADAM_FORM, "chained_optim_avoid_prefix": True}
        content["singleton_local_shards"] = False
    for layer in range(shape.num_layers):
        for name in _WITH_EXTRA_STATE:
            key = f"{LAYER}{name}._extra_state"
            state[f"{key}.{layer}"] = ShardedObject(key, None, (shape.num_layers,), (layer,))
    is_new = not directory.exists()
    folder = begin(directory, iteration)
    try:
        with quiet(), _by_itself(), _told(folder):
            dist_checkpointing.save(state, str(folder), content_metadata=content)
        return publish(folder, directory, iteration)
    except BaseException:
        shutil.rmtree(directory if is_new else folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """While entered, what megatron-core's writer has written reaches its save in a plain queue, as they are one process
    here. The server that it would start for that outlives a process that is killed, with a temporary folder."""
    context = vars(multiprocessing.get_context("spawn"))
    context["Manager"] = lambda: argparse.Namespace(Queue=queue.Queue)
    try:
        yield
    finally:
        del context["Manager"]


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """While entered, what megatron-core could not write to `folder` is one error that says why. Its writers are
    processes, of whose errors only the text arrives, and that in a log line, too."""
    remarks = logging.getLogger(FileSystemWriterAsync.__module__)
    before, remarks.disabled = remarks.disabled, True
    try:
        with naming(folder):
            yield
    except (RuntimeError, checkpoint.CheckpointException) as error:  # of torch's archives, of the processes
        probe_folder(folder, "--save")
        if isinstance(error, RuntimeError):
            raise
        text = first_line(next((failure for failure, _ in error.failures.values()), error))
        raise UserError(f"{folder}: cannot be written: {text}") from error
    finally:
        remarks.disabled = before


def _tensors(
    shape: LlamaShape, read: Callable[[str], Tensor], dtype: torch.dtype, padded: int
) -> Iterator[tuple[str, Tensor]]:
    """(Megatron's name, tensor): layers of one parameter are one tensor [layers, ...]."""
    for hf_name, names in TOP.items():
        if hf_name == "lm_head.weight" and shape.tie_word_embeddings:
            continue
        tensor = _as(dtype, hf_name, read)
        if tensor.dim() == 2:
            tensor = torch.cat([tensor, tensor.new_zeros(padded - len(tensor), tensor.shape[1])])
        yield names[0], tensor
    packings: dict[str, list[tuple[str, str]]] = {}
    for hf_name, (names, part) in IN_LAYER.items():
        is_there = {"bias": shape.add_qkv_bias, "norm": shape.qk_layernorm}.get(_option(hf_name), True)
        if is_there:
            packings.setdefault(names[0], []).append((hf_name, part))
    for name, parts in packings.items():
        layers = [
            _packed({part: _as(dtype, f"model.layers.{layer}.{hf}", read) for hf, part in parts}, shape)
            for layer in range(shape.num_layers)
        ]
        yield f"{LAYER}{name}", torch.stack(layers)


def _as(dtype: torch.dtype, hf_name: str, read: Callable[[str], Tensor]) -> Tensor:
    return finite(read(hf_name).to(dtype), f"{hf_name} as {dtype}", "take float32, or an older checkpoint")


def _option(hf_name: str) -> str:
    """Which option of the shape brings the parameter: `bias`, `norm` (of query and key) or none."""
    if hf_name.endswith(".bias"):
        return "bias"
    return "norm" if hf_name.startswith(("self_attn.q_norm", "self_attn.k_norm")) else ""


def _packed(parts: dict[str, Tensor], shape: LlamaShape) -> Tensor:
    """One Megatron parameter: per KV group [its q | k | v], [gate | up], or the tensor itself."""
    if "q" in parts:
        groups = [parts[p].unflatten(0, (shape.num_query_groups, -1)) for p in ("q", "k", "v")]
        return torch.cat(groups, dim=1).flatten(0, 1)
    return torch.cat([parts["gate"], parts["up"]]) if "gate" in parts else parts["all"]


def arguments_for(shape: LlamaShape, dtype: torch.dtype) -> argparse.Namespace:
    """What Megatron-LM would have been called with; what it does with dropout, experts and so on is said, too. Raises
    UserError: the model's rotary scaling is none of Megatron's."""
    if shape.no_rope_layers:
        raise UserError("layers without rotary embedding (SmolLM3's) are not written as Megatron-LM's checkpoint")
    if shape.add_proj_bias or shape.add_ffn_bias:
        raise UserError("biases of the attention output or the FFN are not written as Megatron-LM's checkpoint")
    if shape.model_type == "olmo2":
        raise UserError("norms behind attention and FFN (OLMo 2's) are not written as Megatron-LM's checkpoint")
    return argparse.Namespace(
        **_PLAIN,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        group_query_attention=shape.num_query_groups < shape.num_attention_heads,
        kv_channels=shape.kv_channels,
        vocab_size=shape.vocab_size,
        seq_length=shape.max_position_embeddings,
        max_position_embeddings=shape.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=shape.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        **_scaling(shape.rope_scaling or {}),
        normalization="RMSNorm",
        norm_epsilon=shape.norm_epsilon,
        layernorm_epsilon=shape.norm_epsilon,  # so called by newer releases
        apply_layernorm_1p=False,
        layernorm_zero_centered_gamma=False,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        untie_embeddings_and_output_weights=not shape.tie_word_embeddings,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_experts=None,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        ckpt_format="torch_dist",
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


def _scaling(scaling: dict[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for a `rope_scaling` of Hugging Face's."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}
    factor = float(scaling["factor"])
    if kind == "linear":
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": factor}
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    numbers = [scaling.get(name) for name in names]
    if numbers != [1, 4, 8192]:
        raise UserError(
            f"rope_scaling: {', '.join(names)} of Megatron-LM are 1, 4, 8192, and this model's "
            f"{', '.join(map(str, numbers))}"
        )
    return {"use_rope_scaling": True, "rope_scaling_factor": factor, "rotary_seq_len_interpolation_factor": None}
