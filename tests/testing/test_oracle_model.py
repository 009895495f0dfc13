"""The oracle's forward pass: equal to transformers for every family, and to the unpruned model with zeroed units."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.errors import UserError
from megatron_prune.testing.helpers.tiny_models import random_batch, random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.reference.oracle import DenseOracle

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "mha_tied": {},
    "gqa_untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mqa": {"num_key_value_heads": 1},
    "head_dim_of_its_own": {"head_dim": 12, "num_key_value_heads": 2},
    "llama3_rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None, "hidden_size": 31, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def auto_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, auto_model, tmp_path):
    config = tiny_config(**FAMILIES[family])
    weights = random_llama_weights(config, seed=3)
    folder = write_hf_folder(tmp_path / "model", config, weights)
    model = auto_model.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    (tokens, labels), *_ = random_batch(config, seed=1, micro_batch_size=3, seq_length=50)
    theirs = model(tokens).logits.detach()
    oracle = DenseOracle(config, weights)
    torch.testing.assert_close(oracle.logits(tokens), theirs, atol=1e-5, rtol=1e-5)
    assert theirs.std() > 0.3, "logits without contrast would prove little"
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten()).item()
    assert oracle.loss(tokens, labels) == pytest.approx(loss, rel=1e-6)
    assert oracle.parameters() == model.num_parameters()


def test_folder_holds_the_same_tensors_and_config(tmp_path):
    config = tiny_config()
    weights = random_llama_weights(config, seed=3)
    folder = write_hf_folder(tmp_path / "a" / "b", config, weights)
    assert json.loads((folder / "config.json").read_text()) == config
    read = load_file(folder / "model.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_weights_are_reproducible_and_units_differ():
    config = tiny_config()
    first, second, other = (random_llama_weights(config, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])
    assert len(first["model.norm.weight"].unique()) == config["hidden_size"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_what_is_not_computed_is_refused(overrides, field):
    config = tiny_config(**overrides)
    weights = random_llama_weights(tiny_config())
    with pytest.raises(UserError, match=field):
        DenseOracle(config, weights).logits(torch.zeros(1, 4, dtype=torch.long))


def test_wrong_weights_are_named():
    config = tiny_config()
    weights = random_llama_weights(config)
    down = "model.layers.2.mlp.down_proj.weight"
    for broken in (
        {name: tensor for name, tensor in weights.items() if name != down},
        weights | {down: weights[down].T},
    ):
        with pytest.raises(UserError, match="layers.2.mlp.down_proj"):
            DenseOracle(config, broken)
    with pytest.raises(UserError, match="rotary"):
        DenseOracle(config, weights | {"model.rotary": torch.zeros(1)})


def test_a_removed_ffn_channel_is_a_zeroed_one():
    config = tiny_config()
    weights = random_llama_weights(config)
    tokens = random_batch(config, seed=2)[0][0]
    units = ((5,), (40,), (0,), (47,))
    small, zeroed = DenseOracle(config, weights), DenseOracle(config, weights)
    small.remove("ffn", units)
    for layer, (unit,) in enumerate(units):
        zeroed.weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, unit] = 0
    torch.testing.assert_close(small.logits(tokens), zeroed.logits(tokens))
    assert small.hf_state()["model.layers.0.mlp.down_proj.weight"].shape == (32, 47)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_removed_query_heads_are_zeroed_columns_and_kv_heads_go_with_their_last(kv_heads):
    config = tiny_config(num_key_value_heads=kv_heads)
    weights = random_llama_weights(config)
    tokens = random_batch(config, seed=2)[0][0]
    small, zeroed = DenseOracle(config, weights), DenseOracle(config, weights)
    for units in (((3,), (0,), (1,), (2,)), ((2,), (2,), (0,), (0,)), ((1,), (1,), (3,), (1,))):
        small.remove("head", units)
        for layer, (unit,) in enumerate(units):
            zeroed.weights[f"model.layers.{layer}.self_attn.o_proj.weight"][:, 8 * unit : 8 * unit + 8] = 0
        torch.testing.assert_close(small.logits(tokens), zeroed.logits(tokens))
        held = sum(tensor.numel() for tensor in small.weights.values())
        assert small.parameters() == held
    assert [small.live.heads[layer] for layer in range(4)] == [(0,), (3,), (2,), (3,)]
    assert small.weights["model.layers.1.self_attn.k_proj.weight"].shape == (8, 32)
    last_kv = small.live.kv_heads(1)[0] * 8
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(small.weights[name], weights[name][last_kv : last_kv + 8])


def test_a_removed_stem_channel_narrows_the_norm():
    """With a channel at zero, mean(x^2) over all H channels is (H-1)/H of the mean over the others: the unpruned model
    equals the small one when epsilon and norm weights make up for exactly that."""
    config = tiny_config(tie_word_embeddings=False)
    weights = random_llama_weights(config)
    tokens = random_batch(config, seed=2)[0][0]
    channel, hidden = 11, config["hidden_size"]
    small = DenseOracle(config, weights)
    small.remove("stem", ((channel,),))
    narrowing = (hidden - 1) / hidden
    zeroed = DenseOracle(config | {"rms_norm_eps": config["rms_norm_eps"] * narrowing}, weights)
    for name, tensor in zeroed.weights.items():
        if "embed" in name:
            tensor[:, channel] = 0
        elif "o_proj" in name or "down_proj" in name:
            tensor[channel] = 0
        elif "norm" in name:
            tensor.mul_(math.sqrt(narrowing))
    torch.testing.assert_close(small.logits(tokens), zeroed.logits(tokens))
    expected = len(weights["model.embed_tokens.weight"]) * 2 + 9 + 4 * (3 * 48 + 4 * 32)
    assert DenseOracle(config, weights).parameters() - small.parameters() == expected


def test_loss_of_the_pretrained_stories260k_on_its_kind_of_text(stories260k, tinystories, auto_model):
    """Equal to transformers', and near the published 1.91 nats per token on a sample of the text."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(stories260k / "tokenizer.model"))
    ids = []
    for story in re.split(r"(?<!\n)\n(?!\n)", tinystories.read_text()[:300_000]):  # a blank line is within a story
        ids += [tokenizer.bos_id(), *tokenizer.encode(story)]
    rows = torch.tensor(ids[: len(ids) // 257 * 257]).view(-1, 257)[::12]
    tokens, labels = rows[:, :-1], rows[:, 1:]
    config = json.loads((stories260k / "config.json").read_text())
    oracle = DenseOracle(config, load_file(stories260k / "model.safetensors"))
    assert oracle.parameters() == 260_032
    theirs = auto_model.from_pretrained(stories260k)(tokens).logits.detach()
    torch.testing.assert_close(oracle.logits(tokens), theirs, atol=1e-4, rtol=1e-4)
    assert oracle.loss(tokens, labels) == pytest.approx(1.91, abs=0.1)
