"""Traffic estimates against what the collectives of a real iteration carry, counted on gloo ranks."""

import dataclasses
import functools
import math
import sys

import pytest
import torch.distributed as dist

from megatron_prune.config import Config, PruningConfig
from megatron_prune.launch.assembly.assemble import fresh_model, quanta
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.launch.estimate.traffic import crossing, pruning_traffic, training_traffic
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.resharding.plan import plan_transfer
from megatron_prune.testing.benchmarks.planning import Planned, worn
from megatron_prune.testing.helpers.ranks import run_ranks

SHAPE = LlamaShape(4, 96, 130, 6, 3, 16, 250, 128, tie_word_embeddings=False)
HALVES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}  # half rings


def make_config(tp=1, bf16=False, distributed=False, sp=False, recompute=None):
    base = Config()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            make_vocab_size_divisible_by=8,
            recompute_granularity=recompute,
            recompute_method=recompute and "uniform",
            recompute_num_layers=recompute and 1,
        ),
        parallel=dataclasses.replace(
            base.parallel,
            tensor_model_parallel_size=tp,
            sequence_parallel=sp,
            use_distributed_optimizer=distributed,
            device="cpu",
        ),
        data=dataclasses.replace(base.data, seq_length=64),
        training=dataclasses.replace(base.training, micro_batch_size=2, global_batch_size=8, bf16=bf16),
        pruning=PruningConfig(target_params=10_000),
    )


class Counter:
    """Stands in for torch.distributed's collectives and adds up what a rank sends with ring algorithms."""

    def __init__(self):
        self.sent = {}
        for name in HALVES:
            original = getattr(dist, name)
            counted = functools.partial(self._call, name, original)
            for module in [m for n, m in sys.modules.items() if n.startswith("megatron") or m is dist]:
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, attribute, counted)

        exchange = dist.batch_isend_irecv

        def counted_exchange(operations):
            for operation in operations:
                if operation.op is dist.isend:
                    ranks = tuple(dist.get_process_group_ranks(operation.group or dist.group.WORLD))
                    sent = operation.tensor.numel() * operation.tensor.element_size()
                    self.sent[ranks] = self.sent.get(ranks, 0) + sent
            return exchange(operations)

        dist.batch_isend_irecv = counted_exchange

    def _call(self, name, original, *args, **kwargs):
        group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), dist.group.WORLD)
        size = dist.get_world_size(group)
        largest = max((a for a in args if hasattr(a, "numel")), key=lambda tensor: tensor.numel())
        whole = largest.numel() * largest.element_size()
        ranks = tuple(dist.get_process_group_ranks(group))
        self.sent[ranks] = self.sent.get(ranks, 0) + HALVES[name] * whole * (size - 1) / size
        return original(*args, **kwargs)

    def take(self):
        sent, self.sent = self.sent, {}
        return sent


def measure_all(_rank, _world_size, cases):
    """Case name -> (bytes over TP, bytes over DP) of a training step, and of scoring, on this rank."""
    from megatron.core import parallel_state

    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import close_mesh, init_mesh

    device, counter, found = choose_device("cpu"), Counter(), {}
    for name, config in cases.items():
        mesh = init_mesh(device, config.parallel.tensor_model_parallel_size, 1)
        found[name] = measure(mesh, config, counter)
        parallel_state.destroy_model_parallel()
    close_mesh()
    return found


def measure(mesh, config, counter):
    from megatron_prune.data.batches import BatchStream
    from megatron_prune.model.sources import RandomWeights
    from megatron_prune.saliency.collector import MicrobatchFisher
    from megatron_prune.saliency.criteria import find_criterion
    from megatron_prune.saliency.reducer import score_elements
    from megatron_prune.testing.helpers.sharded import RandomTokens
    from megatron_prune.training.step import forward_backward

    model, training = fresh_model(config, Architecture.full(SHAPE), mesh, RandomWeights(SHAPE, 0, 0.1)), config.training
    count = training.global_batch_size // (training.micro_batch_size * mesh.dp_size)
    data = RandomTokens(SHAPE.vocab_size, config.data.seq_length, training.global_batch_size)
    batches = BatchStream(data, training.micro_batch_size, mesh.over("samples").rank, mesh.dp_size)
    fisher = MicrobatchFisher(model, count, 1.0)
    fisher.arm()
    counter.take()
    forward_backward(model, batches, count, training.micro_batch_size, config.data.seq_length)
    step = counter.take()
    squares = fisher.reduce()
    score_elements(model, find_criterion("taylor_mix"), "microbatch", squares).reduce()
    scoring = counter.take()
    assert model.step()[0]
    update = counter.take()
    step = {ranks: step.get(ranks, 0) + update.get(ranks, 0) for ranks in {*step, *update}}
    groups = [tuple(dist.get_process_group_ranks(mesh.over(axis).group)) for axis in ("tp", "tokens")]
    return [tuple(sent.get(group, 0) for group in groups) for sent in (step, scoring)]


CASES = {
    "tp2-dp2": make_config(tp=2),
    "tp2-dp2-bf16-distributed": make_config(tp=2, bf16=True, distributed=True),
    "tp2-dp2-sequence-parallel": make_config(tp=2, sp=True, bf16=True, distributed=True),
    "tp2-dp2-full-recompute": make_config(tp=2, sp=True, recompute="full"),
    "tp2-dp2-full-recompute-plain": make_config(tp=2, recompute="full"),
    "dp4": make_config(),
}


@functools.cache
def measured():
    return run_ranks(measure_all, 4, CASES, timeout=280)


@pytest.mark.timeout(300)  # the first case measures all of them
@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_is_estimated(case):
    config = CASES[case]
    layout = ShardLayout.pack(Architecture.full(SHAPE), config.parallel.tensor_model_parallel_size, quanta(config))
    placement = Placement.plan(config, 4, SHAPE.num_layers)
    lines = training_traffic(config, layout, placement, 0)
    over_tp = sum(line.bytes for line in lines if "TP" in line.what)
    over_dp = sum(line.bytes for line in lines if "DP" in line.what)
    tp_size = config.parallel.tensor_model_parallel_size
    for number, rank in enumerate(measured()):
        on_top, _ = pruning_traffic(config, layout, placement, 0, needs_fisher=True, dp_rank=number // tp_size)
        (tp, dp), (tp_scoring, dp_scoring) = rank[case]
        assert over_tp == pytest.approx(tp, rel=0.03)  # losses, norms' gradients and the gradient norm are left out
        assert over_dp == pytest.approx(dp, rel=0.01)
        assert sum(line.bytes for line in on_top) == pytest.approx(tp_scoring + dp_scoring, rel=0.02)


@pytest.mark.parametrize(("kv_heads", "kind"), [(32, "head"), (8, "head"), (32, "ffn"), (32, "stem")])
def test_units_that_will_cross_the_border_in_the_middle_are_foreseen(kv_heads, kind):
    planned = Planned(LlamaShape(40, 64, 512, 32, kv_heads, 8, 64, 16), tp=4, pp=1)
    layout = worn(planned, kind)
    after, crossed = layout.compacted(), 0
    for row in layout.architecture.table.rows:
        for here, there in ((1, 2), (2, 1)):
            plan = plan_transfer(row, layout, after, here)
            across = [size for dim, size in enumerate(plan.new_shape) if dim != plan.sharded_dim]
            crossed += len(plan.sends.get(there, ())) * math.prod(across)
    foreseen = crossing(planned.layout, after, Placement(4, 1, 1, 1, (range(40),)), 0)
    assert foreseen == pytest.approx(crossed, rel=0.25)
    assert (foreseen > 0) == (kind == "ffn" or (kind == "head" and kv_heads == 32))
