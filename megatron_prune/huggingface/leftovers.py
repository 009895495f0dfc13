"""What an export that was killed left beside its target.

remove_leftovers   delete `.NAME.PID.partial` of processes that are gone
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from megatron_prune.checkpoint.lease import Process

logger = logging.getLogger(__name__)


def remove_leftovers(target: Path) -> list[Path]:
    """Delete what processes of this machine that have ended left while they wrote `target`; returns what was there."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d{{1,10}})\.partial")
    try:
        names = sorted(entry.name for entry in os.scandir(target.parent))
    except OSError:
        return []  # no folder yet, or one that the export itself will complain of
    removed = []
    for match in filter(None, map(pattern.fullmatch, names)):
        left = target.with_name(match[0])
        pid = int(match[1])
        if pid != os.getpid() and Process(pid, None).is_running():  # what this process has begun, it names anew
            continue
        try:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        except OSError as error:
            logger.warning("%s: left by an export that was killed, and cannot be removed: %s", left, error.strerror)
        else:
            removed.append(left)
    return removed
