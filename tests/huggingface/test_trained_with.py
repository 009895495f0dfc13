"""A run's export: in its source's dtypes and no larger, with the tokenizer that made the training data and no other."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prune.data.indexed import read_metadata
from megatron_prune.data.tokenizer import build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.tokenizer_copy import copy_tokenizer
from megatron_prune.huggingface.tokenizer_export import export_tokenizer
from megatron_prune.huggingface.trained_with import check_tokenizer, tokenizer_facts
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.helpers.tiny_runs import VOCABULARY, TinyRun, prepare

from .test_convert_tools import tools


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Its source in bfloat16 with float32 norms; beside its tokenizer another one of the same size."""
    import sentencepiece

    run = prepare(tmp_path_factory.mktemp("tiny"))
    config = tiny_config(vocab_size=VOCABULARY, num_hidden_layers=2, num_key_value_heads=2)
    weights = {
        name: tensor + 1e-4 if name.endswith("norm.weight") else tensor.bfloat16()
        for name, tensor in random_llama_weights(config).items()
    }
    shutil.rmtree(run.source)
    write_hf_folder(run.source, config, weights)
    sentencepiece.SentencePieceTrainer.train(
        input=str(run.folder / "text_1.txt"),
        model_prefix=str(run.folder / "other"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        minloglevel=2,
    )
    return run


@pytest.fixture(scope="module")
def trained(tiny: TinyRun) -> Path:
    save = tiny.folder / "run"
    (fate,) = watch_ranks(victim, 1, main, tiny.arguments(save))
    assert fate.exit_code == 0, fate.output
    return save


def test_export_of_a_run_has_its_source_s_dtypes_and_its_data_s_tokenizer(
    tiny: TinyRun, trained: Path, tmp_path: Path
) -> None:
    load, right, wrong = ["--load", str(trained)], tiny.folder / "tokenizer.model", tiny.folder / "other.model"
    moved = shutil.copy(right, tmp_path / "moved.model")
    other = ["--tokenizer-model", str(wrong)]
    (status, told, err), refused, (allowed, _, warned), (same, _, _), (asked, wide, _) = tools(
        ("to", [*load, "--save", str(tmp_path / "out"), "--verify"]),
        ("to", [*load, "--save", str(tmp_path / "no"), *other]),
        ("to", [*load, "--save", str(tmp_path / "yes"), *other, "--allow-other-tokenizer"]),
        ("to", [*load, "--save", str(tmp_path / "moved"), "--tokenizer-model", str(moved)]),
        ("to", [*load, "--save", str(tmp_path / "wide"), "--dtype", "float32"]),
    )
    assert status == 0, told + err
    assert "the tokenizer gives the same ids" in told and "bit for bit" in told and "stored in bfloat16" in told
    source, exported = FolderWeights(tiny.source), FolderWeights(tmp_path / "out")
    for name, stored in exported.stored.items():
        assert stored.dtype == (torch.float32 if name.endswith("norm.weight") else torch.bfloat16), name
    assert exported.total_bytes < source.total_bytes
    assert asked == 0 and "stored in float32" in wide and FolderWeights(tmp_path / "wide").dtype == torch.float32
    assert refused[0] == 2 and refused[2].count("\n") == 1 and not (tmp_path / "no").exists()
    assert f"{wrong} " in refused[2] and str(right) in refused[2] and "--allow-other-tokenizer" in refused[2]
    assert allowed == same == 0, warned


def test_fingerprints_come_from_the_checkpoint_or_from_the_data(tiny: TinyRun, trained: Path) -> None:
    from megatron_prune.checkpoint.reader import CheckpointReader

    right = build_tokenizer(None, str(tiny.folder / "tokenizer.model"))
    wrong = build_tokenizer(None, str(tiny.folder / "other.model"))
    made = read_metadata(str(tiny.data()))
    meta = CheckpointReader(trained).meta
    assert {key: meta[key] for key in tokenizer_facts(right, [made])} == tokenizer_facts(right, [made, made, None])
    older = {key: value for key, value in meta.items() if key not in tokenizer_facts(right, [])}
    unknown = {"tokenizer_model": right.path, "tokenizer_type": right.kind, **tokenizer_facts(right, [None])}
    for known in (meta, older, unknown):
        check_tokenizer(right, known)
        with pytest.raises(UserError, match="is not the tokenizer that the training data was made with"):
            check_tokenizer(wrong, known)
    check_tokenizer(wrong, {})  # nothing is known
    gone = older | {"config": json.dumps({"data": {"data_path": str(tiny.folder / "gone")}})}
    check_tokenizer(wrong, gone)


def test_difference_that_training_was_told_of_is_told_again(tiny: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    used = build_tokenizer(None, str(tiny.folder / "other.model"))
    check_tokenizer(used, tokenizer_facts(used, [read_metadata(str(tiny.data()))]))
    assert "see that both give the same ids" in caplog.text


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_verify_finds_another_tokenizer_in_the_folder(
    kind: str, stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_prune.commands.convert_to_hf import verify_tokenizer
    from megatron_prune.data.tokenizer_files import find_tokenizer

    source, save = tmp_path / "source", tmp_path / "out"
    export_tokenizer(stories260k / "tokenizer.model", source, 512)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    if kind == "HuggingFaceTokenizer":
        path = source
        copy_tokenizer(find_tokenizer(source), save)
    else:
        path = stories260k / "tokenizer.model"
        export_tokenizer(path, save, 512)
    arguments: Any = argparse.Namespace(verify_text=None)
    done: Any = SimpleNamespace(folder=save)
    assert verify_tokenizer(arguments, done, str(path), kind)
    assert "gives the same ids on 100,000 characters" in capsys.readouterr().out
    damages = [("special_tokens_map.json", {"eos_token": "<s>"})]  # which wins over tokenizer_config.json
    if kind == "HuggingFaceTokenizer":
        damages.append(("tokenizer_config.json", {"chat_template": template.replace("<", "(")}))
    for name, damage in damages:
        before = (save / name).read_text()
        (save / name).write_text(json.dumps(json.loads(before) | damage))
        assert not verify_tokenizer(arguments, done, str(path), kind)
        assert "NOT the same" in capsys.readouterr().out
        (save / name).write_text(before)
    content = json.loads((save / "tokenizer.json").read_text())
    del content["model"]["merges"][20:]
    (save / "tokenizer.json").write_text(json.dumps(content))
    assert not verify_tokenizer(arguments, done, str(path), kind)
    assert "ids" in capsys.readouterr().out
