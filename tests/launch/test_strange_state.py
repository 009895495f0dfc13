"""Whatever a stranger puts into a checkpoint's state, random generators included: it is read, or one line says no."""

import random
import shutil

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.plain import pack, unpack
from megatron_prune.commands import main
from megatron_prune.runtime.signals import StopSignals
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.checkpoint.test_hostile_files import sign
from tests.wrong_use import call

pytestmark = pytest.mark.filterwarnings("ignore")

GUARD = ("--prune-spike-guard", "factor=1.3", "window=3")
DROPPED = object()
ANYTHING = [
    *(None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 63, 10**30, 0.5, -1.5, 1e308, float("inf"), float("nan"), DROPPED),
    *("", "4", "llama", "\x1b[2J\x07", "a\nb", "x" * 5000, "../..", [], [1], ["a"], {}, {"a": 1}, {1: 2}, (1, 2, 3)),
    *(np.zeros(3), np.zeros((2, 2), np.int64), np.array(1.0), np.full(4, np.nan), np.zeros(624, np.uint32)),
    *(torch.zeros(3), torch.zeros(5056, dtype=torch.uint8), torch.full((2,), torch.nan), torch.zeros(0)),
]


def places(value, where=()):
    """Every place in nested values, of long lists the first few."""
    yield where
    inner = value.items() if isinstance(value, dict) else enumerate(value[:8]) if type(value) in (list, tuple) else ()
    for key, item in inner:
        yield from places(item, (*where, key))


def spoilt(value, where, new):
    """A copy with `new` at that place, or nothing."""
    first, *rest = where
    if isinstance(value, tuple):
        return tuple(spoilt(list(value), where, new))
    value = value.copy()
    if rest:
        value[first] = spoilt(value[first], rest, new)
    elif new is DROPPED:
        del value[first]
    else:
        value[first] = new
    return value


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """(inputs, a run stopped in the midst of pruning, places of its state by field)"""
    folder = tmp_path_factory.mktemp("shop")
    tiny, good = prepare(folder / "inputs"), folder / "good"
    assert main(["pretrain", *map(str, tiny.arguments(good, *GUARD, "--save-interval", 4, "--exit-interval", 8))]) == 0
    fields = {}
    for place in places(unpack(good / "iter_0000008" / "common.pt")):
        if place:
            fields.setdefault(place[:2], []).append(place)
    return tiny, good, list(fields.values())


def uses(tiny, save, more):
    """Commands that read a run's folder."""
    yield "pretrain", *tiny.arguments(save, *GUARD), "--load", save
    yield "inspect", "--load", save, "--json"
    yield "convert-to-hf", "--load", save, "--save", more / "hf", "--overwrite"
    yield "evaluate", "--load", save, "--device", "cpu", "--eval-samples", "1"
    yield "token-scaling", "--runs", save, "--output-dir", more / "scaling"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1000, 2000, 3000, 4000))])
def test_a_spoilt_state_is_read_or_refused_in_one_line(shop, first, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(StopSignals, "is_asked", lambda self: True)  # a run that reads it does a step
    tiny, good, fields = shop
    save, found = tmp_path / "run", {}
    for seed in range(first, first + (250 if first else 16)):
        generator = random.Random(seed)
        place, new = generator.choice(generator.choice(fields)), generator.choice(ANYTHING)
        shutil.rmtree(save, ignore_errors=True)
        shutil.copytree(good, save)
        file = save / "iter_0000008" / "common.pt"
        file.write_bytes(pack(spoilt(unpack(file), place, new)))
        sign(file.parent)
        command = list(uses(tiny, save, tmp_path))[seed % (5 if first else 2)]
        problems = list(call(main, command, capfd).problems())
        if problems:
            found[seed] = command[0], place, new, problems
    assert not found
