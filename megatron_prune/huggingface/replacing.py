"""Putting an export in the place of an earlier one without losing what is not the export's.

    write_list          list what was written into a folder, in a file of it
    refresh_list        bring the entries of files that were written anew up to date
    check_replaceable   everything of the list is as it was written
    check_kept          nothing that is kept has a name of the new export's
    put_in_place        rename the new folder; of the old one delete what is in its list, keep the rest
    recover             end what was killed in the middle of this

What is in the list and unchanged may be deleted: size and SHA-256 say so, the latter of files up to `_HASHED_BYTES`
(weights can be very large). All else is somebody's: a GGUF file, notes, an edited model card.
"""

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError
from megatron_prune.reading import read_words
from megatron_prune.runtime.folders import write_file

logger = logging.getLogger(__name__)

LIST = "megatron_prune_files.json"
_HASHED_BYTES = 64 << 20
_INSTEAD = "name another folder, or move it away"


def write_list(folder: Path) -> None:
    """Write the list of all files in `folder`."""
    _write(folder, {name: _facts(folder / name) for name in _files(folder)})


def refresh_list(folder: Path, names: Iterable[str]) -> None:
    """Bring the entries of `names` up to date, in a folder that has a list."""
    if (folder / LIST).is_file():
        _write(folder, _read(folder) | {name: _facts(folder / name) for name in names})


def check_replaceable(target: Path) -> None:
    """See that an export stands in `target`, as it was written. Raises UserError: there is no list, so nothing tells
    the tool's files from others; or a file of it was changed."""
    if not (target / LIST).is_file():
        first = next(iter(_files(target)), None) or min(entry.name for entry in target.iterdir())
        raise UserError(
            f"--save {target}: --overwrite deletes only what this tool wrote, and {first!a} is not known to be "
            f"(there is no {LIST}); name another folder, or remove this one"
        )
    for name, facts in _read(target).items():
        file = target / name
        if os.path.lexists(file) and (file.is_symlink() or not file.is_file() or _facts(file) != facts):
            raise UserError(f"--save {target}: {name!a} was changed after the export; {_INSTEAD}")


def check_kept(staged: Path, target: Path) -> None:
    """See that what is kept of `target` fits beside the files in `staged`. Raises UserError: a name is taken."""
    for name in _others(target):
        place = staged / name
        taken = place.exists() or any(parent.is_file() for parent in place.parents)
        if taken:
            raise UserError(
                f"--save {target}: {name!a} was not written by this tool, and the export has one; {_INSTEAD}"
            )


def put_in_place(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; of an export that is there, delete what is in its list and take along the rest."""
    old = staged.with_suffix(".replaced")
    if target.exists():
        target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    if old.exists():
        _empty(old, target)


def recover(target: Path) -> None:
    """Where a process was killed in `put_in_place`: the earlier export comes back, or what was kept of it is taken
    along. Call it as `target`'s only writer."""
    named = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]+\.replaced")
    for old in sorted(target.parent.glob(f".{glob.escape(target.name)}.*.replaced")):
        if not named.fullmatch(old.name):
            continue
        if target.exists():
            _empty(old, target)
        else:
            logger.warning("%s: brought back, an export that was to replace it was killed", target)
            old.rename(target)


def _empty(old: Path, target: Path) -> None:
    kept = _others(old)
    for name in kept:
        place = target / name
        if place.exists():  # came while this ran
            logger.warning("%s: was not written by this tool; it stays in %s", place, old)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        (old / name).rename(place)
    if kept:
        logger.info("%s: %s kept, which this tool did not write", target, ", ".join(kept))
    listed = _read(old) if (old / LIST).is_file() else {}
    for name in _files(old):
        if name in listed and (old / name).is_file() and _facts(old / name) == listed[name]:
            (old / name).unlink()
    (old / LIST).unlink(missing_ok=True)
    for folder in sorted((path for path in old.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    if not any(old.iterdir()):
        old.rmdir()


def _others(folder: Path) -> list[str]:
    """What in `folder` is not in its list: files, links and empty folders, by their relative names."""
    if not folder.is_dir():
        return []
    listed = {*(_read(folder) if (folder / LIST).is_file() else ()), LIST}
    empty = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    ]
    return sorted({*_files(folder), *empty} - listed)


def _files(folder: Path) -> list[str]:
    """Relative names of all that is no folder, but the list itself; links are not followed."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in found) if name != LIST)


def _facts(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    return {"size": size} | ({"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if size <= _HASHED_BYTES else {})


def _write(folder: Path, files: dict[str, Any]) -> None:
    write_file(folder / LIST, (json.dumps({"files": files}, indent=2) + "\n").encode(), lasting=False)


def _read(folder: Path) -> dict[str, Any]:
    """The list's entries. Raises UserError: it is damaged, or names what lies outside the folder."""
    try:
        files = json.loads(read_words(folder / LIST))["files"]
        names = [Path(name) for name in dict(files)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / LIST}: is damaged; name another folder, or remove this one") from error
    if any(name.is_absolute() or ".." in name.parts or name == Path() for name in names):
        raise UserError(f"{folder / LIST}: names files outside of its folder; name another folder, or remove this one")
    return dict(files)
