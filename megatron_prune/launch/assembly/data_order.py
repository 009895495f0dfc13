"""What decides which samples a run reads, so that a resumed run reads on where the first one stopped.

    data_order      Config, Blend -> plain values for the checkpoint
    check_order     refuse to resume on another order, unless asked for
    splits_read     which shares of the data sets are read, and how much of each
    wanted_samples  how many samples to shuffle
    shuffle_of      what came of the shuffle, for the checkpoint
    check_shuffle   refuse to resume on another shuffle, unless asked for
    consumed        samples read so far, data set by data set

A run that resumes under another blend goes on at the same number of samples in the new blend's order: what it has seen
of the data sets that stay is read again in part, in another order. That is why it must be asked for.

megatron-core shuffles a data set for as many epochs as the samples asked for take, all of them together: a run that is
to read more may get another order from its first sample on. So the number asked for stays what it was for as long as it
is enough, and where more are needed the shuffles are compared.
"""

import hashlib
import logging
import math
from typing import Any, NamedTuple

import numpy as np

from megatron_prune.checkpoint.record import Progress
from megatron_prune.config import Config
from megatron_prune.data.datasets import Blend
from megatron_prune.errors import UserError
from megatron_prune.training.state import RunState

_COMPARED = 4096  # entries of each shuffle; two shuffles that differ do so from the start

logger = logging.getLogger(__name__)


class SplitRead(NamedTuple):
    """Of one blend: shares of its documents for training, validation and test, and the samples wanted of each."""

    split: str
    samples: tuple[int, int, int]


def splits_read(config: Config, train_samples: int = 1) -> tuple[SplitRead, SplitRead | None]:
    """What a run reads of data.data_path, and of data.valid_data_path, if it has one."""
    training = config.training
    valid_samples = training.eval_iters * training.global_batch_size if training.eval_interval else 0
    if config.data.valid_data_path:
        return SplitRead("1,0,0", (train_samples, 0, 0)), SplitRead("0,1,0", (0, valid_samples, 0))
    return SplitRead(config.data.split, (train_samples, valid_samples, 0)), None


def data_order(config: Config, blend: Blend) -> dict[str, Any]:
    """Content and shares of the data sets, and what shuffles them; paths do not count."""
    weights = blend.weights or (1.0,)
    return {
        "data": [data.fingerprint for data in blend.data],
        "weights": [weight / math.fsum(weights) for weight in weights],
        "split": splits_read(config)[0].split,
        "seq_length": config.data.seq_length,
        "seed": config.training.seed,
    }


def check_order(config: Config, blend: Blend, stored: dict[str, Any] | None) -> bool:
    """Compare with the `data_order` that a checkpoint holds (None: of a version that did not keep it).

    Returns:
        Whether they are the same, as far as is known.

    Raises:
        UserError: they differ and checkpoint.allow_blend_change is off.
    """
    now = data_order(config, blend)
    if stored is None:
        return True
    different = [name for name in now if stored.get(name) != now[name]]
    if not different:
        return True
    shown = ", ".join(f"{name} {_shown(stored.get(name))} -> {_shown(now[name])}" for name in different)
    if not config.checkpoint.allow_blend_change:
        raise UserError(
            f"data.data_path (--data-path): the checkpoint was trained on other data or another order ({shown}); give "
            "what it was trained with, or go on with --allow-blend-change"
        )
    logger.info("the data changes on resume, as allowed: %s", shown)
    return False


def wanted_samples(config: Config, state: RunState, stored: dict[str, Any] | None) -> int:
    """Samples to shuffle: what the longest possible run reads, or what it was shuffled for before, whichever is more.

    Args:
        state: where the run stands. stored: `shuffle_of` in the checkpoint; None: data in another order, or a new run.
    """
    batch = config.training.global_batch_size
    if stored is None:
        return Progress().longest(config) * batch
    left = state.progress.longest(config) - state.iteration
    return max(stored["samples"], state.consumed_samples + left * batch)


def shuffle_of(dataset: Any, samples: int) -> dict[str, Any]:
    """How a training set is shuffled: the samples it was built for, its epochs by data set, and a digest.

    Args:
        dataset: megatron-core's, of one data set or a blend.
    """
    total, parts = hashlib.sha256(), getattr(dataset, "datasets", [dataset])
    for part in parts:
        total.update(np.asarray(part.document_index[:_COMPARED], dtype=np.int64).tobytes())
        total.update(np.asarray(part.shuffle_index[:_COMPARED], dtype=np.int64).tobytes())
    epochs = [len(part.document_index) // len(part.indices) for part in parts]
    return {"samples": samples, "epochs": epochs, "digest": total.hexdigest()[:16]}


def check_shuffle(config: Config, now: dict[str, Any], stored: dict[str, Any] | None) -> None:
    """Compare `shuffle_of` the data with what a checkpoint holds (None: other data were asked for, or a new run).
    Raises UserError: the order is another one and checkpoint.allow_blend_change is off."""
    if stored is None or now["digest"] == stored["digest"]:
        return
    what = f"{stored['samples']} samples over {stored['epochs']} epochs -> {now['samples']} over {now['epochs']}"
    if not config.checkpoint.allow_blend_change:
        raise UserError(
            "training.train_iters, continued.continue_tokens: the run became so much longer that its data are shuffled "
            f"anew, from the first sample on ({what}); give the length it was begun with, or go on in the new order "
            "with --allow-blend-change"
        )
    logger.info("the order of the data changes on resume, as allowed: %s", what)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(f"{v:.4g}" if isinstance(v, float) else str(v)[:8] for v in value[:32]) + "]"
    return str(value)[:40]


def consumed(dataset: Any, blend: Blend, samples: int) -> dict[str, int]:
    """Of the first `samples` of a training set, how many came from each data set (by prefix)."""
    index = getattr(dataset, "dataset_index", None)  # megatron-core's blend: which data set each sample is from
    counts = [samples] if index is None else np.bincount(index[:samples], minlength=len(blend.data)).tolist()
    return dict(zip(blend.prefixes, counts, strict=True))
