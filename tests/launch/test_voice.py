"""What one rank alone cannot go on with is told by that rank, once, and nobody calls it a lost rank."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_prune.errors import PeerLostError, UserError
from megatron_prune.runtime import voice
from megatron_prune.runtime.failures import SilentError
from megatron_prune.testing.helpers.ranks import free_port
from megatron_prune.testing.helpers.tiny_runs import prepare

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pp2": ("--pipeline-model-parallel-size", 2),
    "dp2": ("--use-distributed-optimizer",),
}
PROGRAM = """
import os, sys
from megatron_prune.errors import UserError
from megatron_prune.runtime.failures import leave
from megatron_prune.pretrain import main
from megatron_prune.training import trainer
who, forward, iterations = sys.argv[1].split(","), trainer.forward_backward, iter(range(1, 100))
def forward_or_fail(*args):
    if next(iterations) == 3 and os.environ["RANK"] in who:
        raise eval(sys.argv[2])
    return forward(*args)
trainer.forward_backward = forward_or_fail
leave(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def outputs(tiny, tmp_path, layout, torchrun, who, error):
    """(exit statuses, all lines told) of two ranks of which `who` fail in their third step."""
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [str(tmp_path / "program.py"), who, error, *tiny.arguments(tmp_path / "run", *LAYOUTS[layout])]
    usual = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        commands = [([*launcher, *words], usual)]
    else:  # as srun starts them: rank 0 keeps the store
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        commands = [(words, usual | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    runs = [
        subprocess.Popen(
            [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, env in commands
    ]
    texts = [run.communicate(timeout=100)[0] for run in runs]
    return [run.returncode for run in runs], [
        line
        for text in texts
        for line in text.splitlines()
        if line.startswith(("error: ", "rank ", "frame #")) or "Error: " in line
    ]


QUICK = {("tp2", 0, "1"), ("pp2", 0, "0"), ("dp2", 1, "1")}


@pytest.mark.parametrize(
    ("layout", "torchrun", "who"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.full)
        for case in [(layout, torchrun, who) for layout in LAYOUTS for torchrun in (0, 1) for who in ("0", "1", "0,1")]
    ],
)
def test_a_mistake_of_some_ranks_is_told_once_by_one_of_them(tiny, tmp_path, layout, torchrun, who):
    statuses, lines = outputs(tiny, tmp_path, layout, torchrun, who, "UserError('data.path: ids end at 5')")
    told = "error: rank 1: data.path: ids end at 5" if who == "1" else "error: data.path: ids end at 5"
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == [told], lines
    assert not [line for line in lines if "Traceback" in line]
    if not torchrun:
        assert statuses == [2 if str(rank) in who else 3 for rank in range(2)]


@pytest.mark.full
@pytest.mark.parametrize("error", ["OSError(28, 'No space left on device', '/x')", "KeyError('a defect')"])
def test_what_is_no_mistake_of_the_user_is_told_by_its_rank_alone(tiny, tmp_path, error):
    _, lines = outputs(tiny, tmp_path, "tp2", False, "1", error)
    assert lines and not any("another rank" in line for line in lines), lines
    assert lines[0].startswith("error: rank 1: /x: No space left" if "OSError" in error else "rank 1:"), lines


@pytest.mark.parametrize("who", [pytest.param("1", marks=pytest.mark.full), "0"])
def test_a_rank_that_is_killed_is_told_in_one_line(tiny, tmp_path, who):
    """Without torchrun, whose agent would end the other one; the store ends with rank 0."""
    statuses, lines = outputs(tiny, tmp_path, "tp2", False, who, "os.kill(os.getpid(), 9)")
    assert sorted(statuses) == [-9, 3]
    assert len(lines) == 1 and f"error: rank {1 - int(who)}: another rank died or hung" in lines[0], lines


@pytest.mark.parametrize(
    ("raised", "tells"),
    [
        ([UserError("a"), PeerLostError("l")], [True, False]),
        ([PeerLostError("l"), UserError("a"), PeerLostError("l")], [False, True, False]),
        ([UserError("a"), UserError("a"), UserError("a")], [True, False, False]),
        ([PeerLostError("l"), ValueError("defect"), ValueError("defect")], [False, True, True]),
        ([PeerLostError("l"), None, PeerLostError("l")], [True, None, True]),  # killed
    ],
)
def test_who_tells(monkeypatch, raised, tells):
    monkeypatch.setattr(voice, "_SECONDS", 0.3)
    monkeypatch.setattr(voice, "store_answers", lambda environ: True)
    store, found = dist.HashStore(), [None] * len(raised)

    def rank(number):
        one = voice.Voice(store, number, len(raised), False)
        try:
            one.settle(raised[number])
            found[number] = True
        except SilentError as silent:
            assert silent.status == (2 if isinstance(raised[number], UserError) else 3)
            found[number] = False
        one.leave()

    for are_lost in (False, True):  # connections break once a rank has settled its own
        mine = [n for n, error in enumerate(raised) if error and isinstance(error, PeerLostError) == are_lost]
        ranks = [threading.Thread(target=rank, args=(number,)) for number in mine]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
    assert found == tells


def test_of_several_ranks_without_rank_0_one_tells(monkeypatch):
    monkeypatch.setattr(voice, "_SECONDS", 0.1)
    store, told = dist.HashStore(), []
    for number in (2, 1, 3):
        try:
            voice.Voice(store, number, 4, False).settle(UserError("a"))
            told.append(number)
        except SilentError:
            pass
    assert told == [2]
