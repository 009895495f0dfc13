"""The shapes that are measured, and runs of them with weights drawn on the device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_prune.data.batches import BatchStream
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.families import table_of
from megatron_prune.model.shape import LlamaShape
from megatron_prune.runtime.mesh import Mesh
from megatron_prune.testing.benchmarks.gpu_check.rows import Context
from megatron_prune.testing.helpers.sharded import Case, rounded
from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun
from megatron_prune.training.step import forward_backward


@dataclass(frozen=True)
class Shapes:
    """What is measured, all with tied embeddings.

    Args:
        source: SmolLM-1.7B. large, small: the 469M and 134M models found from it and from SmolLM-360M; aligned: the
            large one at multiples of 128.
        micro_batches: sizes to try. sequences: of an iteration.
    """

    source: LlamaShape
    large: LlamaShape
    aligned: LlamaShape
    small: LlamaShape
    seq_length: int
    micro_batches: tuple[int, ...]
    usual: int
    sequences: int

    @classmethod
    def of(cls, context: Context) -> Shapes:
        """For a GPU, or small ones for a rehearsal."""
        if context.tiny or not context.is_cuda:
            source = LlamaShape(2, 64, 128, 16, 16, 4, 256, 64, tie_word_embeddings=True)
            large, aligned = replace(source, hidden_size=37, ffn_hidden_size=47), replace(source, hidden_size=40)
            return cls(source, large, aligned, replace(source, hidden_size=24), 64, (1, 2), 2, 4)
        source = LlamaShape(24, 2048, 8192, 32, 32, 64, 49152, 2048, tie_word_embeddings=True)
        large = replace(source, hidden_size=1225, ffn_hidden_size=3012, num_attention_heads=19, num_query_groups=19)
        aligned = replace(large, hidden_size=1280, ffn_hidden_size=3072, num_attention_heads=20, num_query_groups=20)
        small = LlamaShape(32, 576, 1536, 9, 3, 64, 49152, 2048, tie_word_embeddings=True)
        return cls(source, large, aligned, small, 2048, (1, 4, 8), 4, 16)


class DeviceWeights:
    """Callable `hf_name -> tensor` of normal(0, 0.02) numbers, norms one; drawn on the device, which is quick."""

    def __init__(self, shape: LlamaShape, device: torch.device) -> None:
        self._shapes = table_of(shape).hf_shapes(Architecture.full(shape))
        self._device = device

    def __call__(self, hf_name: str) -> Tensor:
        """The tensor of that name; another one at each call."""
        size = self._shapes[hf_name]
        if len(size) == 1:
            return torch.ones(size, device=self._device)
        return torch.empty(size, device=self._device).normal_(0.0, 0.02)


def start(context: Context, shapes: Shapes, shape: LlamaShape, mesh: Mesh, quantum: int = 64) -> SteppedRun:
    """A run in bf16 with main weights, as `pretrain` would build it."""
    multiple = min(quantum, 4) if context.tiny else quantum
    quanta = rounded(ffn=multiple, stem=multiple, vocab=8 if context.tiny else 128)
    case = Case(bf16=True, distributed_optimizer=True, quanta=quanta, device=context.device)
    setup = Setup(shape, case, shapes.seq_length, shapes.usual, shapes.sequences // shapes.usual)
    return SteppedRun(setup, mesh, DeviceWeights(shape, mesh.device.device))


def plain_seconds(run: SteppedRun, micro_batch: int, sequences: int, repeats: int, warm: int = 2) -> float:
    """Median seconds of an iteration of `sequences` sequences: forward, backward, optimizer step."""
    batches = BatchStream(run.trainer.datasets.train, micro_batch, 0, 1)
    spent = []
    for _ in range(warm + repeats):
        run.mesh.device.synchronize()
        started = time.perf_counter()
        forward_backward(run.model, batches, sequences // micro_batch, micro_batch, run.setup.seq_length)
        run.model.step()
        run.mesh.device.synchronize()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[warm:])
