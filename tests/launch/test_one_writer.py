"""One writer per folder, with real runs under real launchers: second starters, killed owners and launchers, Ctrl-C."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_prune.checkpoint.lease import is_lease, live_owner
from megatron_prune.config import dump, load_config
from megatron_prune.testing.benchmarks.kills import Traces
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.launch.launched import Launched
from tests.launch.test_job import SCRIPT, run, start

LAYOUT = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--save-interval", 3)
LONG = ("--continue-tokens", 64 * 400)  # time enough to be interrupted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def status(save):
    return json.loads((save / "run_status.json").read_text())["status"]


def refusals(output):
    return [line for line in output.splitlines() if "is being written by pid" in line]


@pytest.mark.timeout(300)
def test_under_torchrun_a_second_starter_is_refused_and_orphans_save_and_leave(tiny, tmp_path):
    save = tmp_path / "run"
    with Launched(tiny.arguments(save, *LAYOUT, *LONG)) as first:
        assert first.read_until(" iteration        4/"), first.output
        owner, before = first.rank(0), sorted(path.name for path in save.iterdir() if "tmp" not in path.name)
        with Launched(tiny.arguments(save, *LAYOUT)) as second:
            assert second.wait(100) != 0
        lines = refusals(second.output)
        assert len(lines) == 1 and lines[0].startswith(
            f"error: checkpoint.save: {save} is being written by pid {owner}"
        )
        assert set(before) <= {path.name for path in save.iterdir()}
        first.signal(signal.SIGKILL)  # torchrun: its ranks must notice by themselves
        assert first.wait(60) == -signal.SIGKILL  # their output ends with them
        assert first.wait_for_orphans(10) == []
    assert "the launcher (pid" in first.output and "Traceback" not in first.output
    assert status(save) == "preempted" and not list(filter(is_lease, save.iterdir()))
    with Launched(tiny.arguments(save, *LAYOUT)) as again:
        assert again.wait(100) == 0, again.output
    assert status(save) == "finished"


def job(tiny, save, config, *more):
    config.write_text(dump(load_config(tiny.arguments(save, *LAYOUT, *more))))
    return ("bash", SCRIPT, config, "--stage", "prune,continue")


def wait_until_it_trains(save, process):
    while not (save / "latest_checkpointed_iteration.txt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def ranks_of(save):
    """Pids of all processes whose command line names the job's configuration."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.fsencode(save.parent / "run.yaml") in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["kill", "interrupt", "hangup", "nohup"])
def test_the_launcher_is_killed_interrupted_or_loses_its_terminal(tiny, tmp_path, how):
    save, words = tmp_path / "run", ()
    words = job(tiny, save, tmp_path / "run.yaml", *(LONG if how != "nohup" else ()))
    process = start(*(("nohup",) * (how == "nohup")), *words, NPROC_PER_NODE="2")
    try:
        wait_until_it_trains(save, process)
        number = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}.get(how, signal.SIGHUP)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        end = time.monotonic() + 60
        while ranks_of(save) and time.monotonic() < end:
            time.sleep(0.1)
        assert ranks_of(save) == []
    finally:
        for pid in ranks_of(save):
            os.kill(pid, signal.SIGKILL)
    told = json.loads((save / "launch_status.json").read_text())["status"]
    if how == "nohup":
        assert (process.returncode, told) == (0, "finished"), output
        return
    assert (told, status(save)) == ("preempted", "preempted"), output
    assert process.returncode == (-signal.SIGKILL if how == "kill" else 0) and "Traceback" not in output, output
    assert live_owner(save) is None


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_second_interrupt_leaves_at_once(tiny, tmp_path):
    save = tmp_path / "run"
    process = start(*job(tiny, save, tmp_path / "run.yaml", *LONG), NPROC_PER_NODE="2")
    wait_until_it_trains(save, process)
    for pid in ranks_of(save):  # ranks that cannot save: only the second one ends them
        if pid != process.pid and b"elastic" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert "interrupted again: killed" in output and "Traceback" not in output
    assert ranks_of(save) == [] and json.loads((save / "launch_status.json").read_text())["status"] == "preempted"


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_launcher_killed_between_the_first_rename_and_latest_goes_on(tiny, tmp_path):
    save = tmp_path / "run"
    words = job(tiny, save, tmp_path / "run.yaml")
    whole = tmp_path / "whole"
    code, output = run(*job(tiny, whole, tmp_path / "whole.yaml"), NPROC_PER_NODE="2")
    assert code == 0, output
    process = start(*words, NPROC_PER_NODE="2")
    wait_until_it_trains(save, process)
    for pid in ranks_of(save):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (save / "latest_checkpointed_iteration.txt").unlink()
    code, output = run(*words, NPROC_PER_NODE="2")
    assert code == 0, output
    assert Traces.read(save) == Traces.read(whole)


def test_one_rank_saves_at_the_first_interrupt(tiny, tmp_path):
    save = tmp_path / "run"
    words = tiny.arguments(save, "--save-interval", 3, *LONG)
    process = start("python", "-m", "megatron_prune.pretrain", *words, PYTHONPATH=str(SCRIPT.parents[1]))
    try:
        wait_until_it_trains(save, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and status(save) == "preempted" and "Traceback" not in output, output
