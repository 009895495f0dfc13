"""What decides which samples a run reads, so that a resumed run reads on where the first one stopped.

    data_order     Config, Blend -> plain values for the checkpoint
    check_order    refuse to resume on another order, unless asked for
    consumed       samples read so far, data set by data set

A run that resumes under another blend goes on at the same number of samples in the new blend's order: what it has seen
of the data sets that stay is read again in part, in another order. That is why it must be asked for.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from megatron_prune.config import Config
from megatron_prune.data.datasets import Blend
from megatron_prune.errors import UserError

logger = logging.getLogger(__name__)


def data_order(config: Config, blend: Blend) -> dict[str, Any]:
    """Content and shares of the data sets, and what shuffles them; paths do not count."""
    weights = blend.weights or (1.0,)
    return {
        "data": [data.fingerprint for data in blend.data],
        "weights": [weight / math.fsum(weights) for weight in weights],
        "split": config.data.split if config.data.valid_data_path is None else "1,0,0",
        "seq_length": config.data.seq_length,
        "seed": config.training.seed,
    }


def check_order(config: Config, blend: Blend, stored: dict[str, Any] | None) -> None:
    """Compare with the `data_order` that a checkpoint holds (None: of a version that did not keep it).

    Raises:
        UserError: they differ and checkpoint.allow_blend_change is off.
    """
    now = data_order(config, blend)
    different = [name for name in now if stored is not None and stored.get(name) != now[name]]
    if not different or stored is None:
        return
    shown = ", ".join(f"{name} {_shown(stored.get(name))} -> {_shown(now[name])}" for name in different)
    if not config.checkpoint.allow_blend_change:
        raise UserError(
            f"data.data_path (--data-path): the checkpoint was trained on other data or another order ({shown}); give "
            "what it was trained with, or go on with --allow-blend-change"
        )
    logger.info("the data changes on resume, as allowed: %s", shown)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(f"{v:.4g}" if isinstance(v, float) else str(v)[:8] for v in value) + "]"
    return str(value)


def consumed(dataset: Any, blend: Blend, samples: int) -> dict[str, int]:
    """Of the first `samples` of a training set, how many came from each data set (by prefix)."""
    index = getattr(dataset, "dataset_index", None)  # megatron-core's blend: which data set each sample is from
    counts = [samples] if index is None else np.bincount(index[:samples], minlength=len(blend.data)).tolist()
    return dict(zip(blend.prefixes, counts, strict=True))
