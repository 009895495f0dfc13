"""Where initial weights come from, besides a Hugging Face folder: a seeded random initialisation; `finite` for all.

Every tensor is drawn by its own canonical name and seed, so that all layouts start from the same model.
"""

import hashlib

import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.families import table_of
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import BIAS, QKV_BIAS


class RandomWeights:
    """Callable `hf_name -> fp32 tensor`: normal(0, std), output projections scaled by 1/sqrt(2 layers), norms one.

    The scaling of the residual outputs is GPT-2's (Radford et al. 2019), Megatron's default.
    """

    def __init__(self, shape: LlamaShape, seed: int, std: float = 0.02) -> None:
        table = table_of(shape)
        self._shapes = table.hf_shapes(Architecture.full(shape))
        self._outputs = {part.hf_name for row in table.rows if row.is_output for part in row.parts}
        self._biases = {part.hf_name for row in table.rows if row.role in (BIAS, QKV_BIAS) for part in row.parts}
        self._seed, self._std, self._layers = seed, std, shape.num_layers

    def __call__(self, hf_name: str) -> Tensor:
        """The full source tensor of that name."""
        size = self._shapes[hf_name]
        if len(size) == 1:
            return torch.zeros(size) if hf_name in self._biases else torch.ones(size)
        digest = hashlib.sha256(f"{self._seed}/{hf_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        std = self._std / (2 * self._layers) ** 0.5 if hf_name in self._outputs else self._std
        return torch.empty(size).normal_(0.0, std, generator=generator)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; by the least and the largest, which takes a tenth of the time of looking at each."""
    return not (tensor.is_floating_point() and tensor.numel()) or all(bound.isfinite() for bound in tensor.aminmax())


def finite(tensor: Tensor, what: str, cure: str = "the model is damaged, fetch or save it again") -> Tensor:
    """`tensor`, whose values are all finite. Raises UserError, `what: ... ; cure`, when some are not."""
    if not is_finite(tensor):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise UserError(f"{what}: {bad} of {tensor.numel()} values are NaN or infinite; {cure}")
    return tensor
