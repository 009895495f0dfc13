"""Signals: to one rank, to the launcher, and what the run leaves behind. Real processes, real signals."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest

from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.launch.launched import Launched

LAYOUT = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--save-interval", 50)
LONG = ("--continue-tokens", 64 * 60)  # 60 iterations: time enough to be interrupted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def status(save):
    return json.loads((save / "run_status.json").read_text())


def signalled(rank, world_size, arguments, who, number, at):
    """A run whose rank `who` gets a signal during the forward pass of iteration `at`."""
    from megatron_prune.training import trainer

    if rank == who:
        iterations, forward = iter(range(1, at + 1)), trainer.forward_backward

        def forward_and_signal(*args):
            if next(iterations, None) == at:
                os.kill(os.getpid(), number)
            return forward(*args)

        trainer.forward_backward = forward_and_signal
    victim(rank, world_size, main, arguments)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    save = tmp_path_factory.mktemp("whole") / "run"
    fates = watch_ranks(victim, 2, main, tiny.arguments(save, *LAYOUT))
    assert [fate.exit_code for fate in fates] == [0, 0], fates[0].output
    assert status(save) == {"status": "finished", "iteration": 14}
    return Traces.read(save)


@pytest.mark.parametrize(("who", "number"), [(1, signal.SIGUSR1), (0, signal.SIGTERM)])
def test_a_signal_to_one_rank_saves_and_ends_all_of_them(tiny, uninterrupted, tmp_path, who, number):
    arguments = tiny.arguments(tmp_path / "run", *LAYOUT, *(("--async-save",) * (who == 1)))
    fates = watch_ranks(signalled, 2, arguments, who, number, 5)
    assert [fate.exit_code for fate in fates] == [0, 0], fates[0].output
    assert "stopping at iteration 5, a signal asked for it" in fates[0].output
    assert status(tmp_path / "run") == {"status": "preempted", "iteration": 5}
    assert [path.name for path in (tmp_path / "run").glob("iter_*")] == ["iter_0000005"]
    fates = watch_ranks(victim, 2, main, arguments)
    assert [fate.exit_code for fate in fates] == [0, 0], fates[0].output
    assert status(tmp_path / "run") == {"status": "finished", "iteration": 14}
    assert Traces.read(tmp_path / "run") == uninterrupted


@pytest.mark.full  # `make test` sends the same signals to ranks (above) and through the launcher (test_supervisor)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_torchrun_passes_a_signal_on_and_waits(tiny, tmp_path, number):
    arguments = tiny.arguments(tmp_path / "run", *LAYOUT, *LONG)
    handled = ("--signals-to-handle", "SIGUSR1,SIGTERM,SIGINT", "--shutdown-timeout", "60")
    with Launched(arguments, *handled) as run:
        run.read_until(" iteration        3/")
        run.signal(number)
        code = run.wait()
    assert "a signal asked for it" in run.output, run.output
    ended = status(tmp_path / "run")
    assert ended["status"] == "preempted" and 3 <= ended["iteration"] < 70
    assert (tmp_path / "run" / f"iter_{ended['iteration']:07d}").is_dir()
    assert code == 1, "torchrun says 1 though all ranks ended with 0: launchers must read run_status.json"
    assert "Unable to shutdown process" not in run.output


def out_of_time(rank, world_size, arguments):
    """A run whose clock jumps ahead by an hour in the third iteration, on rank 1."""
    from megatron_prune.training import stopping

    calls = iter(range(1, 100))
    ahead = SimpleNamespace(monotonic=lambda: time.monotonic() + (3600 if next(calls) >= 3 else 0))
    if rank == 1:
        stopping.time = ahead
    victim(rank, world_size, main, arguments)


def test_the_time_limit_ends_a_run_like_a_signal(tiny, tmp_path):
    arguments = tiny.arguments(tmp_path / "run", "--use-distributed-optimizer", "--exit-duration-in-mins", 2)
    fates = watch_ranks(out_of_time, 2, arguments)
    assert [fate.exit_code for fate in fates] == [0, 0], fates[0].output
    assert "stopping at iteration 3, training.exit_duration_in_mins is over" in fates[0].output
    assert status(tmp_path / "run") == {"status": "time_limit", "iteration": 3}
