"""A disk that is really full: a small tmpfs. The run says so, keeps the last good checkpoint, goes on or stops."""

import json

import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.disks import grow, small_disk

MIB = 1 << 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 1 MiB."""
    with small_disk(tmp_path / "disk", MIB) as folder:
        yield folder


def names(save):
    return sorted(path.name for path in save.iterdir() if path.name.startswith(("iter_", "latest")))


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_is_said_and_survived(tiny, disk, policy):
    save = disk / "run"
    arguments = tiny.arguments(save, "--save-interval", 2, "--on-save-error", policy, "--async-save")
    fates = watch_ranks(victim, 1, main, arguments)
    output = fates[0].output
    assert fates[0].exit_code == 2, output
    assert "Traceback" not in output, output
    good = CheckpointReader(save).record.iteration
    assert good >= 2 and f"iteration {good} is safe" in output
    assert "No space left on device" in output
    assert not list(save.rglob("*.tmp*"))
    if policy == "stop":
        assert f"error: checkpoint of iteration {good + 2} not saved" in output
        assert f"iteration {good + 5:8d}/" not in output
    else:
        assert "WARNING: checkpoint of iteration" in output and "training goes on" in output
        assert f"could not be saved; resume from iteration {good}" in output
        assert " iteration       14/" in output
    status = save / "run_status.json"
    assert not status.exists() or json.loads(status.read_text())["status"] == "stopped"

    # With room again, the same command goes on from the last good one.
    grow(disk, 16 * MIB)
    fates = watch_ranks(victim, 1, main, arguments)
    assert fates[0].exit_code == 0, fates[0].output
    assert json.loads(status.read_text()) == {"status": "finished", "iteration": 14}
    history = (save / "pruning_history.jsonl").read_text().splitlines()
    assert len(history) == len(CheckpointReader(save).meta["history"])
