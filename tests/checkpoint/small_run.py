"""A small run on real ranks, as far as checkpoints need one: build (fresh or from a record), train, remove groups."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import STEM, find_kind
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import ModelOptions
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.sources import RandomWeights
from megatron_prune.optimizer.wrapped import OptimizerOptions
from megatron_prune.pruning.groups.layer import group_of
from megatron_prune.pruning.history import Removal
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import Mesh, init_mesh
from megatron_prune.testing.helpers.sharded import rounded

SEQ, BATCH = 16, 4  # tokens per sequence, sequences per step (over all ranks)
SHAPE = LlamaShape(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=20,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=4,
    vocab_size=61,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    add_qkv_bias=True,
)
UNTIED = dataclasses.replace(SHAPE, tie_word_embeddings=False, add_qkv_bias=False, qk_layernorm=True)
OLMO2 = dataclasses.replace(SHAPE, tie_word_embeddings=False, add_qkv_bias=False, model_type="olmo2")


@dataclass(frozen=True)
class Kind:
    """A layout and precision; data parallelism is what remains of the ranks."""

    tp: int = 1
    pp: int = 1
    distributed: bool = False
    bf16: bool = False
    sp: bool = False
    first: int | None = None  # layers in the first pipeline stage
    engine: str = "auto"  # class of megatron-core

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


def mesh_of(kind: Kind) -> Mesh:
    """The mesh of `kind` over all ranks, in the place of the one before."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    mesh = init_mesh(choose_device("cpu"), kind.tp, kind.pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return mesh


def options_of(kind: Kind) -> ModelOptions:
    """How the model of `kind` runs."""
    stages = {"num_layers_in_first_pipeline_stage": kind.first}
    return ModelOptions(SEQ, kind.dtype, sequence_parallel=kind.sp, engine=kind.engine, **stages)


def build(kind: Kind, shape: LlamaShape = SHAPE, record: RunRecord | None = None) -> LiveModel:
    """A model with random weights, the same on every layout; with `record`, of its architecture and without weights."""
    mesh, quanta = mesh_of(kind), rounded(vocab=8)
    layout = record.layout(kind.tp, quanta) if record else ShardLayout.pack(Architecture.full(shape), kind.tp, quanta)
    options = OptimizerOptions(lr=3e-3, use_distributed_optimizer=kind.distributed)
    weights = RandomWeights(shape, seed=3, std=0.2) if record is None else None
    return LiveModel.build(layout, mesh, options_of(kind), options, weights)


def train(model: LiveModel, step: int) -> float:
    """One optimizer step on the global batch of `step`; its loss, the same on all ranks."""
    mesh = model.mesh
    tokens = torch.randint(0, SHAPE.vocab_size, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
    mine = iter(tokens[mesh.over("samples").rank :: mesh.dp_size].split(1))

    def forward(batches: Any, module: torch.nn.Module) -> Any:
        batch = next(batches)
        output = module(batch[:, :-1], torch.arange(SEQ).unsqueeze(0), None, labels=batch[:, 1:])

        def loss_of(values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = values.float().mean()
            return loss, {"loss": loss.detach().clone()}  # megatron-core divides the first in place

        return output, loss_of

    model.ddp.zero_grad_buffer()
    model.optimizer.zero_grad()
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=mine,
        model=[model.ddp],
        num_microbatches=BATCH // mesh.dp_size,
        seq_length=SEQ,
        micro_batch_size=1,
        forward_only=False,
    )
    assert model.step()[0]
    total = torch.tensor([float(sum(r["loss"] for r in results))])
    dist.all_reduce(total)
    return float(total) / BATCH / mesh.tp_size


def remove(model: LiveModel, kind: str, which: int) -> None:
    """Retire the `which`-th live unit of a kind, another one in every layer."""
    a = model.architecture
    if kind == "stem":
        units = ((int(a.ids(STEM, 0)[which]),),)
    else:
        live = a.sites(find_kind(kind))
        units = tuple((int(ids[(which + 3 * at) % len(ids)]),) if len(ids) else () for at, ids in enumerate(live))
    model.synchronise()
    model.retire(group_of(a, a.layers[which]) if kind == "layer" else Group.of(kind, units))


def go_on(model: LiveModel, first: int) -> list[float]:
    """Three more steps with removals between them; their losses."""
    losses = [train(model, first)]
    remove(model, "ffn", 2)
    losses.append(train(model, first + 1))
    remove(model, "stem", 4)
    return [*losses, train(model, first + 2)]


def prune_a_little(model: LiveModel) -> list[float]:
    """Three steps with removals of all kinds; every kind of slot has empty ones afterwards."""
    losses = []
    for step, (kind, which) in enumerate((("head", 1), ("ffn", 5), ("stem", 7))):
        losses.append(train(model, step))
        remove(model, kind, which)
    remove(model, "head", 0)
    return losses


def removed_heads(iteration: int, heads: tuple[int, ...], left: int, margin: float | None = None) -> dict[str, Any]:
    """A line of a history: one query head of each layer, and the parameters that are `left`."""
    group = Group.of("head", tuple((head,) for head in heads))
    return Removal(iteration, iteration * BATCH * SEQ, group, {"head": 0.5}, margin, left, {"head": 7}).to_json()


STATE: dict[str, Any] = {
    "tokens": 3 * BATCH * SEQ,
    "config": "training:\n  seed: 7\n",
    "history": [removed_heads(1, (1, 4), 9000)],
    "smoothing": {"head": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "lr_scheduler": {"num_steps": 3, "max_lr": 0.1},
}


@functools.cache
def tensors(folder: str | Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, by key."""
    reader = CheckpointReader(folder, step)
    found = {f"model/{name}": reader.read(name) for name in reader.names}
    for kind in reader.record.facts.optimizer:
        found |= {f"{kind}/{name}": reader.read_optimizer(kind, name) for name in reader.names}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
