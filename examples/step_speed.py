"""A training step here beside its peers', and a smaller model's beside its source's.

    python examples/step_speed.py                      # a slice of SmolLM2-135M's shape, one thread, some ten minutes

Peers, each with the same weights' shapes, tokens, micro-batches, clipping and AdamW, in turn in one process: bare
megatron-core (its GPTModel of local layers, DDP, distributed-optimizer-free Adam) and transformers with torch's fused
AdamW. Smaller models: steps of 57 and 35 % of the source's FLOPs, in even and odd widths. Everything is a ratio of
medians of processor time; a machine that is busy with other work does not matter much.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError


@dataclass(frozen=True)
class StepSpeedOptions:
    """Its options."""

    layers: int = option(4, "layers of hidden size 576, FFN 1536, 9 query and 3 KV heads", at_least=1)
    vocab: int = option(8192, "vocabulary", at_least=128)
    seq_length: int = option(512, "tokens per sequence", at_least=8)
    micro_batches: int = option(2, "micro-batches of one sequence in a step", at_least=1)
    turns: int = option(7, "steps of each that are timed", at_least=1)
    compile: str = option("off", "model.compile here: off or on")


WIDTHS = {  # heads, KV heads, FFN, hidden
    "source": (9, 3, 1536, 576),
    "57 %": (6, 2, 1088, 448),
    "57 %, odd widths": (6, 2, 1091, 447),
    "35 %": (6, 2, 768, 352),
    "35 %, odd widths": (6, 2, 773, 349),
}


def ours(shape: Any, options: StepSpeedOptions, mesh: Any) -> Callable[[], object]:
    """A step of a run of this project that does not prune."""
    from megatron_prune.testing.helpers.sharded import Case
    from megatron_prune.testing.helpers.stepped_run import Setup, SteppedRun

    case = Case(compile=options.compile)
    setup = Setup(shape, case, options.seq_length, 1, options.micro_batches)
    return SteppedRun(setup, mesh).plain_step


def batches(shape: Any, options: StepSpeedOptions) -> Iterator[dict[str, Any]]:
    """Micro-batches without end."""
    import torch

    while True:
        tokens = torch.randint(0, shape.vocab_size, (1, options.seq_length))
        yield {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(tokens.shape)}


def bare_megatron(shape: Any, options: StepSpeedOptions) -> Callable[[], object]:
    """A step of megatron-core's own model, DDP, schedule and optimizer. Call `ours` first: it makes process groups."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=options.seq_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    schedule, data = get_forward_backward_func(), batches(shape, options)
    positions = torch.arange(options.seq_length).unsqueeze(0)
    mask = torch.ones(1, 1, options.seq_length, options.seq_length).tril() < 0.5

    def forward(given: Iterator[dict[str, Any]], wrapped: torch.nn.Module) -> tuple[Any, Callable[[Any], Any]]:
        batch = next(given)
        losses = wrapped(batch["tokens"], positions, mask, labels=batch["labels"])
        return losses, lambda out: (out.mean(), {"loss": out.mean().detach()})

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward,
            data_iterator=data,
            model=wrapped,
            num_microbatches=options.micro_batches,
            seq_length=options.seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()

    return step


def plain_transformers(shape: Any, options: StepSpeedOptions) -> Callable[[], object]:
    """A step of transformers' Llama with torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    data = batches(shape, options)

    def step() -> None:
        for _ in range(options.micro_batches):
            batch = next(data)
            logits = model(batch["tokens"]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
            (loss / options.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turn(jobs: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median processor seconds of each job, after two calls that do not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns + 2):
        for name, job in jobs.items():
            begun = time.process_time()
            job()
            if turn >= 2:
                times[name].append(time.process_time() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def work(options: StepSpeedOptions) -> int:
    """Both tables."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_prune.model.architecture import Architecture
    from megatron_prune.model.shape import LlamaShape
    from megatron_prune.pruning.budget import forward_flops
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import init_mesh

    if options.compile not in ("off", "on"):
        raise UserError(f"--compile {options.compile}: off or on")
    torch.set_num_threads(1)

    def shaped(widths: Sequence[int]) -> LlamaShape:
        heads, kv_heads, ffn, hidden = widths
        sizes = (hidden, ffn, heads, kv_heads, 64, options.vocab, options.seq_length)
        return LlamaShape(options.layers, *sizes, tie_word_embeddings=True)

    shapes = {name: shaped(widths) for name, widths in WIDTHS.items()}
    source = shapes["source"]
    mesh = init_mesh(choose_device("cpu"), 1, 1)
    jobs = {name: ours(shape, options, mesh) for name, shape in shapes.items()}
    model_parallel_cuda_manual_seed(1)
    peers = {"megatron-core": bare_megatron(source, options)}
    peers["transformers"] = plain_transformers(source, options)
    seconds = in_turn({**jobs, **peers}, options.turns)
    print("| a step at the source's size | seconds | its time / ours |")
    print("| --- | ---: | ---: |")
    for name in ("source", *peers):
        title, ratio = "here" if name == "source" else name, seconds[name] / seconds["source"]
        print(f"| {title} | {seconds[name]:.2f} | {ratio:.2f} |")
    print("\n| heads (KV), FFN, hidden | FLOPs / source's | time / source's | FLOPs ratio / time ratio |")
    print("| --- | ---: | ---: | ---: |")
    cost = {name: forward_flops(Architecture.full(shape), options.seq_length) for name, shape in shapes.items()}
    for name in shapes:
        share = cost[name] / cost["source"]
        slower = seconds[name] / seconds["source"]
        heads, kv_heads, ffn, hidden = WIDTHS[name]
        widths = f"{heads} ({kv_heads}), {ffn}, {hidden}"
        print(f"| {widths} | {share:.3f} | {slower:.3f} | {share / slower:.2f} |")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command("step_speed.py", StepSpeedOptions, work, argv, about="A step here beside its peers'.")


if __name__ == "__main__":
    sys.exit(main())
