"""What the first format left behind goes on: a run pruned half-way, its configuration, its history.

tests/fixtures/first_format was written by the version before kinds of units had names: `run` on two tensor-parallel
ranks (metric obc with kept Hessians, second-order updates, coarse quanta), stopped at iteration 8 of 14 with empty
slots; `end_*` is what that version made of it on one rank. Paths in it are of a folder that is gone.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.config import load_config, read_file
from megatron_prune.pretrain import main as pretrain
from megatron_prune.pruning.history import read_history
from megatron_prune.pruning.history_plot import plot_history
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.training.pruning_settings import group_costs
from tests.commands import run as command

FIXTURE = Path(__file__).parents[1] / "fixtures" / "first_format"
OLD_FLAGS = [
    *("--prune-group-cost", "head=2", "--prune-min-ffn", "38", "--prune-min-heads", "2"),
    *("--prune-quantum", "ffn=4", "stem=4"),
]


@pytest.fixture
def run(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "there")
    return tmp_path / "there"


def resume(_rank, _world_size, folder):
    there = Path(folder)
    words = [
        *("--load", there / "run", "--save", there / "run", "--tokenizer-model", there / "files/tokenizer.model"),
        *("--data-path", 3, there / "files/data_0", 1, there / "files/data_1", "--split", "80,20,0"),
        *("--data-cache-path", there / "cache", "--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 2),
        *("--train-iters", 40, "--continue-tokens", 256, "--lr", "2e-3", "--lr-warmup-iters", 3, "--device", "cpu"),
        *("--continue-lr-warmup-iters", 2, "--make-vocab-size-divisible-by", 8, "--prune-target-params", 11400),
        *("--prune-ratio", "2:1", "--prune-gqa", "cluster", "--prune-metric", "obc", *OLD_FLAGS),
        *("--prune-second-order", "enabled=true", "refresh=3", "--eval-interval", 1000, "--eval-iters", 1),
        *("--log-interval", 1, "--progress", "lines"),
        *("--prune-head-score", "per_column", "--prune-balance", "0"),  # what was done then; told where it differs
    ]
    return pretrain([str(word) for word in words])


def test_a_run_goes_on_to_the_same_end(run):
    assert run_ranks(resume, 1, str(run)) == [0]
    mine, theirs = read_history(run / "run/pruning_history.jsonl"), read_history(run / "end_history.jsonl")
    old = ("head", "ffn", "stem")  # lines of then do not count layers
    assert [(r.iteration, r.group, r.parameters, {k: r.widths[k] for k in old}) for r in mine] == [
        (r.iteration, r.group, r.parameters, {k: r.widths[k] for k in old}) for r in theirs
    ]
    for one, other in zip(mine, theirs, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-4)
    stages, expected = (
        json.loads((run / name).read_text())["stages"] for name in ("run/summary.json", "end_summary.json")
    )
    for stage, facts in expected.items():
        assert stages[stage]["validation_loss"] == pytest.approx(facts["validation_loss"], rel=1e-5), stage
        assert stages[stage]["widths"]["stem"] == facts["hidden_size"]


def test_a_checkpoint_is_read_inspected_and_exported(run):
    reader, old = CheckpointReader(run / "run"), json.loads((run / "run/iter_0000008/architecture.json").read_text())
    assert reader.architecture.parameters == old["parameters"] and reader.architecture.hidden_size == old["hidden_size"]
    layout = reader.record.saved_layout
    assert layout.tp == 2 and sum(layout.empty_slots(kind) for kind in layout.architecture.table.varying) > 0
    told = command(sys.executable, "tools/inspect_checkpoint.py", "--load", run / "run", "--verify")
    assert "sums, shapes, values and counts agree" in told and "head" in told
    flags = (
        "--load",
        run / "run",
        "--save",
        run / "hf",
        "--tokenizer-model",
        run / "files/tokenizer.model",
        "--verify",
    )
    assert "every weight is bit for bit as in the checkpoint" in command(
        sys.executable, "tools/convert_to_hf.py", *flags
    )


def test_configurations_mean_what_they_meant(run):
    from_file, from_flags = read_file(run / "run/config.yaml"), load_config(OLD_FLAGS)
    groups, shape = from_file.pruning.groups, CheckpointReader(run / "run").architecture.shape
    assert group_costs(from_file, shape) == group_costs(from_flags, shape)
    assert group_costs(from_file, shape).items() >= {"head": 2, "ffn": 1, "stem": 1}.items()
    assert [groups[name].floor for name in ("head", "ffn", "stem")] == [2, 38, 1]
    assert [groups[name].quantum for name in ("head", "ffn", "stem")] == [1, 4, 4]


def test_histories_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    history = read_history(run / "run/pruning_history.jsonl")
    assert {removal.kind for removal in history} >= {"head", "ffn"} and history[-1].layer_errors is not None
    paths = plot_history(history, CheckpointReader(run / "run").architecture, tmp_path)
    assert all(path.stat().st_size > 5000 for path in paths)
