"""States of the random generators of a process, so that a resumed run draws what the first would have drawn."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_prune.errors import UserError, first_line


def capture_rng() -> dict[str, Any]:
    """Copies of the states of python, numpy, torch, the device, and megatron-core's tracker."""
    # The global generator is the one that libraries draw from, so it is the one to keep.
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, np.array(key), *rest),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }


def restore_rng(states: dict[str, Any], file: Path = Path("rng")) -> None:
    """Inverse of `capture_rng`; the generators of a device stay as they are when the states are of another kind. Raises
    UserError: they are no states; names `file`, which they were read from."""
    try:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])  # noqa: NPY002
        torch.set_rng_state(states["torch"])
        if states["device"].numel() == torch.cuda.get_rng_state().numel():
            torch.cuda.set_rng_state(states["device"])
            tracked = {str(name): state.clone() for name, state in states["tracker"].items()}
            get_cuda_rng_tracker().set_states(tracked)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        told = f"{file}: rng: no states of random generators ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{told}; --no-load-optim goes on without them") from error
