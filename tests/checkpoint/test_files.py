"""The checkpoint folder: what counts as latest, what a crash leaves, what is noticed, what is deleted."""

import shutil
import zlib

import pytest

from megatron_prune.checkpoint import files
from megatron_prune.checkpoint.files import (
    Digest,
    Retention,
    begin,
    damages,
    publish,
    read_manifest,
    resolve,
    steps,
    write_files,
)
from megatron_prune.checkpoint.owner import Owner
from megatron_prune.checkpoint.record import STATUS_FILE, read_status
from megatron_prune.errors import UserError


def make(directory, iteration, content=b"tensors"):
    folder = begin(directory, iteration)
    files.write_manifest(folder, write_files(folder, {"a.distcp": content, "common.pt": b"state"}))
    return publish(folder, directory, iteration)


def test_latest_is_the_last_one_published(tmp_path):
    make(tmp_path, 50)
    folder = make(tmp_path, 100)
    assert resolve(tmp_path) == (100, folder)
    assert resolve(tmp_path, 50)[1].name == "iter_0000050"
    assert resolve(folder) == (100, folder)
    assert (tmp_path / files.LATEST).read_text() == "100\n"


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"ten")])
def test_what_a_rank_wrote_elsewhere_is_noticed_before_publishing(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(files, "_SECONDS_TO_APPEAR", 0.2)
    folder = begin(tmp_path, 50)
    digests = write_files(folder, {"a.distcp": b"tensors", "common.pt": b"state"})
    files.check_present(folder, digests)
    harm(folder / "a.distcp")
    with pytest.raises(OSError, match="all nodes must share this folder") as caught:
        files.check_present(folder, digests)
    assert caught.value.filename == str(folder / "a.distcp")


def test_nothing_there_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        resolve(tmp_path / "absent")
    with pytest.raises(UserError, match="no complete checkpoint$"):
        resolve(tmp_path)
    make(tmp_path, 50)
    with pytest.raises(UserError, match="no checkpoint of iteration 70; .* --ckpt-step 50"):
        resolve(tmp_path, 70)
    (tmp_path / files.LATEST).unlink()  # as a crash just after the first folder was renamed
    assert resolve(tmp_path)[0] == 50
    (tmp_path / files.LATEST).write_text("5o\n")
    with pytest.raises(UserError, match="not an iteration number; .* --ckpt-step 50"):
        resolve(tmp_path)


def test_what_others_wrote_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a Hugging Face model, not a checkpoint; give it as --hf-model"):
        resolve(tmp_path)
    megatrons = tmp_path / "iter_0000005"
    megatrons.mkdir()
    for name in ("metadata.json", ".metadata", "common.pt"):
        (megatrons / name).touch()
    (tmp_path / files.LATEST).write_text("5")
    for path in (tmp_path, megatrons):
        with pytest.raises(UserError, match=r"iter_0000005: not a checkpoint of .*convert-from-megatron"):
            resolve(path)


class Crash(BaseException):
    """Stands for a process that ends at this point."""


def crash(*_):
    raise Crash


@pytest.mark.parametrize("point", ["rename", "replace"])  # of the folder, of the file that names the latest
def test_a_crash_while_publishing_leaves_the_old_one_latest(tmp_path, monkeypatch, point):
    old = make(tmp_path, 50)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(f"pathlib.Path.{point}", crash)
        make(tmp_path, 100)
    assert resolve(tmp_path) == (50, old)
    assert damages(old) == []
    folder = make(tmp_path, 100)  # the next save clears what was left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000050", "iter_0000100", files.LATEST]
    assert resolve(tmp_path) == (100, folder)


@pytest.mark.parametrize("renames", [1, 2])
def test_saving_an_iteration_again_never_leaves_it_without_a_checkpoint(tmp_path, monkeypatch, renames):
    make(tmp_path, 50, b"first")
    real, done = files.Path.rename, []

    def rename(self, target):
        if len(done) == renames:
            raise Crash
        done.append(target)
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr("pathlib.Path.rename", rename)
        patch.setattr("pathlib.Path.replace", crash)  # where both renames went through
        make(tmp_path, 50, b"second")
    _, found = resolve(tmp_path)
    assert damages(found) == []
    assert (found / "a.distcp").read_bytes() == (b"first" if renames == 1 else b"second")
    begin(tmp_path, 60)  # sorts out what the crash left
    assert resolve(tmp_path)[1].name == "iter_0000050"
    make(tmp_path, 50, b"third")
    assert (resolve(tmp_path)[1] / "a.distcp").read_bytes() == b"third"


def test_a_damaged_list_of_checksums_and_a_missing_file_are_noticed(tmp_path):
    folder = make(tmp_path, 50)
    path = folder / files.MANIFEST
    sound = path.read_bytes()
    for bit in range(0, 8 * len(sound), 3):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert damages(folder), f"bit {bit}"
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        assert damages(folder), f"cut to {length}"
    path.write_bytes(sound)
    assert damages(folder) == []
    (folder / "common.pt").unlink()
    assert damages(folder) == [f"{folder / 'common.pt'}: No such file or directory"]
    path.unlink()
    assert damages(folder) == [f"{path}: missing"]


def test_digest_is_size_and_crc32(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    assert files.digest(tmp_path / "f") == Digest(3000, zlib.crc32(b"abc" * 1000))


@pytest.mark.parametrize(
    ("keep", "deleted"),
    [
        (Retention(), []),
        (Retention(keep_last=2), [10, 20, 25, 30]),
        (Retention(keep_last=1), [10, 20, 25, 30, 40]),
        (Retention(keep_last=9), []),
        (Retention(interval=20), [10, 25, 30]),
        (Retention(keep_last=3, interval=25), [10, 20]),
    ],
)
def test_retention(keep, deleted):
    assert keep.superseded([10, 20, 25, 30, 40, 50, 90], newest=50) == deleted


def test_deleting_leaves_the_others(tmp_path):
    for iteration in (10, 20, 30):
        make(tmp_path, iteration)
    Retention(keep_last=2).apply(tmp_path, 30)
    assert steps(tmp_path) == [20, 30]
    shutil.rmtree(tmp_path / "iter_0000020")
    assert Retention(keep_last=1).apply(tmp_path, 30) == []


def test_what_is_nested_too_deeply_is_damaged(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "checksums.json").write_text(deep)
    with pytest.raises(ValueError, match="not a list of checksums"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="recursion"):
        Owner.from_json(deep.encode())
    (tmp_path / STATUS_FILE).write_text(deep)
    assert read_status(tmp_path) is None
