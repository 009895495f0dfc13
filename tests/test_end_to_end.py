"""The whole way of a real model, as a user goes it: import, prune while training, resume, export, generate.

Every step is the command that the README names (training in processes of its own, on 1 and on 2 ranks; the tools in the
test's); the input is the pretrained stories260K, so these tests are skipped where MEGATRON_PRUNE_DATA is unset. A run
that is wrong from the start needs no real input and is tried everywhere.
"""

import json
import sys

import pytest

from megatron_prune.commands import convert_from_hf, convert_to_hf, preprocess_data
from tests.commands import run, torchrun

TARGET = 130_000
GREETING = ", there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def stories(stories260k, tinystories, tmp_path_factory):
    """Tokenized stories and a checkpoint converted from the Hugging Face folder."""
    folder = tmp_path_factory.mktemp("stories")
    encode = ("--input", tinystories, "--output-prefix", folder / "stories", "--prepend-bos")
    model = ("--tokenizer-model", stories260k / "tokenizer.model")
    assert preprocess_data.main([str(word) for word in (*encode, *model)]) == 0
    assert convert_from_hf.main(["--hf-model", str(stories260k), "--save", str(folder / "source")]) == 0
    return folder


def flags(folder, save, *more):
    return (
        "--data-path", folder / "stories", "--data-cache-path", folder / "cache", "--split", "90,10,0",
        "--seq-length", 256, "--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 100,
        "--lr", "1e-3", "--lr-decay-style", "constant", "--prune-target-params", TARGET, "--prune-ratio", "8:1",
        "--continue-tokens", 20480, "--continue-lr-decay-style", "linear", "--eval-interval", 1000, "--eval-iters", 4,
        "--save", save, *more,
    )  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp", [1, 2])
def test_stories260k_is_pruned_to_half(stories, stories260k, tmp_path, run_tool, tp):
    layout = ("--tensor-model-parallel-size", tp) + (("--sequence-parallel", "--use-distributed-optimizer") * (tp > 1))
    source = ("--hf-model", stories260k) if tp == 1 else ("--load", stories / "source")
    torchrun(tp, *flags(stories, tmp_path / "run", *layout, *source))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    stages = summary["stages"]
    assert stages["source"]["parameters"] == 260_032
    assert stages["source"]["validation_loss"] == pytest.approx(1.85, abs=0.1)
    assert TARGET - 3 * 5 * 64 < stages["final"]["parameters"] <= TARGET, "nearer than the smallest group, a channel"
    assert stages["final"]["validation_loss"] < stages["pruned"]["validation_loss"]
    history = (tmp_path / "run" / "pruning_history.jsonl").read_text().splitlines()
    assert len(history) == summary["groups_removed"]
    assert json.loads(history[-1])["parameters"] == stages["final"]["parameters"]

    exported = tmp_path / "exported"
    assert "verify" in run_tool(convert_to_hf.main, "--load", tmp_path / "run", "--save", exported, "--verify")
    text = generate(exported, 40)
    assert text.startswith("Once upon a time") and len(text) > 60


def test_greedy_text_of_the_source(stories, tmp_path, run_tool):
    """Import and export without pruning: the same model, tokenizer included."""
    run_tool(convert_to_hf.main, "--load", stories / "source", "--save", tmp_path / "back", "--verify")
    assert generate(tmp_path / "back", 40).startswith("Once upon a time" + GREETING)


def generate(folder, new_tokens):
    """Greedy continuation of "Once upon a time" by stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("Once upon a time", add_special_tokens=False).input_ids
    ids = torch.tensor([[tokenizer.bos_token_id, *prompt]])
    out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


def test_a_mistake_is_one_line_on_one_rank(tmp_path):
    """Two ranks, a folder that is not there: one line, exit status 2 on both, nothing written."""
    arguments = ("--hf-model", tmp_path / "nowhere", "--data-path", tmp_path / "data", "--save", tmp_path / "run")
    output = torchrun(2, *arguments, "--tensor-model-parallel-size", 2, ok=False)
    assert output.count("error: ") == 1 and "nowhere" in output
    assert "exitcode  : 2" in output and not (tmp_path / "run").exists()


def test_an_unknown_key_names_the_nearest(tmp_path):
    (tmp_path / "run.yaml").write_text("training: {micro_batch_sise: 2}\n")
    output = run(
        sys.executable, "-m", "megatron_prune.pretrain", "--config", tmp_path / "run.yaml", ok=False
    )  # fmt: skip
    assert "micro_batch_size" in output and "Traceback" not in output
