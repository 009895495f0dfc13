"""Every command with wrong flags, by the hundred: it works, or says one line and leaves nothing."""

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from multiprocessing.managers import BaseManager

import pytest

from megatron_prune.commands import main
from megatron_prune.runtime.signals import StopSignals
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.disks import freeze, small_disk
from tests.wrong_use import (
    WRITERS,
    Shop,
    TookTooLongError,
    at_most,
    call,
    files,
    folder_of,
    strange_file,
    wrong_command,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Shop(tmp_path_factory.mktemp("shop"))
    prepare(shop.tiny.folder)
    words = shop.tiny.arguments(shop.run, "--save-interval", 10)
    assert main(["pretrain", *map(str, words)]) == 0
    assert main(["convert-to-hf", "--load", str(shop.run), "--save", str(shop.hf)]) == 0
    shop.write_gguf()
    return shop


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1000, 2000, 100))])
def test_wrong_uses_are_one_line_and_leave_nothing(shop, first, capfd, monkeypatch):
    monkeypatch.setattr(StopSignals, "is_asked", lambda self: True)
    found = {}
    for seed in range(first, first + (100 if first else 40)):
        room = folder_of(shop.folder / "room")
        monkeypatch.chdir(room)
        words = wrong_command(random.Random(seed), shop, room)
        before = sorted(shop.folder.rglob("*")), files(shop.folder)
        done = call(main, words, capfd)
        problems = list(done.problems(may_be=(0, 1, 2)))
        if done.status == 1 and done.errors:
            problems.append("an error line with status 1")
        if done.status == 2 and (sorted(shop.folder.rglob("*")), files(shop.folder)) != before:
            problems.append("a refusal left something")
        if problems:
            found[seed] = problems, " ".join(word[:100] for word in words)
    assert not found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1000, 3000, 100))])
def test_what_is_no_file_or_another_one_is_noticed(shop, first, capfd, monkeypatch):
    """Pipes that nobody writes, devices, links to nowhere, damaged and other files in the place of any file that a
    command reads: it does without, or says one line; it does not wait.
    """
    monkeypatch.setattr(StopSignals, "is_asked", lambda self: True)
    found = {}
    for seed in range(first, first + (100 if first else 20)):
        room = folder_of(shop.folder / "room")
        monkeypatch.chdir(room)
        words, what = strange_file(random.Random(seed), shop, room)
        try:
            with at_most(60.0):
                told = list(call(main, words, capfd).problems(may_be=(0, 1, 2)))
        except TookTooLongError:
            told = ["it waits"]
        if told:
            found[seed] = words[0], what, told
    assert not found


BLOCK = 4096
ROOM = [*(1, 2, 3, 5, 9, 20, 40, 100, 300), 3000]  # blocks
ENTRIES = [*range(1, 13), *(15, 20, 30, 60), 1000]  # files and folders
_IN_SHORT = {"convert-to-hf": [1, 20], "preprocess": [1], "token-scaling": [3], "recipe": [1]}
_ENTRIES_IN_SHORT = {"convert-from-hf, GGUF": [1, 4, 9], "convert-to-hf": [3, 6], "convert-to-gguf": [2]}
_KINDS = {"blocks": (ROOM, _IN_SHORT), "entries": (ENTRIES, _ENTRIES_IN_SHORT)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "way", "room"),
    [
        *((kind, way, room) for kind, (_, in_short) in _KINDS.items() for way, room in in_short.items()),
        *(
            pytest.param(kind, way, rooms, marks=pytest.mark.full)
            for kind, (rooms, _) in _KINDS.items()
            for way in WRITERS
        ),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(shop, kind, way, room, tmp_path, capfd, monkeypatch):
    """Whatever the room that is left, in bytes or in entries; and nothing is there afterwards that is not whole."""
    found = {}
    for blocks in room:
        monkeypatch.chdir(folder_of(shop.folder / "room"))
        sizes = (BLOCK * blocks, 0) if kind == "blocks" else (1 << 30, blocks)
        with small_disk(tmp_path / "disk", *sizes) as disk:
            done = call(main, [way.partition(",")[0], *WRITERS[way](shop, disk)], capfd)
            left = [path.name for path in disk.rglob("*") if path.name.endswith((".tmp", ".partial", ".writer"))]
        problems = [*done.problems(), *left]
        if done.status == 2 and str(disk) not in done.errors[0]:
            problems.append("the line names nothing")
        if problems:
            found[blocks] = problems, done.output
        if done.status == 0 and blocks > 1:
            break
    assert not found
    assert done.status == 0 or len(room) < 10, "there is room enough in the end"


@pytest.mark.parametrize(
    "ways",
    [["convert-from-hf, GGUF", "preprocess"], pytest.param(list(WRITERS), marks=pytest.mark.full)],
    ids=["two", "all"],
)
def test_a_read_only_place_is_one_line_that_names_it(shop, ways, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(folder_of(shop.folder / "room"))
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        freeze(disk)
        for way in ways:
            done = call(main, [way.partition(",")[0], *WRITERS[way](shop, disk)], capfd)
            assert done.status == 2 and not list(done.problems()) and str(disk) in done.errors[0], (way, done.output)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "ways",
    [["convert-to-megatron"], pytest.param(list(WRITERS), marks=pytest.mark.full)],
    ids=["one", "all"],
)
def test_no_process_and_no_temporary_folder_is_there_to_outlive_a_killed_command(
    shop, ways, capfd, monkeypatch, tmp_path
):
    """multiprocessing's servers outlive a `kill -9` of whoever started them, with their folders `pymp-*`."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder_of(tmp_path / "temporary")))
    monkeypatch.setattr(BaseManager, "start", lambda *_: pytest.fail("starts a server"))
    for way in ways:
        assert call(main, [way.partition(",")[0], *WRITERS[way](shop, folder_of(tmp_path / "room"))], capfd).status == 0
        assert not multiprocessing.active_children()
        assert not list((tmp_path / "temporary").glob("pymp-*"))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_is_told_to_stop_while_it_writes_leaves_nothing(
    shop, number, capfd, monkeypatch, tmp_path, request
):
    """The signal comes with the first file that is flushed to the disk, once in a `__del__`, where exceptions are lost;
    further ones while it cleans up.
    """
    flush, remove = os.fsync, shutil.rmtree
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # tests may run under nohup, or after one that runs the launcher
    request.addfinalizer(lambda: signal.signal(number, before))

    class Fragile:
        def __del__(self):
            os.kill(os.getpid(), number)

    def flush_and_signal(descriptor):
        monkeypatch.setattr(os, "fsync", flush)
        Fragile()
        flush(descriptor)
        time.sleep(0.2)  # in a thread, beside which Python's own handler comes to its turn

    def remove_and_signal(*args, **how):
        if number != signal.SIGINT:  # a second Ctrl-C is meant
            os.kill(os.getpid(), number)
        remove(*args, **how)

    monkeypatch.setattr(os, "fsync", flush_and_signal)
    monkeypatch.setattr(shutil, "rmtree", remove_and_signal)
    words = ["convert-from-hf", "--hf-model", shop.tiny.source, "--save", tmp_path / "run"]
    try:
        status = call(main, words, capfd).status
    except SystemExit as left:
        status = left.code
    assert status == 128 + number
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert signal.getsignal(number) == usual
    monkeypatch.setattr(shutil, "rmtree", remove)
    (tmp_path / "run" / "iter_0000000.tmp-0123abcd").mkdir(parents=True)  # as what was killed leaves
    assert call(main, words, capfd).status == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000000"]


@pytest.mark.parametrize(("name", "status"), [(b"m\x1b[31m\x07 n\n", 0), (b"m\xff", 2)])
def test_names_of_folders_do_not_reach_a_terminal_as_they_are(shop, name, status, capfd):
    """Names that are no text are refused in one line."""
    strange, statuses = shop.folder / os.fsdecode(name), []
    shutil.copytree(shop.hf, strange / "hf")
    text = ["--data-path", shop.text, "--device", "cpu", "--eval-samples", "1", "--seq-length", "32"]
    for words in (
        ["convert-from-hf", "--hf-model", strange / "hf", "--save", strange / "run"],
        ["inspect", "--load", strange / "run", "--verify"],
        ["convert-to-hf", "--load", strange / "run", "--save", strange / "out"],
        ["convert-to-gguf", "--hf-model", strange / "hf", "--save", strange / "m.gguf"],
        ["evaluate", "--hf-model", strange / "out", shop.hf, *text, "--output-dir", strange / "report"],
        ["preprocess", "--input", shop.text, "--output-prefix", strange / "p", "--tokenizer-model", strange / "hf"],
    ):
        done = call(main, words, capfd)
        assert not list(done.problems()), (words, done.output)
        statuses.append(done.status)
    assert statuses == [status] * 6


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["launch", *more]
            for more in ([], ["a", "b"], ["x.yaml", "--stage", "prune,nonsense"], ["x.yaml", "--lr", "1"])
        ),
        *(["launch", *more] for more in (["absent.yaml"], ["absent.yaml", "--should-requeue"], ["--", "--lr"])),
        *(["bench", *more] for more in (["--tiny=yes"], ["--only", "x"], ["word"])),
        *(["bench-save", *more] for more in (["--pairs", "0"], ["--pairs", "nan"], ["--dir", "absent"])),
        *(
            ["soak", *more]
            for more in ([], ["--dir"], ["--dir", "s", "--kills", "0"], ["--dir", "s", "--minutes", "nan"])
        ),
        *(
            ["soak", *more]
            for more in (["--dir", "/dev/null"], ["--dir", "s", "--minutes", "-1"], ["--dir", "damaged"])
        ),
        *(["gpu-check", *more] for more in (["--only", "smoke,"], ["--device", "tpu"], ["--minutes", "0"])),
        *(["gpu-check", *more] for more in (["--data", "absent"], ["--model", "absent"], ["--out", "/dev/null/x"])),
        ["gpu-check", "--cluster", "--tensor-model-parallel-size", "1.5"],
    ],
    ids=lambda words: " ".join(words),
)
def test_commands_that_run_long_refuse_wrong_flags_at_once(words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "soak.json").write_text('{"kills":')
    with at_most(60.0):
        done = call(main, words, capfd)
    assert done.status == 2 and not list(done.problems()), done.output
