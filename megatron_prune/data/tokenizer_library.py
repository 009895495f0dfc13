"""A tokenizer as transformers' `AutoTokenizer` gives it: added and special tokens, padding side, chat templates.

    load_library   TokenizerPlace -> the tokenizer; no code of the folder is run
    prepares_alike whether it prepares text as the folder's tokenizer.json says
    added_tokens   id -> token added to the vocabulary
    extra_tokens   those that are not in the vocabulary file itself
    special_id     the begin- or end-of-document id: the tokenizer's, else a configuration's
    adds_bos       whether calling it begins with the begin-of-sequence id

transformers picks a class by the folder's settings and the model's type, and some classes (of version 5 above all) put
their own preparation of text in the place of tokenizer.json's. What transformers gives is what counts here, for
training, export, GGUF and evaluation alike; but where that gives ordinary text other ids than the vocabulary file has
for it, the folder is refused.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_prune.data.hub_files import LFS_HINT, is_lfs_pointer
from megatron_prune.data.leftovers import scratch_folder
from megatron_prune.data.tokenizer_files import (
    SENTENCEPIECE,
    SIDE_FILES,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    VOCABULARY_FILES,
    TokenizerPlace,
    settings_in,
)
from megatron_prune.errors import UserError

ORDINARY_TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "It's 12,345.67% of what they'd said: why (or not)?",
    "Two  spaces between,\nand a line.",
    "na\u00efve caf\u00e9, \u6771\u4eac \u2013 \ufb01ne",
)
"""Text whose ids do not depend on how special tokens, or white space at its ends, are taken."""

_PROBES = ("  two", "\n\n12", "a   12", " one\n\n\n two  ", "\t\u2581x")
"""Text whose ids do depend on that."""
PLAIN_CLASS = 'state "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_NEVER_OPENED = ("name_or_path", "special_tokens_map_file")  # where it was once saved
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_library(place: TokenizerPlace) -> Any:
    """The tokenizer as `AutoTokenizer` gives it: added and special tokens, padding side, chat templates. Raises
    UserError: transformers is not installed, cannot read the folder, would need code from it, or picks a class that
    gives ordinary text other ids than the vocabulary file does."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{place.path}: reading it needs transformers: install megatron-prune[hf]") from error
    refuse_code(place.folder)
    refuse_paths(place.folder)
    with _as_folder(place) as folder:
        try:
            tokenizer = _read(place, folder, transformers)
            _try_out(tokenizer)
        except BaseException as error:  # a zoo of exceptions; a panic of tokenizers is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if is_lfs_pointer(place.vocabulary):
                raise UserError(f"{place.vocabulary}: {LFS_HINT}") from error
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"{place.vocabulary}: is no tokenizer that transformers can read: {reason}") from error
        # Calls take neither from tokenizer.json; its backend alone would.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        _check_ordinary(place, tokenizer)
    return tokenizer


def _read(place: TokenizerPlace, folder: Path, transformers: Any) -> Any:
    """What `AutoTokenizer` makes of the folder; where nothing names a class, what tokenizer.json alone says.

    So does version 5; version 4 takes a class by the folder's name ("bert-corpus"), or none. Raises what they raise.
    """
    settings = settings_in(folder / "config.json") | settings_in(folder / "tokenizer_config.json")
    named = settings.get("tokenizer_class") or settings.get("model_type") or not _is_tokenizer_json(place.vocabulary)
    reader = transformers.AutoTokenizer if named else transformers.PreTrainedTokenizerFast
    return reader.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _try_out(tokenizer: Any) -> None:
    """Settings of a wrong type are accepted, and raise only when used: use them. Raises whatever that raises."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"it is a {type(tokenizer).__name__}, which has no tokenizer.json; save it as one")
    names = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "padding_side", "truncation_side")
    settings = {name: getattr(tokenizer, name) for name in (*names, "all_special_ids", "model_input_names")}
    json.dumps(settings, ensure_ascii=False).encode()
    tokenizer.decode(tokenizer("a")["input_ids"])


def refuse_code(folder: Path) -> None:
    """Raise UserError if the folder's tokenizer is code of its own."""
    if "auto_map" in settings_in(folder / "tokenizer_config.json"):
        file = folder / "tokenizer_config.json"
        raise UserError(f"{file}: auto_map asks for code outside transformers; use a tokenizer without it")


def refuse_paths(folder: Path) -> None:
    """Classes take whatever the settings say as their arguments, and open what these name, wherever it is. Raises
    UserError: the settings of the folder's tokenizer name a file outside of it."""
    for name in _SETTINGS:
        inner: list[Any] = [settings_in(folder / name)]
        while inner:
            value = inner.pop()
            if isinstance(value, dict):
                inner += [one for key, one in value.items() if key not in _NEVER_OPENED]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and os.path.isfile(value) and not _is_in(folder, value):
                raise UserError(f"{folder / name}: names the file {value}, outside of its folder; take the entry out")


def _is_in(folder: Path, file: str) -> bool:
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


@contextlib.contextmanager
def _as_folder(place: TokenizerPlace) -> Iterator[Path]:
    """A folder that transformers reads this tokenizer from: its own, unless its file has a name of its own."""
    if place.vocabulary.name in VOCABULARY_FILES:
        yield place.folder.resolve()
        return
    with scratch_folder() as staged:
        shutil.copyfile(place.vocabulary, staged / TOKENIZER_JSON)
        for name in (*SIDE_FILES, "config.json"):
            if (place.folder / name).is_file():
                shutil.copyfile(place.folder / name, staged / name)
        yield staged


def _check_ordinary(place: TokenizerPlace, tokenizer: Any) -> None:
    """Compare transformers' reading of ordinary text with the vocabulary file's own library."""
    text = _first_difference(place, tokenizer, ORDINARY_TEXTS)
    if text is None:
        return
    way_on = (
        f"to read the file alone, use --tokenizer-type {SENTENCEPIECE}"
        if place.vocabulary.name == TOKENIZER_MODEL
        else f"to go by the file, {PLAIN_CLASS}"
    )
    raise UserError(
        f"{place.folder}: transformers reads {place.vocabulary.name} as {type(tokenizer).__name__}, and gives "
        f"other ids than the file itself has for {text!a}; {way_on}"
    )


def unlike_its_file(place: TokenizerPlace, tokenizer: Any) -> str | None:
    """Unusual text for which transformers' ids are not those of tokenizer.json itself; None where there is none."""
    return _first_difference(place, tokenizer, _PROBES) if place.vocabulary.name != TOKENIZER_MODEL else None


def _first_difference(place: TokenizerPlace, tokenizer: Any, texts: tuple[str, ...]) -> str | None:
    encode = _own_encoder(place.vocabulary)
    if encode is None:
        return None
    added = [token.content for token in added_tokens(tokenizer).values()]
    plain = (text for text in texts if not any(token in text for token in added))
    ids = tokenizer.backend_tokenizer.encode
    return next((text for text in plain if ids(text, add_special_tokens=False).ids != encode(text)), None)


def _own_encoder(vocabulary: Path) -> Callable[[str], list[int]] | None:
    """A function text -> ids by the file alone; None where there is none (vocab.json, tiktoken's files)."""
    if vocabulary.name == TOKENIZER_MODEL:
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(vocabulary)).encode
        except (RuntimeError, OSError):
            return None  # tiktoken's format, which transformers reads under this name too
    if not _is_tokenizer_json(vocabulary):
        return None
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(vocabulary))
    raw.no_truncation()
    raw.no_padding()
    return lambda text: raw.encode(text, add_special_tokens=False).ids


def _is_tokenizer_json(vocabulary: Path) -> bool:
    return vocabulary.suffix == ".json" and vocabulary.name != "vocab.json"


def prepares_alike(place: TokenizerPlace, tokenizer: Any) -> bool:
    """Whether the tokenizer prepares and decodes text just as the folder's tokenizer.json says."""
    if not _is_tokenizer_json(place.vocabulary):
        return False
    from tokenizers import Tokenizer

    raw = json.loads(Tokenizer.from_file(str(place.vocabulary)).to_str())
    read = json.loads(tokenizer.backend_tokenizer.to_str())
    return all(raw[part] == read[part] for part in ("normalizer", "pre_tokenizer", "decoder"))


def added_tokens(tokenizer: Any) -> dict[int, Any]:
    """id -> `tokenizers.AddedToken` of a tokenizer that transformers loaded, in order of ids."""
    return dict(sorted(tokenizer.backend_tokenizer.get_added_tokens_decoder().items()))


def extra_tokens(place: TokenizerPlace, tokenizer: Any) -> list[Any]:
    """The added tokens that are not in the vocabulary file: (id, text, flags), as plain values for a fingerprint."""
    known: set[str] = set()
    if _is_tokenizer_json(place.vocabulary):
        listed = settings_in(place.vocabulary).get("added_tokens") or []
        known = {json.dumps(_flags(entry["id"], entry), sort_keys=True) for entry in listed}
    found = []
    for number, token in added_tokens(tokenizer).items():
        entry = _flags(number, {name: getattr(token, name) for name in ("content", *_FLAGS)})
        if json.dumps(entry, sort_keys=True) not in known:
            found.append(entry)
    return found


def _flags(number: int, token: dict[str, Any]) -> list[Any]:
    return [number, token["content"], *(bool(token.get(name)) for name in _FLAGS)]


def special_id(folder: Path, tokenizer: Any, name: str) -> int | None:
    """The id of `bos` or `eos`: the tokenizer's, else the (first) one in generation_config.json or config.json."""
    number = getattr(tokenizer, f"{name}_token_id")
    if number is not None:
        return int(number)
    size = max(tokenizer.get_vocab().values()) + 1
    for file in ("generation_config.json", "config.json"):
        value = settings_in(folder / file).get(f"{name}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and 0 <= first < size:
            return first
    return None


def adds_bos(library: Any) -> bool:
    """Whether calling a loaded tokenizer begins with the begin-of-sequence id: its files say so in several ways."""
    return library.bos_token_id is not None and library("a")["input_ids"][:1] == [library.bos_token_id]
