"""A cluster export comes back as the model it was: same live units by their original numbers, and prunes further."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.huggingface.config import read_shape, shape_from_config
from megatron_prune.huggingface.export import export
from megatron_prune.huggingface.kv_policy import CLUSTER
from megatron_prune.huggingface.weights import FolderWeights, live_view, source_view
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.families import table_of
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

CONFIG = tiny_config(model_type="qwen2", num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
FULL = Architecture.full(shape_from_config(CONFIG))
HEADS = ([0, 1, 2, 4, 6], [0, 1, 2, 3, 7], [1, 3, 5, 6, 7], [0, 2, 4, 6, 7])
PRUNED = Architecture(
    FULL.shape,
    {
        **FULL.live,
        HEAD: tuple(np.array(ids, dtype=np.int32) for ids in HEADS),
        FFN: tuple(np.array([i for i in range(48) if i % 7 != layer], dtype=np.int32)[:40] for layer in range(4)),
        STEM: (np.array([i for i in range(32) if i not in (0, 9, 31)], dtype=np.int32),),
    },
)
FURTHER = (  # the second removes layer 0's KV head 1 and layer 3's KV head 0
    Group.of(FFN, ((1,), (3,), (0,), (5,))),
    Group.of(HEAD, ((2,), (7,), (6,), (0,))),
    Group.of(STEM, ((30,),)),
)
TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_llama_weights(CONFIG)


@pytest.fixture(scope="module")
def exported(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "out"
    export(live_view(weights.__getitem__, PRUNED), PRUNED, folder, kv_policy=CLUSTER)
    return folder


def edited(exported: Path, folder: Path, **fields: Any) -> Path:
    """A copy with these fields of config.json; None removes one."""
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None or k not in fields})
    )
    return folder


def test_live_units_come_back_by_their_original_numbers(exported: Path, weights: dict[str, Tensor]) -> None:
    architecture, read = read_architecture(exported), FolderWeights(exported)
    assert architecture == PRUNED and architecture.shape == FULL.shape
    read.check(architecture)
    again, live = source_view(read, architecture), live_view(weights.__getitem__, PRUNED)
    shapes = table_of(FULL.shape).hf_shapes(FULL)
    for name, shape in shapes.items():
        tensor = again(name)
        assert tuple(tensor.shape) == shape
        assert torch.equal(live_view(again, PRUNED)(name), live(name)) and tensor.count_nonzero() <= live(name).numel()


def test_other_folders_are_source_models_of_their_own(weights: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "source", CONFIG, weights)
    architecture = read_architecture(folder)
    assert architecture == FULL == Architecture.full(read_shape(folder))
    read = FolderWeights(folder)
    assert source_view(read, architecture) is read
    with pytest.raises(UserError, match="does not exist"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"megatron_prune": None}, "megatron_prune: is missing"),
        ({"megatron_prune": {"shape": {}}}, "megatron_prune: architecture.json: not an architecture"),
        ({"hidden_size": 30}, "hidden_size: contradicts megatron_prune"),
        ({"queries_per_kv_head": [[5]] * 4}, "queries_per_kv_head: contradicts"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps: contradicts"),
        ({"rope_theta": 5e5}, "rope_theta, rope_scaling: contradict"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: contradicts"),
    ],
)
def test_record_and_fields_must_agree(fields: dict[str, Any], words: str, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_architecture(edited(exported, tmp_path / "edited", **fields))
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_fields_that_are_free_may_change(exported: Path, tmp_path: Path) -> None:
    free = {"eos_token_id": 2, "torch_dtype": "bfloat16", "use_cache": False, "attention_dropout": 0.1}
    assert read_architecture(edited(exported, tmp_path / "edited", **free)) == PRUNED


def test_weights_that_do_not_fit_the_record_are_listed(exported: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"wrong shape: .*k_proj"):
        FolderWeights(exported).check(FULL)


def prune_further(_rank: int, _size: int, folder: str) -> tuple[np.ndarray, ...]:
    """Logits of the re-imported training model before and after FURTHER, and of the smaller model built afresh."""
    from megatron.core import tensor_parallel

    from megatron_prune.huggingface.verify_export import training_logits
    from megatron_prune.model.layout import ShardLayout
    from megatron_prune.model.llama import ModelOptions
    from megatron_prune.optimizer.wrapped import OptimizerOptions
    from megatron_prune.resharding.live import LiveModel
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import init_mesh

    architecture, mesh = read_architecture(folder), init_mesh(choose_device("cpu"), 1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    read = source_view(FolderWeights(folder), architecture)
    layout = ShardLayout.pack(architecture, 1, {})
    model = LiveModel.build(layout, mesh, ModelOptions(TOKENS.shape[1]), OptimizerOptions(lr=1e-3), read)
    positions = torch.arange(TOKENS.shape[1]).unsqueeze(0)

    def logits() -> np.ndarray:
        with torch.no_grad():
            return model.module(TOKENS, positions, None)[..., : architecture.shape.vocab_size].numpy()

    results = [logits()]
    for group in FURTHER:
        model.retire(group)
        architecture = architecture.without(group)
    results.append(logits())
    model.compact()
    results.append(logits())
    afresh = training_logits(live_view(read, architecture), architecture, TOKENS, mesh)
    return (*results, afresh.numpy())


def test_imported_model_computes_the_same_and_prunes_further(exported: Path, weights: dict[str, Tensor]) -> None:
    from megatron_prune.testing.reference import oracle_model
    from megatron_prune.testing.reference.oracle_geometry import Geometry, LiveUnits

    ((before, retired, compacted, afresh),) = run_ranks(prune_further, 1, str(exported))
    geometry = Geometry.from_hf(CONFIG)

    def expected(a: Architecture) -> np.ndarray:
        read = live_view(weights.__getitem__, a)
        heads, ffn = (tuple(tuple(map(int, ids)) for ids in arrays) for arrays in (a.sites(HEAD), a.sites(FFN)))
        live = LiveUnits(heads, ffn, tuple(map(int, a.ids(STEM, 0))), geometry.queries_per_kv)
        return oracle_model.logits(TOKENS, {name: read(name) for name in weights}, geometry, live).numpy()

    smaller = PRUNED
    for group in FURTHER:
        smaller = smaller.without(group)
    assert len(smaller.ids(KV_HEAD, 0)) == 3 < len(PRUNED.ids(KV_HEAD, 0)) and len(smaller.ids(KV_HEAD, 3)) == 3
    np.testing.assert_allclose(before, expected(PRUNED), atol=1e-4)
    for ours in (retired, compacted, afresh):
        np.testing.assert_allclose(ours, expected(smaller), atol=1e-4)


def test_there_and_back_through_the_tools(exported: Path, tmp_path: Path) -> None:
    from tests.huggingface.test_convert_tools import tools

    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    export_again = ["--load", run, "--save", out, "--verify"]
    results = tools(
        ("from", ["--hf-model", str(exported), "--save", run]),
        ("to", [*export_again, "--kv-policy", "cluster"]),
        ("to", [*export_again, "--overwrite"]),
    )
    assert [status for status, _, _ in results] == [0, 0, 0], results
    imported, clustered, automatic = (out for _, out, _ in results)
    assert f"{PRUNED.parameters:,} parameters; 4 layers, query heads 5, KV heads 3 to 4" in imported
    assert f"pruned already, from {FULL.parameters:,} parameters" in imported
    assert (
        "KV heads: cluster, 3 to 4 of a layer stored" in clustered
        and "every weight is bit for bit as in the checkpoint" in clustered
    )
    assert "KV heads: expand, 5 of every layer stored" in automatic and "native is not exact: layers keep" in automatic
    assert f"--kv-policy cluster would have {PRUNED.kv_cache_channels:,}" in automatic


def test_export_of_an_import_is_bit_identical(exported: Path, tmp_path: Path) -> None:
    architecture, read = read_architecture(exported), FolderWeights(exported)
    export(live_view(source_view(read, architecture), architecture), architecture, tmp_path / "out", kv_policy=CLUSTER)
    again = FolderWeights(tmp_path / "out")
    assert set(again.stored) == set(read.stored)
    assert all(torch.equal(again(name), read(name)) for name in read.stored)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((exported / "config.json").read_text())
