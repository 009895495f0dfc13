"""One-shot pruning beside Torch-Pruning: the same Llama to about the same size, by magnitude, in turn.

    pip install torch-pruning
    python examples/peers.py --hf-model SmolLM2-135M --data-path DATA --target 109M

Each turn is a process of its own with one thread. What is timed is the processor time from the loaded model to the
pruned one: Torch-Pruning's graph, importance and pruning; here scores, removals and the compaction. Data are named
since `prune-once` opens them; magnitude does not look at them.

FFN and residual channels only: with grouped queries Torch-Pruning 1.6.1 raises on heads. It cuts the same share of
either (`--share`), while here scores choose.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()


def measured(begun: float, before: int, after: int) -> dict[str, float]:
    """What a turn took, and what it removed."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.process_time() - begun, "removed": before - after, "after": after, "peak_mib": peak}


def torch_pruning(options: argparse.Namespace) -> dict[str, float]:
    """Torch-Pruning's own way with a Llama, its LM head and attention left alone."""
    import torch
    import torch_pruning
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.hf_model, dtype=torch.float32)
    model.config.use_cache = False

    def size() -> int:  # of matrices that were cut: a tied embedding comes apart from the LM head, which is not
        return sum(p.numel() for name, p in model.named_parameters() if name != "lm_head.weight")

    before, begun = size(), time.process_time()
    ignored = [model.lm_head]
    for layer in model.model.layers:
        ignored += [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    model(torch.zeros(1, 8, dtype=torch.long))
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=torch.zeros(1, 8, dtype=torch.long),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        output_transform=lambda output: output.logits,
        pruning_ratio=options.share,
        ignored_layers=ignored,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    hidden = model.model.layers[0].mlp.down_proj.out_features
    if model.model.embed_tokens.weight.shape[1] != hidden:
        before -= model.model.embed_tokens.weight.numel()  # it was left whole: neither side of the difference has it
        return measured(begun, before, size() - model.model.embed_tokens.weight.numel())
    return measured(begun, before, size())


def megatron_prune(options: argparse.Namespace) -> dict[str, float]:
    """`megatron-prune prune-once`, timed from its first scoring on."""
    from megatron_prune.commands import prune_once
    from megatron_prune.training.one_shot import OneShot

    found: dict[str, float] = {}
    rounds = OneShot.rounds

    def timed(self: OneShot, *more: object):  # type: ignore[no-untyped-def]
        before, begun = self.model.architecture.parameters, time.process_time()
        for removed in rounds(self, *more):  # type: ignore[arg-type]
            found.update(measured(begun, before, self.model.architecture.parameters))
            yield removed

    OneShot.rounds = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        words = "--split 1,0,0 --seq-length 32 --micro-batch-size 1 --global-batch-size 1 --batches 1 --device cpu "
        words += f"--prune-metric magnitude --prune-types ffn stem --prune-target-params {options.target}"
        places = ["--hf-model", options.hf_model, "--data-path", options.data_path, "--save", f"{folder}/pruned"]
        status = prune_once.main([*words.split(), *places])
    if status != 0:
        sys.exit(status)
    return found


WAYS = {"torch-pruning": torch_pruning, "megatron-prune": megatron_prune}


def main() -> None:
    """Take turns, then print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hf-model", required=True, help="Hugging Face folder of a Llama")
    parser.add_argument("--data-path", required=True, help="a data set made by preprocess with its tokenizer")
    parser.add_argument("--target", default="109M", help="parameters, of megatron-prune")
    parser.add_argument("--share", type=float, default=0.125, help="of each dimension, of Torch-Pruning")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print("\n" + json.dumps(WAYS[options.only](options)))
        return
    if importlib.util.find_spec("torch_pruning") is None:
        sys.exit("error: torch-pruning is not installed: pip install --no-deps torch-pruning")
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(options.turns):
        for name in WAYS:
            words = [sys.executable, "-W", "ignore", str(HERE), *sys.argv[1:], "--only", name]
            done = subprocess.run(
                words, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                sys.exit(f"error: {name} ended with status {done.returncode}")
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"torch-pruning {importlib.metadata.version('torch-pruning')}; medians of {options.turns} turns")
    print("| | processor s | parameters removed | microseconds per thousand of them | peak MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, found in turns.items():
        seconds, peak = (statistics.median(turn[key] for turn in found) for key in ("seconds", "peak_mib"))
        removed = int(found[0]["removed"])
        print(f"| {name} | {seconds:.2f} | {removed:,} | {seconds / removed * 1e9:.0f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
