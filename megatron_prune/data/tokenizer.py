"""Tokenizers: text <-> token ids, with the few facts that megatron-core's data sets ask of a tokenizer.

    build_tokenizer        a file or folder -> `Tokenizer`; the kind is seen from the path unless it is given
    Tokenizer              the interface
    SentencePieceTokenizer a `tokenizer.model`, read by sentencepiece itself
    HuggingFaceTokenizer   a `tokenizer.json` (or a folder that transformers can load), read by tokenizers

Text is turned into ids without any begin- or end-of-document token; preprocessing adds these where it is asked to.
A bare SentencePiece file is never read through transformers, whose own conversion of one may give other ids.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"
TOKENIZER_TYPES = (SENTENCEPIECE, HUGGING_FACE)


class Tokenizer(ABC):
    """Text <-> token ids.

    Attributes:
        path: the file or folder the tokenizer was built from, as the user gave it.
        vocab_size: number of ids; the largest id is vocab_size - 1.
        bos: id that begins a document, None where the tokenizer has none.
        eod: id that ends a document (the tokenizer's end-of-sequence id).
        fingerprint: hexadecimal SHA-256 of the tokenizer's own file, for telling two tokenizers apart.
        unique_identifiers: what megatron-core's data sets put into the key of their index caches.
    """

    kind: str
    path: str
    vocab_size: int
    bos: int | None
    eod: int
    fingerprint: str

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, without begin- or end-of-document ids."""

    @abstractmethod
    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""

    @property
    def pad(self) -> int:
        """-1: data sets take out of the loss whatever equals `pad`, and packed documents hold no padding."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """Kind, content and size; not the path, so that a moved tokenizer finds its caches again."""
        return OrderedDict(kind=self.kind, fingerprint=self.fingerprint, vocab_size=self.vocab_size)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file.

    Raises:
        UserError: the file is no SentencePiece model, or the model has no end-of-sequence id.
    """

    kind = SENTENCEPIECE

    def __init__(self, path: str, model_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        content = _read(model_file)
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model_file}: is no SentencePiece model") from error
        self.path = path
        self.vocab_size = self._model.vocab_size()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        if self._model.eos_id() < 0:
            raise UserError(
                f"{model_file}: the model has no end-of-sequence id, which ends documents; train it with one (eos_id)"
            )
        self.eod = self._model.eos_id()
        self.bos = self._model.bos_id() if self._model.bos_id() >= 0 else None

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, exactly those of `sentencepiece`'s encode."""
        return self._model.encode(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids give nothing."""
        return self._model.decode([int(token) for token in ids])


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or a folder from which transformers can make one (vocab.json and merges.txt).

    Special tokens are looked up beside it: `tokenizer_config.json`, `special_tokens_map.json`, then the ids in
    `generation_config.json` and `config.json`. Special tokens spelled out in a text become their ids, as everywhere in
    Hugging Face's world.

    Raises:
        UserError: tokenizers (or transformers) is not installed, the file cannot be read, or no end-of-sequence
            token is named.
    """

    kind = HUGGING_FACE

    def __init__(self, path: str, folder: Path, tokenizer_json: Path | None) -> None:
        self._model = _load_hugging_face(folder, tokenizer_json)
        self._model.no_truncation()
        self._model.no_padding()
        content = _read(tokenizer_json) if tokenizer_json else self._model.to_str().encode()
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.path = path
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.bos = _special_id(folder, "bos", vocabulary)
        eos = _special_id(folder, "eos", vocabulary)
        if eos is None:
            raise UserError(
                f"{folder}: no end-of-sequence token, which ends documents; name eos_token in tokenizer_config.json"
            )
        self.eod = eos

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, as `add_special_tokens=False` gives them."""
        return self._model.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return self._model.decode([int(token) for token in ids], skip_special_tokens=False)


def build_tokenizer(tokenizer_type: str | None, tokenizer_model: str) -> Tokenizer:
    """Build the tokenizer that lies at a path.

    Args:
        tokenizer_type: `SentencePieceTokenizer` or `HuggingFaceTokenizer`; None reads it from the path: a folder with
            `tokenizer.json` is Hugging Face's, one with only `tokenizer.model` SentencePiece's; a file `*.json` is
            Hugging Face's, any other file SentencePiece's.
        tokenizer_model: a file or a folder.

    Raises:
        UserError: the path or the type is wrong, or what lies there cannot be read.
    """
    if tokenizer_type not in (None, *TOKENIZER_TYPES):
        raise UserError(
            f'data.tokenizer_type (--tokenizer-type): "{tokenizer_type}" is unknown; use {" or ".join(TOKENIZER_TYPES)}'
        )
    path = Path(tokenizer_model)
    if not path.exists():
        raise UserError(f"data.tokenizer_model (--tokenizer-model): {tokenizer_model} does not exist")
    if (tokenizer_type or _kind_of(path)) == SENTENCEPIECE:
        model_file = path / "tokenizer.model" if path.is_dir() else path
        if not model_file.is_file():
            raise UserError(f"data.tokenizer_model (--tokenizer-model): {model_file} does not exist")
        return SentencePieceTokenizer(tokenizer_model, model_file)
    if path.is_file():
        return HuggingFaceTokenizer(tokenizer_model, path.parent, path)
    tokenizer_json = path / "tokenizer.json"
    if not tokenizer_json.is_file() and not (path / "vocab.json").is_file():
        raise UserError(
            f"data.tokenizer_model (--tokenizer-model): {tokenizer_model} holds no tokenizer.json; a bare "
            f"tokenizer.model is read with --tokenizer-type {SENTENCEPIECE}"
        )
    return HuggingFaceTokenizer(tokenizer_model, path, tokenizer_json if tokenizer_json.is_file() else None)


def _kind_of(path: Path) -> str:
    """Which kind of tokenizer an existing path holds; SentencePiece's where nothing speaks against it."""
    if path.is_file():
        return HUGGING_FACE if path.suffix == ".json" else SENTENCEPIECE
    if (path / "tokenizer.json").is_file():
        return HUGGING_FACE
    if (path / "tokenizer.model").is_file():
        return SENTENCEPIECE
    if (path / "vocab.json").is_file():
        return HUGGING_FACE
    raise UserError(
        f"data.tokenizer_model (--tokenizer-model): {path} holds neither tokenizer.json nor tokenizer.model"
    )


def _load_hugging_face(folder: Path, tokenizer_json: Path | None) -> Any:
    """The `tokenizers.Tokenizer` of a file, or of a folder as transformers understands it."""
    library = "tokenizers" if tokenizer_json else "transformers"
    try:
        if tokenizer_json:
            from tokenizers import Tokenizer as Backend

            return Backend.from_file(str(tokenizer_json))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False).backend_tokenizer
    except ImportError as error:
        raise UserError(f"{folder}: reading it needs the package {library}: pip install {library}") from error
    except Exception as error:  # tokenizers raises bare Exceptions, transformers a zoo of them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{tokenizer_json or folder}: is no tokenizer that {library} can read: {reason}") from error


def _special_id(folder: Path, name: str, vocabulary: dict[str, int]) -> int | None:
    """The id of the special token `bos` or `eos`: by its text where one is named, else by an id in a model's config."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / file).get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            if text not in vocabulary:
                raise UserError(f'{folder / file}: {name}_token "{text}" is not in the vocabulary')
            return vocabulary[text]
    for file in ("generation_config.json", "config.json"):
        number = _read_json(folder / file).get(f"{name}_token_id")
        first = number[0] if isinstance(number, list) and number else number
        if isinstance(first, int) and 0 <= first <= max(vocabulary.values()):
            return first
    return None


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: invalid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
