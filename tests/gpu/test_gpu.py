"""On a CUDA device: the oracle's cases, resuming, the benchmark's columns; skipped, with the reason, without one."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_prune.commands import bench
from megatron_prune.testing.benchmarks.gpu_check.cover import compare_one
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.commands import run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200), pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", ["second-order", "bf16-gqa-tied"])
def test_the_oracle_agrees(name):
    row = compare_one(name, "cuda", tiny=False)
    assert row.passed, row.measured


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path):
    """Bit for bit on the same device: stopped in mid-pruning and resumed."""
    files, histories = prepare(tmp_path / "files"), {}
    train = (sys.executable, "-m", "megatron_prune.pretrain")
    for name, stops in (("whole", [()]), ("parts", [("--exit-interval", 9, "--save-interval", 9), ()])):
        for more in stops:
            run(*train, *files.arguments(tmp_path / name, "--device", "cuda", *more))
        histories[name] = (tmp_path / name / "pruning_history.jsonl").read_bytes()
    assert histories["whole"] == histories["parts"] and b'"gone"' in histories["whole"]
    ends = [json.loads((tmp_path / name / "summary.json").read_text())["stages"]["final"] for name in histories]
    assert ends[0]["validation_loss"] == ends[1]["validation_loss"]


def test_the_benchmark_measures_the_gpu(capsys):
    presets = bench.gpu_presets(tiny=True)[:1]
    rows = bench.columns(presets[0])
    assert "peak memory of a compaction / of a plain step" in rows and len(rows) > 20
