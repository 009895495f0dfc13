"""SentencePiece's normalization table (`precompiled_charsmap`) as `tokenizers` normalizers that do exactly the same.

SentencePiece walks over the text and, at each position, replaces the longest source the table has, else copies one
character. `tokenizers` has a normalizer of that name, `Precompiled`, which reads the same table but applies it per
grapheme cluster: it takes the shortest source instead of the longest, drops what else the cluster holds, and finds no
source of six bytes or more (nearly all composed Hangul and kana). It is right for one character at a time only.

So the steps made here first cut the text where SentencePiece would, with a regular expression of all sources of
several characters, by inserting barriers of two characters: a format character that ends every cluster (`fence`), and
a mark. Inside the barriers `Precompiled` sees single characters, NFC composes what belongs to one source and nothing
else, and sources whose target NFC does not know (younger than its Unicode version) have a replacement of their own.
Then the barriers go. Since the table is at hand, the steps are checked on every source it has: a table they cannot
say exactly is refused.
"""

import base64
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import is_normalized

import numpy as np

from megatron_prune.errors import UserError

from .sentencepiece_model import SPACE

Step = dict[str, Any]
"""One normalizer, pre-tokenizer or decoder in the form tokenizer.json has."""

MAX_EXCEPTIONS = 256
"""Replacements of their own that are worth their time: each is a pass over the text."""

MAX_SOURCES = 1 << 20
"""Sources that are read; all of Unicode's compatibility compositions and case folds are a quarter of it."""

FENCES = "\ufff9\ufffa\ufffb\u2061\u2062"
"""Format characters: no grapheme cluster crosses them and NFC leaves them alone."""
MARKS = "|~!#%;_&@"
"""ASCII that no combining character composes with."""


def quote(text: str) -> str:
    """A regular expression (Oniguruma's syntax) that matches `text` alone."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):X}}}" for char in text)


def char_class(chars: Iterable[str]) -> str:
    """A regular expression for any one of these characters."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, chars)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"\\x{{{low:X}}}-\\x{{{high:X}}}" for low, high in ranges) + "]"


def alternatives(texts: Iterable[str]) -> str:
    """A regular expression for the longest of these texts at a position."""
    return "|".join(quote(text) for text in sorted(texts, key=lambda text: (-len(text), text)))


def replace(content: str, *, regex: str | None = None, text: str | None = None) -> Step:
    """Replace each match of a regular expression, or each occurrence of a text, with `content`."""
    return {"type": "Replace", "pattern": {"Regex": regex} if text is None else {"String": text}, "content": content}


def read_rules(charsmap: bytes) -> dict[str, str]:
    """The table as source -> target, both text.

    The file format: the size of a trie in bytes (uint32, little endian), the trie as a double array of uint32 units
    (darts-clone), then all targets, each ended by a zero byte; a source's value is its target's offset there.

    Raises UserError if the table is damaged: also where `tokenizers`, which reads it without looking, would panic or go
    on for ever.
    """
    try:
        (size,) = struct.unpack_from("<I", charsmap)
        if size % 4:
            raise ValueError("its trie is no array")
        units = np.frombuffer(charsmap, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
        targets = charsmap[4 + size :]
        targets.decode()
        found = _suffixes(_base(0, units), units, {})
        texts = {at: targets[at : targets.index(b"\0", at)].decode() for at in {at for _, at in found}}
        return {source.decode(): texts[at] for source, at in found}
    except (struct.error, ValueError, IndexError, RecursionError) as error:
        raise UserError(f"the tokenizer's precompiled_charsmap is damaged ({error})") from error


def _base(position: int, units: np.ndarray) -> int:
    """Where the children of the node at `position` are: child `label` is at base XOR label, the value at base."""
    unit = int(units[position])
    return position ^ (unit >> 10 << ((unit & 0x200) >> 6))


def _suffixes(base: int, units: np.ndarray, memo: dict[int, list[tuple[bytes, int]]]) -> list[tuple[bytes, int]]:
    """(rest of the source, offset of the target) below a node. The table shares branches: `memo` is keyed by base."""
    if base not in memo:
        labels = np.arange(1, 256)
        children = base ^ labels
        if int(children.max()) >= len(units):
            raise IndexError("its trie leads out of itself")
        found = []
        for label in labels[(units[children] & 0x800000FF) == labels]:
            child = base ^ int(label)
            below = _base(child, units)
            first = bytes([label])
            if units[child] >> 8 & 1:
                found.append((first, int(units[below]) & 0x7FFFFFFF))
            longer = _suffixes(below, units, memo)
            if len(found) + len(longer) > MAX_SOURCES:
                raise ValueError("its trie has no end")
            found.extend((first + rest, at) for rest, at in longer)
        memo[base] = found
    return memo[base]


@dataclass(frozen=True)
class _Signs:
    """The characters barriers are made of, chosen so that the table touches none.

    `fence` + `unit` stands between two pieces of text that SentencePiece maps apart, `fence` + `inner` between the
    characters of one source, `fence` + `escape` for a fence character of the text itself, `fence` + `number` times n
    for the n-th user-defined symbol. `between` separates the sources when the steps are checked.
    """

    fence: str
    between: str
    unit: str
    inner: str
    escape: str
    number: str


def charsmap_steps(charsmap: bytes, name: str, kept: Sequence[str], prefix: bool, collapse: bool) -> list[Step]:
    """Normalizers that map text as the table does. It takes some seconds: every source of the table is tried.

    `kept` are the user-defined symbols, which SentencePiece takes out of the text before it consults the table.
    `prefix` puts a space sign before the text, unless it is empty before mapping. `collapse` says that spaces will be
    collapsed afterwards; SentencePiece leaves those inside one target. `name` is for messages.

    Raises UserError if the table does something no combination of normalizers found here does.
    """
    rules = read_rules(charsmap)
    if collapse and any("  " in target for target in rules.values()):
        raise _inexact(name, "  ")
    signs = _signs(rules, kept, name)
    wanted = {source: target for source, target in rules.items() if not source.startswith(tuple(kept))}
    wanted.update((symbol, symbol) for symbol in kept)
    parts = _parts(charsmap, rules, signs, kept)
    exceptions: dict[str, str] = {}
    for source, got in _normalize(_assemble(parts, signs, {}, False), list(wanted), signs):
        if wanted[source] != got and exceptions.setdefault(got, wanted[source]) != wanted[source]:
            raise _inexact(name, source)
    _check_exceptions(exceptions, wanted, parts, name)
    steps = _assemble(parts, signs, exceptions, False)
    repaired = set(exceptions.values())
    for source, got in _normalize(steps, [source for source, target in wanted.items() if target in repaired], signs):
        if got != wanted[source]:
            raise _inexact(name, source)
    return _assemble(parts, signs, exceptions, prefix)


def _inexact(name: str, source: str) -> UserError:
    return UserError(
        f"the tokenizer's normalization {name or 'without a name'} cannot be written as tokenizer.json exactly: "
        f"its rule for {source!a} has no equivalent; use a tokenizer with nmt_nfkc, nfkc or identity"
    )


def _signs(rules: dict[str, str], kept: Sequence[str], name: str) -> _Signs:
    sources = {char for text in (*rules, *kept) for char in text}
    targets = {char for text in rules.values() for char in text}
    fences = [char for char in FENCES if char not in sources | targets]
    marks = [char for char in MARKS if char not in sources]
    if len(fences) < 2 or len(marks) < 4:
        raise _inexact(name, FENCES if len(fences) < 2 else MARKS)
    return _Signs(*fences[:2], *marks[:4])


def _plain(rules: dict[str, str]) -> set[str]:
    """ASCII characters of which runs need no barriers inside: the table keeps them, no longer source starts there.

    Of two ASCII characters only \\r\\n is a grapheme cluster.
    """
    starts = {source[0] for source in rules if len(source) > 1 and source[1].isascii()}
    return {chr(code) for code in range(128)} - rules.keys() - starts - {"\r"}


@dataclass(frozen=True)
class _Parts:
    """Steps that every table needs: up to it, those that compose after it, and those that put symbols back.

    `aside` are the user-defined symbols that are put back; no step in between sees them. `plain` are the characters of
    which runs stand between two barriers.
    """

    before: list[Step]
    compose: list[Step]
    restore: list[Step]
    aside: list[str]
    plain: set[str]


def _parts(charsmap: bytes, rules: dict[str, str], signs: _Signs, kept: Sequence[str]) -> _Parts:
    """The steps for this table, not yet those for exceptions and prefix."""
    long = [source for source in rules if len(source) > 1]
    later = {char for source in long for char in source[1:]}
    plain = _plain(rules)
    own = [alternatives(kept)] if kept else []
    units = [*own, f"(?:{f'(?!{own[0]})' if own else ''}{char_class(plain)}(?![^\\x{{0}}-\\x{{7F}}]))+"]
    if long:
        units.append(f"(?=[\\s\\S]{char_class(later)}){_longest(long)}")
    units.append("[\\s\\S]")
    before = [replace(signs.fence + signs.escape, text=signs.fence)]
    before.append(replace(signs.fence + signs.unit, regex=f"(?>{'|'.join(units)})\\K"))
    # Symbols the table or NFC would change step aside as numbers.
    aside = [symbol for symbol in kept if any(char in rules or char in later for char in symbol)]
    compose, restore = [], []
    for count, symbol in enumerate(aside, start=1):
        before.append(replace(signs.fence + signs.number * count, regex=_alone(symbol, signs)))
        numbers = f"{quote(signs.number)}{{{count}}}(?={quote(signs.fence)})"
        restore.append(replace(symbol, regex=quote(signs.fence) + numbers))
    if long:
        outside = char_class([signs.unit, signs.escape]).replace("[", "[^", 1)
        before.append(replace(signs.fence + signs.inner, regex=f"(?<={outside})(?={char_class(later)})"))
        # NFC must not touch characters the table leaves alone; a table of some other purpose gets exceptions instead.
        # (Above the supplementary ideographs there is nothing to compose.)
        composes = all(chr(code) in rules for code in range(0x30000) if not is_normalized("NFC", chr(code)))
        nfc = [{"type": "NFC"}] if composes else []
        compose = [replace("", text=signs.fence + signs.inner), *nfc]
    # Precompiled miscounts, and may panic, when what it deletes comes first; Replace does not.
    deleted = [source for source, target in rules.items() if not target and len(source) == 1]
    if deleted:
        before.append(replace("", regex=char_class(deleted)))
    before.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")})
    return _Parts(before, compose, restore, aside, plain)


def _alone(text: str, signs: _Signs) -> str:
    """A regular expression for `text` where it is all there is between two barriers, or the start and a barrier."""
    return f"(?<![^{quote(signs.unit)}]){quote(text)}(?={quote(signs.fence)})"


def _assemble(parts: _Parts, signs: _Signs, exceptions: dict[str, str], prefix: bool) -> list[Step]:
    # A prefix joins after the table, which is not to map it, and while the barriers of deleted text still stand.
    first = [{"type": "Prepend", "prepend": SPACE + signs.fence + signs.unit}] if prefix else []
    own = [replace(right, regex=_alone(wrong, signs)) for wrong, right in sorted(exceptions.items())]
    barriers = [replace("", text=signs.fence + signs.unit), replace(signs.fence, text=signs.fence + signs.escape)]
    return [*parts.before, *first, *parts.compose, *own, *parts.restore, *barriers]


def _check_exceptions(exceptions: dict[str, str], wanted: dict[str, str], parts: _Parts, name: str) -> None:
    """Refuse a replacement that other text could meet: what some source rightly becomes, or what the table leaves."""
    right = {target for source, target in wanted.items() if source not in parts.aside}
    for wrong, target in exceptions.items():
        untouched = parts.plain.issuperset(wrong) or (len(wrong) == 1 and wrong not in wanted)
        if untouched or wrong in right or len(exceptions) > MAX_EXCEPTIONS:
            raise _inexact(name, next(source for source in wanted if wanted[source] == target))


def _longest(sources: Iterable[str]) -> str:
    """A regular expression for the longest of these sources at a position; equal branches are written once."""
    trie: dict[str, Any] = {}
    for source in sources:
        node = trie
        for char in source:
            node = node.setdefault(char, {})
        node[""] = {}
    return _branch(trie)


def _branch(node: dict[str, Any]) -> str:
    same: dict[str, list[str]] = {}
    for char, below in node.items():
        if char:
            same.setdefault(_branch(below), []).append(char)
    if not same:
        return ""
    body = "(?:" + "|".join(char_class(chars) + rest for rest, chars in same.items()) + ")"
    return body + "?" if "" in node else body


def _normalize(steps: list[Step], texts: Sequence[str], signs: _Signs) -> Iterator[tuple[str, str]]:
    """Pairs of a text and what the steps make of it; all in one go, which is much faster."""
    from tokenizers import Tokenizer

    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    tokenizer = Tokenizer.from_str(json.dumps(content))
    results = tokenizer.normalizer.normalize_str(signs.between.join(texts)).split(signs.between)
    assert len(results) == max(1, len(texts)), "a separator appeared or vanished"
    return zip(texts, results)
