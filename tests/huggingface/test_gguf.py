"""GGUF files, read back by the gguf package: the same numbers under llama.cpp's names, metadata, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="needs the package gguf: install megatron-prune[gguf]")
pytest.importorskip("transformers")
import gguf

from megatron_prune.commands import convert_to_gguf
from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import read_shape
from megatron_prune.huggingface.gguf_file import convert, interleave, rope_factors
from megatron_prune.huggingface.gguf_tokenizer import read_vocabulary
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

VOCAB = 300
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE with bytes, without normalization, of a few ids less than the models have."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("the cat runs over the house and the dog sleeps under the green river stone\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tiny"), vocab_size=290, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tiny.model"


def model(folder: Path, sp_model: Path, **overrides: Any) -> Path:
    config = tiny_config(**({"vocab_size": VOCAB, "num_hidden_layers": 2} | overrides))
    write_hf_folder(folder, config, random_llama_weights(config))
    (folder / "tokenizer.model").write_bytes(sp_model.read_bytes())
    return folder


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """(metadata, tensors in fp32, their types)."""
    reader = gguf.GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors, types = {}, {}
    for tensor in reader.tensors:
        shape = tuple(int(length) for length in reversed(tensor.shape))
        tensors[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy()
        types[tensor.name] = tensor.tensor_type.name
    return fields, tensors, types


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_every_weight_is_there_in_fp32(model_type: str, sp_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    extra: dict[str, Any] = {"sliding_window": None} if model_type == "mistral" else {}
    hidden = 32 if model_type == "olmo2" else 33
    folder = model(
        tmp_path / "m", sp_model, model_type=model_type, num_key_value_heads=2, hidden_size=hidden,
        intermediate_size=47, tie_word_embeddings=False, **extra,
    )  # fmt: skip
    done = convert(folder, tmp_path / "m.gguf", "f32")
    fields, tensors, types = read(done.file)
    source = load_file(folder / "model.safetensors")
    kind = {"llama": "llama", "mistral": "llama"}.get(model_type, model_type)
    assert fields["general.architecture"] == done.architecture == kind
    assert done.tensors == len(tensors) == len(source) and set(types.values()) == {"F32"}
    assert done.parameters == sum(tensor.numel() for tensor in source.values())
    expected = {
        "embedding_length": hidden, "feed_forward_length": 47, "block_count": 2, "context_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8,
        "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 10000.0,
    }  # fmt: skip
    assert {name: fields[f"{kind}.{name}"] for name in expected} == expected
    assert torch.equal(torch.from_numpy(tensors["output.weight"]), source["lm_head.weight"])
    assert torch.equal(
        torch.from_numpy(tensors["blk.1.ffn_down.weight"]), source["model.layers.1.mlp.down_proj.weight"]
    )
    for part, heads in (("q", 4), ("k", 2)):
        stored = torch.from_numpy(tensors[f"blk.1.attn_{part}.weight"]).unflatten(0, (heads, 8))
        theirs = source[f"model.layers.1.self_attn.{part}_proj.weight"].unflatten(0, (heads, 8))
        # llama.cpp turns channels 2i and 2i + 1 of a Llama together, Hugging Face i and i + 4.
        order = [0, 4, 1, 5, 2, 6, 3, 7] if kind == "llama" else list(range(8))
        assert torch.equal(stored, theirs[:, order])
    if model_type == "qwen2":
        assert np.array_equal(tensors["blk.0.attn_k.bias"], source["model.layers.0.self_attn.k_proj.bias"].numpy())
    if model_type in ("qwen3", "olmo2"):
        assert np.array_equal(
            tensors["blk.0.attn_q_norm.weight"], source["model.layers.0.self_attn.q_norm.weight"].numpy()
        )


@pytest.mark.parametrize("dtype, tolerance", [("f16", 2e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_types_of_matrices(dtype: str, tolerance: float, sp_model: Path, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", sp_model, hidden_size=32, intermediate_size=48)
    exact = read(convert(folder, tmp_path / "exact.gguf", "f32").file)[1]
    done = convert(folder, tmp_path / "m.gguf", dtype)
    _, tensors, types = read(done.file)
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == dtype.upper()
    assert types["output_norm.weight"] == "F32" and "output.weight" not in types  # tied
    rows_of_48 = tuple(f"blk.{layer}.ffn_down.weight" for layer in range(2))
    assert done.fallbacks == (rows_of_48 if dtype == "q8_0" else ())
    assert (done.matrices, done.rounding) == (1 + 2 * 7, "ffn.round_to=32" if dtype == "q8_0" else "")
    assert {types[name] for name in rows_of_48} == {"F16" if dtype == "q8_0" else dtype.upper()}
    for name, values in exact.items():
        assert np.abs(values - tensors[name]).max() <= tolerance * max(1.0, float(np.abs(values).max())), name


@pytest.mark.parametrize(
    ("widths", "quantized", "advice"),
    [
        ({"hidden_size": 32, "intermediate_size": 64}, "q8_0: 15 of 15 matrices", None),
        ({"hidden_size": 33, "intermediate_size": 64}, "q8_0: 4 of 15 matrices", "stem.round_to=32,"),
        ({"hidden_size": 33, "intermediate_size": 47}, "q8_0: 2 of 15 matrices", "ffn.round_to=32 stem.round_to=32,"),
        ({"hidden_size": 32, "intermediate_size": 64, "head_dim": 10}, "q8_0: 13 of 15 matrices", None),
    ],
)
def test_q8_0_says_how_much_it_took(
    widths: dict[str, int], quantized: str, advice: str | None, sp_model: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = model(tmp_path / "m", sp_model, **widths)
    arguments = ["--hf-model", str(folder), "--save", str(tmp_path / "m.gguf"), "--dtype", "q8_0"]
    assert convert_to_gguf.main(arguments) == 0
    out = capsys.readouterr().out
    assert quantized in out and ("--prune-groups" in out) == (advice is not None)
    if advice:
        assert f"prune with --prune-groups {advice} and all of them can be quantized" in out


def test_interleaving_is_undone_by_its_inverse() -> None:
    rows = torch.arange(24.0)[:, None].expand(24, 3)
    turned = interleave(rows, 3)
    assert turned[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(turned.unflatten(0, (3, 4, 2)).transpose(1, 2).flatten(0, 2), rows)


def test_rope_scaling(sp_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = model(tmp_path / "m", sp_model, rope_scaling=LLAMA3, head_dim=16)
    config = AutoConfig.from_pretrained(str(folder))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    factors = rope_factors(read_shape(folder))
    assert torch.allclose(plain / factors, scaled.double(), rtol=1e-6)
    assert factors[0] == 1 and factors[-1] == 8
    _, tensors, _ = read(convert(folder, tmp_path / "m.gguf").file)
    assert np.array_equal(tensors["rope_freqs.weight"], factors.numpy())
    linear = model(tmp_path / "linear", sp_model, rope_scaling={"rope_type": "linear", "factor": 4.0})
    fields, _, _ = read(convert(linear, tmp_path / "linear.gguf").file)
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_sentencepiece_tokenizer(sp_model: Path, tmp_path: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    folder = model(tmp_path / "m", sp_model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    fields, _, _ = read(convert(folder, tmp_path / "m.gguf").file)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:290] == [processor.id_to_piece(number) for number in range(290)]
    assert tokens[290:] == [f"[PAD{number}]" for number in range(290, VOCAB)]
    assert fields["tokenizer.ggml.scores"][:290] == pytest.approx([processor.get_score(i) for i in range(290)])
    types = fields["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[3], types[289], types[290]) == (2, 3, 6, 1, 5)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.add_space_prefix"] is True


def test_unigram_tokenizer(sp_model: Path, tmp_path: Path) -> None:
    """All of SentencePiece's normalization goes along; options that llama.cpp takes otherwise are refused by name."""
    import sentencepiece

    text, rules = sp_model.parent / "text.txt", tmp_path / "rules.tsv"
    rules.write_text("41\t61\n")  # A -> a

    def unigram(**options: Any) -> Path:
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / "unigram"), model_type="unigram",
            normalization_rule_tsv=str(rules), hard_vocab_limit=False, num_threads=1, minloglevel=2,
            **({"vocab_size": 60} | options),
        )  # fmt: skip
        return tmp_path / "unigram.model"

    folder = model(tmp_path / "m", unigram())
    fields, _, _ = read(convert(folder, tmp_path / "m.gguf").file)
    assert fields["tokenizer.ggml.model"] == "t5"
    assert fields["tokenizer.ggml.add_space_prefix"] and fields["tokenizer.ggml.remove_extra_whitespaces"]
    charsmap = bytes(fields["tokenizer.ggml.precompiled_charsmap"])
    assert charsmap.endswith(b"a\0") and charsmap in (folder / "tokenizer.model").read_bytes()
    refused: dict[str, dict[str, Any]] = {
        "byte_fallback": {"byte_fallback": True, "vocab_size": 300},
        "user-defined": {"user_defined_symbols": ["dog"]},
        "without a prefix": {"add_dummy_prefix": False},
        "as_suffix": {"treat_whitespace_as_suffix": True},
        "no end-of-sequence id": {"eos_id": -1},
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token_id"}))
    for words, options in refused.items():
        (folder / "tokenizer.model").write_bytes(unigram(**options).read_bytes())
        with pytest.raises(UserError, match=words):
            read_vocabulary(folder, VOCAB)


def test_byte_level_tokenizer(sp_model: Path, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = model(tmp_path / "m", sp_model, vocab_size=310)
    (folder / "tokenizer.model").unlink()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|a|>", "<|b|>"], initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat runs over the house"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|a|>", "eos_token": "<|b|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('_token_id"', '_unused"'))
    vocabulary = read_vocabulary(folder, 310)
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_bos) == ("gpt2", "smollm", False)
    assert {text: i for i, text in enumerate(vocabulary.tokens[: tokenizer.get_vocab_size()])} == tokenizer.get_vocab()
    assert vocabulary.merges and all(part.count(" ") == 1 for part in vocabulary.merges)
    assert vocabulary.types[0] == 3 and vocabulary.special == {"bos": 0, "eos": 1}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), level])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="pre_tokenizer"):
        read_vocabulary(folder, 310)


def test_what_does_not_map_is_refused(sp_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "m", sp_model)
    cluster = model(tmp_path / "cluster", sp_model)
    (cluster / "config.json").write_text(json.dumps({"model_type": "cluster_llama"}))
    bare = model(tmp_path / "bare", sp_model)
    (bare / "tokenizer.model").unlink()
    qwen = model(tmp_path / "qwen", sp_model, model_type="qwen2", rope_scaling=LLAMA3)
    large = model(tmp_path / "large", sp_model, vocab_size=280)
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    cases = [
        (cluster, "x.gguf", [], "--kv-policy expand"),
        (bare, "x.gguf", [], "a GGUF file needs a tokenizer"),
        (qwen, "x.gguf", [], "rope_scaling llama3 of a qwen2 model"),
        (large, "x.gguf", [], "its tokenizer has 290 ids, the model 280"),
        (folder, "taken.gguf", [], "is there already"),
        (folder, "x.gguf", ["--dtype", "q4"], "--dtype q4: unknown"),
        (tmp_path / "nowhere", "x.gguf", [], "does not exist"),
    ]
    for source, name, more, words in cases:
        assert convert_to_gguf.main(["--hf-model", str(source), "--save", str(tmp_path / name), *more]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and captured.out == "", captured.err
    assert not (tmp_path / "x.gguf").exists() and taken.read_text() == "mine"
    assert not list(tmp_path.glob(".*partial"))


def test_two_into_one_file_are_refused_in_one_line(sp_model: Path, tmp_path: Path) -> None:
    folder, target, told = model(tmp_path / "m", sp_model), tmp_path / "m.gguf", []

    def again(name: str) -> None:
        with pytest.raises(UserError, match=r"--save .*m.gguf: is being written by pid \d+"):
            convert(folder, target)
        told.append(name)

    convert(folder, target, on_tensor=again)
    assert told and sorted(file.name for file in tmp_path.iterdir()) == ["m", "m.gguf"]


@pytest.mark.parametrize(("dtype", "value"), [("f16", 1e5), ("bf16", 3.4e38), ("q8_0", 1e7)])
def test_values_beyond_a_types_range_leave_nothing(dtype: str, value: float, sp_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = model(tmp_path / "m", sp_model)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"--dtype ({dtype}|f16): blk\.1\.ffn_up\.weight holds values beyond"):
        convert(folder, tmp_path / "m.gguf", dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
