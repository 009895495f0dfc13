"""Smoothed scores go on after a save in mid-pruning, on another layout, from storage with empty slots."""

import json

import numpy as np
import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.model.kinds import FFN
from megatron_prune.testing.helpers.ranks import run_ranks

ITERATIONS, HALF = 12, 6


def train(_rank, world_size, arguments):
    import os

    import torch.distributed as dist

    from megatron_prune import pretrain

    if world_size == 1:
        dist.destroy_process_group()
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[variable]
    return pretrain.main([str(word) for word in arguments])


def test_smoothed_scores_follow_their_units_through_a_checkpoint(workshop, tmp_path):
    """Two runs, one of them stopped half way on two ranks and finished on one: the same averages, the same removals."""
    base = [
        "--data-path", workshop / "data", "--tokenizer-model", workshop / "tokenizer.model", "--seq-length", 32,
        "--split", "1,0,0", "--train-iters", ITERATIONS, "--lr", "1e-4", "--lr-decay-style", "constant",
        "--prune-target-params", 12000, "--prune-groups", "head.cost=1", "ffn.floor=44",
        "--prune-saliency-momentum", 0.9, "--prune-ratio", "1:1", "--prune-metric", "taylor_mix",
    ]  # fmt: skip
    source, two, one = ["--hf-model", workshop / "source"], tmp_path / "two", tmp_path / "one"
    assert run_ranks(train, 1, [*base, *source, "--save", one]) == [0]
    layout = ["--tensor-model-parallel-size", 2, "--prune-groups", "ffn.quantum=4"]
    halves = ["--save", two, "--exit-interval", HALF, *layout]
    assert run_ranks(train, 2, [*base, *source, *halves]) == [0, 0]
    saved = CheckpointReader(two)
    assert saved.meta["iteration"] == HALF and saved.record.saved_layout.empty_slots(FFN)
    assert run_ranks(train, 1, [*base, "--load", two, "--save", two]) == [0]
    histories = [
        [json.loads(line) for line in (run / "pruning_history.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert len(histories[0]) == ITERATIONS and len({removal["group"] for removal in histories[0]}) > 1
    for expected, found in zip(*histories, strict=True):
        assert found["gone"] == expected["gone"]
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-4)
    averages = [CheckpointReader(run).meta["smoothed"] for run in (one, two)]
    for kind in ("head", "ffn", "stem"):
        for mine, theirs in zip(averages[1][kind], averages[0][kind], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, err_msg=kind)
