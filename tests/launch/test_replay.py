"""A recorded sequence of removals is repeated: on other layouts, other data, at other speeds; what does not fit is
refused."""

import json

import pytest

from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.helpers.tiny_runs import prepare

TARGET = 11_400


def run(words, ranks=1, exit_code=0):
    fates = watch_ranks(victim, ranks, main, [str(word) for word in words])
    assert [fate.exit_code for fate in fates] == [exit_code] * ranks, fates[0].output
    return fates[0].output


def lines(folder):
    return [json.loads(line) for line in (folder / "pruning_history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """A run along a curve over half of 20 iterations."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    run(arguments(tiny, folder))
    return folder


def arguments(tiny, save, *more):
    whole = ("--prune-ratio", "null", "--prune-curve", "end=50%", "--train-iters", 20, "--continue-tokens", 0)
    return tiny.arguments(save, *whole, "--continue-lr-warmup-iters", 0, "--lr-decay-style", "linear", *more)


@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)])
def test_the_same_groups_leave_at_the_same_tokens_whatever_the_scores_are(tiny, recorded, tmp_path, layout):
    other = ("--seed", 9, "--prune-replay", recorded / "pruning_history.jsonl", *layout)
    run(arguments(tiny, tmp_path / "run", *other), 2 if layout else 1)
    mine, theirs = lines(tmp_path / "run"), lines(recorded)
    assert [(line["gone"], line["parameters"], line["tokens"]) for line in mine] == [
        (line["gone"], line["parameters"], line["tokens"]) for line in theirs
    ]


def test_a_longer_run_stretches_it_and_is_resumed_in_the_middle(tiny, recorded, tmp_path):
    history = recorded / "pruning_history.jsonl"
    words = ("--train-iters", 40, "--prune-replay", history, "--prune-replay-end", "50%")
    run(arguments(tiny, tmp_path / "whole", *words))
    mine, theirs = lines(tmp_path / "whole"), lines(recorded)
    assert [line["gone"] for line in mine] == [line["gone"] for line in theirs]
    assert mine[-1]["iteration"] == 20, "where the curve ends"
    scale = mine[-1]["tokens"] / theirs[-1]["tokens"]
    assert all(0 <= m["tokens"] - scale * t["tokens"] < 64 for m, t in zip(mine, theirs, strict=True))
    for stop in (5, 12):
        run(arguments(tiny, tmp_path / "parts", *words, "--exit-interval", stop))
    run(arguments(tiny, tmp_path / "parts", *words))
    assert Traces.read(tmp_path / "parts") == Traces.read(tmp_path / "whole")


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny, recorded, tmp_path):
    history = recorded / "pruning_history.jsonl"
    wider = tiny_config(intermediate_size=52)
    other = write_hf_folder(tmp_path / "other", wider, random_llama_weights(wider))
    damaged, gone = tmp_path / "damaged.jsonl", tmp_path / "gone.jsonl"
    damaged.write_text(history.read_text().replace('"parameters"', '"parametres"', 3))
    gone.write_text("".join(line + "\n" for line in 2 * history.read_text().splitlines()[:1] for _ in range(2)))
    cases = (
        (("--prune-replay", history, "--hf-model", other), "replay on a source of the same shape"),
        (("--prune-replay", history, "--prune-target-params", 9000), "above pruning.target_params 9000"),
        (("--prune-replay", damaged), "damaged.jsonl:1: not a line of a pruning history"),
        (("--prune-replay", gone), "gone.jsonl:2: its group is not in this source"),
        (("--prune-replay", tmp_path / "nowhere"), "cannot be read"),
        (("--prune-replay", history, "--prune-ratio", "1:1"), "pruning.replay needs pruning.target_params"),
        (("--prune-replay-end", "20%"), "pruning.replay_end belongs to pruning.replay"),
    )
    for words, complaint in cases:
        for more in ((), ("--dry-run",)):
            assert complaint in run(arguments(tiny, tmp_path / "run", *words, *more), exit_code=2), words
            assert not (tmp_path / "run").exists()


def test_the_dry_run_says_so(tiny, recorded, tmp_path):
    output = run(arguments(tiny, tmp_path / "run", "--prune-replay", recorded / "pruning_history.jsonl", "--dry-run"))
    assert "as recorded in" in output and f"pruning: {len(lines(recorded))} groups" in output
