"""tools/convert_from_hf.py and tools/convert_to_hf.py: there and back, from a sharded run in mid-pruning, mistakes."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.huggingface.config import read_shape
from megatron_prune.huggingface.weights import FolderWeights, live_view
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

REPOSITORY = Path(__file__).resolve().parents[2]
GROUPS = (
    Group.of(HEAD, ((1,), (2,), (0,), (7,))),
    Group.of(FFN, ((3,), (40,), (0,), (1,))),
    Group.of(STEM, ((5,),)),
    Group.of(HEAD, ((0,), (4,), (1,), (6,))),
    Group.of(STEM, ((30,),)),
    Group.of(STEM, ((31,),)),
)


def run_tools(_rank: int, _size: int, calls: list[tuple[str, list[str]]]) -> list[tuple[int, str, str]]:
    """Each call's exit status, stdout and stderr, in a process of their own: the tools set up a runtime."""
    import torch.distributed as dist

    from megatron_prune.commands import convert_from_hf, convert_to_hf

    dist.destroy_process_group()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # the tools run alone
        del os.environ[variable]
    mains = {"from": convert_from_hf.main, "to": convert_to_hf.main}
    results = []
    for tool, arguments in calls:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = mains[tool](arguments)
        results.append((status, out.getvalue(), err.getvalue()))
    return results


def tools(*calls: tuple[str, list[str]]) -> list[tuple[int, str, str]]:
    (results,) = run_ranks(run_tools, 1, list(calls), timeout=110)
    return results


def source(folder: Path, **overrides: Any) -> Path:
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4, **overrides)
    return write_hf_folder(folder, config, random_llama_weights(config))


def save_pruned_run(rank: int, _size: int, folder: str, save: str) -> None:
    """A run on two tensor-parallel ranks that has removed groups and not compacted yet."""
    from megatron.core import tensor_parallel

    from megatron_prune.checkpoint.save import save_checkpoint
    from megatron_prune.model.layout import ShardLayout
    from megatron_prune.model.llama import ModelOptions
    from megatron_prune.optimizer.wrapped import OptimizerOptions
    from megatron_prune.resharding.live import LiveModel
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import close_mesh, init_mesh

    shape = read_shape(folder)
    mesh = init_mesh(choose_device("cpu"), 2, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    layout = ShardLayout.pack(Architecture.full(shape), 2, {})
    model = LiveModel.build(layout, mesh, ModelOptions(16), OptimizerOptions(lr=1e-3), FolderWeights(folder))
    for group in GROUPS:
        model.retire(group)
    assert model.layout.is_due, "the test wants empty slots in the checkpoint"
    save_checkpoint(model, save, 7, {"consumed_tokens": 999, "history": []})
    close_mesh()


def test_there_and_back_is_bit_identical_and_verified(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", model_type="qwen3", tie_word_embeddings=False)
    export = ["--load", str(tmp_path / "run"), "--save", str(tmp_path / "out"), "--verify"]
    (first, out, _), (second, told, _), (third, doubted, _) = tools(
        ("from", ["--hf-model", str(folder), "--save", str(tmp_path / "run")]),
        ("to", export),
        ("to", [*export, "--overwrite", "--verify-tolerance", "-1"]),
    )
    assert first == second == 0
    assert third == 1 and "NOT WITHIN -1" in doubted
    assert f"{Architecture.full(read_shape(folder)).parameters:,} parameters" in out
    assert "tensor parallel 8" in out and "a group of each kind" in out and "tokenizer: none recorded" in out
    assert "within 8 times" in told and "gives the same" in told and "KV heads: native" in told and "random ids" in told
    before, after = FolderWeights(folder), FolderWeights(tmp_path / "out")
    assert set(before.stored) == set(after.stored)
    assert all(torch.equal(before(name), after(name)) for name in before.stored)
    assert read_shape(tmp_path / "out") == read_shape(folder)


def test_sharded_run_in_mid_pruning_is_exported_without_its_empty_slots(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    run_ranks(save_pruned_run, 2, str(folder), str(tmp_path / "run"))
    save = tmp_path / "out"
    ((status, out, err),) = tools(("to", ["--load", str(tmp_path / "run"), "--save", str(save), "--verify"]))
    assert status == 0, err
    architecture = Architecture.full(read_shape(folder))
    for group in GROUPS:
        architecture = architecture.without(group)
    assert "iteration 7" in out and f"{architecture.parameters:,} parameters ({architecture.described()})" in out
    assert "KV heads: expand" in out and "MistralForCausalLM" in out and "within 8 times" in out
    expected, read = live_view(FolderWeights(folder), architecture), FolderWeights(save)
    for name in read.stored:
        tensor = expected(name)
        if "k_proj" in name or "v_proj" in name:
            layer = int(name.split(".")[2])
            position = np.searchsorted(architecture.ids(KV_HEAD, layer), architecture.ids(HEAD, layer) // 2)
            tensor = tensor.unflatten(0, (-1, 8))[torch.from_numpy(position)].flatten(0, 1)
        assert torch.equal(read(name), tensor), name


def test_real_model_goes_through_both_tools(stories260k: Path, tinystories: Path, tmp_path: Path) -> None:
    run, save = str(tmp_path / "run"), tmp_path / "out"
    text = ["--verify", "--verify-text", str(tinystories)]
    (first, out, _), (second, told, err), (third, _, refused) = tools(
        ("from", ["--hf-model", str(stories260k), "--save", run]),
        ("to", ["--load", run, "--save", str(save), "--dtype", "bfloat16", "--max-shard-size", "300KB", *text]),
        ("to", ["--load", run, "--save", str(save)]),
    )
    assert (first, second, third) == (0, 0, 2), err
    assert "260,032 parameters" in out and "SentencePieceTokenizer with 512 ids, recorded" in out
    assert "1,024 tokens of text" in told and "bfloat16 in 2 files" in told
    assert refused.startswith("error: --save") and refused.count("\n") == 1
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= {f.name for f in save.iterdir()}


def test_a_token_without_a_row_gets_one_when_asked_for(stories260k: Path, tinystories: Path, tmp_path: Path) -> None:
    """Vicuna's way: the tokenizer's folder adds <pad>, the model has no row for it."""
    import shutil

    from transformers import AutoTokenizer

    from .tokenizer_layouts import vicuna

    folder = Path(shutil.copytree(stories260k, tmp_path / "vicuna"))
    vicuna(folder, stories260k / "tokenizer.model", tinystories)
    run, save = str(tmp_path / "run"), tmp_path / "out"
    (short, told, _), (status, out, err), (exported, verified, why) = tools(
        ("from", ["--hf-model", str(folder), "--save", str(tmp_path / "short")]),
        ("from", ["--hf-model", str(folder), "--save", run, "--resize-vocab"]),
        ("to", ["--load", run, "--save", str(save), "--verify", "--verify-text", str(tinystories)]),
    )
    assert short == 0 and "no row for id 512 ('<pad>')" in told and "--resize-vocab" in told
    assert status == 0, err
    assert "rows: 1 added for '<pad>'; 513 now" in out and "HuggingFaceTokenizer with 513 ids, recorded" in out
    assert exported == 0 and "tokens of text" in verified, verified + why
    assert read_shape(save).vocab_size == 513
    before, after = FolderWeights(stories260k), FolderWeights(save)
    assert torch.equal(after("model.embed_tokens.weight")[:512], before("model.embed_tokens.weight"))
    library = AutoTokenizer.from_pretrained(str(save))
    assert (library.pad_token_id, library.padding_side, len(library)) == (512, "left", 513)
    assert library.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<s>USER: x"


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    broken = source(tmp_path / "broken")
    (broken / "config.json").write_text((broken / "config.json").read_text().replace('"silu"', '"gelu"'))
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    new = str(tmp_path / "new")
    calls = [
        (("from", ["--hf-model", str(tmp_path / "nowhere"), "--save", new]), "config.json: does not exist"),
        (("from", ["--hf-model", str(broken), "--save", new]), "hidden_act: 'gelu'"),
        (("from", ["--hf-model", str(folder), "--save", str(full)]), "is there already"),
        (("from", ["--hf-model", str(folder), "--save", new, "--dtype", "int4"]), "--dtype int4: unknown"),
        (("to", ["--load", str(tmp_path / "nowhere"), "--save", new]), "no such folder"),
        (("to", ["--load", str(full), "--save", new]), "no complete checkpoint"),
    ]
    for (status, out, err), (call, words) in zip(tools(*(call for call, _ in calls)), calls):
        assert status == 2 and out == "" and err.count("\n") == 1 and words in err, (call, err)
    assert not Path(new).exists() and [file.name for file in full.iterdir()] == ["notes.txt"]


def test_tool_is_a_program_with_an_exit_status(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools/convert_from_hf.py"), "--hf-model", str(tmp_path)]
    done = subprocess.run([*command, "--save", str(tmp_path / "run")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/config.json: does not exist; name the folder of a Hugging Face model\n"


@pytest.mark.parametrize("flag", ["--tokenizer-model", None])
def test_recorded_tokenizer_that_is_gone_is_named(flag: str | None, stories260k: Path, tmp_path: Path) -> None:
    import shutil

    moved = shutil.copytree(stories260k, tmp_path / "moved")
    run, save = str(tmp_path / "run"), str(tmp_path / "out")
    ((status, _, _),) = tools(("from", ["--hf-model", str(moved), "--save", run]))
    assert status == 0
    shutil.rmtree(moved)
    extra = [flag, str(stories260k)] if flag else []
    (named, without) = tools(
        ("to", ["--load", run, "--save", save, *extra]),
        ("to", ["--load", run, "--save", save + "2", "--no-tokenizer"]),
    )
    assert (named[0], without[0]) == (0 if flag else 2, 0)
    assert flag or "--tokenizer-model" in named[2]
