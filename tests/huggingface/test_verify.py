"""`--verify`: judged by the model's own rounding, cached steps and generation included; wrong elements are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.errors import UserError
from megatron_prune.huggingface.cluster import refresh_code
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.huggingface.export import export, stored_weights
from megatron_prune.huggingface.replacing import write_list
from megatron_prune.huggingface.verify_export import load_stock_model, run_stock, training_logits, wrong_weight
from megatron_prune.model.architecture import Architecture
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config

CONFIG = tiny_config(num_attention_heads=8, num_key_value_heads=4)
ARCHITECTURE = Architecture.full(shape_from_config(CONFIG))
TOKENS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(5))
POLICIES = ("native", "expand", "cluster")


def massive() -> dict[str, torch.Tensor]:
    """Weights whose residual stream carries one huge channel from the first layer on, as pretrained models' does."""
    weights = {name: tensor.clone() for name, tensor in random_llama_weights(CONFIG).items()}
    weights["model.layers.0.mlp.down_proj.weight"][3] *= 3e4
    for name, tensor in weights.items():
        if name.endswith("norm.weight") and "layers.0" not in name:
            tensor *= 300
            tensor[3] = 1e-3
    return weights


def trained(_rank: int, _size: int) -> Any:
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import init_mesh

    mesh = init_mesh(choose_device("cpu"), 1, 1)
    return training_logits(massive().__getitem__, ARCHITECTURE, TOKENS, mesh).numpy()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_export_computes_the_same_with_and_without_cache(policy: str, tmp_path: Path) -> None:
    weights = random_llama_weights(CONFIG)
    done = export(weights.__getitem__, ARCHITECTURE, tmp_path / "out", kv_policy=policy)
    model = load_stock_model(done.folder, policy == "cluster")
    assert wrong_weight(model, stored_weights(weights.__getitem__, ARCHITECTURE, done.plan, done.dtypes)) is None
    run = run_stock(model, TOKENS)
    assert run.cached <= run.tolerance < 1e-4 and run.generated_alike
    names = ("cache", "past_key_values", "past_key_value", "use_cache")
    # A cache that is dropped, as transformers 5.24's was: attention sees the new tokens alone.
    for layer in model.model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *given, plain=plain, **named: plain(
            *given,
            **{name: None if name in names else value for name, value in named.items()} | {"attention_mask": None},
        )
    run = run_stock(model, TOKENS)
    assert run.cached > 100 * run.tolerance and not run.generated_alike


def test_massive_activations_pass_and_one_wrong_element_does_not(tmp_path: Path) -> None:
    weights = massive()
    done = export(weights.__getitem__, ARCHITECTURE, tmp_path / "out", kv_policy="native")
    run = run_stock(load_stock_model(done.folder), TOKENS)
    (logits,) = run_ranks(trained, 1)
    difference = (run.logits - torch.from_numpy(logits)).abs().max().item()
    assert run.rounding > 1e-4, "the model should round more than the tolerance there was once"
    assert difference <= run.tolerance and run.cached <= run.tolerance and run.generated_alike
    # The smallest error there is: the last bit of one element.
    name = "model.layers.2.mlp.up_proj.weight"
    model = load_stock_model(done.folder)
    bits = model.state_dict()[name].view(torch.int32)
    bits[7, 11] ^= 1
    assert wrong_weight(model, stored_weights(weights.__getitem__, ARCHITECTURE, done.plan, done.dtypes)) == name


def test_code_of_an_earlier_export_is_brought_up_to_date(tmp_path: Path) -> None:
    weights = random_llama_weights(CONFIG)
    folder = export(weights.__getitem__, ARCHITECTURE, tmp_path / "out", kv_policy="cluster").folder
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "modeling_cluster_llama.py").write_text("old")
    assert refresh_code(folder) == ["modeling_cluster_llama.py"] and refresh_code(folder) == []
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    # An export of an earlier version: its list says what its code was, and the new code is the tool's own again.
    (folder / "modeling_cluster_llama.py").write_text("older")
    write_list(folder)
    assert refresh_code(folder) == ["modeling_cluster_llama.py"]
    export(weights.__getitem__, ARCHITECTURE, folder, kv_policy="native", overwrite=True)
    assert not list(folder.glob("*.py"))
    stock = export(weights.__getitem__, ARCHITECTURE, tmp_path / "stock", kv_policy="native").folder
    for wrong, words in ((stock, "no export of --kv-policy cluster"), (tmp_path / "nowhere", "holds no config.json")):
        with pytest.raises(UserError, match=words):
            refresh_code(wrong)
    assert not list(stock.glob("*.py"))
