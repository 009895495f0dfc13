"""One writer per folder: who may take it, who is dead, and any number of processes that want it at once."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import pytest

from megatron_prune.checkpoint import files, lease
from megatron_prune.checkpoint import owner as owners
from megatron_prune.checkpoint.lease import acquire, live_owner
from megatron_prune.checkpoint.owner import EXPIRY, Owner, Process, death
from megatron_prune.errors import UserError

CONTEXT = multiprocessing.get_context("fork")


def held(directory):
    return [path.name for path in directory.iterdir() if lease.is_lease(path)]


def owner(**changes):
    return dataclasses.replace(Owner.of_this_process({}), **changes)


def write(directory, value, age=0.0):
    """A lease as another process would have left it."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{lease.PREFIX}1"
    path.write_bytes(value.to_json())
    os.utime(path, (time.time() - age,) * 2)
    return path


def in_a_process(function, *args):
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def hold_for_ever(directory):
    acquire(directory)
    time.sleep(1000)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_a_second_starter_is_told_who_has_the_folder_and_a_killed_owner_is_taken_over(tmp_path):
    folder = tmp_path / "run"
    first = in_a_process(hold_for_ever, folder)
    wait_for(lambda: live_owner(folder) is not None)
    with pytest.raises(
        UserError, match=rf"run is being written by pid {first.pid} on .*; wait for that run or stop"
    ) as e:
        acquire(folder)
    assert "\n" not in str(e.value)
    with pytest.raises(OSError, match="being written by pid") as refused:
        files.begin(folder, 5)
    assert refused.value.errno == errno.EBUSY
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with acquire(folder) as mine:
        assert mine.loss() is None and held(folder) == [f"{lease.PREFIX}2"]
    assert not folder.exists() or held(folder) == []


def test_a_folder_made_for_a_lease_goes_with_it_and_content_stays(tmp_path):
    with acquire(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with acquire(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_the_same_process_holds_it_twice_and_gives_it_back_once(tmp_path):
    with acquire(tmp_path) as outer:
        with acquire(tmp_path) as inner:
            assert inner.is_nested
        assert outer.loss() is None
    assert held(tmp_path) == []


HERE, AWAY = owners.this_machine(), "another boot"


@pytest.mark.parametrize(
    ("theirs", "mine", "age", "dies"),
    [
        ({"machine": HERE}, {}, EXPIRY * 9, None),  # this very process: alive, however silent
        ({"machine": HERE, "start": 1}, {}, 0, "its process is gone"),  # its number was given again
        ({"machine": HERE, "pid": 2**22 + 1}, {}, 0, "its process is gone"),
        ({"machine": AWAY}, {}, EXPIRY - 1, None),
        ({"machine": AWAY}, {}, EXPIRY + 1, "no sign of life for 121 s"),
        ({"machine": AWAY, "job": "7", "restarts": 0}, {"job": "7", "restarts": 1}, 0, "its job was requeued"),
        ({"machine": AWAY, "job": "7", "restarts": 1}, {"job": "7", "restarts": 1}, 0, None),  # two steps of one job
        ({"machine": AWAY, "job": "7"}, {"job": "8", "restarts": 1}, 0, None),
        ({"machine": AWAY, "job": None}, {"job": None, "restarts": 1}, 0, None),
    ],
)
def test_who_is_dead(theirs, mine, age, dies):
    assert death(owner(**theirs), owner(**mine), age) == dies


def test_a_process_that_proc_does_not_show_is_no_dead_one(monkeypatch):
    """Where /proc hides what others run (hidepid), and where this process may open no more files."""
    mine = Process.find(os.getpid())

    def unseen(pid):
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(owners, "_start", unseen)
    assert mine.is_running(), "its folder in /proc is there"
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert Process(2**22 + 1, 5).is_running(), "somebody else's"
    monkeypatch.setattr(os, "kill", lambda *_: None)
    assert not Process(2**22 + 1, 5).is_running(), "ended just now"


def test_an_owner_elsewhere_is_waited_out_by_its_heartbeat(tmp_path):
    write(tmp_path, owner(machine=AWAY, host="node7", pid=4, job="31"), age=30)
    with pytest.raises(
        UserError, match=r"pid 4 on node7, job 31 .* last heard of 3\d s ago \(it counts as dead after 120 s"
    ):
        acquire(tmp_path)
    write(tmp_path, owner(machine=AWAY), age=EXPIRY + 5)
    with acquire(tmp_path):
        assert held(tmp_path) == [f"{lease.PREFIX}2"]


def test_a_requeued_job_takes_over_at_once(tmp_path, monkeypatch):
    write(tmp_path, owner(machine=AWAY, job="31"))
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    with pytest.raises(UserError):
        acquire(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    acquire(tmp_path).release()


def test_an_owner_whose_launcher_is_gone_is_waited_for(tmp_path):
    def orphan():
        acquire(tmp_path, above=[Process(2**22 + 1, 5)])
        time.sleep(1.0)
        os._exit(0)

    first = in_a_process(orphan)
    wait_for(lambda: live_owner(tmp_path) is not None)
    acquire(tmp_path).release()
    first.join()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": 3}', b"\xff\x00"])
def test_a_damaged_lease_holds_only_while_it_is_fresh(tmp_path, text):
    path = tmp_path / f"{lease.PREFIX}1"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"somebody \(.*lease-1 cannot be read; remove it"):
        acquire(tmp_path)
    os.utime(path, (time.time() - EXPIRY - 5,) * 2)
    acquire(tmp_path).release()


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with acquire(tmp_path) as mine:
        assert mine.loss() is None and json.loads(mine.path.read_text())["pid"] == os.getpid()


def test_a_dead_lease_that_is_somebodys_again_is_left_alone(tmp_path, monkeypatch):
    """Between the look at the dead one and the new lease, others take the folder over, give it back, and take it."""
    write(tmp_path, owner(machine=AWAY, pid=3), age=EXPIRY + 5)
    link = lease._link

    def late(*arguments):
        write(tmp_path, owner(machine=AWAY, host="node7", pid=4))
        return link(*arguments)

    monkeypatch.setattr(lease, "_link", late)
    with pytest.raises(UserError, match="is being written by pid 4 on node7"):
        acquire(tmp_path)
    assert held(tmp_path) == [f"{lease.PREFIX}1"]


def test_the_loss_of_a_lease_is_noticed(tmp_path):
    mine = acquire(tmp_path)
    mine.path.unlink()
    assert mine.loss() == "its lease was removed"
    write(tmp_path, owner(machine=AWAY, host="node7", pid=4))
    assert mine.loss().startswith("it is written by pid 4 on node7")
    mine.release()
    assert held(tmp_path) == [f"{lease.PREFIX}1"], "another's stays"


def test_a_newer_iteration_is_not_replaced_by_an_older_one_unless_told_to(tmp_path):
    def save(iteration, **more):
        folder = files.begin(tmp_path, iteration)
        files.write_manifest(folder, files.write_files(folder, {"a": b"a"}))
        return files.publish(folder, tmp_path, iteration, **more)

    save(11)
    with pytest.raises(OSError, match="holds iteration 11, which is newer"):
        save(4)
    assert (tmp_path / files.LATEST).read_text() == "11\n" and files.steps(tmp_path) == [11]
    save(4, goes_back=True)
    assert (tmp_path / files.LATEST).read_text() == "4\n"


class Ended(BaseException):
    """An actor is killed, or the play is over."""


class Interleaving:
    """Three starters in one process, of which one at a time does one line of lease.py; which one is drawn, and one of
    them often stands still for long. They take the folder, hold it, are killed at any line, or give it back.
    """

    def __init__(self, seed, folder, monkeypatch):
        self.random, self.folder, self.over, self.two_at_once = random.Random(seed), folder, False, False
        self.turn, self.back = [threading.Semaphore(0) for _ in range(3)], threading.Semaphore(0)
        self.here, self.dead, self.holders, self.turns, self.tokens = threading.local(), set(), set(), 0, 0
        real = Owner.of_this_process({})
        monkeypatch.setattr(
            Owner,
            "of_this_process",
            lambda *_: dataclasses.replace(real, token=str(self.here.token), pid=self.here.token),
        )
        monkeypatch.setattr(
            lease, "death", lambda found, *_: "killed" if found is not None and found.pid in self.dead else None
        )
        monkeypatch.setattr(lease.time, "sleep", lambda _: None)

    def line(self):
        """Let the others go on."""
        self.back.release()
        self.turn[self.here.number].acquire()
        if self.over:
            raise Ended

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != lease.__file__:
            return None
        if event == "line":
            if self.here.may_die and self.random.random() < 0.004:
                self.here.may_die = False  # what runs in a `finally` is no more than a kill leaves behind
                raise Ended
            self.line()
        return self.trace

    def traced(self, function, *args):
        sys.settrace(self.trace)
        try:
            return function(*args)
        finally:
            sys.settrace(None)

    def actor(self, number):
        self.here.number = number
        self.turn[number].acquire()
        while not self.over:
            self.tokens += 1
            self.here.token, self.here.may_die = self.tokens, True
            try:
                mine = self.traced(acquire, self.folder)
                self.holders.add(number)
                self.turns += 1
                self.two_at_once |= self.holders != {number}
                for _ in range(self.random.randrange(80)):
                    self.line()
                self.holders.discard(number)
                if self.random.random() < 0.4:
                    raise Ended
                self.traced(mine.release)
            except UserError:
                continue
            except Ended:
                self.holders.discard(number)
                self.dead.add(self.here.token)
        self.back.release()

    def play(self, lines=3000):
        actors = [threading.Thread(target=self.actor, args=(number,), daemon=True) for number in range(3)]
        for actor in actors:
            actor.start()
        now = asleep = 0
        for _ in range(lines):
            if self.random.random() < 0.003:
                asleep = self.random.randrange(3)
            if now == asleep or self.random.random() < 0.03:
                now = self.random.choice([number for number in range(3) if number != asleep])
            self.turn[now].release()
            self.back.acquire()
            if self.two_at_once or not actors[now].is_alive():
                break
        self.over = True
        for turn, actor in zip(self.turn, actors, strict=True):
            while actor.is_alive():
                turn.release()
                actor.join(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files of actors that were killed
@pytest.mark.parametrize("first", [0, *(pytest.param(10 * n, marks=pytest.mark.full) for n in range(1, 60))])
def test_never_two_at_once_in_any_order_of_lines(tmp_path, monkeypatch, first):
    turns = 0
    for seed in range(first, first + 10):
        with monkeypatch.context() as patch:
            play = Interleaving(seed, tmp_path / str(seed), patch)
            play.play()
        assert not play.two_at_once, f"seed {seed}"
        turns += play.turns
    assert turns > 20


def scramble(directory, seed):
    """Take the folder until told; whoever has it writes a file that nobody else may touch meanwhile."""
    generator, witness = random.Random(seed), directory / "witness"
    while not (directory / "enough").exists():
        try:
            mine = acquire(directory)
        except UserError:
            time.sleep(generator.uniform(0, 0.01))
            continue
        witness.write_text(str(os.getpid()))
        time.sleep(generator.uniform(0, 0.01))
        if witness.read_text() != str(os.getpid()):
            (directory / "two-at-once").touch()
        with (directory / "turns").open("a") as turns:
            turns.write(".")
        if generator.random() < 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        mine.release()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 50))])
def test_never_two_at_once_however_they_are_interleaved_and_killed(tmp_path, seed):
    """For 100 turns, however long this machine takes; a folder that nobody can take any more ends by time-out."""
    turns, alive, number = tmp_path / "turns", [], 0
    turns.touch()
    while turns.stat().st_size < 100:
        alive = [process for process in alive if process.is_alive()]
        while len(alive) < 5:
            alive.append(in_a_process(scramble, tmp_path, seed * 10_000 + number))
            number += 1
        time.sleep(0.01)
    (tmp_path / "enough").touch()
    for process in alive:
        process.join()
    assert not (tmp_path / "two-at-once").exists()
    acquire(tmp_path).release()
    assert held(tmp_path) == []
