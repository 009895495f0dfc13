"""A model that has lost layers: saved on one layout, loaded on others, inspected, exported to stock classes."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.save import save_checkpoint
from megatron_prune.commands import convert_to_hf, inspect_checkpoint
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import FFN, HEAD, LAYER, STEM
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.sources import RandomWeights
from megatron_prune.optimizer.wrapped import OptimizerOptions
from megatron_prune.resharding.coordinator import verify
from megatron_prune.resharding.live import LiveModel
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import rounded
from tests.checkpoint.small_run import (
    SHAPE,
    STATE,
    Kind,
    build,
    go_on,
    mesh_of,
    options_of,
    remove,
    same,
    tensors,
    train,
)
from tests.checkpoint.test_layouts import Resumed, resume_all

GPT = partial(Kind, engine="gpt")  # a HybridModel keeps its layers, so far
A = GPT(pp=2, distributed=True)  # x DP 2 on four ranks
ON_FOUR = {"same": A, "tp2_pp2": GPT(tp=2, pp=2, sp=True), "dp4": GPT()}


def save_then_resume(rank, world, folder):
    """Layer 1 leaves, one of the second stage comes to the first; then layer 0 leaves, still stored when saved."""
    model = build(A)
    train(model, 0)
    remove(model, "layer", 1)
    train(model, 1)
    assert model.compact() and model.layout.layers == (0, 2, 3)
    verify(model, thorough=True)
    remove(model, "layer", 0)
    train(model, 2)
    verify(model, thorough=True)
    fingerprint = model.layout.fingerprint()
    save_checkpoint(model, folder, 3, STATE)
    step = model.adam_step()
    losses = go_on(model, 3)
    reference = Resumed(losses, model.architecture.parameters, step, STATE["tokens"], fingerprint)
    return reference, resume_all(ON_FOUR, folder)


def resume_on_one(rank, world, folder):
    return resume_all({"tp1": GPT()}, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    reference, resumed = run_ranks(save_then_resume, 4, str(folder))[0]
    return folder, reference, resumed | run_ranks(resume_on_one, 1, str(folder))[0]


def test_every_layout_holds_the_same_and_goes_on_alike(runs):
    folder, reference, resumed = runs
    assert resumed["same"] == reference, "bit for bit, with the layer that was stored and gone"
    for name, found in resumed.items():
        assert same(tensors(folder), tensors(folder / f"again_{name}")), name
        assert found.losses == pytest.approx(reference.losses, rel=1e-5), name
        assert (found.parameters, found.step) == (reference.parameters, reference.step), name


def test_the_checkpoint_says_which_layers_are_left(runs, capsys):
    folder = runs[0]
    reader = CheckpointReader(folder)
    assert reader.architecture.layers == (2, 3)
    assert {name.split(".")[2] for name in reader.names if name.startswith("model.layers.")} == {"2", "3"}
    assert inspect_checkpoint.main(["--load", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "layers 2 of 4" in told and "    3  0 1 2 3 4 5 6 7 -> " in told and "    1  " not in told


def save_plain(rank, world, folder):
    """A shape that a stock class has, without layer 1 and a channel of the others."""
    model = build(GPT(), dataclasses.replace(SHAPE, add_qkv_bias=False))
    train(model, 0)
    remove(model, "layer", 1)
    remove(model, "ffn", 2)
    model.compact()
    save_checkpoint(model, folder, 1, STATE)


def test_it_is_exported_to_a_stock_class_with_fewer_layers(tmp_path, capsys):
    pytest.importorskip("transformers")
    run_ranks(save_plain, 1, str(tmp_path / "run"))
    arguments = ["--load", str(tmp_path / "run"), "--save", str(tmp_path / "hf"), "--no-tokenizer", "--verify"]
    assert convert_to_hf.main(arguments) == 0, capsys.readouterr()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and shape_from_config(config).num_layers == 3
    assert "| layers | 4 | 3 |" in (tmp_path / "hf" / "README.md").read_text()


def unequal():
    """Every layer has widths of its own, and one is gone."""
    heads = (np.arange(8), np.array([0, 1, 5]), np.array([]), np.arange(2, 8))
    channels = (np.arange(20), np.arange(0, 20, 4), np.array([]), np.arange(3, 17))
    whole = {STEM: (np.arange(24),), LAYER: (np.array([0, 1, 3]),)}
    live = {HEAD: heads, FFN: channels, **whole}
    return Architecture(SHAPE, {kind: tuple(ids.astype(np.int32) for ids in sites) for kind, sites in live.items()})


def save_unequal(rank, world, folder):
    kind = GPT(tp=2, sp=True)
    mesh, layout = mesh_of(kind), ShardLayout.pack(unequal(), 2, rounded(vocab=8))
    model = LiveModel.build(layout, mesh, options_of(kind), OptimizerOptions(lr=3e-3), RandomWeights(SHAPE, 3, 0.2))
    for step in range(3):
        train(model, step)
    verify(model, thorough=True)
    save_checkpoint(model, folder, 3, STATE)
    reference = Resumed(go_on(model, 3), model.architecture.parameters, 3, STATE["tokens"], "")
    return reference, resume_all({"pp2": GPT(pp=2), "dp2": GPT(distributed=True)}, folder)


def test_layers_of_widths_of_their_own_are_built_stored_saved_and_loaded(tmp_path):
    assert Architecture.from_json(json.loads(json.dumps(unequal().to_json()))) == unequal()
    assert unequal().widths()["head"] == [8, 3, 6] and unequal().span(FFN) == "5 to 20"
    reference, resumed = run_ranks(save_unequal, 2, str(tmp_path))[0]
    for name, found in resumed.items():
        assert same(tensors(tmp_path), tensors(tmp_path / f"again_{name}")), name
        assert found.losses == pytest.approx(reference.losses, rel=1e-5), name
        assert (found.parameters, found.step) == (reference.parameters, reference.step), name
