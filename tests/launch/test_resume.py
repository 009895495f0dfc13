"""What a resumed run takes from a checkpoint, and what it refuses to: the whole way through `pretrain`."""

import json
import shutil

import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare

LAST = 14


def run(arguments, exit_code=0, ranks=1):
    """A run in processes of its own; its output."""
    fates = watch_ranks(victim, ranks, main, [str(word) for word in arguments])
    assert [fate.exit_code for fate in fates] == [exit_code] * ranks, fates[0].output
    return fates[0].output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Traces of a run that is never interrupted."""
    save = tmp_path_factory.mktemp("whole") / "run"
    run(tiny.arguments(save))
    return Traces.read(save)


@pytest.fixture(scope="module")
def halves(tiny, tmp_path_factory):
    """A run stopped at iteration 6, with checkpoints at 2, 4 and 6."""
    save = tmp_path_factory.mktemp("halves") / "run"
    run(tiny.arguments(save, "--save-interval", 2, "--exit-interval", 6))
    assert json.loads((save / "run_status.json").read_text()) == {"status": "exit_interval", "iteration": 6}
    return save


@pytest.fixture
def half(halves, tmp_path):
    """A copy of it."""
    shutil.copytree(halves, tmp_path / "run")
    return tmp_path / "run"


def steps(save):
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))


def test_resume_is_exact_under_another_save_interval(tiny, whole, half):
    run(tiny.arguments(half, "--save-interval", 5, "--async-save"))
    assert Traces.read(half) == whole
    assert steps(half) == [2, 4, 5 + 5, LAST] or steps(half) == [2, 4, 6, 10, LAST]


def test_an_older_step_goes_the_same_way_again(tiny, whole, half):
    output = run(tiny.arguments(half, "--ckpt-step", 4, "--save-interval", 2, "--keep-last", 2))
    assert " iteration        5/" in output and " iteration        4/" not in output
    assert Traces.read(half) == whole
    assert steps(half) == [12, LAST]


def test_retained_checkpoints_stay(tiny, half):
    run(tiny.arguments(half, "--save-interval", 2, "--save-retain-interval", 4, "--keep-last", 1))
    assert steps(half) == [4, 8, 12, LAST]


def test_finetuning_takes_the_weights_only(tiny, half, tmp_path):
    arguments = [str(half) if word == str(tmp_path / "new") else word for word in tiny.arguments(tmp_path / "new")]
    arguments[arguments.index("--save") + 1] = str(tmp_path / "new")
    output = run([*arguments, "--finetune", "--exit-interval", 2])
    assert " iteration        1/" in output and "consumed samples:            2 " in output
    reader = CheckpointReader(tmp_path / "new")
    assert reader.record.facts.adam_step == 2 and reader.meta["consumed_samples"] == 4
    before = CheckpointReader(half).architecture.parameters
    assert reader.architecture.parameters <= before < 17568
    assert [line["iteration"] for line in reader.meta["history"]] in ([1], [1, 1], [1, 2], [1, 1, 2], [1, 1, 2, 2])
    output = run([*tiny.arguments(half), "--finetune"], exit_code=2)
    assert "begins a new run" in output and f"--load {half} --no-finetune" in output


def test_the_optimizer_may_be_left_behind(tiny, whole, half):
    output = run(tiny.arguments(half, "--no-load-optim"))
    assert " iteration        7/" in output
    assert CheckpointReader(half).record.facts.adam_step == LAST - 6
    assert Traces.read(half) != whole


def test_other_data_are_refused_unless_asked_for(tiny, half):
    def swapped(*more):
        arguments = tiny.arguments(half, "--exit-interval", 8, *more)
        at = arguments.index("--data-path")
        arguments[at + 1], arguments[at + 3] = arguments[at + 3], arguments[at + 1]
        return arguments

    output = run(swapped(), exit_code=2)
    assert output.count("error: ") == 1 and "weights [0.75 0.25] -> [0.25 0.75]" in output
    assert "--allow-blend-change" in output
    output = run(swapped("--allow-blend-change"))
    assert "the data changes on resume, as allowed" in output
    counts = CheckpointReader(half).meta["consumed_samples_per_data_set"]
    assert sum(counts.values()) == 16 and all(counts.values())
    run(swapped("--exit-interval", 9), exit_code=0)


# A run reads its training data several times over, and its learning rate does not depend on its length.
FEW = ("--split", "5,20,0", "--lr-decay-style", "constant")


def test_another_length_keeps_the_order_or_is_refused(tiny, tmp_path):
    """megatron-core shuffles all epochs that a run needs together, so a run of another length has another order."""
    whole, save = tmp_path / "whole", tmp_path / "run"
    run(tiny.arguments(whole, *FEW))
    run(tiny.arguments(save, *FEW, "--exit-interval", 6))
    shutil.copytree(save, tmp_path / "longer")

    run(tiny.arguments(save, *FEW, "--train-iters", 20))  # shorter: reads on as if nothing had been said
    assert Traces.read(save) == Traces.read(whole)
    assert CheckpointReader(save).meta["data_shuffle"]["samples"] == 88

    longer = tiny.arguments(tmp_path / "longer", *FEW, "--train-iters", 400, "--exit-interval", 7)
    output = run(longer, exit_code=2)
    assert output.count("error: ") == 1 and "training.train_iters, continued.continue_tokens" in output
    assert "88 samples over [" in output and "--allow-blend-change" in output
    assert "the order of the data changes on resume, as allowed" in run([*longer, "--allow-blend-change"])
    run(longer)  # and is kept from then on


def test_a_longer_run_reads_on_where_its_order_is_the_same(tiny, half):
    """Of data that are read once, there is only one order."""
    run(tiny.arguments(half, "--train-iters", 50, "--exit-interval", 7))
    assert CheckpointReader(half).meta["data_shuffle"]["samples"] == 108


def test_the_same_data_elsewhere_are_the_same_data(tiny, half, tmp_path):
    moved = {}
    for number in (0, 1):
        for suffix in (".bin", ".idx", ".json"):
            source = tiny.data(number).with_name(tiny.data(number).name + suffix)
            shutil.copy2(source, tmp_path / f"moved_{number}{suffix}")
        moved[str(tiny.data(number))] = str(tmp_path / f"moved_{number}")
    arguments = [moved.get(word, word) for word in tiny.arguments(half, "--exit-interval", 7)]
    run(arguments)
