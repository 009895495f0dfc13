"""A SentencePiece model as the content of a `tokenizer.json` that gives the same ids and the same decoded text.

`tokenizer_json` puts together the parts of the `tokenizers` library that, in this combination, do what SentencePiece
does, and refuses (UserError, naming the option) what none of them does. Where the two work differently:

- BPE. SentencePiece merges any two neighbours whose concatenation is a piece, the best score first and the leftmost
  among equals; `tokenizers` merges listed pairs by their rank in the list, the leftmost among equals. Whatever
  surrounds a piece, the merges inside its span go as if the piece stood alone, as long as none crosses the span's
  ends; so each piece has at most one pair it is ever made from: the last one when the piece alone is encoded. These
  pairs, ordered by score, are the list. Listing every split instead would give one score several ranks, and the wrong
  one of two overlapping occurrences could win.
- Unigram. Both search the best sum of scores and prefer the first found among equals. But `tokenizers` also finds the
  texts of control and byte pieces in the text. The text is cut inside them, where no piece crosses.
  SentencePiece adds in 32 bits, `tokenizers` in 64: where two segmentations have the same sum but for rounding (runs
  like "000" as "00"+"0" or "0"+"00"; sums over 100,000 characters), the results may differ. That is not reproduced,
  and is the one thing that is neither exact nor refused: `export_tokenizer` warns of it.
- User-defined symbols. SentencePiece takes them out first; here they are cut out after normalization, and looked up
  whole, which is right as long as every other piece that is looked up whole is what merging would give.
- The prefix and the whitespace. No pre-tokenizer: SentencePiece does not split at spaces. `Prepend`, `Replace`.
- Decoding. SentencePiece removes the prefix from the first piece, or from as many as are nothing else when extra
  whitespace is removed.

Why not transformers' own conversion: of 54 models of all kinds, ids and decoded text were SentencePiece's on 408 texts
for 6 by `LlamaConverter` (4.57), for 6 by `SpmConverter.build_tokenizer_from_spm_proto` (5.24), for 52 by this module,
which refuses the other two. The library is exact for BPE with byte_fallback, no normalization and white space kept,
as Llama's (docs/huggingface.md); another way for that kind alone would depend on the version, and save nothing here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from megatron_prune.errors import UserError

from .sentencepiece_charsmap import Step, alternatives, charsmap_steps, quote, replace
from .sentencepiece_model import SPACE, PieceKind, SentencePieceModel


def tokenizer_json(model: SentencePieceModel, add_bos: bool) -> dict[str, Any]:
    """The content of tokenizer.json; with `add_bos` its template puts the bos piece before every text.

    Raises UserError if the model has an option that `tokenizers` cannot reproduce exactly.
    """
    _refuse(model)
    special = [i for i, piece in enumerate(model.pieces) if piece.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": model.pieces[i].text, **flags} for i in special],
        "normalizer": _sequence("normalizers", normalizers(model)),
        "pre_tokenizer": _sequence("pretokenizers", pre_tokenizers(model)),
        "post_processor": _post_processor(model) if add_bos else None,
        "decoder": _sequence("decoders", _decoders(model)),
        "model": _bpe(model) if model.model_type == "bpe" else _unigram(model),
    }


def _sequence(key: str, steps: list[Step]) -> Step | None:
    return {"type": "Sequence", key: steps} if steps else None


def _refuse(model: SentencePieceModel) -> None:
    """Raise UserError for the first option of the model that has no exact equivalent."""
    normal, own = model.texts(PieceKind.NORMAL), model.texts(PieceKind.USER_DEFINED)
    texts = [piece.text for piece in model.pieces]
    repeated = next((text for text in texts if texts.count(text) > 1), None) if len(set(texts)) < len(texts) else None
    byte_like = [text for text in (*normal, *own) if re.fullmatch(r"<0x.{2}>", text)]
    spaced = any(SPACE in text for text in normal) and SPACE not in (*normal, *own)
    checks = [
        (model.model_type not in ("bpe", "unigram"), f"model_type {model.model_type}", "bpe or unigram"),
        (model.treat_whitespace_as_suffix, "treat_whitespace_as_suffix", "whitespace as a prefix"),
        (not model.escape_whitespaces, "escape_whitespaces=false", "escaped whitespace"),
        (model.has_denormalizer, "denormalizer_spec", "no denormalization rules"),
        (
            bool(model.texts(PieceKind.UNUSED)),
            f"unused pieces {model.texts(PieceKind.UNUSED)[:1]}",
            "its whole vocabulary",
        ),
        (repeated is not None, f"the repeated piece {repeated!a}", "distinct pieces"),
        (any(len(text) == 1 for text in model.reserved), "a control piece of one character", "longer ones"),
        (any(" " in text for text in own), "user_defined_symbols with spaces", "symbols without spaces"),
        (bool(own) and model.model_type == "unigram", "user_defined_symbols of a unigram model", "bpe"),
        (model.byte_fallback and bool(byte_like), f"the piece {byte_like[:1]} beside byte_fallback", "another text"),
        (spaced, f"pieces with {SPACE!a}, which is no piece itself", "spaces in its training text"),
    ]
    for wrong, option, instead in checks:
        if wrong:
            raise UserError(
                f"the tokenizer's {option} cannot be written as tokenizer.json exactly; use a tokenizer with {instead}"
            )


def normalizers(model: SentencePieceModel) -> list[Step]:
    """What prepares text as SentencePiece does."""
    extra, prefix = model.remove_extra_whitespaces, model.add_dummy_prefix
    steps: list[Step] = []
    if model.charsmap:
        kept = tuple(model.texts(PieceKind.USER_DEFINED))
        steps += charsmap_steps(model.charsmap, model.normalizer_name, kept, prefix and not extra, extra)
    if extra:
        steps.append(replace("", regex=f"(?<![ {SPACE}])[ {SPACE}]+\\z"))
        steps.append(replace("", regex="\\A +"))
        steps.append(replace(" ", regex=" {2,}"))
    if prefix and (extra or not model.charsmap):
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, replace(SPACE, text=" ")]


def _decoders(model: SentencePieceModel) -> list[Step]:
    steps = [replace(model.unk_surface, regex=f"\\A{quote(model.unknown)}\\z")]
    strip = model.add_dummy_prefix or model.remove_extra_whitespaces
    has_space = SPACE in model.texts(PieceKind.NORMAL, PieceKind.USER_DEFINED)
    if has_space:
        # What stays is the sign at a piece's start, or anywhere if nothing is stripped.
        steps.append(replace(" ", regex=f"(?!\\A){SPACE}") if strip else replace(" ", text=SPACE))
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if has_space and strip:
        steps.append(replace("", regex=f"\\A{SPACE}+" if model.remove_extra_whitespaces else f"\\A{SPACE}"))
        steps.append(replace(" ", text=SPACE))
    return steps


def _post_processor(model: SentencePieceModel) -> Step:
    if model.bos is None:
        raise UserError("add_bos: the tokenizer model has no bos piece; leave add_bos off")
    index = [piece.text for piece in model.pieces].index(model.bos)

    def after_bos(name: str, type_id: int) -> list[Step]:
        return [{"SpecialToken": {"id": model.bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": after_bos("A", 0),
        "pair": [*after_bos("A", 0), *after_bos("B", 1)],
        "special_tokens": {model.bos: {"id": model.bos, "ids": [index], "tokens": [model.bos]}},
    }


def _unigram(model: SentencePieceModel) -> Step:
    pieces = model.pieces
    return {
        "type": "Unigram",
        "unk_id": next(i for i, piece in enumerate(pieces) if piece.kind == PieceKind.UNKNOWN),
        # The least score decides the price of an unknown character: only normal pieces count.
        "vocab": [[piece.text, piece.score if piece.kind == PieceKind.NORMAL else 0.0] for piece in pieces],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel) -> Step:
    merges = bpe_merges(model)
    own = model.texts(PieceKind.USER_DEFINED)
    if own:
        made = {left + right for left, right in merges}
        for text in model.texts(PieceKind.NORMAL):
            if len(text) > 1 and text not in made and not any(symbol in text for symbol in own):
                raise UserError(
                    "the tokenizer's user_defined_symbols cannot be written as tokenizer.json exactly, since its "
                    f"merges never make the piece {text!a}; use a tokenizer without such symbols"
                )
    # tokenizers before 0.20 read pairs only as text; a line that starts like a file header they would skip.
    as_text = not any(left.startswith("#version") for left, _ in merges)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": bool(own),
        "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
        "merges": [f"{left} {right}" if as_text else [left, right] for left, right in merges],
    }


def bpe_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The pairs to merge, best first: for each piece the one pair its merging alone ends with (see the module).

    Pieces that merging never makes have no pair, nor have those that hold a user-defined symbol.

    Raises UserError if pieces of equal score compete, or one is made of a character that is no piece.
    """
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == PieceKind.NORMAL}
    own = model.texts(PieceKind.USER_DEFINED)
    pairs: dict[str, tuple[str, str]] = {}
    for text in scores:
        if " " in text or any(symbol in text for symbol in own):
            continue
        symbols = list(text)
        while len(symbols) > 2:
            best = max(
                (i for i in range(len(symbols) - 1) if symbols[i] + symbols[i + 1] in scores),
                key=lambda i: (scores[symbols[i] + symbols[i + 1]], -i),
                default=None,
            )
            if best is None:
                break
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        if len(symbols) == 2:
            pairs[text] = (symbols[0], symbols[1])
            missing = [symbol for symbol in symbols if symbol not in scores]
            if missing:
                raise UserError(
                    f"the tokenizer's piece {text!a} is made of {missing[0]!a}, which is no piece itself; "
                    "tokenizer.json cannot say that: use a tokenizer that has all characters of its pieces"
                )
    _refuse_ties(pairs, scores)
    return sorted(pairs.values(), key=lambda pair: -scores[pair[0] + pair[1]])


def _refuse_ties(pairs: dict[str, tuple[str, str]], scores: dict[str, float]) -> None:
    """Refuse pieces of equal score of which the text's order, not a rank, decides which is merged.

    Equals are harmless if none can overlap another (one's right part the other's left part), and if no piece made
    from one of them comes before, or level with, the others.
    """
    equals: dict[float, list[str]] = defaultdict(list)
    for text in pairs:
        equals[scores[text]].append(text)
    tied = {text for texts in equals.values() if len(texts) > 1 for text in texts}
    lefts: dict[tuple[float, str], set[str]] = defaultdict(set)
    for text in tied:
        lefts[scores[text], pairs[text][0]].add(text)
    for text, (left, right) in pairs.items():
        rivals = lefts[scores[text], right] - {text} if text in tied else set()
        rivals |= {part for part in (left, right) if part in tied and scores[text] >= scores[part]}
        if rivals:
            raise UserError(
                f"the tokenizer's pieces {text!a} and {min(rivals)!a} have scores that leave their order to the text, "
                "which the ranked merges of tokenizer.json cannot say; use a tokenizer with distinct scores"
            )


def pre_tokenizers(model: SentencePieceModel) -> list[Step]:
    """What keeps user-defined symbols whole, and reserved pieces from being found in text."""
    own = model.texts(PieceKind.USER_DEFINED)
    steps = []
    if own:
        steps.append(_split(alternatives(own), "Isolated"))
    if own or model.model_type == "unigram":
        steps.append(_split("|".join(_cuts(model)), "MergedWithPrevious"))
    return steps


def _split(regex: str, behavior: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


def _cuts(model: SentencePieceModel) -> list[str]:
    """For each reserved piece, a regular expression for the character in it after which text is cut.

    There no piece crosses, so that cutting changes nothing but that the reserved piece is not found in the text.
    """
    normal = model.texts(PieceKind.NORMAL)
    crossing: dict[str, list[str]] = defaultdict(list)
    for text in normal:
        for i in range(1, len(text)):
            crossing[text[i - 1 : i + 1]].append(text)
    known = {text for text in normal if len(text) == 1}
    found = []
    for text in model.reserved:
        if " " in text:
            continue  # normalized text has none
        if text == model.unknown and known.isdisjoint(text) and not model.byte_fallback:
            continue  # its text is one unknown piece, found or not
        for i in range(1, len(text)):
            # Neighbours that are both unknown would be one unknown piece, cut they would be two.
            one_unknown = not model.byte_fallback and text[i - 1] not in known and text[i] not in known
            if not one_unknown and not _crosses(crossing[text[i - 1 : i + 1]], text[:i], text[i:]):
                found.append(_after(text, i))
                break
        else:
            raise UserError(
                f"the tokenizer's piece {text!a} cannot be told from the same text in tokenizer.json, "
                "since ordinary pieces or unknown characters overlap it everywhere; use a bpe tokenizer without "
                "user_defined_symbols, or one with byte_fallback"
            )
    return found


def _after(text: str, i: int) -> str:
    """A regular expression for the character before position `i` of `text`, where all of `text` stands around it."""
    behind = f"(?<={quote(text[: i - 1])})" if i > 1 else ""
    return f"{behind}{quote(text[i - 1])}(?={quote(text[i:])})"


def _crosses(pieces: Iterable[str], before: str, after: str) -> bool:
    """Whether one of the pieces can lie over the point between `before` and `after`, whatever surrounds the two."""
    for piece in pieces:
        for i in range(1, len(piece)):
            head, tail = piece[:i], piece[i:]
            fits_before = head.endswith(before) or before.endswith(head)
            if fits_before and (tail.startswith(after) or after.startswith(tail)):
                return True
    return False
