"""Scratch folders under the system's temporary one: nobody takes another's, and those of killed processes go."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_prune.data import leftovers
from megatron_prune.data.leftovers import scratch_folder

HOLD = """
import sys
from megatron_prune.data.leftovers import scratch_folder
with scratch_folder() as folder:
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text("content")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(leftovers.tempfile, "tempdir", None)
    return tmp_path


def holder():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def test_what_killed_processes_left_is_removed_and_a_live_ones_is_not(place):
    other = place / "megatron_prune-of-a-file"
    other.write_text("no folder")
    (place / "somebody").mkdir()
    (place / "megatron_prune-link").symlink_to(place / "somebody")
    (alive, theirs), (killed, left) = holder(), holder()
    assert theirs.is_dir() and left.is_dir() and theirs.stat().st_mode & 0o777 == 0o700
    killed.kill()
    killed.wait()
    with scratch_folder() as mine:
        assert mine.is_dir() and not list(mine.iterdir()) and mine.parent == place
        assert not left.exists() and (theirs / "a" / "b").read_text() == "content"
    assert not mine.exists()
    alive.communicate("")
    assert not theirs.exists()
    assert sorted(path.name for path in place.iterdir()) == [
        *("megatron_prune-link", "megatron_prune-of-a-file", "somebody")
    ]


def test_many_at_once_have_one_each(place):
    def one(number):
        for _ in range(50):
            with scratch_folder() as folder:
                (folder / "mine").write_text(str(number))
                assert (folder / "mine").read_text() == str(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert not list(place.iterdir())


def test_what_an_exception_leaves_is_removed(place):
    with pytest.raises(KeyError), scratch_folder() as folder:
        raise KeyError(folder)
    assert not list(place.iterdir())
