"""The tokenizer of a Hugging Face folder in GGUF's words, for llama.cpp.

    read_vocabulary   folder -> Vocabulary: SentencePiece BPE (`llama`) or unigram (`t5`), or byte-level BPE (`gpt2`)

Which file is the tokenizer's is decided in data.tokenizer_files, as for training and export. A SentencePiece-like
tokenizer.json needs no tokenizer.model beside it (sentencepiece_from_json).
llama.cpp tokenizes with code of its own and knows a byte-level BPE's pre-tokenizer by name only. What it would not do
exactly is refused by name: other ids than the model was trained with ruin it without a word.
The gguf package's `SpecialVocab` is not used: it finds no special ids without a tokenizer.json, which Vicuna's,
Zephyr's, ChatML's and Qwen's layouts lack, as does a bare tokenizer.model.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.data.tokenizer_files import (
    SENTENCEPIECE,
    TOKENIZER_MODEL,
    TokenizerPlace,
    find_tokenizer,
    holds_tokenizer,
    settings_in,
)
from megatron_prune.data.tokenizer_library import added_tokens, adds_bos, load_library
from megatron_prune.errors import UserError
from megatron_prune.huggingface.chat import as_setting, chat_templates
from megatron_prune.huggingface.sentencepiece_from_json import check_same_ids, model_from_json
from megatron_prune.huggingface.sentencepiece_model import PieceKind, SentencePieceModel, belongs, read_model

logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # GGUF's token types, which are SentencePiece's
_NAMES = ("bos", "eos", "unk", "pad")
FURTHER_ENDS = ("eot", "eom")
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
# Ends of text that llama.cpp stops at wherever the vocabulary has them.
KNOWN_ENDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>")
}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The pattern that a tokenizer.json splits by -> llama.cpp's name of the pre-tokenizer.
SPLITS = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}


@dataclass
class Vocabulary:
    """What GGUF stores of a tokenizer; `read_vocabulary` completes it step by step.

    Attributes:
        model: `llama` (SentencePiece BPE), `t5` (SentencePiece unigram) or `gpt2` (byte-level BPE).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: one per id; types are GGUF's.
        scores: of SentencePiece pieces, else None.
        merges: of a byte-level BPE, "a b" each, else None.
        special: ids by GGUF's names (`bos`, `eos`, `unk`, `pad`; `eot`, `eom`: further ends of text), those there are.
        add_bos, add_space_prefix, remove_extra_whitespaces: what llama.cpp does to every text; None leaves its default.
        charsmap: SentencePiece's normalization table, which llama.cpp applies for `t5` only; empty: none.
        chat_template: one, or a list of named ones (`name`, `template`), None: none.
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
    chat_template: str | list[dict[str, str]] | None = None


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a model with `vocab_size` ids; ids that the tokenizer lacks become unused tokens.

    Which file is the tokenizer's, and its special tokens, is what `find_tokenizer` and transformers say; ids that
    config.json names count only where the tokenizer names none. Added tokens beyond the model's rows are left out, with
    a warning: the model cannot be given them. Raises UserError: there is no tokenizer, or none that llama.cpp would
    reproduce."""
    if not holds_tokenizer(folder):
        raise UserError(f"{folder}: holds neither tokenizer.model nor tokenizer.json; a GGUF file needs a tokenizer")
    place = find_tokenizer(folder)
    if place.kind == SENTENCEPIECE:
        vocabulary = _bare_sentencepiece(place)
    else:
        library = load_library(place)
        content = json.loads(library.backend_tokenizer.to_str())
        read = _byte_level if _is_byte_level(content) else _sentencepiece_like
        vocabulary = read(place, library, content)
        templates = as_setting(chat_templates(folder, library))
        vocabulary = dataclasses.replace(vocabulary, chat_template=templates)
    _fit(vocabulary, vocab_size, folder)
    vocabulary.special.update(
        {name: number for name, number in _config_ids(folder, vocabulary).items() if name not in vocabulary.special}
    )
    if vocabulary.model == "t5" and "eos" not in vocabulary.special:
        raise UserError(f"{folder}: names no end-of-sequence id; llama.cpp would take id 1 of a unigram model for it")
    return vocabulary


def _fit(vocabulary: Vocabulary, vocab_size: int, folder: Path) -> None:
    """Make the vocabulary as long as the model's."""
    size = len(vocabulary.tokens)
    lost = range(vocab_size, size)
    if any(vocabulary.types[number] not in (CONTROL, USER_DEFINED, UNUSED) for number in lost):
        raise UserError(f"{folder}: its tokenizer has {size} ids, the model {vocab_size}")
    if lost:
        names = ", ".join(ascii(vocabulary.tokens[number]) for number in lost[:10])
        logger.warning("%s: the model has no rows for %s of its tokenizer; left out", folder, names)
        for name in [name for name, number in vocabulary.special.items() if number >= vocab_size]:
            del vocabulary.special[name]
    for row in (vocabulary.tokens, vocabulary.types, vocabulary.scores):
        if row is not None:
            del row[vocab_size:]
    for number in range(size, vocab_size):
        _append(vocabulary, f"[PAD{number}]", UNUSED)


def _append(vocabulary: Vocabulary, text: str, kind: int) -> None:
    vocabulary.tokens.append(text)
    vocabulary.types.append(kind)
    if vocabulary.scores is not None:
        vocabulary.scores.append(_ADDED_SCORE if kind != UNUSED else _UNUSED_SCORE)


def _take_added(vocabulary: Vocabulary, library: Any) -> None:
    """Tokens that are added to the vocabulary, or marked in it; ids that are left out become unused tokens."""
    for number, token in added_tokens(library).items():
        kind = CONTROL if token.special else USER_DEFINED
        while number > len(vocabulary.tokens):
            _append(vocabulary, f"[PAD{len(vocabulary.tokens)}]", UNUSED)
        if number == len(vocabulary.tokens):
            _append(vocabulary, token.content, kind)
        elif vocabulary.types[number] != UNKNOWN:
            vocabulary.tokens[number], vocabulary.types[number] = token.content, kind


# SentencePiece --------------------------------------------------------------------------------------------------------


def _bare_sentencepiece(place: TokenizerPlace) -> Vocabulary:
    model = read_model(place.vocabulary)
    named = {"bos": model.bos, "eos": model.eos, "unk": model.unknown, "pad": model.pad}
    texts = [piece.text for piece in model.pieces]
    ids = {name: texts.index(text) for name, text in named.items() if text is not None}
    return _sentencepiece(model, place.vocabulary, ids, add_bos=model.bos is not None)


def _sentencepiece_like(place: TokenizerPlace, library: Any, content: Mapping[str, Any]) -> Vocabulary:
    """From the `tokenizer.model` where it is this tokenizer's, else worked out from tokenizer.json."""
    ids = _named_ids(library)
    file = place.folder / TOKENIZER_MODEL
    if file.is_file() and belongs(file, library):
        model = read_model(file)
    else:
        file = place.vocabulary
        named = {name: library.convert_ids_to_tokens(ids[name]) if name in ids else None for name in _NAMES}
        model = model_from_json(content, named, str(file))
    check_same_ids(model, library, str(file))
    vocabulary = _sentencepiece(model, file, ids, add_bos=adds_bos(library))
    _take_added(vocabulary, library)
    if model.add_dummy_prefix and not _always_prefixes(library):
        logger.warning(
            "%s: llama.cpp puts a space before any text, this tokenizer not before one that begins with a space or "
            "follows a special token: such text gets other ids",
            place.folder,
        )
    return vocabulary


def _always_prefixes(library: Any) -> bool:
    """Whether a tokenizer with a space sign before text puts it before " a", and before "a" after a special token."""
    texts = ["a", " a", f"{library.eos_token or ''}a"]
    alone, spaced, after = (
        library(text, add_special_tokens=False, split_special_tokens=False)["input_ids"] for text in texts
    )
    return spaced != alone and after[len(after) - len(alone) :] == alone


def _sentencepiece(model: SentencePieceModel, file: Path, special: dict[str, int], add_bos: bool) -> Vocabulary:
    unigram = model.model_type == "unigram"
    (_check_unigram if unigram else _check_bpe)(model, file)
    return Vocabulary(
        model="t5" if unigram else "llama",
        pre="default",
        tokens=[piece.text for piece in model.pieces],
        types=[int(piece.kind) for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        merges=None,
        special=special,
        add_bos=add_bos,
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
        "user-defined symbols, which llama.cpp scores in another way": bool(model.texts(PieceKind.USER_DEFINED)),
        "unused pieces, which llama.cpp uses": bool(model.texts(PieceKind.UNUSED)),
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


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    model = content["model"]
    return (
        model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    )


def _byte_level(place: TokenizerPlace, library: Any, content: Mapping[str, Any]) -> Vocabulary:
    model = content["model"]
    texts = {number: text for text, number in model["vocab"].items()}
    size = max(texts, default=-1) + 1
    vocabulary = Vocabulary(
        model="gpt2",
        pre=_pre_tokenizer(content, place.vocabulary),
        tokens=[texts.get(number, f"[PAD{number}]") for number in range(size)],
        types=[NORMAL if number in texts else UNUSED for number in range(size)],
        scores=None,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])],
        special=_named_ids(library),
        add_bos=adds_bos(library),
    )
    _take_added(vocabulary, library)
    return vocabulary


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
            name = SPLITS.get((parts[0].get("pattern") or {}).get("Regex", ""))
            if name:
                return name
    raise UserError(
        f"{file}: pre_tokenizer {json.dumps(pre)[:120]}: none of those that map to llama.cpp's (GPT-2's, SmolLM's, "
        "Llama 3's, Qwen 2's)"
    )


# Settings beside the vocabulary ---------------------------------------------------------------------------------------


def _named_ids(library: Any) -> dict[str, int]:
    """GGUF's name -> id, of the special tokens that the tokenizer names."""
    ids = {name: getattr(library, f"{name}_token_id") for name in _NAMES}
    return {name: number for name, number in ids.items() if number is not None}


def _config_ids(folder: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """Ids that the model's configurations name; further ends of text, which llama.cpp does not know by their names."""
    found: dict[str, int] = {}
    ends: list[int] = []
    for file in ("config.json", "generation_config.json"):
        config = settings_in(folder / file)
        for name in ("bos", "eos", "pad"):
            value = config.get(f"{name}_token_id")
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and 0 <= number < len(vocabulary.tokens):
                    found.setdefault(name, number)
                    ends += [number] if name == "eos" else []
    eos = vocabulary.special.get("eos", found.get("eos"))
    further = [
        number for number in dict.fromkeys(ends) if number != eos and vocabulary.tokens[number] not in KNOWN_ENDS
    ]
    if len(further) > 2:
        logger.warning("%s: GGUF names three ends of text at most; ids %s left out", folder, further[2:])
    return found | dict(zip(FURTHER_ENDS, further))
