"""Wrong configurations, by the hundred, through `pretrain` and its dry run: one line, status 2, nothing written.

Whatever the dry run refuses the run refuses, and what it accepts runs: then for one step, since a signal seems to have
arrived. A few are tried as processes of their own.
"""

import os
import random
import subprocess
import sys

import pytest
import yaml

from megatron_prune.pretrain import main
from megatron_prune.runtime.signals import StopSignals
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.wrong_use import Shop, call, files, folder_of, is_affordable, unlikely_flags, wrong_flags, wrong_yaml

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's own; a run is not stopped by them, either

_ONLY_BEFORE_A_JOB = ("(--eval-tasks)", "(--eval-data-path)")  # read by the launcher's stages, and so by the dry run
_ONLY_HERE = ("not here", "the launch will refuse", "no CUDA device")  # a dry run may be on another machine


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Shop(tmp_path_factory.mktemp("shop"))
    prepare(shop.tiny.folder)
    assert main(shop.tiny.arguments(shop.run, "--save-interval", 10)) == 0
    return shop


def drawn(seed, shop):
    """A configuration file in an empty room, and the words that run it."""
    generator, room = random.Random(seed), folder_of(shop.folder / "room")
    configuration, how = shop.configuration(room / "run"), seed % 3
    text = wrong_yaml(generator, configuration) if how == 0 else yaml.safe_dump(configuration)
    (room / "run.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    more = wrong_flags(generator) if how == 1 else unlikely_flags(generator, shop) if how == 2 else []
    return ["--config", room / "run.yaml", *more]


def problems(words, shop, capfd):
    """What must not be, in words."""
    before = files(shop.folder)
    dry = call(main, [*words, "--dry-run"], capfd)
    yield from dry.problems()
    if files(shop.folder) != before:
        yield "the dry run wrote something"
    if dry.status == 0 and not is_affordable(words):
        return
    real = call(main, words, capfd)
    yield from real.problems()
    if real.status == 2 and files(shop.folder) != before:
        yield "a run that was refused wrote something"
    if dry.status == 2 and real.status == 0 and not any(field in dry.output for field in _ONLY_BEFORE_A_JOB):
        yield f"only the dry run refused: {dry.errors}"
    if dry.status == 0 and real.status == 2 and not any(text in dry.output + real.output for text in _ONLY_HERE):
        yield f"the dry run accepted it: {real.errors}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1000, 4000, 500))])
def test_wrong_configurations_are_one_line_and_write_nothing(shop, first, capfd, monkeypatch):
    monkeypatch.setattr(StopSignals, "is_asked", lambda self: True)
    monkeypatch.chdir(shop.folder)
    found = {}
    for seed in range(first, first + (500 if first else 60)):
        words = drawn(seed, shop)
        told = list(problems(words, shop, capfd))
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
