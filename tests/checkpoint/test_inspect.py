"""megatron-prune inspect: what it says is what was saved, and damage gives one line and status 2."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.save import save_weights
from megatron_prune.commands import inspect_checkpoint
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.families import table_of
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import SHAPE, Kind, mesh_of, removed_heads


def pruned():
    """Two heads fewer per layer; one layer loses a whole KV head."""
    architecture = Architecture.full(SHAPE)
    for heads in ((0, 1, 2, 3), (1, 3, 5, 7)):
        architecture = architecture.without(Group.of("head", tuple((head,) for head in heads)))
    return architecture


STATE = {
    "tokens": 4096,
    "config": "data:\n  data_path: 1.0 corpus\nmodel:\n  hf_model: source\n",
    "history": [removed_heads(4, (0, 1, 2, 3), 15999, 0.25), removed_heads(9, (1, 3, 5, 7), pruned().parameters)],
}


def save(rank, world, folder, poison):
    architecture = pruned()
    shapes = table_of(SHAPE).hf_shapes(architecture)

    def read(name):
        value = torch.ones(shapes[name])
        if name == poison:
            value[0] = float("nan")
        return value

    save_weights(mesh_of(Kind()), folder, 12, architecture, read, torch.float32, STATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "good"
    run_ranks(save, 1, str(path), None)
    return path


def test_text_names_widths_cache_and_history(folder, capsys):
    assert inspect_checkpoint.main(["--load", str(folder), "--verify"]) == 0
    text = capsys.readouterr().out
    a = pruned()
    assert f"parameters   {a.parameters:,} of {Architecture.full(SHAPE).parameters:,}" in text
    assert "heads 6 of 8" in text
    assert f"KV cache     {a.kv_cache_channels} of {2 * 4 * 4 * 4} elements per token" in text
    assert "tokens 4096, hf_model source, data_path 1.0 corpus" in text
    assert "2 groups: 2 head, iterations 4 to 9, least margin 2.50e-01" in text
    assert "    0  2 3 4 5 6 7 -> 1:2 2:2 3:2" in text
    assert "    1  0 2 4 5 6 7 -> 0:1 1:1 2:2 3:2" in text
    assert "verified" in text


def test_json_is_one_object(folder, capsys):
    assert inspect_checkpoint.main(["--load", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["iteration"] == 12
    assert facts["layers"][0]["kv_heads"] == [1, 2, 3]
    assert facts["layout"]["slots_per_rank"]["stem"] == SHAPE.hidden_size
    assert facts["bytes"] == sum(path.stat().st_size for path in (folder / "iter_0000012").iterdir())


def test_plot_leaves_removed_heads_blank(folder, tmp_path, capsys):
    from matplotlib import pyplot

    assert inspect_checkpoint.main(["--load", str(folder), "--plot", str(tmp_path / "heads.png")]) == 0
    image = pyplot.imread(tmp_path / "heads.png")[..., :3]
    assert min(image.shape[:2]) > 200
    assert len(np.unique((image.reshape(-1, 3) * 255).astype(np.uint8), axis=0)) > SHAPE.num_query_groups
    capsys.readouterr()


def test_damage_is_one_line_and_status_2(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    victim = next((copy / "iter_0000012").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert inspect_checkpoint.main(["--load", str(copy), "--verify"]) == 2
    error = capsys.readouterr().err
    assert victim.name in error and error.count("\n") == 1
    assert inspect_checkpoint.main(["--load", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_verify_finds_values_that_are_not_finite(tmp_path, capsys):
    name = "model.layers.2.mlp.down_proj.weight"
    run_ranks(save, 1, str(tmp_path / "bad"), name)
    assert inspect_checkpoint.main(["--load", str(tmp_path / "bad"), "--verify"]) == 2
    assert f"{name} (weight): holds values that are not finite" in capsys.readouterr().err
