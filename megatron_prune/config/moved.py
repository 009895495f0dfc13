"""Old names of options: still understood, with one line that names the new one.

Both log the new name, on the first rank only.
"""

import logging
import os
from typing import Any

from megatron_prune.config.pruning import MOVED, PruningConfig
from megatron_prune.errors import UserError, one_line

logger = logging.getLogger(__name__)

_SECTION, _FIELD = "pruning", "groups"


def renamed_entry(section: str, name: str, raw: Any, source: str) -> tuple[str, Any]:
    """(name, raw value) of an entry of a YAML section; entries that were never renamed are returned as they are. Raises
    UserError: an old mapping that is none, or has other keys than it had."""
    if section != _SECTION or name not in MOVED:
        return name, raw
    field, target = MOVED[name]
    if isinstance(target, str):
        moved = {target: raw}
    elif isinstance(raw, dict) and set(raw) <= set(target):
        moved = {target[key]: value for key, value in raw.items()}
    else:
        raise UserError(f"{source}: {section}.{name}: expected a mapping with the keys {', '.join(target)}")
    _tell(f"{source}: {section}.{name}", (f"{section}.{_FIELD}.{kind}.{field}" for kind in moved))
    return _FIELD, {kind: {field: value} for kind, value in moved.items()}


def renamed_flag(flag: str, words: list[str]) -> tuple[str, list[str]]:
    """(flag, words) under its present name."""
    name = flag.removeprefix(f"--{PruningConfig.flag_prefix}").replace("-", "_")
    if not flag.startswith(f"--{PruningConfig.flag_prefix}") or name not in MOVED:
        return flag, words
    field, target = MOVED[name]
    if isinstance(target, str):
        moved = [f"{target}.{field}={word}" for word in words]
    else:
        pairs = [word.partition("=") for word in words]
        unknown = [key for key, _, _ in pairs if key not in target]
        if unknown:
            raise UserError(
                f'{flag}: expected {" ".join(f"{key}=N" for key in target)}, got "{one_line(" ".join(words))}"'
            )
        moved = [f"{target[key]}.{field}={value}" for key, _, value in pairs]
    now = f"--{PruningConfig.flag_prefix}{_FIELD}"
    _tell(flag, (f"{now} {word}" for word in moved))
    return now, moved


def _tell(old: str, new: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s is called %s now", old, ", ".join(new))
