"""A run whose size follows a curve and whose learning rate has one schedule, from the command line to its end."""

import json
import re

import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare

ITERS, TARGET = 20, 11_400


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def arguments(tiny, save, *more):
    curve = (
        "--prune-ratio",
        "null",
        "--prune-schedule",
        "curve",
        "--prune-curve",
        "end=50%",
        "--lr-schedule",
        "whole_run",
    )
    no_tail = ("--continue-tokens", 0, "--continue-lr-warmup-iters", 0)
    whole = ("--train-iters", ITERS, "--lr-decay-style", "linear", "--lr-warmup-iters", 0)
    return tiny.arguments(save, *curve, *no_tail, *whole, *more)


def run(words, ranks=1, exit_code=0):
    fates = watch_ranks(victim, ranks, main, words)
    assert [fate.exit_code for fate in fates] == [exit_code] * ranks, fates[0].output
    return fates[0].output


@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", 2, "--sequence-parallel")])
def test_the_target_is_reached_on_time_and_a_resumed_run_goes_the_same_way(tiny, tmp_path, layout):
    ranks = 2 if layout else 1
    output = run(arguments(tiny, tmp_path / "whole", *layout), ranks)
    rates = [float(rate) for rate in re.findall(r"learning rate: ([0-9.E+-]+)", output)]
    assert rates == pytest.approx([2e-3 * (1 - i / ITERS) for i in range(ITERS)], rel=1e-4), "one line, both phases"
    history = [json.loads(line) for line in (tmp_path / "whole/pruning_history.jsonl").read_text().splitlines()]
    last = history[-1]
    assert last["parameters"] <= TARGET and 7 <= last["iteration"] <= ITERS // 2
    per_iteration = [sum(line["iteration"] == i for line in history) for i in range(1, ITERS)]
    assert per_iteration[0] > per_iteration[5], "fast first, slow last"
    for stop in (8,) if layout else (3, 8, 13):  # in mid-curve, at its end, afterwards
        run(arguments(tiny, tmp_path / "parts", *layout, "--exit-interval", stop), ranks)
    run(arguments(tiny, tmp_path / "parts", *layout), ranks)
    assert Traces.read(tmp_path / "parts") == Traces.read(tmp_path / "whole")


def test_a_run_whose_adam_begins_anew_is_resumed_right_after_a_removal(tiny, tmp_path):
    """The checkpoint holds no moments then."""
    reset = ("--prune-optimizer-state", "reset")
    run(arguments(tiny, tmp_path / "carried", "--exit-interval", 4))
    run(arguments(tiny, tmp_path / "whole", *reset))
    for stop in (1, 3, 8):
        run(arguments(tiny, tmp_path / "parts", *reset, "--exit-interval", stop))
    assert CheckpointReader(tmp_path / "parts", 1).record.facts.adam_step == 0
    assert CheckpointReader(tmp_path / "carried").record.facts.adam_step == 4
    run(arguments(tiny, tmp_path / "parts", *reset))
    assert Traces.read(tmp_path / "parts") == Traces.read(tmp_path / "whole")


def test_a_stop_at_the_target_goes_on_with_the_same_schedule(tiny, tmp_path):
    run(arguments(tiny, tmp_path / "whole"))
    run(arguments(tiny, tmp_path / "parts", "--exit-at-target"))
    assert json.loads((tmp_path / "parts/run_status.json").read_text())["iteration"] <= ITERS // 2
    run(arguments(tiny, tmp_path / "parts"))
    assert Traces.read(tmp_path / "parts") == Traces.read(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prune-curve", "end=twice"), "pruning.curve: end: expected tokens, such as 5B, or a share of the run"),
        (("--prune-curve", "end=101%"), "pruning.curve: end: expected tokens"),
        (("--prune-curve", "start=60%"), "must follow each other within the 1280 tokens of training.train_iters"),
        (("--prune-curve", "end=2K"), "must follow each other within the 1280 tokens of training.train_iters"),
        (("--prune-first-prune-iter", 3), "pruning.first_prune_iter belongs to schedule: ratio"),
        (("--continue-tokens", 640), "continued: with optimizer.lr_schedule: whole_run"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tiny, tmp_path, flags, words, capfd):
    assert main(arguments(tiny, tmp_path / "run", *flags)) == 2
    line = capfd.readouterr().err.strip()
    assert words in line and "\n" not in line
    assert not (tmp_path / "run").exists()
