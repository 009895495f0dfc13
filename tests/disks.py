"""A disk that is really full: a small tmpfs, where this user may mount one."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, size, inodes=0):
    """`folder`, made anew, holds an empty file system of `size` bytes while entered; `size` may be grown by `grow`.

    `inodes`: files and folders that fit into it, itself among them; 0: any number.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        folder.rmdir()
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def freeze(folder):
    """Make the small disk at `folder` read-only, as a snapshot is."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def grow(folder, size):
    """Give the small disk at `folder` room for `size` bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
