"""Wrong configurations, by the hundred, through `pretrain` and its dry run: one line, status 2, nothing written.

Whatever the dry run refuses the run refuses, and what it accepts runs: then for one step, since a signal seems to have
arrived. Hundreds are tried as processes of their own: `python -m tests.launch.sweep`.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_prune.pretrain import main
from megatron_prune.runtime.signals import StopSignals
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.launch.sweep import drawn, problems
from tests.wrong_use import Shop, call, files

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's own; a run is not stopped by them, either


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Shop(tmp_path_factory.mktemp("shop"))
    prepare(shop.tiny.folder)
    assert main(shop.tiny.arguments(shop.run, "--save-interval", 10)) == 0
    return shop


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1000, 4000, 500))])
def test_wrong_configurations_are_one_line_and_write_nothing(shop, first, capfd, monkeypatch):
    monkeypatch.setattr(StopSignals, "is_asked", lambda self: True)
    monkeypatch.chdir(shop.folder)
    found = {}
    for seed in range(first, first + (500 if first else 60)):
        words = drawn(seed, shop)
        told = list(problems(words, shop, partial(call, main, capfd=capfd)))
        if told:
            found[seed] = (told, " ".join(str(word)[:100] for word in words))
    assert not found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (10, 20, 30))])
def test_the_same_in_processes_of_their_own(shop, first):
    ends = []
    for seed in range(first, first + (10 if first else 2)):
        words = [str(word) for word in drawn(seed, shop)]
        before = files(shop.folder)
        command = [sys.executable, "-m", "megatron_prune.pretrain", *words, "--exit-interval", "1"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            command, cwd=shop.folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stdout + done.stderr, (seed, words, done.stderr)
        assert done.returncode == 0 or (done.returncode, len(lines)) == (2, 1), (seed, words, done.stderr)
        assert done.returncode == 0 or files(shop.folder) == before, (seed, words)
        ends.append(done.returncode)
    assert 2 in ends


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("count", [8, pytest.param(900, marks=pytest.mark.full)])
def test_a_sweep_of_processes(count, tmp_path):
    command = [sys.executable, "-m", "tests.launch.sweep", str(tmp_path / "shop"), str(count)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} wrong configurations" in done.stdout
