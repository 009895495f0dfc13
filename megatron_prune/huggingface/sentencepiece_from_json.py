"""The SentencePiece model that a SentencePiece-like `tokenizer.json` came from, where no `tokenizer.model` is left.

    model_from_json   content of tokenizer.json -> SentencePieceModel with the same ids
    check_same_ids    a SentencePieceModel, run by SentencePiece itself, against a loaded tokenizer

A tokenizer.json ranks merges, SentencePiece scores pieces. Pieces get scores in the order of their first merges; then
SentencePiece's way to each piece is worked out (`bpe_merges`) and must be among the listed merges, in the same order:
both then merge the same pairs in the same order in every text (see sentencepiece_to_json). Unigram scores are stated.
How text is normalized is recognised in the form that our own exports have, or in that of Llama's tokenizers.
"""

import base64
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_prune.data.tokenizer_library import ORDINARY_TEXTS, added_tokens
from megatron_prune.errors import UserError

from .sentencepiece_model import SPACE, PieceKind, SentencePieceModel, SpmPiece, processor_of, write_model
from .sentencepiece_to_json import bpe_merges, normalizers, pre_tokenizers

_TYPES = {"BPE": "bpe", "Unigram": "unigram"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def model_from_json(content: Mapping[str, Any], named: Mapping[str, str | None], where: str) -> SentencePieceModel:
    """The SentencePiece model that gives a tokenizer.json's ids.

    Arguments:
        content: of tokenizer.json.
        named: the texts of the special tokens `bos`, `eos`, `unk` and `pad`, None for those that there are not.
        where: begins every complaint.

    Raises:
        UserError: there is none, or it cannot be told.
    """
    stored = content["model"]
    if stored.get("type") not in _TYPES or named["unk"] is None:
        raise _no_such(where, f"its model is {stored.get('type')}" if named["unk"] else "it names no unknown token")
    pieces = _pieces(content, named["unk"], where)
    control = {piece.text for piece in pieces if piece.kind == PieceKind.CONTROL}
    model = SentencePieceModel(
        pieces=pieces,
        model_type=_TYPES[stored["type"]],
        byte_fallback=bool(stored.get("byte_fallback")),
        treat_whitespace_as_suffix=False,
        unk_surface=" \u2047 ",
        bos=named["bos"] if named["bos"] in control else None,
        eos=named["eos"] if named["eos"] in control else None,
        pad=named["pad"] if named["pad"] in control else None,
        normalizer_name="",
        charsmap=_charsmap(content),
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        escape_whitespaces=True,
        has_denormalizer=False,
    )
    if model.model_type == "bpe":
        _check_merges(model, _merges(content), where)
    return _with_flags(model, content, where)


def check_same_ids(model: SentencePieceModel, library: Any, where: str) -> None:
    """Raise UserError if SentencePiece gives ordinary text other ids with `model` than a loaded tokenizer does."""
    processor = processor_of(write_model(model), where)
    added = [token.content for token in added_tokens(library).values()]
    for text in ORDINARY_TEXTS:
        if any(token in text for token in added):
            continue
        if processor.encode(text) != library(text, add_special_tokens=False)["input_ids"]:
            raise _no_such(where, f"SentencePiece would give the text {text!a} other ids")


def _no_such(where: str, reason: str) -> UserError:
    return UserError(f"{where}: maps to no SentencePiece model, which GGUF needs of it: {reason}")


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    listed = content["model"].get("merges") or []
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in listed)
    return [(str(left), str(right)) for left, right in pairs]


def _pieces(content: Mapping[str, Any], unknown: str, where: str) -> tuple[SpmPiece, ...]:
    """The vocabulary in order of ids, without tokens that are added after it."""
    stored = content["model"]
    if stored["type"] == "Unigram":
        texts = [str(text) for text, _ in stored["vocab"]]
        scores = {str(text): float(score) for text, score in stored["vocab"]}
    else:
        texts = sorted(stored["vocab"], key=stored["vocab"].__getitem__)
        if [stored["vocab"][text] for text in texts] != list(range(len(texts))):
            raise _no_such(where, f"its ids are not 0 to {len(texts) - 1}")
        merged = dict.fromkeys(left + right for left, right in _merges(content))
        scores = {text: -float(rank) for rank, text in enumerate(merged)}
    special = {token["content"]: bool(token.get("special")) for token in content.get("added_tokens") or []}
    pieces = []
    for number, text in enumerate(texts):
        if text == unknown:
            kind = PieceKind.UNKNOWN
        elif text in special:
            kind = PieceKind.CONTROL if special[text] else PieceKind.USER_DEFINED
        elif stored.get("byte_fallback") and _BYTE.fullmatch(text):
            kind = PieceKind.BYTE
        else:
            kind = PieceKind.NORMAL
        # Characters, and what no merge makes, come last, as SentencePiece has them.
        score = scores.get(text, -float(len(scores) + number)) if kind == PieceKind.NORMAL else 0.0
        pieces.append(SpmPiece(text, score, kind))
    if sum(piece.kind == PieceKind.UNKNOWN for piece in pieces) != 1:
        raise _no_such(where, f"its unknown token {unknown!a} is not in the vocabulary")
    return tuple(pieces)


def _check_merges(model: SentencePieceModel, listed: list[tuple[str, str]], where: str) -> None:
    rank = {pair: number for number, pair in enumerate(listed)}
    taken = bpe_merges(model)
    missing = next((pair for pair in taken if pair not in rank), None)
    if missing is not None:
        raise _no_such(where, f"it does not merge {missing[0]!a} and {missing[1]!a}, as SentencePiece would")
    ranks = [rank[pair] for pair in taken]
    if ranks != sorted(ranks):
        raise _no_such(where, "the order of its merges is no order of its pieces")


# How text is prepared -------------------------------------------------------------------------------------------------


def _with_flags(model: SentencePieceModel, content: Mapping[str, Any], where: str) -> SentencePieceModel:
    """The model with prefix, white space and normalization as the tokenizer.json has them."""
    wanted = (content.get("normalizer"), content.get("pre_tokenizer"))
    for prefix, extra in itertools.product((True, False), repeat=2):
        tried = dataclasses.replace(model, add_dummy_prefix=prefix, remove_extra_whitespaces=extra)
        if _as_stored(normalizers(tried), pre_tokenizers(tried)) == wanted:
            return tried
    if model.model_type == "bpe" and not model.charsmap:
        prefix_of_llama = _llama_prefix(content)
        if prefix_of_llama is not None:
            return dataclasses.replace(model, add_dummy_prefix=prefix_of_llama)
    raise _no_such(where, "its normalizer or pre_tokenizer is none that SentencePiece has")


def _as_stored(steps: list[dict[str, Any]], splits: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Normalizer and pre-tokenizer as the installed tokenizers writes them."""
    from tokenizers import Tokenizer

    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    written = json.loads(Tokenizer.from_str(json.dumps(content)).to_str())
    return written["normalizer"], written["pre_tokenizer"]


def _charsmap(content: Mapping[str, Any]) -> bytes:
    """SentencePiece's table, where our export's normalizer holds it; empty without one."""
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return b""


def _llama_prefix(content: Mapping[str, Any]) -> bool | None:
    """Whether text gets a space sign in front, in the forms of Llama's tokenizers; None in any other form."""
    prefix = False
    for step in _steps(content.get("normalizer"), "normalizers"):
        pattern = step.get("pattern") or {}
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step.get("type") != "Replace" or (
            (pattern.get("String"), step.get("content")) != (" ", SPACE)
            # What transformers 5 adds so that a prefix comes before a space sign, too.
            and (pattern.get("Regex"), step.get("content")) != (f"\\A{SPACE}", SPACE * 2)
        ):
            return None
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") != "Metaspace" or step.get("split", True) or step.get("replacement") != SPACE:
            return None
        prefix = prefix or step.get("prepend_scheme") != "never"
    return prefix


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if not part:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]
