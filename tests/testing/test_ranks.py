"""run_ranks: results in order, failures with their traceback, hangs ended in time, nothing left behind."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_prune.errors import UserError
from megatron_prune.testing.helpers.ranks import RankError, run_ranks


def sum_over_ranks(rank, world_size, scale):
    tensor = torch.full((3,), float(rank + 1)) * scale
    dist.all_reduce(tensor)
    return {"rank": rank, "world_size": world_size, "sum": tensor, "threads": torch.get_num_threads()}


def megatron_tensor_parallel_sum(rank, _world_size):
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(2)
    tensor = torch.tensor(float(rank))
    dist.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor.item()


def fail_on_last_rank(rank, world_size):
    if rank == world_size - 1:
        print("about to fail")
        raise UserError("hidden_size: 7 is no multiple of 4")
    dist.barrier()


def die_on_first_rank(rank, _world_size):
    if rank == 0:
        os._exit(3)
    dist.barrier()


def hang_on_first_rank(rank, _world_size, folder):
    child = subprocess.Popen(["sleep", "1000"])
    Path(folder, f"rank_{rank}").write_text(f"{os.getpid()} {child.pid}")
    if rank == 0:
        wait_for_something_that_never_comes()
    dist.barrier()


def wait_for_something_that_never_comes():
    time.sleep(1000)


def read_environment(_rank, _world_size, name):
    print("printed by a rank")
    return os.environ.get(name), os.environ["RANK"], torch.cuda.is_available()


def return_something_unpicklable(_rank, _world_size):
    return lambda: None


def large_result(rank, _world_size):
    return torch.full((1_000_000,), float(rank))


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids):
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_in_rank_order(world_size):
    results = run_ranks(sum_over_ranks, world_size, 10.0)
    total = 10.0 * sum(range(1, world_size + 1))
    assert [r["rank"] for r in results] == list(range(world_size))
    for result in results:
        assert result["world_size"] == world_size
        assert result["threads"] == 1
        assert torch.equal(result["sum"], torch.full((3,), total))


def test_megatron_groups_work_and_each_call_starts_afresh():
    for _ in range(2):
        assert run_ranks(megatron_tensor_parallel_sum, 2) == [1.0, 1.0]
    assert not dist.is_initialized()


def test_large_results_pass():
    results = run_ranks(large_result, 2)
    assert [r.sum().item() for r in results] == [0.0, 1_000_000.0]


def test_a_warm_call_is_fast():
    run_ranks(sum_over_ranks, 2, 1.0)
    start = time.monotonic()
    run_ranks(sum_over_ranks, 2, 1.0)
    assert time.monotonic() - start < 3


def test_an_exception_names_the_rank_and_carries_its_traceback():
    with pytest.raises(RankError, match=r"rank 2 of 3 raised") as caught:
        run_ranks(fail_on_last_rank, 3)
    assert caught.value.rank == 2
    assert isinstance(caught.value.exception, UserError)
    assert caught.value.__cause__ is caught.value.exception
    message = str(caught.value)
    assert "hidden_size: 7 is no multiple of 4" in message
    assert "in fail_on_last_rank" in message
    assert "about to fail" in message


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankError, match=r"rank 0 of 2 died with exit code 3"):
        run_ranks(die_on_first_rank, 2)


def test_a_hang_ends_in_time_says_where_and_leaves_nothing_behind(tmp_path, monkeypatch):
    rendezvous = tmp_path / "rendezvous"
    rendezvous.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(rendezvous))
    start = time.monotonic()
    with pytest.raises(RankError, match="did not finish within 4 s") as caught:
        run_ranks(hang_on_first_rank, 2, str(tmp_path), timeout=4)
    assert time.monotonic() - start < 12
    assert "wait_for_something_that_never_comes" in str(caught.value)
    pids = [pid for rank in range(2) for pid in (tmp_path / f"rank_{rank}").read_text().split()]
    assert len(pids) == 4
    assert wait_until_gone(pids) == []
    assert list(rendezvous.iterdir()) == []


def test_ranks_see_the_callers_environment_no_cuda_and_their_output_is_passed_on(monkeypatch, capsys):
    monkeypatch.setenv("MEGATRON_PRUNE_TEST_RANKS", "seen")
    results = run_ranks(read_environment, 2, "MEGATRON_PRUNE_TEST_RANKS")
    assert results == [("seen", "0", False), ("seen", "1", False)]
    assert capsys.readouterr().out.count("printed by a rank") == 2


def test_what_cannot_be_pickled_is_said_plainly():
    with pytest.raises(TypeError, match="top level of a module"):
        run_ranks(lambda rank, world_size: None, 1)
    with pytest.raises(RankError, match="rank 0 of 1 raised"):
        run_ranks(return_something_unpicklable, 1)


def test_ranks_die_with_a_caller_that_is_killed(tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n"
        "from tests.testing.test_ranks import hang_on_first_rank\n"
        "from megatron_prune.testing.helpers import ranks\n"
        "ranks.PRELOADED = ('torch',)\n"
        "if __name__ == '__main__':\n"
        f"    ranks.run_ranks(hang_on_first_rank, 2, {str(tmp_path)!r}, timeout=100)\n"
    )
    rendezvous = Path(tempfile.mkdtemp(prefix="r"))  # a socket lies in it, whose path must not be long
    caller = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"TMPDIR": str(rendezvous)})
    try:
        files = [tmp_path / "rank_0", tmp_path / "rank_1"]
        deadline = time.monotonic() + 60
        while not all(f.exists() and len(f.read_text().split()) == 2 for f in files):
            assert time.monotonic() < deadline and caller.poll() is None, "the ranks did not start"
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait()
    assert wait_until_gone([pid for f in files for pid in f.read_text().split()]) == []
    assert not list(rendezvous.glob("run_ranks_*"))
    shutil.rmtree(rendezvous)
