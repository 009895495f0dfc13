"""Arithmetic between the matrix products, as one kernel each where torch.compile makes them.

    live_rms_norm   the norm over the live channels of a partly empty width
    rotate          rotary embedding of queries or keys
    fusions         megatron-core's own fields for the rest: SwiGLU and the loss, which it compiles itself
    kernels_for     which of them a run has kernels for: none, those without sums (rotations, SwiGLU), or all

Widths are numbers of the compiled code, not constants in it: a function is compiled for the first shape it meets, and
once or twice more where a number turns out to change; from then on removals and compactions compile nothing. The order
in which such a kernel adds up a row may differ between a run and its resumption, whose first shapes are others. So a
run has kernels with sums in them only if it is told to: its resumption is then equal to rounding, not to the bit.
"""

import functools
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_prune.errors import UserError


def _live_rms_norm(x: Tensor, weight: Tensor, live: int, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / live + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def _rotate(x_SBND: Tensor, angles: Tensor) -> Tensor:
    cosines, sines = angles.cos().to(x_SBND.dtype), angles.sin().to(x_SBND.dtype)
    first, second = x_SBND.chunk(2, dim=-1)
    return x_SBND * cosines + torch.cat((-second, first), dim=-1) * sines


NONE, WITHOUT_SUMS, ALL = "none", "without sums", "all"


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def live_rms_norm(x: Tensor, weight: Tensor, live: int, eps: float) -> Tensor:
    """x / sqrt(sum(x^2) / live + eps) * weight over the last dim, computed in fp32; in the input's dtype and shape."""
    return _compiled(_live_rms_norm)(x, weight, live, eps)


def rotate(x_SBND: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys turned by `angles` [S, 1, 1, D], whose halves are the same; in their own dtype."""
    return _compiled(_rotate)(x_SBND, angles)


def fusions(kernels: str, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig. `bias_activation_fusion` (for rotations) and `persist_layer_norm`
    (for norms) also tell this project's layers."""
    return {
        "bias_activation_fusion": kernels != NONE,
        "persist_layer_norm": kernels == ALL,
        # Its gradients of logits are in bfloat16, whatever the dtype of the model.
        "cross_entropy_loss_fusion": kernels == ALL and dtype == torch.bfloat16,
        "cross_entropy_fusion_impl": "native",
    }


def kernels_for(asked: str, device: str | None) -> str:
    """NONE, WITHOUT_SUMS or ALL, for `model.compile` and a device (cuda, cpu; None: of no run). `auto` makes those
    without sums on a GPU that has Triton, none on a CPU: they save 3 % of a step there, and take half a minute to make.
    Raises UserError: `on`, and what makes them is missing."""
    if asked == "off" or device is None:
        return NONE
    if device == "cuda":
        missing = None if find_spec("triton") else "the package triton"
    else:
        names = [os.environ.get("CXX", ""), "g++", "clang++"]
        missing = None if any(map(shutil.which, filter(None, names))) else "a C++ compiler (g++)"
    if asked == "auto":
        return WITHOUT_SUMS if device == "cuda" and missing is None else NONE
    if missing:
        raise UserError(f"model.compile: on needs {missing}, which is not here; install it, or use off")
    return ALL
