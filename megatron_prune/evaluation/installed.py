"""What lm-evaluation-harness needs to run a model; asked without importing any of it.

lacking   the packages of megatron-prune[eval] that are not installed
"""

from __future__ import annotations

import importlib.util

_PACKAGES = (
    "lm_eval",
    "accelerate",
    "datasets",
)  # the harness itself requires only some of what its `hf` model imports


def lacking() -> str | None:
    """Names of the packages that are not installed, or None where nothing lacks."""
    return ", ".join(name for name in _PACKAGES if importlib.util.find_spec(name) is None) or None
