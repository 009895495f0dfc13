"""Weights of a folder: every form is read alike, one tensor at a time, and whatever is wrong with it is listed."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.huggingface.shards import ShardEntry, plan_shards, write_shards
from megatron_prune.huggingface.weights import FolderWeights, live_view
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.model.shape import LlamaShape
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

CONFIG = tiny_config(num_key_value_heads=2, num_hidden_layers=2)
SHAPE = shape_from_config(CONFIG)
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_llama_weights(CONFIG)


def write_sharded(folder: Path, weights: dict[str, Tensor], count: int = 3, legacy: bool = False) -> dict[str, str]:
    """Deal the tensors over `count` files with an index; returns the index's weight_map."""
    folder.mkdir()
    stem, suffix = ("pytorch_model", "bin") if legacy else ("model", "safetensors")
    placed = {}
    for number in range(count):
        part = {name: tensor for i, (name, tensor) in enumerate(weights.items()) if i % count == number}
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        if legacy:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def write(folder: Path, form: str, weights: dict[str, Tensor]) -> Path:
    if form == "safetensors":
        write_hf_folder(folder, CONFIG, weights)
    elif form.startswith("sharded"):
        write_sharded(folder, weights, legacy=form.endswith("bin"))
    else:
        folder.mkdir()
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin", "old_bin", "sharded_bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_gives_the_same_tensors(
    form: str, dtype: torch.dtype, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = {name: tensor.to(dtype) for name, tensor in weights.items()}
    read = FolderWeights(write(tmp_path / "model", form, expected))
    read.check(SHAPE)
    assert set(read.stored) == set(expected) and read.dtype == dtype
    assert read.total_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert read.largest_bytes == max(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        found = read(name)
        assert found.dtype == dtype and torch.equal(found, tensor), name


def complaint(folder: Path, shape: LlamaShape = SHAPE) -> str:
    with pytest.raises(UserError) as caught:
        FolderWeights(folder).check(shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_that_is_wrong_is_listed_at_once(weights: dict[str, Tensor], tmp_path: Path) -> None:
    broken = dict(weights)
    del broken[NORM]
    broken["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    broken["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)
    broken["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    broken["model.layers.1.input_layernorm.weight"] = torch.ones(32, dtype=torch.float64)
    words = complaint(write_hf_folder(tmp_path / "model", CONFIG, broken))
    assert f"missing: {NORM};" in words
    assert "unused: model.layers.0.self_attn.q_proj.bias;" in words
    assert "wrong shape: model.layers.1.mlp.up_proj.weight [47, 32] instead of [48, 32];" in words
    assert "model.layers.0.mlp.up_proj.weight int8, model.layers.1.input_layernorm.weight float64" in words


def test_long_lists_are_cut(weights: dict[str, Tensor], tmp_path: Path) -> None:
    few = {name: weights[name] for name in (EMBEDDING, NORM)}
    assert "and 8 more" in complaint(write_hf_folder(tmp_path / "model", CONFIG, few))


def test_known_leftovers_pass(weights: dict[str, Tensor], tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": weights[EMBEDDING].clone(),
    }
    FolderWeights(write_hf_folder(tmp_path / "model", CONFIG, weights | extra)).check(SHAPE)


def test_tied_and_untied_output_layers_are_told_apart(weights: dict[str, Tensor], tmp_path: Path) -> None:
    other = weights | {"lm_head.weight": weights[EMBEDDING] + 1}
    assert "lm_head.weight differs" in complaint(write_hf_folder(tmp_path / "tied", CONFIG, other))
    untied = CONFIG | {"tie_word_embeddings": False}
    words = complaint(write_hf_folder(tmp_path / "untied", untied, weights), shape_from_config(untied))
    assert "missing: lm_head.weight" in words and "tie_word_embeddings is false" in words


def test_missing_shard_is_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    write_sharded(tmp_path / "model", weights)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    assert "are missing: model-00002-of-00003.safetensors" in complaint(tmp_path / "model")


def test_index_that_disagrees_with_its_files_is_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    placed = write_sharded(folder, weights)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed | {"model.other": "model-00001-of-00003.safetensors"}}))
    assert "model-00001-of-00003.safetensors: model.other is not in it" in complaint(folder)
    index.write_text(json.dumps({"weight_map": placed | {NORM: "../elsewhere.safetensors"}}))
    assert "no name of a file in this folder" in complaint(folder)
    index.write_text("[]")
    assert "index.json: holds no JSON object" in complaint(folder)
    extra = {NORM: weights[NORM]}
    save_file(extra, folder / "model-00004.safetensors")
    index.write_text(json.dumps({"weight_map": placed | {NORM: "model-00004.safetensors"}}))
    assert f"{NORM} is also in" in complaint(folder)


@pytest.mark.parametrize("form", ["safetensors", "bin", "old_bin"])
@pytest.mark.parametrize("keep", [0.999, 0.5, 0.0])
def test_truncated_file_is_named(form: str, keep: float, weights: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write(tmp_path / "model", form, weights)
    file = next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    assert complaint(folder).startswith(str(file))


class Opener:
    """What a hostile pickle does: run code when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_pickle_with_code_is_refused_and_not_run(weights: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({**weights, "trap": Opener(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    assert "asks for io.open, which is neither tensor nor plain value" in complaint(folder)
    assert not (tmp_path / "ran").exists()
    name = next(iter(weights))
    endless = torch.zeros(1).expand(weights[name].shape)
    for wrong in (endless, weights[name].to_sparse()):
        torch.save({**weights, name: wrong}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="is no plain tensor, or has fewer values than its shape"):
            FolderWeights(folder)
    torch.save({"state": weights}, folder / "pytorch_model.bin")
    assert "is no table of tensors" in complaint(folder)
    array = pickle.dumps({name: weights[name].numpy() for name in weights}, protocol=2)
    for content in (array, pickle.dumps(1, protocol=5), b"\x80\x02]\x95"):
        (folder / "pytorch_model.bin").write_bytes(content)
        told = complaint(folder)
        assert "damaged or of another kind (" in told or "asks for numpy" in told
        assert "weights_only" not in told and "2.6" not in told  # torch's advice is to run it
    with tarfile.open(folder / "pytorch_model.bin", "w"):
        pass
    assert "legacy .tar format.)" in complaint(folder)


def test_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    assert "holds no weights; looked for model.safetensors" in complaint(tmp_path)
    assert "is no folder" in complaint(tmp_path / "absent")


def test_reading_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    import psutil

    megabyte = 2**20
    tensors = {f"t{i}": torch.full((2 * megabyte,), float(i)) for i in range(24)}  # 8 MB each
    for form in ("sharded", "bin"):
        read = FolderWeights(write(tmp_path / form, form, tensors))
        before, peak = psutil.Process().memory_info().rss, 0
        for name in tensors:
            assert read(name)[-1] == float(name[1:])
            read(name).sum()
            peak = max(peak, psutil.Process().memory_info().rss)
        assert peak - before < 40 * megabyte, form


def test_live_view_reads_what_is_left(weights: dict[str, Tensor]) -> None:
    full = Architecture.full(SHAPE)
    pruned = (
        full.without(Group.of(HEAD, ((1,), (2,)))).without(Group.of(FFN, ((7,), (0,)))).without(Group.of(STEM, ((3,),)))
    )
    read = live_view(weights.__getitem__, pruned)
    stem = [i for i in range(32) if i != 3]
    rows = [i for i in range(32) if not 16 <= i < 24]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(read(name), weights[name][rows][:, stem])
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(read(name), weights[name][stem][:, 1:])
    assert torch.equal(read(EMBEDDING), weights[EMBEDDING][:, stem])


def test_written_shards_are_read_by_the_reference_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    generator = np.random.default_rng(0)
    tensors = {f"t{i}": torch.from_numpy(generator.normal(size=(i + 1, 5))).bfloat16() for i in range(9)}
    entries = [ShardEntry(name, tuple(tensor.shape), torch.bfloat16) for name, tensor in tensors.items()]
    shards = plan_shards(entries, 100)
    asked: list[str] = []

    def fetch(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    files = write_shards(tmp_path, shards, fetch)
    assert asked == list(tensors) and len(files) == len(shards) > 3
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert all(sum(e.elements for e in shard) * 2 <= 100 or len(shard) == 1 for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {tmp_path / file for file in index["weight_map"].values()} == set(files)
