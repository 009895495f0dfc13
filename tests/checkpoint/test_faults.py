"""Damaged files, a full disk, a process that dies while it saves: all ranks fail together, nothing is lost."""

import os
import resource
import shutil
from pathlib import Path

import pytest

from megatron_prune.checkpoint import save
from megatron_prune.checkpoint.files import LATEST, MANIFEST, CheckpointSaveError, Retention, read_manifest
from megatron_prune.checkpoint.load import load_checkpoint
from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.checkpoint.save import save_checkpoint
from megatron_prune.errors import UserError
from megatron_prune.testing.helpers.ranks import RankError, run_ranks
from tests.checkpoint.small_run import STATE, Kind, build, same, tensors, train


def message(function, *args, **kwargs):
    """What a call raised, as (class name, message); None when it went well."""
    try:
        function(*args, **kwargs)
    except (UserError, CheckpointSaveError) as error:
        return type(error).__name__, str(error)
    return None


def limited(bytes_per_file, function, *args, **kwargs):
    """`message` of a call during which no file may grow beyond a size (None: any): writes fail as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if bytes_per_file is None else bytes_per_file, hard)
    )
    try:
        return message(function, *args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def save_fail_and_load_damaged(rank, world, folder):
    """Good checkpoints 1 and 2, failing saves after them, then loads of damaged copies."""
    folder = Path(folder)
    model = build(Kind(tp=2))
    train(model, 0)
    save_checkpoint(model, folder, 1, STATE)
    save_checkpoint(model, folder, 2, STATE)
    found = {"names": sorted(path.name for path in folder.iterdir())}
    found["data"] = limited(4096 if rank == 1 else None, save_checkpoint, model, folder, 3, STATE)
    big = {**STATE, "ballast": "x" * 500_000}
    found["small files"] = limited(300_000 if rank == 0 else None, save_checkpoint, model, folder, 3, big)
    (folder / "file").write_text("")
    found["no folder"] = message(save_checkpoint, model, folder / "file", 3, STATE)
    (folder / "file").unlink(missing_ok=True)
    found["names after"] = sorted(path.name for path in folder.iterdir())
    try:
        save_checkpoint(model, folder, 3, {"deep": [{"set": {1, 2}}]})
    except TypeError as error:
        found["state"] = str(error)
    save_checkpoint(model, folder, 3, STATE, retain=Retention(keep_last=2))
    found["names at last"] = sorted(path.name for path in folder.iterdir())
    if rank == 0:
        for victim in read_manifest(folder / "iter_0000003"):
            shutil.copytree(folder, folder.parent / f"damaged_{victim}")
            flip(folder.parent / f"damaged_{victim}" / "iter_0000003" / victim)
    import torch.distributed as dist

    dist.barrier()
    copies = sorted(folder.parent.glob("damaged_*"))
    found["damaged"] = {copy.name: message(load_checkpoint, model, copy) for copy in copies}
    dist.barrier()
    if rank == 0:
        shutil.copytree(folder, folder.parent / "renamed")
        (folder.parent / "renamed" / "iter_0000003").rename(folder.parent / "renamed" / "iter_0000003.replaced")
    dist.barrier()
    found["between two renames"] = message(load_checkpoint, model, folder.parent / "renamed")
    return found


def flip(path):
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def die_while_publishing(rank, world, folder):
    model = build(Kind())
    train(model, 1)
    save.publish = lambda *_: os._exit(9)
    save_checkpoint(model, folder, 4, STATE)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(folder, what both ranks saw)."""
    folder = tmp_path_factory.mktemp("faults") / "checkpoints"
    return folder, run_ranks(save_fail_and_load_damaged, 2, str(folder))


def test_a_failed_save_is_raised_on_all_ranks_and_leaves_no_trace(story):
    _, ranks = story
    for case, words in (("data", "rank 1: File too large"), ("small files", "File too large"), ("no folder", "exists")):
        assert ranks[0][case] == ranks[1][case], case
        name, text = ranks[0][case]
        assert name == "CheckpointSaveError"
        assert "iteration 3" in text and words in text and "\n" not in text
    assert ranks[0]["names after"] == ranks[0]["names"] == ["iter_0000001", "iter_0000002", LATEST]
    assert ranks[0]["names at last"] == ["iter_0000002", "iter_0000003", LATEST]


def test_what_a_crash_left_between_two_renames_is_loaded(story):
    assert [rank["between two renames"] for rank in story[1]] == [None, None]


def test_a_state_that_cannot_be_stored_is_named(story):
    assert "state['deep'][0]['set']: set cannot be stored" in story[1][0]["state"]


def test_every_damaged_file_is_found_by_all_ranks_together(story):
    folder, ranks = story
    assert ranks[0]["damaged"] == ranks[1]["damaged"]
    assert len(ranks[0]["damaged"]) == len(read_manifest(folder / "iter_0000003")) > 8
    for copy, raised in ranks[0]["damaged"].items():
        name, text = raised
        path = folder.parent / copy / "iter_0000003" / copy.removeprefix("damaged_")
        assert name == "UserError"
        assert str(path) in text and "--ckpt-step 2" in text and "\n" not in text


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "removed"])
def test_a_reader_finds_every_damaged_file(story, tmp_path, how):
    names = sorted(path.name for path in (story[0] / "iter_0000003").iterdir())
    shutil.copytree(story[0], tmp_path / "copy")
    assert {MANIFEST, ".metadata", "common.pt", "architecture.json"} < set(names)
    for name in names:
        path = tmp_path / "copy" / "iter_0000003" / name
        sound = path.read_bytes()
        if how == "flipped":
            flip(path)
        elif how == "removed":
            path.unlink()
        else:
            path.write_bytes(sound[: len(sound) // 2] if how == "cut" else b"")
        with pytest.raises(UserError, match=f"{name}.*--ckpt-step 2"):
            CheckpointReader(tmp_path / "copy")
        path.write_bytes(sound)
    assert same(tensors(tmp_path / "copy"), tensors(story[0]))


def test_a_damaged_older_checkpoint_is_not_offered(story, tmp_path):
    shutil.copytree(story[0], tmp_path / "copy")
    flip(tmp_path / "copy" / "iter_0000003" / "common.pt")
    flip(tmp_path / "copy" / "iter_0000002" / "__1_0.distcp")
    with pytest.raises(UserError, match=r"common\.pt.*there is no other good checkpoint"):
        RunRecord.read(tmp_path / "copy")


def test_a_process_that_dies_while_saving_leaves_the_last_checkpoint(story, tmp_path):
    shutil.copytree(story[0], tmp_path / "copy")
    with pytest.raises(RankError, match="died"):
        run_ranks(die_while_publishing, 1, str(tmp_path / "copy"))
    assert any(".tmp-" in path.name for path in (tmp_path / "copy").iterdir())
    reader = CheckpointReader(tmp_path / "copy")
    assert reader.record.iteration == 3
    assert reader.meta["tokens"] == STATE["tokens"]
