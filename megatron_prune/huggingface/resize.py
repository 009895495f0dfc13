"""Rows for ids that a tokenizer's folder adds to its vocabulary (`<pad>`, markers of a chat), and the model lacks.

A new row is the mean of all others, as transformers' `resize_token_embeddings` has it but for the noise: the model
knows nothing about the token, and gives it about average odds.
"""

import dataclasses

import torch
from torch import Tensor

from megatron_prune.huggingface.weights import Reader
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import VOCAB
from megatron_prune.model.table import ParamTable


def resized(architecture: Architecture, rows: int) -> Architecture:
    """The same live units, with `rows` ids."""
    return dataclasses.replace(architecture, shape=dataclasses.replace(architecture.shape, vocab_size=rows))


def with_rows(read: Reader, table: ParamTable, rows: int) -> Reader:
    """Reader of the tensors of `table`, of which those with a row per id have at least `rows`, in the stored dtype."""
    of_ids = {name for name, (part, _) in table.parts.items() if part.dims[0].kind == VOCAB}

    def read_resized(hf_name: str) -> Tensor:
        tensor = read(hf_name)
        if hf_name not in of_ids or len(tensor) >= rows:
            return tensor
        mean = tensor.mean(dim=0, dtype=torch.float64).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(rows - len(tensor), -1)))

    return read_resized
