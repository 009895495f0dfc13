"""Cluster attention from end to end, by the commands a user types: SmolLM-360M's head counts (15 query, 5 KV heads).

A source with random weights is pruned on two tensor-parallel ranks, which 15 heads do not divide by; the checkpoint is
exported in compact form; that export is pruned further on one rank and exported for stock classes. Each export is
compared with the training model by `--verify`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from megatron_prune.commands import convert_to_hf, inspect_checkpoint
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.model.kinds import HEAD
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from tests.commands import torchrun

CONFIG = tiny_config(
    hidden_size=60, num_hidden_layers=3, num_attention_heads=15, num_key_value_heads=5, head_dim=4, vocab_size=64
)


def prune(folder: Path, ranks: int, source: Path, target: int, save: Path) -> str:
    """Train and prune as a user would; the run's output."""
    return torchrun(
        ranks, "--hf-model", source,
        "--data-path", folder / "data", "--data-cache-path", folder / "cache", "--split", "1,0,0", "--seq-length", 32,
        "--tokenizer-model", folder / "tokenizer.model", "--micro-batch-size", 2, "--global-batch-size", 2,
        "--train-iters", 60, "--lr", "1e-3", "--lr-decay-style", "constant", "--prune-target-params", target,
        "--prune-gqa", "cluster", "--prune-types", "head", "--prune-groups", "head.cost=1", "--prune-finish", "first",
        "--prune-saliency-momentum", 0, "--eval-interval", 0, "--log-interval", 1,
        "--tensor-model-parallel-size", ranks, "--save", save,
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_15_heads_on_two_ranks_compact_export_and_on(tmp_path: Path, run_tool: Callable[..., str]) -> None:
    from megatron_prune.data.preprocess import Options, preprocess

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the quick brown fox number {i} jumps over {i * 7} lazy dogs" for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=64, minloglevel=2,
        normalization_rule_name="identity",
    )  # fmt: skip
    preprocess([str(text)], str(tmp_path / "data"), Options(tokenizer_model=str(tmp_path / "tokenizer.model")))
    source = write_hf_folder(tmp_path / "source", CONFIG, random_llama_weights(CONFIG))
    full = read_architecture(source)

    log = prune(tmp_path, 2, source, full.parameters - 9_000, tmp_path / "run")
    compact, compact2 = tmp_path / "compact", tmp_path / "compact2"
    told = run_tool(
        convert_to_hf.main, "--load", tmp_path / "run", "--save", compact, "--kv-policy", "cluster", "--verify"
    )
    pruned = read_architecture(compact)
    assert "KV heads: cluster" in told and "every weight is bit for bit as in the checkpoint" in told
    assert pruned.shape == full.shape and pruned.num_attention_heads < 15
    assert pruned.parameters <= full.parameters - 9_000
    assert f"kv cache/token: {pruned.kv_cache_channels}" in log
    removed = [json.loads(line) for line in (tmp_path / "run/pruning_history.jsonl").read_text().splitlines()]
    assert len(removed) == 15 - pruned.num_attention_heads and all(len(one["gone"]["head"]) == 3 for one in removed)

    # The export is a source like any other, and its heads keep their numbers.
    further = tmp_path / "further"
    prune(tmp_path, 1, compact, pruned.parameters - 4_000, further)
    told = run_tool(convert_to_hf.main, "--load", further, "--save", compact2, "--kv-policy", "cluster", "--verify")
    assert "every weight is bit for bit as in the checkpoint" in told
    last = read_architecture(compact2)
    assert last.shape == full.shape and last.parameters <= pruned.parameters - 4_000
    for layer in range(3):
        assert set(last.ids(HEAD, layer).tolist()) < set(pruned.ids(HEAD, layer).tolist())
    told = run_tool(convert_to_hf.main, "--load", further, "--save", tmp_path / "stock", "--verify")
    assert "every weight is bit for bit as in the checkpoint" in told
    inspected = run_tool(inspect_checkpoint.main, "--load", further, "--verify")
    assert f"KV cache     {last.kv_cache_channels} of {full.kv_cache_channels} elements per token" in inspected
