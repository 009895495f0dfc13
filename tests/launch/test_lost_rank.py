"""A rank that dies or hangs: the others end by themselves, soon, with one line, and nothing is lost."""

import json
import os
import signal
import time

import pytest
import torch.distributed as dist

from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import free_port, watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.launch.launched import Launched

MINUTES = 0.1  # until a hung collective ends the run
LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pp2": ("--pipeline-model-parallel-size", 2),
    "dp2": ("--use-distributed-optimizer",),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def stopped(rank, _world_size, arguments, folder):
    """A run whose rank 1 stands still from the forward pass of iteration 5 on; rank 0 ends it when itself is through.

    The run joins a process group of its own, as under torchrun, so that all of its timeouts are the product's.
    """
    from megatron_prune.training import trainer

    ranks = [None, None]
    dist.all_gather_object(ranks, (os.getpid(), free_port()))
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks[0][1])}
    if rank == 1:
        iterations, forward = iter(range(1, 6)), trainer.forward_backward

        def forward_and_stop(*args):
            if next(iterations, None) == 5:
                (folder / "stopped").write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGSTOP)
            return forward(*args)

        trainer.forward_backward = forward_and_stop
    status = main(arguments)
    if rank == 0:
        (folder / "noticed").write_text(str(time.monotonic()))
        os.kill(ranks[1][0], signal.SIGKILL)
    os._exit(status)


@pytest.mark.full
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_rank_that_hangs_ends_the_others_in_time(tiny, tmp_path, layout):
    more = ("--save-interval", 2, "--distributed-timeout-minutes", MINUTES)
    arguments = tiny.arguments(tmp_path / "run", *LAYOUTS[layout], *more)
    first, second = watch_ranks(stopped, 2, arguments, tmp_path)
    assert (first.exit_code, second.exit_code) == (3, -signal.SIGKILL), first.output
    lines = [line for line in first.output.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: rank 0: another rank died or hung (Timed out waiting {MINUTES * 60_000:.0f}ms) in iteration 5: "
        f"resume from iteration 4 of {tmp_path / 'run'}"
    ]
    assert "Traceback" not in first.output
    waited = float((tmp_path / "noticed").read_text()) - float((tmp_path / "stopped").read_text())
    assert MINUTES * 60 * 0.9 < waited < MINUTES * 60 + 5


@pytest.mark.full
@pytest.mark.timeout(300)
def test_kill_9_under_torchrun_loses_nothing(tiny, tmp_path):
    save, layout = tmp_path / "run", LAYOUTS["tp2"]
    with Launched(tiny.arguments(save, *layout, "--save-interval", 3)) as run:
        assert run.read_until(" iteration        5/"), run.output
        os.kill(run.rank(1), signal.SIGKILL)
        killed = time.monotonic()
        code = run.wait()
        seconds = time.monotonic() - killed
        assert code == 1 and seconds < 20, f"{code} after {seconds:.1f} s"
        assert run.wait_for_orphans(2) == []
    assert run.output.count("error: rank 0: another rank died or hung (") == 1, run.output
    assert f"resume from iteration 3 of {save}" in run.output
    assert not (save / "run_status.json").exists()

    with Launched(tiny.arguments(save, *layout, "--save-interval", 3)) as run:
        assert run.wait(120) == 0, run.output
    assert " iteration        4/" in run.output and " iteration        3/" not in run.output
    assert json.loads((save / "run_status.json").read_text()) == {"status": "finished", "iteration": 14}
    fates = watch_ranks(victim, 2, main, tiny.arguments(tmp_path / "whole", *layout))
    assert [fate.exit_code for fate in fates] == [0, 0], fates[0].output
    assert Traces.read(save) == Traces.read(tmp_path / "whole")
