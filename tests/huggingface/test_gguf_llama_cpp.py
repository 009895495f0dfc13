"""GGUF files in llama.cpp itself: the same token ids, logits and greedy text as transformers (make test-gguf)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.huggingface.export import export
from megatron_prune.huggingface.gguf_file import convert
from megatron_prune.huggingface.weights import FolderWeights, live_view
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.pruning.groups.layer import group_of
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

from .tokenizer_layouts import LAYOUTS

pytestmark = [pytest.mark.gguf, pytest.mark.timeout(300)]
PROMPT = "Once upon a time"


def llama(file: Path) -> Any:
    """The file in llama.cpp, its cache in fp32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-gguf")
    return llama_cpp.Llama(
        str(file), n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )


def skip_where_amx_is_compiled_in(dtype: str) -> None:
    """Quantized matrices take llama.cpp's AMX code then, which ends the process on some machines."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-gguf")
    if dtype == "q8_0" and b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
        pytest.skip("llama-cpp-python is built for this processor, AMX included: reinstall it as make test-gguf does")


def compare(folder: Path, file: Path, ids: list[int], new: int = 40) -> tuple[float, list[int], list[int]]:
    """(largest difference of logits over `ids`, greedy continuation by llama.cpp, by transformers)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder)).float().eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=-1)
    runner = llama(file)
    runner.eval(ids)
    difference = float(np.abs(np.array(runner.scores[: len(ids)]) - expected).max())
    ours = []
    for _ in range(new):
        ours.append(int(np.argmax(runner.scores[runner.n_tokens - 1])))
        runner.eval(ours[-1:])
    runner.close()
    return difference, ours, theirs[0, len(ids) :].tolist()


FAMILIES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama3_rope": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "head_dim": 16,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2},
    "smollm3": {"model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 0},
    "smollm3_that_rotates": {
        "model_type": "smollm3", "no_rope_layers": [1] * 4, "attention_bias": True, "pad_token_id": 0,
    },
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2, "tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_each_family(family: str, stories260k: Path, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=512, **FAMILIES[family])
    folder = write_hf_folder(tmp_path / "m", config, random_llama_weights(config))
    (folder / "tokenizer.model").write_bytes((stories260k / "tokenizer.model").read_bytes())
    ids = torch.randint(3, 512, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    difference, ours, theirs = compare(folder, convert(folder, tmp_path / "m.gguf", "f32").file, ids)
    assert difference < 1e-4 and ours == theirs


def test_expanded_heads_of_a_pruned_model(stories260k: Path, tmp_path: Path) -> None:
    """Heads removed one by one leave clusters of different sizes; hidden is no multiple of heads either."""
    groups = (
        Group.of(HEAD, ((1,), (2,), (0,), (7,), (3,))),
        Group.of(FFN, ((3,),) * 5),
        Group.of(STEM, ((5,),)),
        Group.of(STEM, ((9,),)),
    )
    source = FolderWeights(stories260k)
    from megatron_prune.huggingface.config import read_shape

    architecture = Architecture.full(read_shape(stories260k))
    for group in groups:
        architecture = architecture.without(group)
    done = export(
        live_view(source, architecture), architecture, tmp_path / "m",
        tokenizer_model=str(stories260k / "tokenizer.model"),
    )  # fmt: skip
    assert done.plan.policy == "expand" and done.class_name == "MistralForCausalLM"
    file = convert(tmp_path / "m", tmp_path / "m.gguf", "f32").file
    runner = llama(file)
    ids = runner.tokenize(PROMPT.encode(), add_bos=False, special=False)
    runner.close()
    assert ids == [403, 407, 261, 378]
    difference, ours, theirs = compare(tmp_path / "m", file, [1, *ids])
    assert difference < 1e-4 and ours == theirs


def test_a_pruned_model_with_fewer_layers(stories260k: Path, tmp_path: Path) -> None:
    """Layers 1 and 3 of five have left, and an FFN channel of the others: numbered anew, a plain Llama."""
    source = FolderWeights(stories260k)
    from megatron_prune.huggingface.config import read_shape

    architecture = Architecture.full(read_shape(stories260k))
    for layer in (3, 1):
        architecture = architecture.without(group_of(architecture, layer))
    architecture = architecture.without(Group.of(FFN, ((3,), (), (5,), (), (7,))))
    done = export(
        live_view(source, architecture), architecture, tmp_path / "m",
        tokenizer_model=str(stories260k / "tokenizer.model"),
    )  # fmt: skip
    assert done.class_name == "LlamaForCausalLM"
    file = convert(tmp_path / "m", tmp_path / "m.gguf", "f32").file
    runner = llama(file)
    assert runner.metadata["llama.block_count"] == "3"
    runner.close()
    difference, ours, theirs = compare(tmp_path / "m", file, [1, 403, 407, 261, 378])
    assert difference < 1e-4 and ours == theirs


@pytest.mark.parametrize("dtype, tolerance, same", [("f16", 0.05, 40), ("bf16", 0.5, 20), ("q8_0", 0.5, 20)])
def test_smaller_types_stay_near(dtype: str, tolerance: float, same: int, stories260k: Path, tmp_path: Path) -> None:
    skip_where_amx_is_compiled_in(dtype)
    file = convert(stories260k, tmp_path / "m.gguf", dtype).file
    difference, ours, theirs = compare(stories260k, file, [1, 403, 407, 261, 378])
    assert 0 < difference < tolerance and ours[:same] == theirs[:same]


def test_q8_0_is_what_llama_cpp_quantizes_to(stories260k: Path, tmp_path: Path) -> None:
    """Byte for byte, where rows are multiples of 32; the others it would store in another type."""
    import ctypes

    import gguf

    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-gguf")
    plain = convert(stories260k, tmp_path / "plain.gguf", "f32").file
    ours = convert(stories260k, tmp_path / "ours.gguf", "q8_0")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = 7, 1
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(theirs).encode(), ctypes.byref(settings)) == 0
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(str(theirs)).tensors}
    compared = 0
    for tensor in gguf.GGUFReader(str(ours.file)).tensors:
        if tensor.tensor_type.name == "Q8_0":
            assert tensor.tensor_type == expected[tensor.name].tensor_type, tensor.name
            assert np.array_equal(tensor.data, expected[tensor.name].data), tensor.name
            compared += 1
    assert compared == 1 + 5 * 6 and len(ours.fallbacks) == 5


K_QUANTS = {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}


@pytest.mark.parametrize("hidden, ffn, block", [(256, 512, True), (272, 520, False)])
@pytest.mark.parametrize("kind", K_QUANTS)
def test_llama_cpp_s_own_quantizer_takes_our_files(
    kind: str, hidden: int, ffn: int, block: bool, stories260k: Path, tmp_path: Path
) -> None:
    """The K types quantize rows of 256; others llama.cpp stores in another type, and the file runs all the same."""
    import ctypes

    import gguf

    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-gguf")
    skip_where_amx_is_compiled_in("q8_0")
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "head_dim": 64, "num_key_value_heads": 2}
    config = tiny_config(vocab_size=512, num_hidden_layers=2, **sizes)
    folder = write_hf_folder(tmp_path / "m", config, random_llama_weights(config))
    (folder / "tokenizer.model").write_bytes((stories260k / "tokenizer.model").read_bytes())
    plain, small = convert(folder, tmp_path / "m.gguf", "f32").file, tmp_path / "small.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = K_QUANTS[kind], 1
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(small).encode(), ctypes.byref(settings)) == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(small)).tensors}
    assert types["blk.0.attn_output.weight"].endswith("_K"), "rows of 256 in either model"
    assert types["blk.0.ffn_up.weight"].endswith("_K") == block
    ids = torch.randint(3, 512, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    scores = []
    for file in (plain, small):
        runner = llama(file)
        runner.eval(ids)
        scores.append(np.array(runner.scores[: len(ids)]))
        runner.close()
    correlation = np.corrcoef(scores[0].ravel(), scores[1].ravel())[0, 1]
    assert correlation > 0.9


UNIGRAMS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no_prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
}


@pytest.mark.parametrize("options", UNIGRAMS)
def test_unigram_ids_on_real_text(options: str, real_data: Path, tmp_path: Path) -> None:
    """On text of several kinds: the ids of the exported folder, and but for rounding of the tokenizer trained with."""
    import sentencepiece
    from transformers import AutoTokenizer

    from megatron_prune.huggingface.tokenizer_export import export_tokenizer

    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-gguf")
    files = sorted((real_data / "text").glob("*.txt"))
    sentencepiece.SentencePieceTrainer.train(
        input=[str(file) for file in files], input_sentence_size=5000, model_prefix=str(tmp_path / "unigram"),
        vocab_size=1000, model_type="unigram", num_threads=1, minloglevel=2, **UNIGRAMS[options],
    )  # fmt: skip
    config = tiny_config(vocab_size=1024, num_hidden_layers=1)
    folder = write_hf_folder(tmp_path / "m", config, random_llama_weights(config))
    export_tokenizer(tmp_path / "unigram.model", folder, None)
    file = convert(folder, tmp_path / "m.gguf", "f32").file
    runner = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    trained_with = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "unigram.model"))
    exported = AutoTokenizer.from_pretrained(str(folder))
    texts = [
        "  a  b\tc \n",
        "na\u00efve \ufb01ne \u2460 \u6771\u4eac\u3000\U0001f600\U0001f600",
        "e\u0301 \uac00 <s> \u200b",
    ]
    for source in files:
        text = source.read_text(encoding="utf-8")
        texts += [text[start : start + 3000] for start in range(0, len(text), 3000)]
    assert len(texts) > 1000
    rounded = 0
    for text in texts:
        ids = runner.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == exported(text, add_special_tokens=False)["input_ids"], ascii(text[:80])
        expected = trained_with.encode(text)
        if ids != expected:  # SentencePiece adds scores in 32 bits: another segmentation of the same score
            rounded += 1
            assert sum(map(trained_with.get_score, ids)) == pytest.approx(
                sum(map(trained_with.get_score, expected)), abs=0.01
            )
        if trained_with.unk_id() not in ids:
            assert runner.detokenize(ids).decode().lstrip(" ") == trained_with.decode(ids).lstrip(" ")
    assert rounded < len(texts) / 10


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_of_every_layout_on_real_text(name: str, stories260k: Path, real_data: Path, tmp_path: Path) -> None:
    """Byte-level and our own exports exactly; SentencePiece ones but for spaces after special tokens, as warned of."""
    from transformers import AutoTokenizer

    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-gguf")
    config = tiny_config(vocab_size=520, num_hidden_layers=1, model_type="qwen2" if name == "qwen" else "llama")
    folder = write_hf_folder(tmp_path / "m", config, random_llama_weights(config))
    LAYOUTS[name](folder, stories260k / "tokenizer.model", real_data / "text" / "tinyshakespeare.txt")
    library = AutoTokenizer.from_pretrained(str(folder))
    runner = llama_cpp.Llama(str(convert(folder, tmp_path / "m.gguf", "f32").file), vocab_only=True, verbose=False)
    added = [token.content for token in library.added_tokens_decoder.values()]
    texts = [f"time{token}was {token} x" for token in added]
    for source in sorted((real_data / "text").glob("*.txt")):
        text = source.read_text(encoding="utf-8")
        texts += [text[start : start + 1500] for start in range(0, 90_000, 1500)]
    exact = name in ("llama3", "stale", "qwen", "resaved")
    compared = 0
    for text in texts:
        if exact or not (text.startswith(" ") or any(token in text for token in added)):
            ids = runner.tokenize(text.encode(), add_bos=False, special=True)
            assert ids == library(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
            compared += 1
    assert compared > 100
    assert runner.token_eos() == library.eos_token_id
    assert runner.tokenize(b"a", add_bos=True, special=True) == library("a")["input_ids"]


@pytest.mark.timeout(600)
def test_whole_way_of_a_real_model(stories260k: Path, tinystories: Path, tmp_path: Path) -> None:
    """Import, prune while training, export, GGUF, llama.cpp: the same greedy text as transformers."""
    root = Path(__file__).resolve().parents[2]

    def run(*command: object) -> str:
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    data, saved, hf = tmp_path / "data", tmp_path / "run", tmp_path / "hf"
    tokenizer = stories260k / "tokenizer.model"
    run("tools/preprocess_data.py", "--input", tinystories, "--output-prefix", data, "--tokenizer-model", tokenizer,
        "--prepend-bos")  # fmt: skip
    run("tools/convert_from_hf.py", "--hf-model", stories260k, "--save", tmp_path / "source")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "-m", "megatron_prune.pretrain")
    run(*launcher, "--load", tmp_path / "source", "--data-path", data, "--seq-length", 128, "--global-batch-size", 4,
        "--micro-batch-size", 4, "--train-iters", 60, "--lr", "1e-3", "--prune-target-params", 180_000,
        "--prune-ratio", "8:1", "--continue-tokens", 5120, "--save", saved)  # fmt: skip
    run("tools/convert_to_hf.py", "--load", saved, "--save", hf, "--verify")
    file = tmp_path / "m.gguf"
    run("tools/convert_to_gguf.py", "--hf-model", hf, "--save", file, "--dtype", "f32")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(str(hf))(PROMPT)["input_ids"]
    runner = llama(file)
    assert runner.tokenize(PROMPT.encode(), add_bos=False, special=False) == ids
    runner.close()
    difference, ours, theirs = compare(hf, file, [1, *ids], new=60)
    assert difference < 1e-4 and ours == theirs
