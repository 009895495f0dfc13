"""Which file of a folder is its tokenizer: decided here, once.

    find_tokenizer    path -> TokenizerPlace: the kind, and the vocabulary file that wins
    holds_tokenizer   whether a folder has one at all
    settings_in       what a settings file says, {} where there is none

Training, export, GGUF and evaluation all ask here. The order is transformers': `tokenizer.json` wins over whatever lies
beside it (a foreign `tokenizer.model` is not looked at), then `tokenizer.model`, then `vocab.json`. A `tokenizer.model`
with nothing beside it that says more (`SIDE_FILES`) is SentencePiece's own; with such files, added tokens, special
tokens and chat templates are theirs, and transformers reads it all (tokenizer_library).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.data.hub_files import present, read_json
from megatron_prune.errors import UserError
from megatron_prune.reading import LARGEST

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"
TOKENIZER_TYPES = (SENTENCEPIECE, HUGGING_FACE)

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
VOCABULARY_FILES = (TOKENIZER_JSON, TOKENIZER_MODEL, "vocab.json")
"""In the order in which they win."""

CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", CHAT_TEMPLATE_FOLDER)
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *CHAT_TEMPLATE_FILES)
"""What says more of a tokenizer than its vocabulary file; the last name is a folder."""

FIELD = "data.tokenizer_model (--tokenizer-model)"


@dataclass(frozen=True)
class TokenizerPlace:
    """Where a tokenizer lies.

    Attributes:
        kind: one of TOKENIZER_TYPES.
        path: as the user gave it.
        vocabulary: the file that holds its vocabulary.
    """

    kind: str
    path: str
    vocabulary: Path

    @property
    def folder(self) -> Path:
        """Where the files beside the vocabulary lie."""
        return self.vocabulary.parent


def find_tokenizer(path: str | Path, kind: str | None = None) -> TokenizerPlace:
    """Decide what the tokenizer at a path is.

    Args:
        path: a folder, or a file: `*.json` is Hugging Face's (`tokenizer.json` stands for its folder), any other file
            SentencePiece's.
        kind: one of TOKENIZER_TYPES, to overrule what is seen.

    Raises:
        UserError: nothing lies there, the kind is unknown or does not fit, or a `tokenizer.model` is named whose folder
            adds tokens to it.
    """
    if kind not in (None, *TOKENIZER_TYPES):
        raise UserError(
            f'data.tokenizer_type (--tokenizer-type): "{kind}" is unknown; use {" or ".join(TOKENIZER_TYPES)}'
        )
    place = Path(path)
    if not place.exists():
        raise UserError(f"{FIELD}: {path} does not exist")
    if place.is_file():
        seen = HUGGING_FACE if place.suffix == ".json" else SENTENCEPIECE
        if kind is None and seen == SENTENCEPIECE:
            _refuse_to_lose(place)
        if (kind or seen) == HUGGING_FACE:
            _insist_readable(place.parent, ("config.json", *SIDE_FILES), named=place)
        return TokenizerPlace(kind or seen, str(path), place)
    if kind == SENTENCEPIECE:
        if not present(place / TOKENIZER_MODEL):
            raise UserError(f"{FIELD}: {place / TOKENIZER_MODEL} does not exist")
        _insist_readable(place, (TOKENIZER_MODEL,))
        return TokenizerPlace(kind, str(path), place / TOKENIZER_MODEL)
    name = next((name for name in VOCABULARY_FILES if present(place / name)), None)
    if name is None:
        raise UserError(f"{FIELD}: {path} holds neither tokenizer.json nor tokenizer.model")
    _insist_readable(place, (name, "config.json", *SIDE_FILES))
    bare = name == TOKENIZER_MODEL and not any((place / side).exists() for side in SIDE_FILES)
    if bare and kind == HUGGING_FACE:
        raise UserError(
            f"{FIELD}: {path} holds no tokenizer.json; a bare tokenizer.model is read with --tokenizer-type "
            f"{SENTENCEPIECE}"
        )
    return TokenizerPlace(SENTENCEPIECE if bare else HUGGING_FACE, str(path), place / name)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary file. Raises UserError as `present` does."""
    return any(present(folder / name) for name in VOCABULARY_FILES)


def _insist_readable(folder: Path, names: Iterable[str], named: Path | None = None) -> None:
    """transformers leaves out what is no file, and reads as much as there is, by names that its classes know.

    Args:
        named: a file that the user named, and that may be a link to anywhere.

    Raises:
        UserError: something else stands in the place of one of these files, or it is larger than any of its kind; any
            file of the folder is a link out of it.
    """
    templates = folder / CHAT_TEMPLATE_FOLDER
    more = sorted(templates.glob("*.jinja")) if templates.is_dir() else []
    more += [file for file in sorted(folder.iterdir()) if file.is_symlink() and file.is_file() and file != named]
    for file in [*(folder / name for name in names if name != CHAT_TEMPLATE_FOLDER), *more]:
        if present(file, folder) and file.stat().st_size > LARGEST:
            raise UserError(f"{file}: is larger than {LARGEST:,} bytes, which no tokenizer is")


def _refuse_to_lose(file: Path) -> None:
    """A file `tokenizer.model`, named by itself, must not lose the tokens that its folder adds to it."""
    folder = file.parent
    if file.name != TOKENIZER_MODEL:
        return
    listed = [
        *(settings_in(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).values(),
        *(settings_in(folder / TOKENIZER_JSON).get("added_tokens") or []),
    ]
    texts = {str(token.get("content")) for token in listed if isinstance(token, dict)}
    texts |= set(settings_in(folder / "added_tokens.json"))
    if not texts:
        return
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        return  # whoever reads it says what is wrong
    pieces = {model.id_to_piece(number) for number in range(model.get_piece_size())}
    more = sorted(texts - pieces)
    if more:
        raise UserError(
            f"{FIELD}: {file} lacks tokens that its folder adds ({more[0]!a}{' and more' if more[1:] else ''}); "
            f"name the folder, or leave them out with --tokenizer-type {SENTENCEPIECE}"
        )


def settings_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file. Raises UserError as `read_json` does."""
    return read_json(file) if present(file) else {}
