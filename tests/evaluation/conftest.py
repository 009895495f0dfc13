"""A tokenizer, two tiny models of different width with it, and a text, all made here."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

WORDS = [
    "cat",
    "dog",
    "house",
    "river",
    "stone",
    "the",
    "a",
    "runs",
    "sleeps",
    "over",
    "under",
    "green",
    "naïve",
    "東京",
]
VOCAB_SIZE = 320


def sentences(count: int, seed: int) -> list[str]:
    """Lines of words, each a document."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 20))) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents with blank lines between."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(sentences(60, seed=0)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sp_model(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model trained on the text."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text_file),
        model_prefix=str(prefix),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # the usual one takes seconds to export
        minloglevel=2,
    )
    return Path(f"{prefix}.model")


@pytest.fixture(scope="session")
def model_folders(sp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models; the first has its tokenizer in Hugging Face's form, the second only the SentencePiece file."""
    pytest.importorskip("transformers")
    import shutil

    from megatron_prune.huggingface.tokenizer_export import export_tokenizer

    root = tmp_path_factory.mktemp("models")
    folders = []
    for name, hidden in (("large", 48), ("small", 32)):
        config = tiny_config(vocab_size=VOCAB_SIZE, hidden_size=hidden, num_hidden_layers=2, max_position_embeddings=64)
        folders.append(write_hf_folder(root / name, config, random_llama_weights(config, seed=hidden)))
    export_tokenizer(sp_model, folders[0], None)
    shutil.copyfile(sp_model, folders[1] / "tokenizer.model")
    return folders[0], folders[1]
