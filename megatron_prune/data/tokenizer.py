"""Tokenizers: text <-> token ids, with the few facts that megatron-core's data sets ask of a tokenizer.

    build_tokenizer        a file or folder -> `Tokenizer`; tokenizer_files decides what it is
    check_rows             a tokenizer must not have more ids than its model has rows
    Tokenizer              the interface
    SentencePieceTokenizer a bare `tokenizer.model`, read by sentencepiece itself
    HuggingFaceTokenizer   any other: as transformers' `AutoTokenizer` gives it, without code from the folder

Text is turned into ids without any begin- or end-of-document token; preprocessing adds these where it is asked to.
A bare SentencePiece file is never read through transformers, whose own conversion of one may give other ids.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from megatron_prune.data.hub_files import LFS_HINT, is_lfs_pointer
from megatron_prune.data.tokenizer_files import (
    FIELD,
    HUGGING_FACE,
    SENTENCEPIECE,
    TokenizerPlace,
    find_tokenizer,
)
from megatron_prune.data.tokenizer_library import PLAIN_CLASS, extra_tokens, load_library, special_id, unlike_its_file
from megatron_prune.errors import UserError
from megatron_prune.reading import read_content

logger = logging.getLogger(__name__)

_AT_ONCE = 64  # texts in one call of the library


class Tokenizer(ABC):
    """Text <-> token ids.

    Attributes:
        path: the file or folder the tokenizer was built from, as the user gave it.
        vocab_size: number of ids; the largest id is vocab_size - 1.
        base_size: the same, without tokens that are added after the vocabulary.
        bos: id that begins a document, None where the tokenizer has none.
        eod: id that ends a document (the tokenizer's end-of-sequence id).
        fingerprint: hexadecimal SHA-256 of the vocabulary file (and of tokens that files beside it add), for telling
            two tokenizers apart.
        unique_identifiers: what megatron-core's data sets put into the key of their index caches.
    """

    kind: str
    path: str
    vocab_size: int
    base_size: int
    bos: int | None
    eod: int
    fingerprint: str

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, without begin- or end-of-document ids."""

    @abstractmethod
    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of `texts`, as `tokenize` gives them, in one call of the library and on one thread."""

    @abstractmethod
    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""

    @abstractmethod
    def text_of(self, number: int) -> str:
        """How the vocabulary spells one id; empty where it has none."""

    @property
    def pad(self) -> int:
        """-1: data sets take out of the loss whatever equals `pad`, and packed documents hold no padding."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """Kind, content and size; not the path, so that a moved tokenizer finds its caches again."""
        return OrderedDict(kind=self.kind, fingerprint=self.fingerprint, vocab_size=self.vocab_size)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. Raises UserError: the file is no SentencePiece model, or the model has no
    end-of-sequence id."""

    kind = SENTENCEPIECE

    def __init__(self, path: str, model_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        content = _read(model_file)
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            problem = LFS_HINT if is_lfs_pointer(model_file) else "is no SentencePiece model"
            raise UserError(f"{model_file}: {problem}") from error
        self.path = path
        self.vocab_size = self.base_size = self._model.vocab_size()
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

    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return self._model.encode(list(texts), num_threads=1)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids give nothing."""
        return self._model.decode([int(token) for token in ids])

    def text_of(self, number: int) -> str:
        """The piece of one id."""
        return self._model.id_to_piece(number) if 0 <= number < self.vocab_size else ""


class HuggingFaceTokenizer(Tokenizer):
    """What `AutoTokenizer` makes of a folder (or of a `*.json` file): the same ids, special tokens included.

    Special tokens spelled out in a text become their ids, as everywhere in Hugging Face's world. Where the tokenizer
    names no begin or end, the ids in `generation_config.json` and `config.json` stand for them. Raises UserError:
    transformers is not installed, the folder cannot be read, or no end-of-sequence token is named."""

    kind = HUGGING_FACE

    def __init__(self, place: TokenizerPlace) -> None:
        library = load_library(place)
        text = unlike_its_file(place, library) if parent_process() is None else None  # told once, not by every worker
        if text is not None:
            logger.warning(
                "%s: transformers reads it as %s, which takes text such as %a in another way than the file says: "
                "training, export and GGUF do as transformers does; to go by the file, %s",
                place.vocabulary,
                type(library).__name__,
                text,
                PLAIN_CLASS,
            )
        self._model = library.backend_tokenizer
        self.path = place.path
        self.vocab_size = max(library.get_vocab().values(), default=-1) + 1
        self.base_size = max(self._model.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        digest = hashlib.sha256(_read(place.vocabulary))
        extra = extra_tokens(place, library)
        if extra:
            digest.update(json.dumps(extra).encode())
        self.fingerprint = digest.hexdigest()
        self.bos = special_id(place.folder, library, "bos")
        eos = special_id(place.folder, library, "eos")
        if eos is None:
            raise UserError(
                f"{place.folder}: no end-of-sequence token, which ends documents; name eos_token in "
                "tokenizer_config.json"
            )
        self.eod = eos

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, as `add_special_tokens=False` gives them."""
        return self._model.encode(text, add_special_tokens=False).ids

    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`. Offsets into the text, which cost a fifth, are left out."""
        found = []
        for start in range(0, len(texts), _AT_ONCE):  # more of them at once leave the processor's cache
            batch = self._model.encode_batch_fast(list(texts[start : start + _AT_ONCE]), add_special_tokens=False)
            found += [encoding.ids for encoding in batch]
        return found

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return self._model.decode([int(token) for token in ids], skip_special_tokens=False)

    def text_of(self, number: int) -> str:
        """The token of one id."""
        return self._model.id_to_token(number) or ""


def build_tokenizer(tokenizer_type: str | None, tokenizer_model: str) -> Tokenizer:
    """Build the tokenizer that lies at a path.

    Args:
        tokenizer_type: `SentencePieceTokenizer` or `HuggingFaceTokenizer`; None: see `find_tokenizer`.
        tokenizer_model: a file or a folder.

    Raises:
        UserError: the path or the type is wrong, or what lies there cannot be read.
    """
    place = find_tokenizer(tokenizer_model, tokenizer_type)
    if place.kind == SENTENCEPIECE:
        return SentencePieceTokenizer(tokenizer_model, place.vocabulary)
    return HuggingFaceTokenizer(place)


def check_rows(tokenizer: Tokenizer, vocab_size: int, field: str = FIELD) -> None:
    """Check that the model has a row for every id of its tokenizer.

    Args:
        vocab_size: the model's number of ids, without what tensor parallelism pads.
        field: what the error calls the option.

    Raises:
        UserError: it has not; says the way on.
    """
    if tokenizer.vocab_size <= vocab_size:
        return
    told = f"{field}: {tokenizer.path} has {tokenizer.vocab_size} ids, the model {vocab_size}"
    if tokenizer.base_size > vocab_size:
        raise UserError(f"{told}; use the model's own tokenizer")
    raise UserError(
        f"{told}: there is no row for id {vocab_size} ({tokenizer.text_of(vocab_size)!a}), which is added to the "
        "vocabulary; if this is the model's own tokenizer, give the model the rows: megatron-prune convert-from-hf "
        "--resize-vocab"
    )


def _read(file: Path) -> bytes:
    try:
        return read_content(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
