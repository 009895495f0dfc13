"""`--kv-policy cluster`: models whose KV heads serve different numbers of query heads, run by the code they bring.

Logits come from four sides: the training model and the dense oracle, the cluster export under sdpa and eager attention,
and the expanded export, which is stock code. Import and further pruning are test_cluster_import's matter.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.huggingface.export import Exported, export
from megatron_prune.huggingface.kv_policy import CLUSTER, EXPAND, NATIVE
from megatron_prune.huggingface.weights import FolderWeights, live_view
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config
from megatron_prune.testing.reference import oracle_model
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits

TOLERANCE = 1e-4
TOKENS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(5))
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
UNEVEN = ([0, 1, 2, 4, 6], [0, 1, 2, 3, 7], [1, 3, 5, 6, 7], [0, 2, 4, 6, 7])  # of 8 query and 4 KV heads
# case -> config.json's fields, live query heads of each layer, what `auto` takes
CASES: dict[str, tuple[dict[str, Any], tuple[list[int], ...], str]] = {
    "llama": (GROUPED, UNEVEN, EXPAND),
    "llama3_untied": (GROUPED | {"rope_scaling": LLAMA3, "tie_word_embeddings": False}, UNEVEN, EXPAND),
    "qwen2": (GROUPED | {"model_type": "qwen2"}, UNEVEN, EXPAND),
    "qwen3": (
        {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 2},
        ([0, 1, 2, 4, 6], [0, 1, 2, 3, 7], [3, 4, 5, 6, 7], [0, 1, 2, 3, 5]),
        EXPAND,
    ),
    "15_of_5": (
        {"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 4},
        ([0, 1, 2, 3, 4, 5, 14], [0, 3, 6, 9, 12, 13, 14], [0, 1, 2, 6, 7, 8, 10], [2, 5, 8, 9, 10, 11, 12]),
        EXPAND,
    ),
    "mha": ({"num_attention_heads": 4}, ([0, 1, 2], [0, 2, 3], [1, 2, 3], [0, 1, 3]), NATIVE),
    "mqa": ({"num_attention_heads": 8, "num_key_value_heads": 1}, UNEVEN, NATIVE),
}


def architecture_of(case: str) -> Architecture:
    """The case's model: some channels gone as well, hidden 29 is no multiple of its heads."""
    overrides, heads, _ = CASES[case]
    full = Architecture.full(shape_from_config(tiny_config(**overrides)))

    def some(count: int, gone: set[int]) -> np.ndarray:
        return np.array(sorted(set(range(count)) - gone), dtype=np.int32)

    live = {
        **full.live,
        HEAD: tuple(np.array(ids, dtype=np.int32) for ids in heads),
        FFN: tuple(some(48, {layer, 20, 30 + layer}) for layer in range(4)),
        STEM: (some(32, {0, 9, 31}),),
    }
    return Architecture(full.shape, live)


def read_live(case: str) -> Any:
    weights = random_llama_weights(tiny_config(**CASES[case][0]))
    return live_view(weights.__getitem__, architecture_of(case))


def logits_of_training_model(_rank: int, _size: int) -> list[np.ndarray]:
    from megatron_prune.huggingface.verify_export import training_logits
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import init_mesh

    mesh = init_mesh(choose_device("cpu"), 1, 1)
    return [training_logits(read_live(case), architecture_of(case), TOKENS, mesh).numpy() for case in CASES]


@dataclasses.dataclass(frozen=True)
class Exports:
    """Folders and export reports by case and policy, and the training model's logits by case."""

    base: Path
    done: dict[tuple[str, str], Exported]
    trained: dict[str, torch.Tensor]

    def folder(self, case: str, policy: str = CLUSTER) -> Path:
        return self.base / f"{case}_{policy}"

    def load(self, case: str, policy: str = CLUSTER, attention: str = "sdpa") -> Any:
        if policy == EXPAND and case == "qwen3":
            needs("4.51")  # this version's stock classes lack Qwen 3; the cluster export brings what it needs
        return load(self.folder(case, policy), attention, policy == CLUSTER)


def needs(version: str) -> None:
    transformers = pytest.importorskip("transformers")
    if Version(transformers.__version__) < Version(version):
        pytest.skip(f"needs transformers {version}")


def cached(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's keys and values [B, K, T, D] after TOKENS; old versions keep them in two lists."""
    cache = model(TOKENS, use_cache=True).past_key_values
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def load(folder: Path, attention: str = "sdpa", trust: bool = True, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, trust_remote_code=trust, **options
    )
    return model.eval()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    base = tmp_path_factory.mktemp("clusters")
    done = {
        (case, policy): export(read_live(case), architecture_of(case), base / f"{case}_{policy}", kv_policy=policy)
        for case in CASES
        for policy in (CLUSTER, EXPAND)
    }
    (logits,) = run_ranks(logits_of_training_model, 1)
    return Exports(base, done, {case: torch.from_numpy(values) for case, values in zip(CASES, logits)})


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.std() > 0.3, "logits without contrast would prove little"
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_training_model_and_the_oracle(case: str, exports: Exports) -> None:
    trained, a = exports.trained[case], architecture_of(case)
    for policy in (CLUSTER, EXPAND):
        for attention in ("sdpa", "eager"):
            with torch.no_grad():
                ours = exports.load(case, policy, attention)(TOKENS).logits
            assert largest_difference(ours, trained) < TOLERANCE, (policy, attention)
    geometry = Geometry.from_hf(tiny_config(**CASES[case][0]))
    heads, ffn = (tuple(tuple(map(int, ids)) for ids in arrays) for arrays in (a.sites(HEAD), a.sites(FFN)))
    live, read = LiveUnits(heads, ffn, tuple(map(int, a.ids(STEM, 0))), geometry.queries_per_kv), read_live(case)
    names = FolderWeights(exports.folder(case)).stored
    expected = oracle_model.logits(TOKENS, {name: read(name) for name in names}, geometry, live)
    assert largest_difference(trained, expected) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_generation_is_the_same_with_and_without_cache(case: str, exports: Exports) -> None:
    prompt, mask = TOKENS[:, :9], torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0  # the first prompt is shorter: padded on the left
    results = []
    for policy in (CLUSTER, EXPAND):
        for attention in ("sdpa", "eager"):
            model = exports.load(case, policy, attention)
            for use_cache in (True, False):
                results.append(model.generate(prompt, attention_mask=mask, use_cache=use_cache, **GREEDY))
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(set(results[0][0, 9:].tolist())) > 1 or len(set(results[0][1, 9:].tolist())) > 1


def test_cache_is_read_under_every_name_and_none_is_swallowed(exports: Exports) -> None:
    from transformers import DynamicCache

    model = exports.load("llama")
    attention = model.model.layers[1].self_attn
    states = torch.randn(1, 5, 29, generator=torch.Generator().manual_seed(1))
    rotary = model.model.rotary_emb(states, torch.arange(5)[None])

    def attend(start: int, end: int, **arguments: Any) -> torch.Tensor:
        where = tuple(part[:, start:end] for part in rotary)
        return attention(states[:, start:end], position_embeddings=where, attention_mask=None, **arguments)[0]

    with torch.no_grad():
        whole = attend(0, 5)[:, -1:]
        for name in ("cache", "past_key_values", "past_key_value"):
            cache = DynamicCache()
            attend(0, 4, **{name: cache})
            torch.testing.assert_close(attend(4, 5, **{name: cache}, use_cache=True), whole)
        for unknown in (
            {"key_value_store": DynamicCache()},
            {"old": (states, states)},
            {"old_keys": torch.zeros(1, 4, 4, 8)},
            {"use_cache": True},
            {"cache": DynamicCache(), "past_key_values": DynamicCache()},
        ):
            with pytest.raises(TypeError, match=r"modeling_cluster_llama.py does not know .* --refresh-code"):
                attend(4, 5, **unknown)


def test_beams_and_a_static_cache_give_what_the_expanded_model_gives(exports: Exports) -> None:
    needs("4.50")  # older ones refuse a static cache
    compact, stock = exports.load("llama"), exports.load("llama", EXPAND)
    for options in ({"num_beams": 3}, {"cache_implementation": "static"}):
        arguments = GREEDY | options
        assert torch.equal(compact.generate(TOKENS[:, :7], **arguments), stock.generate(TOKENS[:, :7], **arguments))


@pytest.mark.parametrize("case", CASES)
def test_only_live_kv_heads_are_stored_and_cached(case: str, exports: Exports) -> None:
    a, done = architecture_of(case), exports.done[case, CLUSTER]
    assert done.stored_parameters == a.parameters
    model = exports.load(case)
    assert sum(parameter.numel() for parameter in model.parameters()) == a.parameters
    heads = [keys.shape[1] for keys, _ in cached(model)]
    assert heads == [len(a.ids(KV_HEAD, layer)) for layer in range(4)]
    per_token = sum(keys[0, :, 0].numel() + values[0, :, 0].numel() for keys, values in cached(model))
    assert per_token == a.kv_cache_channels == done.plan.cache_elements(a)
    stock = cached(exports.load(case, EXPAND))
    expanded = exports.done[case, EXPAND].plan.cache_elements(a)
    assert sum(2 * keys[0, :, 0].numel() for keys, _ in stock) == expanded >= per_token


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_training_step_has_the_expanded_models_gradients(case: str, attention: str, exports: Exports) -> None:
    compact, stock = (exports.load(case, policy, attention).train() for policy in (CLUSTER, EXPAND))
    compact.gradient_checkpointing_enable()
    losses = [model(TOKENS, labels=TOKENS, use_cache=False).loss for model in (compact, stock)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    theirs = dict(stock.named_parameters())
    for name, parameter in compact.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        if parameter.shape == theirs[name].shape and "k_proj" not in name and "v_proj" not in name:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
    # A repeated KV head's gradients add up to that of the one it was repeated from.
    index = exports.done[case, EXPAND].plan.repeats
    rows = theirs["model.layers.1.self_attn.k_proj.weight"].grad.unflatten(0, (-1, 8))
    ours = compact.model.layers[1].self_attn.k_proj.weight.grad.unflatten(0, (-1, 8))
    summed = torch.zeros_like(ours).index_add_(0, torch.from_numpy(index[1]), rows)
    torch.testing.assert_close(ours, summed, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["llama3_untied", "qwen3"])
def test_trained_model_is_saved_with_its_code_and_loads_again(case: str, exports: Exports, tmp_path: Path) -> None:
    model = exports.load(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    names = {file.name for file in (tmp_path / "tuned").iterdir()}
    assert {"configuration_cluster_llama.py", "modeling_cluster_llama.py", "config.json"} <= names
    again = load(tmp_path / "tuned")
    with torch.no_grad():
        logits = again(TOKENS).logits
        assert torch.equal(logits, model(TOKENS).logits)
    assert largest_difference(logits, exports.trained[case]) > 0.01
    assert read_architecture(tmp_path / "tuned") == architecture_of(case)


def test_base_model_and_a_fresh_model_of_the_configuration(exports: Exports) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    folder = exports.folder("llama")
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        states = exports.load("llama").model(TOKENS).last_hidden_state
        assert torch.equal(base(TOKENS).last_hidden_state, states)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert sum(parameter.numel() for parameter in fresh.parameters()) == architecture_of("llama").parameters


def test_layers_are_not_split_over_devices(exports: Exports) -> None:
    model = exports.load("llama")
    assert {type(layer).__name__ for layer in model.model.layers} <= set(model._no_split_modules)
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    spread = load(exports.folder("llama"), device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(spread(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("case", CASES)
def test_auto_takes_stock_code_wherever_it_is_exact(case: str, exports: Exports, tmp_path: Path) -> None:
    done = export(read_live(case), architecture_of(case), tmp_path / "out")
    assert done.plan.policy == CASES[case][2] and not list((tmp_path / "out").glob("*.py"))
    assert (done.plan.obstacle is None) == (done.plan.policy == NATIVE)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "auto_map" not in config and "megatron_prune" not in config


def test_model_card_says_that_code_comes_with_the_model(exports: Exports) -> None:
    card = (exports.folder("llama") / "README.md").read_text()
    a = architecture_of("llama")
    assert "- custom_code" in card and card.count('from_pretrained("FOLDER", trust_remote_code=True)') == 2
    assert "`ClusterLlamaForCausalLM`" in card and "MistralForCausalLM" not in card
    assert f"| KV cache, elements per token | {2 * 4 * 4 * 8:,} | {a.kv_cache_channels:,} |" in card
    stock = (exports.folder("llama", EXPAND) / "README.md").read_text()
    assert "custom_code" not in stock and f"| {2 * 4 * 5 * 8:,} |" in stock


def test_code_that_travels_needs_torch_and_transformers_only(exports: Exports) -> None:
    files = list(exports.folder("llama").glob("*.py"))
    assert len(files) == 2
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", "transformers"}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level or node.module.split(".")[0] in {"torch", "transformers"}


def test_configuration_refuses_clusters_that_do_not_add_up() -> None:
    from megatron_prune.huggingface.remote.configuration_cluster_llama import ClusterLlamaConfig

    with pytest.raises(ValueError, match="layer 1 are not positive numbers that add up to num_attention_heads"):
        ClusterLlamaConfig(num_hidden_layers=2, num_attention_heads=4, queries_per_kv_head=[[3, 1], [2, 1]])
    with pytest.raises(ValueError, match="1 layers, num_hidden_layers is 2"):
        ClusterLlamaConfig(num_hidden_layers=2, num_attention_heads=4, queries_per_kv_head=[[3, 1]])
