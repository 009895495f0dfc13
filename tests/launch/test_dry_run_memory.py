"""Memory estimates against counted tensor bytes of real steps on gloo ranks: state exact, activations within 10 %.

Each rank builds the model through the launch code, takes two optimizer steps (so that Adam's moments exist), and counts
the storages behind weights, gradient buffers and optimizer; then it records what autograd saves in one forward pass.
"""

import dataclasses
import functools

import pytest
import torch

from megatron_prune.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prune.launch.assembly.assemble import fresh_model, quanta
from megatron_prune.launch.estimate.activations import saved_activations
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.launch.estimate.rank_memory import fullest_rank, gradient_buffer, rank_memory
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import HEAD, STEM
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import inner_model
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.sources import RandomWeights
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import close_mesh, init_mesh
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import RandomTokens

GQA = LlamaShape(4, 96, 130, 6, 3, 16, 250, 128, tie_word_embeddings=True)
UNTIED = dataclasses.replace(GQA, num_query_groups=6, tie_word_embeddings=False)
QWEN2 = dataclasses.replace(GQA, add_qkv_bias=True, model_type="qwen2")
QWEN3 = dataclasses.replace(UNTIED, qk_layernorm=True, model_type="qwen3")
OLMO2 = dataclasses.replace(GQA, model_type="olmo2")


def make_config(tp=1, pp=1, bf16=False, distributed=False, bucket=None, sp=False, recompute=None, ffn_quantum=1):
    """A run of two micro-batches of 2 x 64 tokens."""
    base = Config()
    return dataclasses.replace(
        base,
        model=ModelConfig(
            make_vocab_size_divisible_by=8,
            recompute_granularity=recompute,
            recompute_method="uniform" if recompute == "full" else None,
            recompute_num_layers=2 if recompute == "full" else None,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=sp,
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=bucket is not None,
            overlap_param_gather=bucket is not None and distributed,
            ddp_bucket_size=bucket,
            device="cpu",
        ),
        data=DataConfig(seq_length=64),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=4, bf16=bf16),
        pruning=dataclasses.replace(base.pruning, groups=base.pruning.groups.having("ffn", quantum=ffn_quantum)),
    )


def measure_all(_rank, _world_size, cases):
    """On each rank, per case: (pipeline stage, data-parallel rank, counted state by kind, bytes one forward saves)."""
    from megatron.core import parallel_state

    found = {}
    for name, (config, architecture) in cases.items():
        parallel = config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        mesh = init_mesh(choose_device("cpu"), tp, pp)
        found[name] = measure(mesh, config, architecture)
        parallel_state.destroy_model_parallel()
    close_mesh()
    return found


def measure(mesh, config, architecture):
    model = fresh_model(config, architecture, mesh, RandomWeights(architecture.shape, 0, 0.1))
    steps(model, config, mesh)
    return mesh.pp_rank, mesh.over("owners").rank, count_state(model), count_saved(model, config, mesh)


def steps(model, config, mesh):
    from megatron_prune.data.batches import BatchStream
    from megatron_prune.training.step import forward_backward

    training = config.training
    count = training.global_batch_size // (training.micro_batch_size * mesh.dp_size)
    data = RandomTokens(model.table.shape.vocab_size, config.data.seq_length, 2 * training.global_batch_size)
    batches = BatchStream(data, training.micro_batch_size, mesh.over("samples").rank, mesh.dp_size)
    for _ in range(2):
        forward_backward(model, batches, count, training.micro_batch_size, config.data.seq_length)
        assert model.step()[0]


def storages(tensors):
    """Storage address -> bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def count_state(model):
    """Bytes of the distinct storages behind weights, gradients and optimizer."""
    weights = storages(model.module.parameters())
    gradients = storages([buffer.grad_data for buffer in model.ddp.buffers])
    assert set(storages([p.grad for p in model.module.parameters() if p.grad is not None])) <= set(gradients)
    (inner,) = model.optimizer.chained_optimizers
    held = [t for state in inner.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    held += [p for group in inner.optimizer.param_groups for p in group["params"]]
    others = {address: size for address, size in storages(held).items() if address not in weights}
    assert not set(others) & set(gradients)
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(others.values()),
    }


def count_saved(model, config, mesh):
    """Bytes of the distinct storages that one micro-batch's forward pass saves, parameters left out."""
    size, length, shape = config.training.micro_batch_size, config.data.seq_length, model.table.shape
    llama = inner_model(model.module)
    if not mesh.is_first_stage:
        local = length // (mesh.tp_size if config.parallel.splits_sequences else 1)
        width = model.layout.stored.hidden
        llama.set_input_tensor(torch.randn(local, size, width, dtype=model.dtype, requires_grad=True))
    parameters, saved = storages(model.module.parameters()), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    rows = torch.randint(0, shape.vocab_size, (size, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.ddp(rows.clone(), torch.arange(length).unsqueeze(0), None, labels=rows)
    assert output.requires_grad
    return sum(bytes_ for address, bytes_ in storages(saved).items() if address not in parameters)


def pruned(shape):
    """Fewer heads, in clusters of 2, 1 and 1 queries, and a stem that is no multiple of anything."""
    full = Architecture.full(shape)
    heads = (full.ids(HEAD, 0)[[0, 1, 2, 4]],) * shape.num_layers
    return Architecture(shape, {**full.live, HEAD: heads, STEM: (full.ids(STEM, 0)[:90],)})


# name -> (processes, config, architecture); cases of as many processes are measured together.
CASES = {
    f"tp{tp}-dp{dp}-{'bf16' if bf16 else 'fp32'}-{'distributed' if distributed else 'plain'}": (
        tp * dp,
        make_config(tp=tp, bf16=bf16, distributed=distributed),
        Architecture.full(GQA),
    )
    for tp in (1, 2)
    for dp in (1, 2)
    for bf16 in (False, True)
    for distributed in (False, True)
} | {
    "sequence-parallel": (2, make_config(tp=2, sp=True, bf16=True, distributed=True), Architecture.full(UNTIED)),
    "buckets": (2, make_config(bf16=True, distributed=True, bucket=20_000), Architecture.full(UNTIED)),
    "buckets-plain": (2, make_config(bucket=20_000), Architecture.full(GQA)),
    "tied-on-two-stages": (4, make_config(pp=2, distributed=True, bucket=20_000), Architecture.full(GQA)),
    "untied-on-two-stages": (2, make_config(pp=2), Architecture.full(UNTIED)),
    "stored-wider-than-live": (2, make_config(tp=2, ffn_quantum=32), Architecture.full(GQA)),
    "biases": (1, make_config(bf16=True), Architecture.full(QWEN2)),
    "query-and-key-norms": (1, make_config(bf16=True), Architecture.full(QWEN3)),
    "query-and-key-norms-fp32": (1, make_config(), Architecture.full(QWEN3)),
    "norms-behind": (2, make_config(tp=2, sp=True, bf16=True), Architecture.full(OLMO2)),
    "norms-behind-fp32": (1, make_config(), Architecture.full(OLMO2)),
    "selective-recompute": (1, make_config(recompute="selective"), Architecture.full(GQA)),
    "full-recompute": (1, make_config(recompute="full", bf16=True), Architecture.full(GQA)),
    "uneven-clusters": (2, make_config(distributed=True), pruned(GQA)),
}


@functools.cache
def measured(world_size):
    """Case name -> what each rank counted, for all cases of that many processes."""
    cases = {name: case[1:] for name, case in CASES.items() if case[0] == world_size}
    ranks = run_ranks(measure_all, world_size, cases, timeout=280)
    return {name: [rank[name] for rank in ranks] for name in cases}


@pytest.mark.timeout(300)  # the first case of a number of processes measures all of them
@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_what_is_estimated(case):
    world_size, config, architecture = CASES[case]
    layout = ShardLayout.pack(architecture, config.parallel.tensor_model_parallel_size, quanta(config))
    placement = Placement.plan(config, world_size, architecture.shape.num_layers)
    seen = set()
    for stage, dp_rank, state, saved in measured(world_size)[case]:
        estimate = rank_memory(config, layout, placement, stage, dp_rank)
        assert {kind: getattr(estimate, kind) for kind in state} == state, f"stage {stage}, DP rank {dp_rank}"
        activations = saved_activations(config, layout, placement, stage)
        assert activations == pytest.approx(saved, rel=0.1), f"activations of stage {stage}"
        seen.add((stage, dp_rank))
    assert seen == {(stage, dp_rank) for stage in range(placement.pp) for dp_rank in range(placement.dp)}


def test_the_fullest_rank_is_the_fullest():
    config = make_config(tp=2, pp=2, bf16=True, distributed=True)
    layout = ShardLayout.pack(Architecture.full(GQA), 2, quanta(config))
    placement = Placement.plan(config, 8, GQA.num_layers)
    ranks = [
        rank_memory(config, layout, placement, stage, dp_rank, True)
        for stage in range(2)
        for dp_rank in range(placement.dp)
    ]
    assert fullest_rank(config, layout, placement, True).peak == max(rank.peak for rank in ranks)


def test_buffer_padding_by_hand():
    """Last parameter first; starts at multiples of 64, the end at a multiple of lcm(128, DP size)."""
    buffer = gradient_buffer([10, 70, 5], [False] * 3, dp=3, is_padded=True, bucket=None)
    assert buffer.spans == ((0, 5), (64, 134), (192, 202))
    assert buffer.buckets == ((0, 384),)
    assert [buffer.owned(rank, 3) for rank in range(3)] == [[5, 64], [6, 10], []]
    plain = gradient_buffer([10, 70, 5], [False] * 3, dp=3, is_padded=False, bucket=60)
    assert plain.buckets == ((0, 75), (75, 85)) and plain.numel == plain.unpadded == 85
