"""A whole run that loses layers: planned, drawn, told, and repeated on other layouts."""

import json

import numpy as np
import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.commands import main as command
from megatron_prune.model.kinds import LAYER
from megatron_prune.pretrain import main
from megatron_prune.report.story import read_story
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare

pytestmark = pytest.mark.full
LOSES_LAYERS = (
    *("--engine", "gpt", "--prune-types", "ffn", "layer", "--prune-target-params", 17_000, "--prune-balance", 0),
    *("--prune-ratio", "null", "--prune-curve", "end=50%", "--train-iters", 20, "--continue-tokens", 0),
    *("--prune-groups", "ffn.floor=40", "layer.score=block_influence", "--continue-lr-warmup-iters", 0),
)


def run(tiny, save, *more, ranks=1):
    words = [str(word) for word in tiny.arguments(save, *LOSES_LAYERS, *more)]
    fates = watch_ranks(victim, ranks, main, words)
    assert [fate.exit_code for fate in fates] == [0] * ranks, fates[0].output
    return fates[0].output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"), layers=4)


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    run(tiny, folder)
    return folder


def gone(folder):
    lines = [json.loads(line) for line in (folder / "pruning_history.jsonl").read_text().splitlines()]
    return [(line["group"], line["gone"], line["parameters"], line["tokens"]) for line in lines]


def test_it_is_planned(tiny, tmp_path):
    told = run(tiny, tmp_path / "run", "--dry-run").splitlines()
    (layers,) = [line.split() for line in told if line.startswith("  layers")]
    assert layers == ["layers", "4", "2"]


def test_figures_report_and_inspection_know_the_layers_that_left(recorded, capsys):
    assert (recorded / "pruning_widths.png").stat().st_size > 0
    story = read_story(recorded)
    architecture = CheckpointReader(recorded).architecture
    left = [units["layer"][0][0] for name, units, *_ in gone(recorded) if name == "layer"]
    assert len(left) == 2 and sorted({*left, *architecture.layers}) == [0, 1, 2, 3]
    assert len(np.unique(story.arrays[f"left/{LAYER}"])) == 3, "two left at moments of their own, two live"
    assert command(["inspect", "--load", str(recorded)]) == 0
    told = capsys.readouterr().out
    assert "layers 2 of 4" in told and "2 layer" in told


@pytest.mark.parametrize("layout", [("--pipeline-model-parallel-size", 2), ("--tensor-model-parallel-size", 2)])
def test_a_replay_on_another_layout_removes_the_same_layers_at_the_same_tokens(tiny, recorded, tmp_path, layout):
    history = recorded / "pruning_history.jsonl"
    run(tiny, tmp_path / "run", "--seed", 9, "--prune-replay", history, *layout, ranks=2)
    assert gone(tmp_path / "run") == gone(recorded)


def test_it_is_resumed_bit_for_bit_with_influences_smoothed_over_the_stop(tiny, recorded, tmp_path):
    for stop in (("--exit-interval", 7), ()):
        run(tiny, tmp_path / "parts", *stop)
    assert Traces.read(tmp_path / "parts") == Traces.read(recorded)


def test_a_recipe_of_it_repeats_it(tiny, recorded, tmp_path):
    path = tmp_path / "recipe.json"
    assert command(["recipe", str(recorded), "--output", str(path)]) == 0
    words = ["--recipe", path, "--hf-model", tiny.source, "--tokenizer-model", tiny.folder / "tokenizer.model"]
    words += ["--data-path", tiny.data(0), "--make-vocab-size-divisible-by", 8, "--split", "80,20,0", "--device", "cpu"]
    (fate,) = watch_ranks(victim, 1, main, [str(word) for word in (*words, "--save", tmp_path / "again")])
    assert fate.exit_code == 0, fate.output
    assert gone(tmp_path / "again") == gone(recorded)
