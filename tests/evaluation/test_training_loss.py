"""What a sharded run reports as its validation loss is what megatron-prune evaluate finds of its export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.commands import evaluate
from megatron_prune.data.preprocess import Options, preprocess

ROOT = Path(__file__).resolve().parents[2]
LENGTH, SAMPLES = 32, 8


@pytest.mark.timeout(300)
def test_validation_loss_of_two_ranks_is_the_export_s(
    model_folders: tuple[Path, Path], text_file: Path, sp_model: Path, tmp_path: Path
) -> None:
    data = str(tmp_path / "data")
    preprocess([str(text_file)], data, Options(str(sp_model), append_eod=True))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "megatron_prune.pretrain", "--hf-model", model_folders[0], "--data-path", data, "--split", "70,30,0",
        "--seq-length", LENGTH, "--micro-batch-size", 2, "--global-batch-size", SAMPLES // 2, "--train-iters", 4,
        "--lr", "1e-3", "--prune-target-params", 25_000, "--prune-ratio", "8:1", "--eval-interval", 100,
        "--eval-iters", 2, "--seed", 7, "--tensor-model-parallel-size", 2, "--sequence-parallel",
        "--save", tmp_path / "run",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["groups_removed"] > 0
    expected = summary["stages"]["final"]["validation_loss"]

    load = ["--load", str(tmp_path / "run"), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    named = ["--data-path", data, "--split", "70,30,0", "--seq-length", str(LENGTH), "--seed", "7"]
    for arguments in ([], [*named, "--eval-samples", str(SAMPLES)]):  # as its checkpoint says, and as options say
        assert evaluate.main([*load, *arguments]) == 0
        (model,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
        assert model["perplexity"][0]["tokens"] == SAMPLES * LENGTH
        assert model["perplexity"][0]["loss"] == pytest.approx(expected, rel=1e-5)
