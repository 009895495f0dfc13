"""The tokenizer of a Hugging Face folder in GGUF's words, for llama.cpp.

    read_vocabulary   folder -> Vocabulary: SentencePiece BPE (`llama`) or unigram (`t5`), or byte-level BPE (`gpt2`)

llama.cpp tokenizes with code of its own and knows a byte-level BPE's pre-tokenizer by name only. What it would not do
exactly is refused by name: other ids than the model was trained with ruin it without a word.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import read_json
from megatron_prune.huggingface.sentencepiece_model import Kind, SentencePieceModel, read_model
from megatron_prune.huggingface.tokenizer import adds_bos

logger = logging.getLogger(__name__)

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF's token types, which are SentencePiece's

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The pattern that a tokenizer.json splits by -> llama.cpp's name of the pre-tokenizer.
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer.

    Attributes:
        model: `llama` (SentencePiece BPE), `t5` (SentencePiece unigram) or `gpt2` (byte-level BPE).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: one per id; types are GGUF's.
        scores: of SentencePiece pieces, else None.
        merges: of a byte-level BPE, "a b" each, else None.
        special: ids by GGUF's names (`bos`, `eos`, `unk`, `pad`), those that there are.
        add_bos, add_space_prefix, remove_extra_whitespaces: what llama.cpp does to every text; None leaves its default.
        charsmap: SentencePiece's normalization table, which llama.cpp applies for `t5` only; empty: none.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes = b""


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a model with `vocab_size` ids; ids that the tokenizer lacks become unused tokens.

    Raises:
        UserError: there is no tokenizer, or none that llama.cpp would reproduce.
    """
    added = _added_tokens(folder)
    if (folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(folder, added)
    elif (folder / "tokenizer.json").is_file():
        vocabulary = _byte_level(folder, added)
    else:
        raise UserError(f"{folder}: holds neither tokenizer.model nor tokenizer.json; a GGUF file needs a tokenizer")
    missing = vocab_size - len(vocabulary.tokens)
    if missing < 0:
        raise UserError(f"{folder}: its tokenizer has {len(vocabulary.tokens)} ids, the model {vocab_size}")
    first = len(vocabulary.tokens)
    vocabulary.tokens.extend(f"[PAD{first + number}]" for number in range(missing))
    vocabulary.types.extend([UNUSED] * missing)
    if vocabulary.scores is not None:
        vocabulary.scores.extend([-10000.0] * missing)
    return vocabulary


# SentencePiece --------------------------------------------------------------------------------------------------------


def _sentencepiece(folder: Path, added: Mapping[int, tuple[str, bool]]) -> Vocabulary:
    file = folder / "tokenizer.model"
    model = read_model(file)
    unigram = model.model_type == "unigram"
    (_check_unigram if unigram else _check_bpe)(model, file)
    tokens = [piece.text for piece in model.pieces]
    types = [int(piece.kind) for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    for number in sorted(set(added) - set(range(len(tokens)))):
        if number != len(tokens):
            raise UserError(f"{folder}: added tokens leave ids out ({len(tokens)} is missing)")
        text, is_special = added[number]
        tokens.append(text)
        types.append(CONTROL if is_special else USER_DEFINED)
        scores.append(-1000.0)
    named = {"bos": model.bos, "eos": model.eos, "unk": model.unknown, "pad": model.pad}
    ids = {name: tokens.index(text) for name, text in named.items() if text is not None}
    ids |= _config_ids(folder, len(tokens))
    if unigram and "eos" not in ids:
        raise UserError(f"{folder}: names no end-of-sequence id; llama.cpp would take id 1 of a unigram model for it")
    add_bos = _settings(folder).get("add_bos_token")
    return Vocabulary(
        model="t5" if unigram else "llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None,
        special=ids,
        add_bos=bool(add_bos) if add_bos is not None else model.bos is not None,
        add_space_prefix=model.add_dummy_prefix,
        remove_extra_whitespaces=model.remove_extra_whitespaces if unigram else None,
        charsmap=model.charsmap if unigram else b"",
    )


def _check_unigram(model: SentencePieceModel, file: Path) -> None:
    """llama.cpp's unigram is SentencePiece's, normalization included, but for these.

    It adds scores in 64 bits, as tokenizer.json does (see sentencepiece_to_json), and puts no prefix before a text of
    nothing but spaces, where these are kept.
    """
    checks = {
        "byte_fallback: llama.cpp gives the unknown id for characters it lacks, training their bytes": (
            model.byte_fallback
        ),
        "user-defined symbols, which llama.cpp scores in another way": bool(model.texts(Kind.USER_DEFINED)),
        "unused pieces, which llama.cpp uses": bool(model.texts(Kind.UNUSED)),
        "extra white space removed without a prefix, where llama.cpp adds one": (
            model.remove_extra_whitespaces and not model.add_dummy_prefix
        ),
        "treat_whitespace_as_suffix": model.treat_whitespace_as_suffix,
        "escape_whitespaces=false": not model.escape_whitespaces,
    }
    for words, wrong in checks.items():
        if wrong:
            raise UserError(f"{file}: is a SentencePiece unigram model that does not map to GGUF: {words}")
    logger.warning(
        "%s: a unigram model; SentencePiece adds scores in 32 bits, llama.cpp (and tokenizer.json) in 64: where two "
        "segmentations score the same but for rounding, they may choose different ones",
        file,
    )


def _check_bpe(model: SentencePieceModel, file: Path) -> None:
    if model.model_type != "bpe":
        raise UserError(
            f"{file}: is a SentencePiece {model.model_type} model; llama.cpp reads BPE and unigram ones, others it "
            "would split in another way"
        )
    if not model.byte_fallback:
        logger.warning("%s: has no byte pieces; llama.cpp may give other ids for characters it lacks", file)
    if model.charsmap or model.remove_extra_whitespaces:
        logger.warning(
            "%s: normalizes text (%s%s), which llama.cpp does not: texts it would change get other ids",
            file,
            model.normalizer_name or "a rule of its own",
            ", white space collapsed" if model.remove_extra_whitespaces else "",
        )


# Byte-level BPE -------------------------------------------------------------------------------------------------------


def _byte_level(folder: Path, added: Mapping[int, tuple[str, bool]]) -> Vocabulary:
    file = folder / "tokenizer.json"
    content = read_json(file)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not isinstance(model.get("vocab"), dict):
        raise UserError(f"{file}: is no byte-level BPE; only that and a SentencePiece tokenizer.model map to GGUF")
    tokens = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for number, (text, is_special) in added.items():
        tokens[number], types[number] = text, CONTROL if is_special else USER_DEFINED
    if sorted(tokens) != list(range(len(tokens))):
        raise UserError(f"{file}: its ids are not 0 to {len(tokens) - 1}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    return Vocabulary(
        model="gpt2",
        pre=_pre_tokenizer(content, file),
        tokens=[tokens[number] for number in range(len(tokens))],
        types=[types[number] for number in range(len(tokens))],
        scores=None,
        merges=merges,
        special=_named_ids(folder, {text: number for number, text in tokens.items()})
        | _config_ids(folder, len(tokens)),
        add_bos=adds_bos(folder),
    )


def _pre_tokenizer(content: Mapping[str, Any], file: Path) -> str:
    """llama.cpp's name for how text is split before merging."""
    pre = content.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre]) if pre.get("type") == "Sequence" else [pre]
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        uses_regex = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and uses_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and uses_regex:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not uses_regex and parts[0].get("behavior") == "Isolated":
            name = _SPLITS.get((parts[0].get("pattern") or {}).get("Regex", ""))
            if name:
                return name
    raise UserError(
        f"{file}: pre_tokenizer {json.dumps(pre)[:120]}: none of those that map to llama.cpp's (GPT-2's, SmolLM's, "
        "Llama 3's, Qwen 2's)"
    )


# Settings beside the vocabulary ---------------------------------------------------------------------------------------


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether it is special), of tokens added to a vocabulary."""
    file = folder / "tokenizer.json"
    entries = read_json(file).get("added_tokens", []) if file.is_file() else []
    return {entry["id"]: (entry["content"], bool(entry.get("special"))) for entry in entries}


def _named_ids(folder: Path, numbers: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = _settings(folder).get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in numbers:
            found[name] = numbers[text]
    return found


def _config_ids(folder: Path, size: int) -> dict[str, int]:
    """Ids that config.json names; the first of several."""
    config = read_json(folder / "config.json")
    found = {}
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and 0 <= first < size:
            found[name] = first
    return found
