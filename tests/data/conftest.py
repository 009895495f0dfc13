"""A generated text, a SentencePiece model and a Hugging Face tokenizer trained on it, and a data set made of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.data.preprocess import Options, preprocess

NOUNS = ["cat", "dog", "house", "river", "stone", "one", "two", "東京"]
WORDS = [*NOUNS, "the", "a", "runs", "sleeps", "over", "under", "green", "naïve"]
VOCAB_SIZE = 320  # 256 bytes, control symbols and what the words give


def make_documents(count: int, seed: int) -> list[str]:
    """Paragraphs of one to four lines, without blank lines and without white space at their ends."""
    generator = random.Random(seed)
    line = lambda: " ".join(generator.choices(WORDS, k=generator.randint(3, 20))) + "."  # noqa: E731
    return ["\n".join(line() for _ in range(generator.randint(1, 4))) for _ in range(count)]


def mutated(content: bytes, random: random.Random) -> bytes:
    """`content` with a few bytes changed, cut out, put in, or its end cut off."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(changed))
        kind = random.choice(("set", "flip", "drop", "insert", "cut"))
        if kind == "insert":
            changed[at:at] = random.choice((b"\0", b"\xff\xff\xff\xff", b'"', b"\n", b"{", b"\\ud83d", b"[" * 3000))
        elif kind == "cut":
            del changed[at:]
        elif at < len(changed) and kind == "drop":
            del changed[at : at + random.randint(1, 8)]
        elif at < len(changed):
            changed[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF)) if kind == "set" else changed[at] ^ 1 << at % 8
    return bytes(changed)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """300 documents."""
    return make_documents(300, seed=0)


@pytest.fixture(scope="session")
def text_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents in one file, separated by blank lines."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sp_model(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model: unk 0, bos 1, eos 2, bytes for what it does not know."""
    return train_sentencepiece(text_file, tmp_path_factory.mktemp("tokenizer") / "tiny")


def train_sentencepiece(text_file: Path, prefix: Path, **options: object) -> Path:
    """Train a model of `VOCAB_SIZE` ids; returns its file."""
    import sentencepiece

    settings = {"vocab_size": VOCAB_SIZE, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(input=str(text_file), model_prefix=str(prefix), **settings)
    return Path(f"{prefix}.model")


@pytest.fixture(scope="session")
def hf_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as Hugging Face saves it: tokenizer.json and tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text_file)], trainer)
    folder = tmp_path_factory.mktemp("hf_tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make_data(tmp_path: Path, sp_model: Path) -> Callable[..., str]:
    """A function that makes a data set under a name, of a number of documents, and returns its prefix."""

    def make(name: str, count: int = 200, seed: int = 1, **options: object) -> str:
        source = tmp_path / f"{name}.txt"
        source.write_text("\n\n".join(make_documents(count, seed)), encoding="utf-8")
        settings = {"tokenizer_model": str(sp_model), "append_eod": True, "overwrite": True, **options}
        preprocess([str(source)], str(tmp_path / name), Options(**settings))  # type: ignore[arg-type]
        return str(tmp_path / name)

    return make
