"""Every supported family, in and out: bit for bit unpruned, and with equal logits unpruned and pruned.

Source models are made and saved by stock transformers, so what is read here is what it writes today; the spelling of
older versions is test_config's matter. Logits come from three sides: stock transformers on the exported folder, the
training model (all cases in one process of its own), and the dense oracle or the masked source model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import read_shape, shape_from_config
from megatron_prune.huggingface.export import export
from megatron_prune.huggingface.kv_policy import EXPAND, NATIVE
from megatron_prune.huggingface.source_facts import read_source
from megatron_prune.huggingface.verify_export import stock_logits
from megatron_prune.huggingface.weights import FolderWeights, live_view
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, LAYER, STEM
from megatron_prune.model.shape import LlamaShape
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.reference import oracle_model
from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits

TOLERANCE = 1e-4
TOKENS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(5))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied_gqa": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "num_key_value_heads": 2}),
    "linear": ("llama", {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 4, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4, "head_dim": 16}),
    "olmo2": ("olmo2", {"rms_norm_eps": 1e-3}),
    "olmo2_gqa": ("olmo2", {"num_key_value_heads": 4, "head_dim": 12, "tie_word_embeddings": True}),
    "biases": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "ffn_biases": ("smollm3", {"num_key_value_heads": 4, "mlp_bias": True, "pad_token_id": 0}),
    "smollm3": ("smollm3", {"num_key_value_heads": 4, "no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
}


def make_source(folder: Path, model_type: str, overrides: dict[str, Any]) -> Path:
    """A folder as stock transformers saves it, with weights that give logits of some contrast."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | overrides)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.9 / parameter.shape[1] ** 0.5
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    return folder


def some_groups(architecture: Architecture, heads: int, ffn: int, stem: int, seed: int) -> Architecture:
    """Remove that many groups of each kind, with units that differ over layers."""
    rng = np.random.default_rng(seed)
    for kind, count in ((HEAD, heads), (FFN, ffn), (STEM, stem)):
        for _ in range(count):
            live = [architecture.ids(STEM, 0)] if kind == STEM else [architecture.ids(kind, n) for n in range(3)]
            units = tuple((int(rng.choice(ids)),) for ids in live)
            architecture = architecture.without(Group.of(kind, units))
    return architecture


def heads_left(architecture: Architecture, *layers: list[int]) -> Architecture:
    """The same with just these query heads."""
    heads = tuple(np.array(ids, dtype=np.int32) for ids in layers)
    return Architecture(architecture.shape, {**architecture.live, HEAD: heads})


def prune(case: str, full: Architecture) -> Architecture:
    """The pruned cases; a case of a family's name is unpruned."""
    uneven = ([0, 1, 2, 4, 6], [0, 1, 2, 3, 7], [1, 3, 5, 6, 7])  # of 8 query and 4 KV heads
    return {
        "61_with_7_heads": lambda: some_groups(full, 1, 5, 3, seed=1),
        "native_groups": lambda: some_groups(heads_left(full, *[[0, 1, 4, 5, 6, 7]] * 3), 0, 3, 4, seed=2),
        "clusters": lambda: some_groups(heads_left(full, *uneven), 0, 4, 4, seed=3),
        "one_query_per_kv_head": lambda: some_groups(heads_left(full, [0, 2, 4], [1, 3, 7], [0, 3, 5]), 0, 2, 1, 4),
        "qwen2_clusters": lambda: some_groups(heads_left(full, *uneven), 0, 4, 5, seed=5),
        "qwen3_pruned": lambda: some_groups(full, 2, 4, 5, seed=6),
        "olmo2_heads": lambda: some_groups(full, 2, 5, 3, seed=10),
        "olmo2_groups": lambda: some_groups(heads_left(full, *[[0, 1, 4, 5, 6, 7]] * 3), 0, 3, 4, seed=11),
        "olmo2_repeated": lambda: some_groups(heads_left(full, [0, 1, 2, 3], [1, 2, 4, 7], [2, 3, 6, 7]), 0, 3, 5, 12),
        "biases_groups": lambda: some_groups(heads_left(full, *[[0, 1, 4, 5, 6, 7]] * 3), 0, 3, 4, seed=13),
        "biases_odd_width": lambda: some_groups(heads_left(full, *uneven), 0, 3, 3, seed=14),
        "smollm3_groups": lambda: some_groups(heads_left(full, *[[0, 1, 4, 5, 6, 7]] * 3), 0, 3, 4, seed=8),
        "llama3_heads_and_ffn": lambda: some_groups(full, 3, 10, 0, seed=7),
    }[case]()


PRUNED = {  # case -> family, KV policy in force, class of the export
    "61_with_7_heads": ("llama", NATIVE, "MistralForCausalLM"),
    "native_groups": ("llama_tied_gqa", NATIVE, "LlamaForCausalLM"),
    "clusters": ("llama_tied_gqa", EXPAND, "LlamaForCausalLM"),
    "one_query_per_kv_head": ("llama_tied_gqa", NATIVE, "LlamaForCausalLM"),
    "qwen2_clusters": ("qwen2", EXPAND, "Qwen2ForCausalLM"),
    "qwen3_pruned": ("qwen3", EXPAND, "Qwen3ForCausalLM"),
    "llama3_heads_and_ffn": ("llama3", EXPAND, "MistralForCausalLM"),
    "olmo2_heads": ("olmo2", NATIVE, "Olmo2ForCausalLM"),
    "olmo2_groups": ("olmo2_gqa", NATIVE, "Olmo2ForCausalLM"),
    "olmo2_repeated": ("olmo2_gqa", EXPAND, "Olmo2ForCausalLM"),
    "biases_groups": ("biases", NATIVE, "LlamaForCausalLM"),
    "biases_odd_width": ("biases", EXPAND, "SmolLM3ForCausalLM"),
    "smollm3_groups": ("smollm3", NATIVE, "SmolLM3ForCausalLM"),
}
CASES = [*FAMILIES, *PRUNED]


def logits_of_training_model(_rank: int, _size: int, jobs: list[tuple[str, Architecture]]) -> list[np.ndarray]:
    from megatron_prune.huggingface.verify_export import training_logits
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import init_mesh

    mesh = init_mesh(choose_device("cpu"), 1, 1)
    results = []
    for folder, architecture in jobs:
        read = live_view(FolderWeights(folder), architecture)
        results.append(training_logits(read, architecture, TOKENS, mesh).numpy())
    return results


@dataclasses.dataclass(frozen=True)
class World:
    """Source folders by family, architectures and the training model's logits by case, folders to export into."""

    sources: dict[str, Path]
    architectures: dict[str, Architecture]
    trained: dict[str, torch.Tensor]

    def source(self, case: str) -> Path:
        return self.sources[PRUNED[case][0] if case in PRUNED else case]

    def read(self, case: str):
        return live_view(FolderWeights(self.source(case)), self.architectures[case])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("families")
    sources = {name: make_source(base / name, *recipe) for name, recipe in FAMILIES.items()}
    full = {name: Architecture.full(read_shape(folder)) for name, folder in sources.items()}
    architectures = {case: prune(case, full[PRUNED[case][0]]) if case in PRUNED else full[case] for case in CASES}
    jobs = [(str(sources[PRUNED[c][0] if c in PRUNED else c]), architectures[c]) for c in CASES]
    (logits,) = run_ranks(logits_of_training_model, 1, jobs)
    trained = {case: torch.from_numpy(values) for case, values in zip(CASES, logits)}
    return World(sources, architectures, trained)


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3, "logits without contrast would prove little"
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_model_comes_back_bit_for_bit(family: str, world: World, tmp_path: Path) -> None:
    from transformers import AutoConfig

    source = world.sources[family]
    weights, shape = FolderWeights(source), read_shape(source)
    weights.check(shape)
    done = export(weights, Architecture.full(shape), tmp_path / "out", source=read_source(source))
    again = FolderWeights(tmp_path / "out")
    again.check(read_shape(tmp_path / "out"))
    assert set(again.stored) == set(weights.stored)
    for name, stored in weights.stored.items():
        assert again.stored[name].dtype == stored.dtype
        assert torch.equal(again(name), weights(name)), name
    assert read_shape(tmp_path / "out") == shape
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (source, tmp_path / "out"))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    # Qwen2's own config leaves head_dim out, and the layers from which windows would be used mean nothing without any.
    assert changed <= {"_name_or_path", "transformers_version", "head_dim", "max_window_layers"}
    assert done.plan.policy == NATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_training_model_computes_what_transformers_does(family: str, world: World) -> None:
    assert largest_difference(world.trained[family], stock_logits(world.sources[family], TOKENS)) < TOLERANCE


@pytest.mark.parametrize("case", PRUNED)
def test_pruned_model_loads_in_stock_transformers_with_equal_logits(case: str, world: World, tmp_path: Path) -> None:
    _, policy, class_name = PRUNED[case]
    architecture = world.architectures[case]
    done = export(world.read(case), architecture, tmp_path / "out")
    assert (done.plan.policy, done.class_name) == (policy, class_name)
    assert largest_difference(world.trained[case], stock_logits(tmp_path / "out", TOKENS)) < TOLERANCE
    if policy == NATIVE:
        assert done.stored_parameters == architecture.parameters
    else:
        assert done.stored_parameters > architecture.parameters


@pytest.mark.parametrize("case", PRUNED)
def test_training_model_equals_the_dense_oracle(case: str, world: World) -> None:
    a, config = world.architectures[case], world.source(case) / "config.json"
    geometry = Geometry.from_hf(json.loads(config.read_text()))
    heads, ffn = (tuple(tuple(map(int, ids)) for ids in arrays) for arrays in (a.sites(HEAD), a.sites(FFN)))
    live = LiveUnits(heads, ffn, tuple(map(int, a.ids(STEM, 0))), geometry.queries_per_kv)
    read = world.read(case)
    names = FolderWeights(world.source(case)).stored
    expected = oracle_model.logits(TOKENS, {name: read(name) for name in names}, geometry, live)
    assert largest_difference(world.trained[case], expected) < TOLERANCE


def test_phi3_is_a_llama_with_fused_weights(tmp_path: Path) -> None:
    """Phi-3 in, a Llama out: the same logits whole, and pruned as the oracle computes them from the parts."""
    source = make_source(tmp_path / "phi3", "phi3", {"num_key_value_heads": 4, "pad_token_id": 0})
    weights, shape = FolderWeights(source), read_shape(source)
    weights.check(shape)
    assert weights.total_bytes == 4 * Architecture.full(shape).parameters
    done = export(weights, Architecture.full(shape), tmp_path / "out")
    assert done.class_name == "LlamaForCausalLM"
    expected = stock_logits(source, TOKENS)
    assert largest_difference(stock_logits(tmp_path / "out", TOKENS), expected) < TOLERANCE
    pruned = some_groups(heads_left(Architecture.full(shape), *[[0, 1, 4, 5, 6, 7]] * 3), 0, 3, 4, seed=9)
    (trained,) = run_ranks(
        logits_of_training_model, 1, [(str(source), Architecture.full(shape)), (str(source), pruned)]
    )
    assert largest_difference(torch.from_numpy(trained[0]), expected) < TOLERANCE
    export(live_view(weights, pruned), pruned, tmp_path / "pruned")
    assert largest_difference(torch.from_numpy(trained[1]), stock_logits(tmp_path / "pruned", TOKENS)) < TOLERANCE
    with pytest.raises(UserError, match="rows"):
        content = json.loads((source / "config.json").read_text()) | {"intermediate_size": 43}
        (source / "config.json").write_text(json.dumps(content))
        FolderWeights(source)


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text", "gemma2"])
def test_families_that_are_not_computed_are_refused_with_the_reason(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **SIZES).to_dict()
    with pytest.raises(UserError, match=f"model_type: {model_type} is not supported: .*(norm|windows)"):
        shape_from_config(config)


def test_smollm3_without_its_list_has_the_intervals_layers() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("smollm3", **(SIZES | {"num_hidden_layers": 9})).to_dict()
    stated = shape_from_config(config)
    assert stated.no_rope_layers == (3, 7) and stated.tie_word_embeddings
    assert LlamaShape.from_json(json.loads(json.dumps(stated.to_json()))) == stated
    assert shape_from_config({**config, "no_rope_layers": None}) == stated
    live = {
        kind: sites if kind.is_shared else tuple(ids[:0] if n == 1 else ids for n, ids in enumerate(sites))
        for kind, sites in Architecture.full(stated).live.items()
    }
    live[LAYER] = (np.array([0, 2, 3, 4, 5, 6, 7, 8], dtype=np.int32),)
    assert Architecture(stated, live).renumbered().shape.no_rope_layers == (2, 6), "they stay the same layers"
    for wrong in ([1, 0], [1, 2] * 9, "all"):
        with pytest.raises(UserError, match="no_rope_layers"):
            shape_from_config({**config, "no_rope_layers": wrong})


def test_pruned_heads_and_channels_equal_the_masked_source(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case = "llama3_heads_and_ffn"
    architecture = world.architectures[case]
    export(world.read(case), architecture, tmp_path / "out")
    masked = AutoModelForCausalLM.from_pretrained(world.source(case))
    with torch.no_grad():
        for layer, module in enumerate(masked.model.layers):
            d = architecture.shape.kv_channels
            for head in set(range(8)) - set(architecture.ids(HEAD, layer).tolist()):
                module.self_attn.o_proj.weight[:, head * d : (head + 1) * d] = 0
            for channel in set(range(44)) - set(architecture.ids(FFN, layer).tolist()):
                module.mlp.down_proj.weight[:, channel] = 0
        expected = masked(TOKENS).logits
    assert largest_difference(stock_logits(tmp_path / "out", TOKENS), expected) < TOLERANCE


def test_expand_can_be_asked_for_where_native_would_do(world: World, tmp_path: Path) -> None:
    case = "native_groups"
    done = export(world.read(case), world.architectures[case], tmp_path / "out", kv_policy=EXPAND)
    assert done.plan.num_key_value_heads == world.architectures[case].num_attention_heads
    assert largest_difference(world.trained[case], stock_logits(tmp_path / "out", TOKENS)) < TOLERANCE


def test_exported_model_generates_with_and_without_cache(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for case in ("61_with_7_heads", "qwen2_clusters"):
        export(world.read(case), world.architectures[case], tmp_path / case)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / case)
        arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        with_cache = model.generate(TOKENS[:1, :8], use_cache=True, **arguments)
        assert torch.equal(with_cache, model.generate(TOKENS[:1, :8], use_cache=False, **arguments))
