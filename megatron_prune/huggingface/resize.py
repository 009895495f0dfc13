"""Rows for ids that a tokenizer's folder adds to its vocabulary (`<pad>`, markers of a chat), and the model lacks.

    resized     architecture, rows -> the architecture with that many ids
    with_rows   a reader of weights -> one whose embedding and output layer have that many rows

A new row is the mean of all others, as transformers' `resize_token_embeddings` has it but for the noise: the model
knows nothing about the token, and gives it about average odds.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_prune.huggingface.weights import EMBEDDING, HEAD_WEIGHT, Reader
from megatron_prune.model.architecture import Architecture


def resized(architecture: Architecture, rows: int) -> Architecture:
    """The same live units, with `rows` ids."""
    return dataclasses.replace(architecture, shape=dataclasses.replace(architecture.shape, vocab_size=rows))


def with_rows(read: Reader, rows: int) -> Reader:
    """Reader of tensors of which the embedding and the output layer are [rows, hidden], in the stored dtype."""

    def read_resized(hf_name: str) -> Tensor:
        tensor = read(hf_name)
        if hf_name not in (EMBEDDING, HEAD_WEIGHT) or len(tensor) >= rows:
            return tensor
        mean = tensor.mean(dim=0, dtype=torch.float64).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(rows - len(tensor), -1)))

    return read_resized
