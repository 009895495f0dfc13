"""Whether a folder can be written, tried before the work whose result goes there.

probe_folder   make it, write a block, leave nothing but the folder
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_prune.errors import UserError


def probe_folder(folder: str | Path, field: str) -> None:
    """Make `folder` and write a block in it, that a full disk would not take; nothing stays but the folder.

    Raises:
        UserError: that is not possible; `field` names the folder in the message.
    """
    probe = Path(folder) / f".probe.{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}: {folder} cannot be written: {reason}; give another folder") from error
