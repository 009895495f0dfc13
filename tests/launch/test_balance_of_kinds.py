"""What the defaults take from each kind of unit, on eight layers of SmolLM2-135M's shape.

A head of that shape has 64 columns where small test models have 8: what is divided twice, or summed where the others
are not, sends all heads away first (9 query heads to 3 while the FFN kept 97 % of its channels, and the loss doubled).
"""

import json
import shutil

import pytest
import torch

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.data.preprocess import Options, preprocess
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from tests.launch.conftest import VOCABULARY

LAYERS = 8
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
STEPS, LEFT = 5, 0.75  # of the parameters in the layers
# Share of its units that each kind keeps: the least and the most that is still balance. Heads leave last, or with the
# others; what is left of any kind is at least 0.6 (the default `balance`) of a proportionally smaller model's.
KEPT = {HEAD: (0.5, 1.0), KV_HEAD: (0.5, 1.0), FFN: (0.45, 0.9), STEM: (0.55, 1.0)}


def first_layers(model, folder):
    """A folder with the first layers of the Hugging Face model in another one."""
    from safetensors.torch import load_file

    folder.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".model", ".jinja", ".txt") and "index" not in file.name:
            shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    weights = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = {
        name: t
        for name, t in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    write_hf_folder(folder, config, kept)
    return folder


def pruned(source, data, save, sequence):
    """The architecture that the defaults lead to in a few steps."""
    shape = json.loads((source / "config.json").read_text())
    hidden, ffn, head = shape["hidden_size"], shape["intermediate_size"], shape.get("head_dim") or 64
    layer = 2 * hidden * head * (shape["num_attention_heads"] + shape["num_key_value_heads"]) + 3 * hidden * ffn
    target = int(LEFT * LAYERS * layer) + shape["vocab_size"] * hidden
    words = [
        *("--hf-model", source, "--data-path", data, "--split", "90,10,0", "--save", save, "--device", "cpu"),
        *("--seq-length", sequence, "--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", STEPS),
        *("--lr", "1e-4", "--min-lr", 0, "--lr-warmup-iters", 1, "--eval-interval", 1000, "--eval-iters", 1),
        *("--prune-target-params", target, "--prune-curve", "end=80%", "--no-report", "--progress", "lines"),
    ]
    fates = watch_ranks(victim, 1, main, [str(word) for word in words])
    assert fates[0].exit_code == 0, fates[0].output
    return CheckpointReader(save).record.architecture


def assert_balanced(architecture):
    kept = {kind: architecture.width(kind) / kind.size(architecture.shape) for kind in KEPT}
    for kind, (least, most) in KEPT.items():
        assert least <= kept[kind] <= most, {one.name: round(share, 2) for one, share in kept.items()}
    return kept


def test_random_weights_do_not_lose_their_heads(workshop, tmp_path):
    torch.manual_seed(1)
    config = tiny_config(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, head_dim=64, tie_word_embeddings=True, **SIZES
    )
    source = tmp_path / "source"
    write_hf_folder(source, config, random_llama_weights(config))
    shutil.copy(workshop / "tokenizer.model", source)
    assert_balanced(pruned(source, workshop / "data", tmp_path / "run", 32))


def test_the_real_model_keeps_its_heads(real_data, tmp_path):
    model = real_data / "SmolLM2-135M"
    if not (model / "config.json").is_file():
        pytest.skip("the real inputs hold no SmolLM2-135M (make smollm2 writes one: build/smollm2/source)")
    source = first_layers(model, tmp_path / "source")
    text = real_data / "text" / "tinystories_944k.txt"
    (tmp_path / "text.txt").write_text(text.read_text()[:60_000])
    preprocess([str(tmp_path / "text.txt")], str(tmp_path / "data"), Options(tokenizer_model=str(source)))
    kept = assert_balanced(pruned(source, tmp_path / "data", tmp_path / "run", 128))
    assert kept[HEAD] > kept[FFN], "what a well-trained model needs least is FFN channels"
