"""GGUF files as Hugging Face folders: the same weights, logits and ids as the model that the file was made of."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="needs the package gguf: install megatron-prune[gguf]")
pytest.importorskip("transformers")
import gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prune.commands import convert_from_hf
from megatron_prune.errors import UserError
from megatron_prune.huggingface import gguf_file
from megatron_prune.huggingface.config import read_shape
from megatron_prune.huggingface.gguf_file import convert
from megatron_prune.huggingface.gguf_import import GgufModel, write_folder
from megatron_prune.huggingface.gguf_tokenizer import SPLITS
from megatron_prune.huggingface.tokenizer_export import NASTY_TEXTS, export_tokenizer
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from tests.strange import is_read_or_refused

from .tokenizer_layouts import CHATML, byte_level

VOCAB = 620
TEXT = "The cat runs over the house, and in 1987 the dog sleeps under the green river's stone\n"
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 30)
    return file


def folder_with(folder: Path, text: Path, pre: str = "smollm", **overrides: Any) -> Path:
    """A tiny model with a byte-level tokenizer of llama.cpp's kind `pre`, or a SentencePiece one (`llama`)."""
    config = tiny_config(**({"vocab_size": VOCAB, "num_hidden_layers": 2} | overrides))
    write_hf_folder(folder, config, random_llama_weights(config))
    if pre == "llama":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
        return folder
    splits = {name: pattern for pattern, name in SPLITS.items()}
    tokenizer = byte_level(text, ["<|end|>", "<|im_start|>"], splits.get(pre))
    if pre == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>",
        "chat_template": CHATML,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) * 7).logits


@pytest.mark.parametrize(
    ("pre", "overrides"),
    [
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
        ("smollm", {"hidden_size": 33, "head_dim": 8, "rope_theta": 100000.0}),
        ("llama-bpe", {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "max_position_embeddings": 32768}),
        ("gpt-2", {"model_type": "qwen3", "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("qwen2", {"model_type": "qwen2", "num_key_value_heads": 2}),
    ],
)
def test_there_and_back_is_the_same_model_and_tokenizer(
    pre: str, overrides: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    overrides |= {"model_type": "mistral", "sliding_window": None} if overrides.get("hidden_size") == 33 else {}
    source = folder_with(tmp_path / "source", text, pre, **overrides)
    file = convert(source, tmp_path / "m.gguf", "f32").file
    arguments = ["--gguf", str(file), "--hf-model", str(tmp_path / "back")]
    assert convert_from_hf.main(arguments) == 0
    before, after = FolderWeights(source), FolderWeights(tmp_path / "back")
    assert set(before.stored) == set(after.stored)
    assert all(torch.equal(before(name), after(name)) for name in before.stored)
    assert torch.equal(logits(source), logits(tmp_path / "back"))
    mine, theirs = vars(read_shape(source)), vars(read_shape(tmp_path / "back"))
    assert mine | {"model_type": ""} == theirs | {"model_type": ""}
    ours, again = (AutoTokenizer.from_pretrained(str(folder)) for folder in (source, tmp_path / "back"))
    for sample in (*NASTY_TEXTS, TEXT, "x<|im_start|>y<|end|>"):
        if pre != "llama" or "<" not in sample:  # special pieces that are spelled: read in several ways
            expected = ours(sample, add_special_tokens=False)["input_ids"]
            assert again(sample, add_special_tokens=False)["input_ids"] == expected, sample
    assert (again.eos_token, again.pad_token) == (ours.eos_token, ours.pad_token)
    assert again.chat_template == ours.chat_template


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "nmt_nfkc_cf", "pad_id": 3, "bos_id": -1},
    ],
    ids=["default", "plain", "no_prefix", "lower"],
)
def test_a_unigram_model_comes_back_with_its_normalization(
    options: dict[str, Any], text: Path, tmp_path: Path, capsys: Any
) -> None:
    """The ids of the plain export, which is compared with SentencePiece's own elsewhere."""
    import sentencepiece

    source = folder_with(tmp_path / "source", text, "llama")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(source / "tokenizer"), vocab_size=60, model_type="unigram",
        hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    file = convert(source, tmp_path / "m.gguf", "f32").file
    assert convert_from_hf.main(["--gguf", str(file), "--hf-model", str(tmp_path / "back")]) == 0
    export_tokenizer(source / "tokenizer.model", tmp_path / "exported", None)
    ours, again = (AutoTokenizer.from_pretrained(str(tmp_path / name)) for name in ("exported", "back"))
    for sample in (*NASTY_TEXTS, TEXT, "  THE  Caf\u00e9 "):
        ids = again(sample, add_special_tokens=False)["input_ids"]
        assert ids == ours(sample, add_special_tokens=False)["input_ids"], sample
    assert again.special_tokens_map == ours.special_tokens_map
    assert (again.bos_token_id, again.pad_token_id) == ((None, 3) if options.get("pad_id") else (1, None))
    capsys.readouterr()
    ending = changed(file, tmp_path / "ending.gguf", tokenizer__ggml__add_eos_token=True)
    assert convert_from_hf.main(["--gguf", str(ending), "--hf-model", str(tmp_path / "ending")]) == 2
    assert "add_eos_token: texts that get an end by themselves" in capsys.readouterr().err


def test_named_templates_and_every_end_of_text_come_back(text: Path, tmp_path: Path) -> None:
    """Ends that the file names, and those that llama.cpp knows by their texts."""
    source = folder_with(tmp_path / "source", text)
    templates = [{"name": name, "template": f"{name}: {CHATML}"} for name in ("default", "tool_use")]
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": templates}))
    library = AutoTokenizer.from_pretrained(str(source))
    end = library.convert_tokens_to_ids("<|end|>")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 7]}))
    file = convert(source, tmp_path / "m.gguf", "f32").file
    assert convert_from_hf.main(["--gguf", str(file), "--hf-model", str(tmp_path / "back")]) == 0
    assert AutoTokenizer.from_pretrained(str(tmp_path / "back")).chat_template == library.chat_template
    ends = json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [end, 2, 7]  # 2: config.json's
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == end
    again = convert(tmp_path / "back", tmp_path / "again.gguf", "f32").file
    first, second = (
        {name: value for name, value in GgufModel(one).fields.items() if "chat" in name or name.endswith("_id")}
        for one in (file, again)
    )
    assert len(first) == 8 and second == first


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantized_weights_become_what_they_stand_for(
    kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gguf_file.DTYPES, kind, kind)
    monkeypatch.setitem(gguf_file._FILE_TYPES, kind, "MOSTLY_" + kind)
    source = folder_with(tmp_path / "source", text, hidden_size=32, intermediate_size=64)
    file = convert(source, tmp_path / "m.gguf", kind).file
    model = GgufModel(file)
    assert (model.quantization, model.stored_dtype) == (kind, torch.float16 if kind == "F16" else torch.bfloat16)
    write_folder(model, tmp_path / "exact", "float32")
    read, exact = FolderWeights(source), FolderWeights(tmp_path / "exact")
    qkind = gguf.GGMLQuantizationType[kind]
    for name in read.stored:
        values = read(name).numpy()
        if values.ndim == 1:
            expected = values
        elif "q_proj" in name or "k_proj" in name:  # quantized in another order of rows, each row by itself
            rows = [gguf.quants.quantize(row[None], qkind) for row in values]
            expected = np.concatenate([gguf.quants.dequantize(row, qkind) for row in rows])
        else:
            expected = gguf.quants.dequantize(gguf.quants.quantize(values, qkind), qkind)
        assert np.array_equal(exact(name).numpy(), expected), name
    assert write_folder(model, tmp_path / "plain") == model.stored_dtype
    assert FolderWeights(tmp_path / "plain").dtype == model.stored_dtype


def test_a_checkpoint_is_made_in_the_same_command(text: Path, tmp_path: Path, capsys: Any) -> None:
    file = convert(folder_with(tmp_path / "source", text), tmp_path / "m.gguf", "f32").file
    folder = ["--gguf", str(file), "--hf-model", str(tmp_path / "hf")]
    assert convert_from_hf.main([*folder, "--dry-run"]) == 0
    assert not (tmp_path / "hf").exists() and "a group of each kind" in capsys.readouterr().out
    assert convert_from_hf.main([*folder, "--dtype", "bfloat16"]) == 0
    assert "llama in bfloat16" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "m.gguf" in card and "F32" in card


def changed(file: Path, target: Path, **fields: Any) -> Path:
    """A GGUF file with other values of fields of the same type and length."""
    target.write_bytes(file.read_bytes())
    reader = gguf.GGUFReader(str(target), "r+")
    for name, value in fields.items():
        field = reader.fields[name.replace("__", ".")]
        field.parts[field.data[0]][:] = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else value
    reader.data.flush()
    return target


def test_anything_else_is_one_line(text: Path, tmp_path: Path, capsys: Any) -> None:
    source = folder_with(tmp_path / "source", text)
    good = convert(source, tmp_path / "m.gguf", "f32").file
    cut, empty, other = tmp_path / "cut.gguf", tmp_path / "empty.gguf", tmp_path / "other.gguf"
    cut.write_bytes(good.read_bytes()[:-5000])
    empty.write_bytes(b"")
    other.write_bytes(b"PK\x03\x04" + bytes(4000))
    garbled = tmp_path / "garbled.gguf"
    garbled.write_bytes(good.read_bytes().replace(b"llama", b"llam\xff", 1))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    cases = [
        (tmp_path / "no.gguf", [], "is no file"),
        (cut, [], "is cut off, damaged or no GGUF file"),
        (empty, [], "is cut off, damaged or no GGUF file"),
        (other, [], "is cut off, damaged or no GGUF file"),
        (garbled, [], "is cut off, damaged or no GGUF file"),
        (changed(good, tmp_path / "1.gguf", general__architecture="gemma"), [], "'gemma' is not read"),
        (changed(good, tmp_path / "2.gguf", llama__block_count=3), [], "lacks 'blk.2."),
        (changed(good, tmp_path / "3.gguf", llama__block_count=1), [], "holds, beside the model's tensors, 'blk.1."),
        (changed(good, tmp_path / "4.gguf", llama__feed_forward_length=40), [], "instead of [40, 32]"),
        (changed(good, tmp_path / "5.gguf", llama__attention__value_length=4), [], "is not a head's 8"),
        (changed(good, tmp_path / "6.gguf", tokenizer__ggml__pre="falcon"), [], "'falcon' is not read"),
        (changed(good, tmp_path / "7.gguf", tokenizer__ggml__model="bert"), [], "'bert' is not read"),
        (changed(good, tmp_path / "8.gguf", tokenizer__ggml__eos_token_id=99999), [], "none of the model's 620 ids"),
        (good, ["--dtype", "int8"], "--dtype int8: unknown"),
        (good, ["--dry-run", "--save", str(tmp_path / "x")], "leave out --save"),
    ]  # fmt: skip
    for file, more, words in cases:
        assert convert_from_hf.main(["--gguf", str(file), "--hf-model", str(tmp_path / "out"), *more]) == 2, words
        told = capsys.readouterr()
        assert words in told.err and told.err.count("\n") == 1 and told.out.count("\n") <= 1, told.err
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial")), words
    assert convert_from_hf.main(["--gguf", str(good), "--hf-model", str(taken)]) == 2
    assert convert_from_hf.main(["--hf-model", str(source)]) == 2
    assert "--save is missing" in capsys.readouterr().err


def test_a_number_that_is_not_understood_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(writer: Any, *rest: Any) -> None:
        metadata(writer, *rest)
        writer.add_uint32("llama.expert_count", 8)

    metadata = gguf_file._write_metadata
    monkeypatch.setattr(gguf_file, "_write_metadata", more)
    file = convert(folder_with(tmp_path / "source", text), tmp_path / "m.gguf", "f32").file
    with pytest.raises(UserError, match=r"llama\.expert_count: is not understood"):
        GgufModel(file)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    return convert(folder_with(folder / "source", text), folder / "m.gguf", "f32").file.read_bytes()


@pytest.mark.timeout(1200)
@settings(suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_a_mutated_head_is_read_or_refused_in_one_line(
    seed: int, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Counts of 2^56 among them, which are never reached."""
    random, content = Random(seed), bytearray(whole)
    head = whole.index(b"blk.0") + 2000
    for _ in range(random.randint(1, 3)):
        content[random.randrange(head)] = random.choice([0, 1, 9, 127, 255, random.randrange(256)])
    file = tmp_path_factory.getbasetemp() / "mutated.gguf"
    file.write_bytes(content)
    is_read_or_refused(lambda: GgufModel(file))
