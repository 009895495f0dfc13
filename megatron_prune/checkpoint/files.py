"""The folder of a run's checkpoints: names, checksums, publishing, keeping and deleting.

    DIR/iter_0000100/                        one complete checkpoint
    DIR/iter_0000100.tmp-1a2b3c4d/           one being written (or left by a run that died); readers never look at it
    DIR/latest_checkpointed_iteration.txt    number of the newest complete one

    holds_checkpoint  whether there is something to resume from
    refuse_step       no run saves into a checkpoint's own folder
    resolve           directory and step -> folder, or a UserError that says what is there
    Digest, digest    size and CRC-32 of a file
    check_present     whether all files that ranks wrote are here
    write_manifest    checksums.json: the digests of all other files
    damages           what is wrong with a folder, file by file
    publish           rename the finished folder into place, then move `latest` on
    Retention         which older checkpoints stay

Both renames are atomic and everything is flushed to the disk before them, so a reader finds either the old state or the
new. Nothing here communicates: one rank calls what changes the folder, and only while no other process holds it (see
`lease`).
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.checkpoint.crc import crc32
from megatron_prune.checkpoint.lease import FolderBusyError, is_lease, refuse_others
from megatron_prune.errors import UserError
from megatron_prune.reading import open_file, read_content
from megatron_prune.runtime.folders import replace_file, write_file

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "checksums.json"
_STEP_FOLDER = re.compile(r"iter_(\d{7,12})", re.ASCII)
_REPLACED = ".replaced"
_CHUNK = 4 << 20
_SECONDS_TO_APPEAR = 10.0
_LONGEST = 12  # digits of an iteration


class CheckpointSaveError(OSError):
    """A checkpoint could not be written (disk full, no permission, ...); raised on all ranks, older ones stay."""


# Names ----------------------------------------------------------------------------------------------------------------


def step_name(iteration: int) -> str:
    """Name of the folder of a checkpoint, e.g. `iter_0000100`."""
    return f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """What the name of a checkpoint's folder says, also of one that was about to be replaced; None for another's."""
    match = _STEP_FOLDER.fullmatch(folder.name.removesuffix(_REPLACED))
    return int(match[1]) if match else None


def steps(directory: Path) -> list[int]:
    """Iterations that have a checkpoint folder in `directory`, ascending (complete by construction, maybe damaged)."""
    if not directory.is_dir():
        return []
    found = {iteration_of(entry) for entry in directory.iterdir() if entry.is_dir()}
    return sorted(iteration for iteration in found if iteration is not None)


def holds_checkpoint(directory: Path) -> bool:
    """Whether a run has saved in `directory`, also where a crash struck between two renames."""
    return (directory / LATEST).exists() or bool(steps(directory))


def refuse_step(directory: Path, what: str) -> None:
    """Raise UserError where a run would save into a folder that is, or would pass for, one checkpoint of another.

    Args:
        what: the field or flag that names it, for the message.
    """
    if iteration_of(directory.resolve()) is not None:
        raise UserError(f"{what}: {directory} has the name of one checkpoint; give the folder of a run")


def refuse_content(directory: Path, what: str) -> None:
    """Raise UserError unless `directory` is absent or empty, but for leases and what saves that were killed have left.

    Args:
        what: the field or flag that names it, for the message.
    """
    if directory.is_dir() and all(is_lease(entry) or entry.match("iter_*.tmp-*") for entry in directory.iterdir()):
        return
    if directory.exists():
        raise UserError(f"{what}: {directory} is there already; name a folder that does not exist or is empty")


def step_folder(directory: Path, iteration: int) -> Path:
    """The folder of `iteration`; the one it was about to replace, should a crash have struck between two renames."""
    folder = directory / step_name(iteration)
    replaced = folder.with_name(folder.name + _REPLACED)
    return replaced if replaced.is_dir() and not folder.is_dir() else folder


def resolve(directory: Path, step: int | None = None) -> tuple[int, Path]:
    """(iteration, folder) of the checkpoint to load.

    Args:
        directory: the run's folder, or one `iter_...` folder itself.
        step: iteration; None: the one that `latest_checkpointed_iteration.txt` names, else the newest there is.

    Raises:
        UserError: there is none; the message says which are there.
    """
    own = iteration_of(directory)
    if own is not None and directory.is_dir():
        if step not in (None, own):
            raise UserError(f"{directory} is the checkpoint of iteration {own}, not {step}: name its parent")
        return own, _of_ours(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; give the folder that was saved to")
    if step is None:
        step = _latest(directory)
    folder = step_folder(directory, step)
    if not folder.is_dir():
        raise UserError(f"{directory}: no checkpoint of iteration {step}; {_offer(directory, step)}")
    return step, _of_ours(folder)


def _of_ours(folder: Path) -> Path:
    """`folder`, unless it looks like another program's, which has the same names outside."""
    if (folder / MANIFEST).exists() or (folder / "architecture.json").exists():
        return folder
    parent = folder.parent
    if any((step_folder(parent, step) / MANIFEST).exists() for step in steps(parent)):  # its neighbours are ours
        offer = _offer(parent, iteration_of(folder))
        raise UserError(f"{folder}: half a checkpoint, perhaps of a copy that was cut short; {offer}")
    raise UserError(
        f"{folder}: not a checkpoint of megatron_prune; if it is Megatron-LM's, in torch_dist format, make one of it "
        "with megatron-prune convert-from-megatron"
    )


def _latest(directory: Path) -> int:
    path = directory / LATEST
    try:
        step = latest_number(directory)
    except FileNotFoundError:
        present = steps(directory)
        if present:  # a run died between the renames of its very first checkpoint, which is complete
            return present[-1]
        if (directory / "config.json").exists():
            raise UserError(f"{directory}: a Hugging Face model, not a checkpoint; give it as --hf-model") from None
        raise UserError(f"{path}: no such file, so no complete checkpoint") from None
    except ValueError:
        raise UserError(f"{path}: not an iteration number; {_offer(directory, None)}") from None
    if step is None:
        raise UserError(
            f"{path}: Megatron-LM's release; make a checkpoint of it with megatron-prune convert-from-megatron"
        )
    return step


def latest_number(directory: Path) -> int | None:
    """What `latest_checkpointed_iteration.txt` says; None for `release`, Megatron's word for weights alone. Raises
    ValueError: it is neither (a path, a number beyond all iterations, ...); OSError: it cannot be read."""
    with open_file(directory / LATEST) as file:
        text = file.read(_LONGEST + 3)
    if text.strip() == b"release":
        return None
    if not re.fullmatch(rb"\d{1,%d}\r?\n?" % _LONGEST, text):
        raise ValueError(f"{directory / LATEST}: not an iteration number")
    return int(text)


def _offer(directory: Path, but: int | None) -> str:
    """What else could be loaded: the newest undamaged checkpoint, verified now."""
    for step in reversed(steps(directory)):
        if step != but and not damages(step_folder(directory, step)):
            return f"the newest good checkpoint is of iteration {step}: load it with --ckpt-step {step}"
    return "there is no other good checkpoint"


def refuse_damaged(directory: Path, iteration: int, complaints: Iterable[str]) -> None:
    """Raise UserError for the first complaint, with the newest good checkpoint beside it; nothing if there is none."""
    for complaint in complaints:
        raise UserError(f"damaged checkpoint: {complaint}; {_offer(directory, iteration)}")


# Checksums ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digest:
    """Size in bytes and CRC-32 of a file; the sum finds every flipped bit and every burst of up to 32."""

    size: int
    crc32: int


def digest(path: Path) -> Digest:
    """Size and CRC-32 of the file at `path`, which is read once."""
    size, crc = 0, 0
    with open_file(path) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), crc32(chunk, crc)
    return Digest(size, crc)


def check_present(folder: Path, digests: Mapping[str, Digest]) -> None:
    """See that every file is in `folder` with its size, as the rank that wrote it says. Raises OSError: one is not,
    within the time in which a network file system may learn of it."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    missing = list(digests)
    while missing := [name for name in missing if _size(folder / name) != digests[name].size]:
        if time.monotonic() > deadline:
            reason = "a rank wrote it, and rank 0 does not see all of it: all nodes must share this folder"
            raise FileNotFoundError(errno.ENOENT, reason, str(folder / missing[0]))
        time.sleep(0.1)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def write_manifest(folder: Path, digests: Mapping[str, Digest]) -> None:
    """Write checksums.json; it carries a sum over itself as well."""
    write_file(folder / MANIFEST, _manifest_text({name: [d.size, d.crc32] for name, d in sorted(digests.items())}))


def _manifest_text(files: dict[str, list[int]]) -> bytes:
    own = crc32(json.dumps(files).encode())
    return (json.dumps({"files (bytes, CRC-32)": files, "crc32 of this list": own}, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Digest]:
    """Inverse of `write_manifest`. Raises ValueError when it is damaged, FileNotFoundError when it is not there."""
    text = read_content(folder / MANIFEST)
    try:
        files = json.loads(text)["files (bytes, CRC-32)"]
        is_sound = _manifest_text(files) == text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a list of checksums ({error})") from error
    if not is_sound:
        raise ValueError("does not match its own sum")
    if any("/" in name or name in ("", ".", "..") for name in files):
        raise ValueError("names files outside of its folder")
    return {name: Digest(*values) for name, values in files.items()}


def damages(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Complaints `PATH: what` about the files of a checkpoint folder; an empty list when all is as it was written.

    Args:
        names: read only these (all that checksums.json lists when None).
    """
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return [f"{folder / MANIFEST}: missing"]
    except (ValueError, OSError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    return [c for name in (manifest if names is None else names) if (c := _damage(folder / name, manifest.get(name)))]


def _damage(path: Path, expected: Digest | None) -> str | None:
    if expected is None:
        return f"{path}: not in {MANIFEST}"
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path}: {size} bytes, {expected.size} were written"
        found = digest(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if found == expected else f"{path}: its content is not what was written"


# Writing --------------------------------------------------------------------------------------------------------------


def begin(directory: Path, iteration: int) -> Path:
    """Make a fresh folder to write into, after clearing what runs that died have left. Raises OSError: FolderBusyError
    where another process writes, whose folders are no leftovers."""
    directory.mkdir(parents=True, exist_ok=True)
    refuse_others(directory)
    for entry in directory.glob("iter_*.tmp-*"):
        shutil.rmtree(entry, ignore_errors=True)
    for entry in directory.glob(f"iter_*{_REPLACED}"):
        _settle(entry)
    folder = directory / f"{step_name(iteration)}.tmp-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def _settle(replaced: Path) -> None:
    """After a crash between two renames: the old checkpoint goes back to its place, or goes where there is a new."""
    place = replaced.with_name(replaced.name.removesuffix(_REPLACED))
    if place.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        replaced.rename(place)


def write_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, Digest]:
    """Write and flush small files; their digests."""
    for name, content in files.items():
        write_file(folder / name, content)
    return {name: Digest(len(content), crc32(content)) for name, content in files.items()}


def publish(folder: Path, directory: Path, iteration: int, goes_back: bool = False) -> Path:
    """Rename the finished `folder` to its name and move `latest` on to it.

    Args:
        goes_back: `latest` may move to an older iteration: the run was told to go on from there.

    Raises:
        OSError: among them FolderBusyError: another process holds the folder, or has saved a newer iteration.
    """
    refuse_others(directory)
    newest = None
    with contextlib.suppress(OSError, ValueError):  # it names none: nothing to guard
        newest = latest_number(directory)
    if newest is not None and newest > iteration and not goes_back:
        raise FolderBusyError(errno.EEXIST, f"it holds iteration {newest}, which is newer: another run saved it there")
    _sync_folder(folder)
    final = directory / step_name(iteration)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    _sync_folder(directory)
    replace_file(directory / LATEST, f"{iteration}\n".encode())
    _sync_folder(directory)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Keeping --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one is complete.

    Args:
        keep_last: this many of the newest (None: all; with `interval`: one).
        interval: and all at multiples of this iteration (Megatron's `save_retain_interval`).
    """

    keep_last: int | None = None
    interval: int | None = None

    def superseded(self, present: Sequence[int], newest: int) -> list[int]:
        """Iterations to delete now that `newest` is complete; later ones, of a future given up, are left alone."""
        if self.keep_last is None and self.interval is None:
            return []
        older = sorted(step for step in present if step < newest)
        old = older[: max(len(older) - (self.keep_last or 1) + 1, 0)]
        return [step for step in old if not self.interval or step % self.interval]

    def apply(self, directory: Path, newest: int) -> list[int]:
        """Delete the folders of the `superseded` iterations; each is renamed first, so that nobody loads half of one.

        Raises OSError.
        """
        doomed = self.superseded(steps(directory), newest)
        for step in doomed:
            folder = step_folder(directory, step)
            away = directory / f"{step_name(step)}.tmp-deleted"
            folder.rename(away)
            shutil.rmtree(away)
        return doomed
