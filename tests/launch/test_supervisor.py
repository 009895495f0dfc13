"""The supervisor of a node: signals reach each rank once, the launcher between stays unharmed, nothing outlives it."""

import os
import signal
import sys
import threading
import time

import pytest

from megatron_prune.launch.jobs.supervisor import supervise

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")

# Stands for torchrun: starts two ranks in sessions of their own, fails if one fails.
LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1], str(r)], start_new_session=True) for r in range(2)]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""
# Takes its time before it listens, then saves and leaves when it is told to.
GOOD_RANK = """
import signal, sys, time
time.sleep(0.5)
told = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, f: told.append(n))
open(f"ready-{sys.argv[1]}", "w").close()
while not told:
    time.sleep(0.02)
time.sleep(0.5)
open(f"saved-{sys.argv[1]}", "w").write(" ".join(str(int(n)) for n in told))
"""
DEAF_RANK = GOOD_RANK.replace("while not told:", "while True:")


def run(rank, signals, tmp_path, monkeypatch, grace=20.0):
    """Supervise two such ranks; send this process the signals once both are ready, or at once."""
    monkeypatch.chdir(tmp_path)

    def tell():
        time.sleep(0.1)
        while rank is DEAF_RANK and not (tmp_path / "ready-0").exists():
            time.sleep(0.02)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=tell)
    thread.start()
    outcome = supervise([sys.executable, "-c", LAUNCHER, rank], dict(os.environ), grace, poll=0.05)
    thread.join()
    return outcome


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_save_and_everything_ends_well(number, tmp_path, monkeypatch):
    outcome = run(GOOD_RANK, [number], tmp_path, monkeypatch)
    assert (outcome.code, outcome.told) == (0, number)
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


def test_a_second_signal_changes_nothing(tmp_path, monkeypatch):
    """Schedulers signal more than once; ranks are told once."""
    outcome = run(GOOD_RANK, [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], tmp_path, monkeypatch)
    assert outcome.code == 0 and (tmp_path / "saved-1").read_text() == str(int(signal.SIGUSR1))


def test_ranks_that_do_not_leave_are_killed(tmp_path, monkeypatch):
    start = time.monotonic()
    outcome = run(DEAF_RANK, [signal.SIGTERM], tmp_path, monkeypatch, grace=0.5)
    assert outcome.code != 0 and outcome.told == signal.SIGTERM and time.monotonic() - start < 30
    assert not (tmp_path / "saved-0").exists()


def test_a_failure_is_passed_on_and_handlers_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    outcome = supervise([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), 1.0)
    assert (outcome.code, outcome.told) == (3, None)
    assert signal.getsignal(signal.SIGTERM) == before
