"""Model FLOPs, by the usual convention: 2 per multiply-add, backward twice the forward, attention not halved for
causality.
"""

from __future__ import annotations

from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.budget import flops_per_token


def training_flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """FLOPs to train on one token: matrix multiplications of live widths, logits and attention included."""
    return 3.0 * forward_flops_per_token(architecture, seq_length)


def forward_flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """FLOPs of a forward pass alone, such as a teacher's."""
    return flops_per_token(architecture.table, architecture.counts, seq_length)


# Dense bf16 peaks in TFLOP/s, from the manufacturer's data sheets; the first name found in the device's own wins.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "V100": 125.0,
}


def known_peak_tflops(device_name: str) -> float | None:
    """Dense peak of a device by its name, e.g. `NVIDIA A100-SXM4-80GB` -> 312; None for one that is not listed."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
