"""config.json: what is read from every spelling in use, what is refused and by which name, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import config_json, read_shape, shape_from_config
from megatron_prune.huggingface.source_facts import read_source
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import STEM
from megatron_prune.model.llama import inverse_frequencies
from megatron_prune.testing.helpers.tiny_models import tiny_config

# As published with the models, the fields that matter here.
SMOLLM_360M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 960,
    "intermediate_size": 2560,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 15,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_32_1B = {
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN25_05B = {
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SMOLLM_360M, 361_821_120),
        (LLAMA_7B, 6_738_415_616),
        (LLAMA_32_1B, 1_235_814_400),
        (QWEN25_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
    ],
)
def test_published_models_have_their_published_size(config: dict[str, Any], parameters: int) -> None:
    assert Architecture.full(shape_from_config(config)).parameters == parameters


def test_fields_left_out_by_old_configs_have_their_known_defaults() -> None:
    shape = shape_from_config(LLAMA_7B)
    assert (shape.num_query_groups, shape.kv_channels, shape.rotary_base) == (32, 128, 10000.0)
    assert not shape.tie_word_embeddings and shape.rope_scaling is None


def test_spellings_of_rope_mean_the_same() -> None:
    llama3 = LLAMA_32_1B["rope_scaling"]
    older = shape_from_config(LLAMA_32_1B)
    newer = {k: v for k, v in LLAMA_32_1B.items() if not k.startswith("rope_")}
    newer["rope_parameters"] = {**llama3, "rope_theta": 500000.0}
    assert shape_from_config(newer) == older
    assert shape_from_config({**newer, "rope_theta": 500000.0, "rope_scaling": llama3}) == older
    plain = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert shape_from_config(SMOLLM_360M | plain) == shape_from_config(SMOLLM_360M)
    linear = shape_from_config(tiny_config(rope_scaling={"type": "linear", "factor": 2}))
    assert (inverse_frequencies(linear) * 2 == inverse_frequencies(shape_from_config(tiny_config()))).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2'"),
        ({"model_type": "mixtral"}, "model_type: 'mixtral'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
        ({"vocab_size": "many"}, "vocab_size: 'many' is no positive whole number"),
        ({"intermediate_size": 0}, "intermediate_size: 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads"),
        ({"head_dim": None, "hidden_size": 31}, "head_dim: is missing, and hidden_size (31)"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim: is missing; Qwen3"),
        (
            {"model_type": "qwen3", "attention_bias": True},
            "attention_bias: biases are supported with llama",
        ),
        ({"model_type": "olmo2", "attention_bias": True}, "attention_bias: biases"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": "yes"}, "attention_bias: 'yes' is neither"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}}, "rope_scaling: beta_fast"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta: stated more than once"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is no JSON object"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window: 64 is less than"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window: 4096 is less than"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding_window: 64"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(change: dict[str, Any], words: str) -> None:
    config = {name: value for name, value in (tiny_config() | change).items() if value is not None}
    with pytest.raises(UserError) as caught:
        shape_from_config(config, "DIR/config.json")
    assert str(caught.value).startswith(f"DIR/config.json: {words}") and "\n" not in str(caught.value)


def test_windows_that_reach_over_the_whole_context_are_none(tmp_path: Path) -> None:
    for window in (None, 128, 4096):
        assert shape_from_config(tiny_config(model_type="mistral", sliding_window=window)).model_type == "mistral"
    qwen = tiny_config(model_type="qwen2", use_sliding_window=False, sliding_window=16)
    assert shape_from_config(qwen).add_qkv_bias


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: does not exist"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: invalid JSON"):
        read_shape(tmp_path)


def test_written_config_states_everything_and_is_read_back(tmp_path: Path) -> None:
    full = Architecture.full(shape_from_config(LLAMA_32_1B))
    pruned = full.without(Group.of(STEM, ((5,),)))
    config = config_json(pruned, "bfloat16", 8, {"bos_token_id": 128000, "eos_token_id": [1, 2]})
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] is None
    assert (config["hidden_size"], config["head_dim"], config["num_key_value_heads"]) == (2047, 64, 8)
    assert config["rope_scaling"] == LLAMA_32_1B["rope_scaling"] and config["rope_theta"] == 500000.0
    assert config["eos_token_id"] == [1, 2] and config["pad_token_id"] is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = read_shape(tmp_path)
    assert np.array_equal(inverse_frequencies(again), inverse_frequencies(full.shape))
    assert Architecture.full(again).parameters == pruned.parameters


def test_source_facts_hold_no_path(tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(pad_token_id=None)))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    facts = read_source(folder)
    assert facts["name"] == "some-model" and str(tmp_path) not in json.dumps(facts)
    assert facts["special_ids"] == {"bos_token_id": 1, "eos_token_id": 2}
    assert facts["generation_config"] == {"temperature": 0.6, "do_sample": True} and facts["dtype"] == "float32"
