"""A small run on real ranks that a test can stop anywhere, and the oracle's run beside it.

start       the Trainer of this rank, as `testing.helpers.sharded.run_case` builds it
oracle_of   the dense oracle and the batches that mean the same
canonical   weights and optimizer state put together from all ranks, live elements in canonical order
script      groups that make units move between ranks: the lowest FFN channels, some heads, a stem channel
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_prune.checkpoint.storage import Source
from megatron_prune.checkpoint.streams import Scratch
from megatron_prune.checkpoint.tensors import facts_of, optimizer_key, sources, weight_key
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.launch.assembly.assemble import fresh_model
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.resharding.live import LiveModel
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import Mesh, agree, init_mesh
from megatron_prune.testing.helpers.sharded import Case, RandomTokens, run_config
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config
from megatron_prune.testing.reference.oracle import DenseOracle, OracleSettings
from megatron_prune.training.metrics import Reporter
from megatron_prune.training.state import RunState
from megatron_prune.training.trainer import Datasets, Trainer

MICRO_BATCHES, MICRO_BATCH, SEQUENCE, ITERATIONS = 4, 2, 8, 20
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 30}
GQA = tiny_config(**SMALL)
QWEN2 = tiny_config(**SMALL, model_type="qwen2", tie_word_embeddings=False, vocab_size=61)


def start(case: Case, config: dict, settings: OracleSettings) -> Trainer:
    """This rank's part of a run of up to ITERATIONS iterations, not yet begun."""
    mesh = init_mesh(choose_device("cpu"), case.tp, case.pp)
    run = case.applied(run_config(settings, MICRO_BATCHES, MICRO_BATCH, SEQUENCE))
    weights = random_llama_weights(config, seed=3)
    model = fresh_model(run, Architecture.full(shape_from_config(config)), mesh, weights.__getitem__)
    tokens = RandomTokens(config["vocab_size"], SEQUENCE, ITERATIONS * MICRO_BATCHES * MICRO_BATCH)
    return Trainer(run, model, Datasets(tokens, None), RunState(), Reporter(run, 1, None, is_active=False))


def oracle_of(config: dict, settings: OracleSettings) -> tuple[DenseOracle, list]:
    """The oracle with the weights of `start`, and the global batches of all iterations."""
    tokens = RandomTokens(config["vocab_size"], SEQUENCE, ITERATIONS * MICRO_BATCHES * MICRO_BATCH)
    batches = [tokens.micro_batches(i, MICRO_BATCHES, MICRO_BATCH) for i in range(ITERATIONS)]
    return DenseOracle(config, random_llama_weights(config, seed=3), settings), batches


def assembled(mesh: Mesh, mine: Iterable[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]) -> dict[str, Tensor]:
    """(key, global shape, offset, values) of all ranks as whole tensors; each element must come exactly once."""
    found: dict[str, Tensor] = {}
    for key, shape, offset, values in itertools.chain(*agree(mesh, list(mine))):
        tensor = found.setdefault(key, torch.full(shape, torch.nan, dtype=values.dtype))
        place = tuple(slice(first, first + size) for first, size in zip(offset, values.shape, strict=True))
        assert bool(tensor[place].isnan().all()), f"{key} at {offset}: held twice"
        tensor[place] = values
    missing = [key for key, tensor in found.items() if bool(tensor.isnan().any())]
    assert not missing, f"not held by anybody: {missing}"
    return found


def canonical(model: LiveModel) -> dict[str, Tensor]:
    """{checkpoint key: tensor} of weights, main weights and moments; weights must be in step over DP (collective)."""

    def described(source: Source) -> tuple[str, tuple[int, ...], tuple[int, ...], Tensor]:
        return source.key, source.global_shape, source.offset, source.read(Scratch()).clone()

    return assembled(model.mesh, map(described, sources(model, facts_of(model))))


def oracle_tensors(oracle: DenseOracle) -> dict[str, Tensor]:
    """The oracle's weights and moments under the keys of `canonical`."""
    return {
        **{weight_key(name): tensor for name, tensor in oracle.weights.items()},
        **{optimizer_key("exp_avg", name): tensor for name, tensor in oracle.exp_avg.items()},
        **{optimizer_key("exp_avg_sq", name): tensor for name, tensor in oracle.exp_avg_sq.items()},
    }


SCRIPT: dict[int, list[Group]] = {
    2: [*(Group.of(FFN, ((unit,), (29 - unit,))) for unit in range(7)), Group.of(STEM, ((3,),))],
    4: [Group.of(HEAD, ((0, 1), (4, 5))), Group.of(FFN, ((9,), (11,))), Group.of(STEM, ((30,),))],
    6: [Group.of(HEAD, ((2,), (1,))), *(Group.of(FFN, ((unit,), (unit,))) for unit in (13, 14, 15, 16))],
}
