"""Tiny Llamas for tests: a configuration, random weights that train lively, a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.huggingface.config import CLASSES
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits, weight_shapes


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A Llama of about 35,000 parameters: hidden 32, FFN 48, 4 layers, 4 heads of 8, MHA, vocabulary 64, tied.

    `overrides` are fields of `config.json`, e.g. `num_key_value_heads=2, model_type="qwen3"`.
    """
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | overrides
    return {"architectures": [CLASSES[config["model_type"]]]} | config


def random_llama_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """fp32 weights of the model that `config` describes.

    Matrices have a standard deviation of 0.9 / sqrt(inputs) (the usual 0.02 at 2,048 inputs), so that tiny models give
    gradients worth scoring; norm weights scatter around 1 and biases around 0. In the output projections every head,
    channel and row has a scale of its own (log-normal), as in trained models: saliencies then differ by more than
    rounding, and layouts can be compared over many removals.
    """
    geometry = Geometry.from_hf(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(geometry, LiveUnits.full(geometry)).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            per_unit = geometry.head_dim if "o_proj" in name else 1
            units = torch.randn(shape[1] // per_unit, generator=generator).repeat_interleave(per_unit)
            rows = torch.randn(shape[0], 1, generator=generator)
            noise = noise * (0.5 * units).exp() * (0.5 * rows).exp()
        if len(shape) == 2:
            weights[name] = noise * 0.9 / shape[1] ** 0.5
        else:
            weights[name] = 0.1 * noise + (1.0 if "norm" in name else 0.0)
    return weights


def random_batch(
    config: Mapping[str, Any], seed: int, micro_batches: int = 2, micro_batch_size: int = 2, seq_length: int = 16
) -> list[tuple[Tensor, Tensor]]:
    """`micro_batches` pairs (tokens, labels), int64 [micro_batch_size, seq_length]; labels are the next tokens.

    Tokens favour small ids, so that there is something to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(micro_batches, micro_batch_size, seq_length + 1, generator=generator)
    tokens = (uniform.square() * config["vocab_size"]).long()
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]


def write_hf_folder(path: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Write `config.json` and `model.safetensors` into `path` (made when absent) and return it."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
