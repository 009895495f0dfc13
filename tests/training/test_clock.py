"""The clock of parts: sums, nesting, and on CUDA no waiting but one per log line."""

from types import SimpleNamespace

import pytest

from megatron_prune.runtime import device as module
from megatron_prune.runtime.device import PartClock


class Time:
    """A clock that this test moves."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(module, "time", time)
    return time


def cpu():
    return PartClock(SimpleNamespace(kind="cpu"))


def test_parts_add_up_until_they_are_collected(time):
    clock = cpu()
    for seconds in (1.0, 2.0):
        with clock.part("scoring"):
            time.now += seconds
        time.now += 10
    assert clock.collect() == {"scoring": 3.0}
    assert clock.collect() == {}


def test_an_inner_part_is_not_counted_twice(time):
    clock = cpu()
    with clock.part("retire"):
        time.now += 1
        with clock.part("second-order"):
            time.now += 5
        time.now += 2
    assert clock.collect() == {"retire": 3.0, "second-order": 5.0}


def test_a_part_that_fails_is_closed(time):
    clock = cpu()
    with pytest.raises(ValueError, match="broken"), clock.part("outer"):
        time.now += 1
        with clock.part("inner"):
            time.now += 1
            raise ValueError("broken")
    assert clock.collect() == {"outer": 1.0, "inner": 1.0}


class Event:
    """A CUDA event that is past once the device, which lags behind, gets there."""

    waits = 0
    host = device = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.host

    def query(self):
        return self.at <= Event.device

    def synchronize(self):
        Event.waits += 1
        Event.device = max(Event.device, self.at)

    def elapsed_time(self, end):
        assert self.query() and end.query(), "asked for before the device got there"
        return (end.at - self.at) * 1000


def test_on_cuda_only_collecting_waits(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    monkeypatch.setattr(module, "_MANY", 8)
    clock = PartClock(SimpleNamespace(kind="cuda"))
    for iteration in range(50):
        for name in ("forward-backward", "optimizer"):
            with clock.part(name):
                Event.host += 0.5
        Event.device = Event.host - 1.0  # an iteration behind
        assert Event.waits == 0
        assert len(clock._spans) <= 8 + 2, "past events are not kept"
        assert iteration < 50
    assert clock.collect() == pytest.approx({"forward-backward": 25.0, "optimizer": 25.0})
    assert Event.waits == 1
