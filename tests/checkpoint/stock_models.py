"""megatron-core's own models of a Llama with its own layers, DDP and Adam: what Megatron-LM builds, but for
TransformerEngine.

    gpt_model, hybrid_model   of a shape, with random weights
    wrapped                   DDP and Adam around one
    train_step                one step of one, or of ours
"""

import dataclasses
import importlib.util

import torch

PADDED = 64  # rows of the embedding
HAS_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None
GPT_INTEROP = importlib.util.find_spec("megatron.core.dist_checkpointing.gpt_checkpoint_interop") is not None


def gpt_model(shape, bf16=False):
    """megatron-core's own model, with its own layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        init_method_std=0.2,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_layernorm),
        vocab_size=PADDED,
        max_sequence_length=shape.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
    )
    return Float16Module(config, shaken(model)) if bf16 else shaken(model)


def shaken(model):
    """Norms and biases of 1 and 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def hybrid_model(shape):
    """megatron-core's HybridModel on local layers; it has no other final norm than TransformerEngine's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    hybrid_block.TENorm = WrappedTorchNorm
    gpt = gpt_model(shape)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_layernorm)
    own = layer.submodules
    names = {"sharded_state_dict_keys_map": own.sharded_state_dict_keys_map}
    attention = TransformerLayerSubmodules(
        input_layernorm=own.input_layernorm,
        self_attention=own.self_attention,
        self_attn_bda=own.self_attn_bda,
        **names,
    )
    ffn = TransformerLayerSubmodules(pre_mlp_layernorm=own.pre_mlp_layernorm, mlp=own.mlp, mlp_bda=own.mlp_bda, **names)
    stack = ModuleSpec(
        hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(layer.module, submodules=attention),
            mlp_layer=ModuleSpec(MLPLayer, submodules=ffn),
        ),
    )
    model = HybridModel(
        dataclasses.replace(gpt.config, num_layers=2 * shape.num_layers),
        stack,
        vocab_size=gpt.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        hybrid_layer_pattern="*-" * shape.num_layers,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
    )
    return shaken(model)


def train_step(ddp, optimizer, step, tokens, positions, mask, labels):
    """The loss before the step."""
    from megatron.core.distributed import finalize_model_grads

    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    loss = ddp(tokens, positions, mask, labels=labels).float().mean()
    loss.backward()
    finalize_model_grads([ddp])
    step()
    return float(loss.detach())


def wrapped(model, lr=3e-3, distributed=False, min_lr=0.0):
    """(DDP, optimizer) around the model."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    ddp = DistributedDataParallel(model.config, config, model)
    adam = {"lr": lr, "min_lr": min_lr, "bf16": model.config.bf16, "params_dtype": model.config.params_dtype}
    adam |= {"weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 1.0}
    options = OptimizerConfig(optimizer="adam", use_distributed_optimizer=distributed, **adam)
    return ddp, get_megatron_optimizer(options, [ddp], use_gloo_process_groups=False)
