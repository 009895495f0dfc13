"""The tokenizer of a Hugging Face folder, taken along into an export: the same ids, special tokens and chat.

    copy_tokenizer     TokenizerPlace -> files in the export's folder, checked as `AutoTokenizer` reads them there
    compare_tokenizers what `AutoTokenizer` makes of an export against the tokenizer it comes from

Files are copied as they are where that is enough. Often it is not: the class that transformers picks depends on the
model's type, which an export may change, on its version, and may not do what tokenizer.json says; a `tokenizer.model`
with added tokens beside it is converted anew by every version. Then what `AutoTokenizer` makes of the source is written
in the plainest form (`PreTrainedTokenizerFast`), which versions 4.48 to 5 read alike.
"""

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.data.tokenizer_files import (
    SENTENCEPIECE,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TokenizerPlace,
    find_tokenizer,
    settings_in,
)
from megatron_prune.data.tokenizer_library import added_tokens, load_library, prepares_alike
from megatron_prune.errors import UserError
from megatron_prune.huggingface.chat import as_setting, chat_templates, render_chats
from megatron_prune.huggingface.sentencepiece_model import belongs
from megatron_prune.huggingface.tokenizer_export import NASTY_TEXTS, verify_tokenizer
from megatron_prune.runtime.folders import write_file

logger = logging.getLogger(__name__)

COPIED = (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
"""What belongs to a tokenizer in a Hugging Face folder."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of a tokenizer_config.json, what only the class or the files it was written for understand.
_OF_ANOTHER_FORM = {
    *("tokenizer_class", "auto_map", "backend", "processor_class", "init_inputs", "legacy", "sp_model_kwargs"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template"),
    *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "name_or_path"),
    *("add_prefix_space", "spaces_between_special_tokens", "is_local", "local_files_only", "use_fast"),
}
_MOST_ADDED = 200  # added tokens whose ids in a text are compared, from both ends of the list


@dataclass(frozen=True)
class _Reading:
    """What transformers makes of a folder: its tokenizer and chat templates."""

    library: Any
    templates: dict[str, str]


def copy_tokenizer(place: TokenizerPlace, save_dir: Path) -> None:
    """Write a Hugging Face tokenizer into an export's folder, for a model trained with that very tokenizer.

    Arguments:
        place: what `find_tokenizer` found, of the kind HUGGING_FACE.
        save_dir: the export's folder, with its config.json where it has one; made if absent.

    Raises:
        UserError: transformers is missing or cannot read the tokenizer, it needs code of its own, or no files make
            transformers read it in `save_dir` as it does in its own folder.
    """
    if place.folder.resolve() == save_dir.resolve():
        return
    source = _read(place)
    save_dir.mkdir(parents=True, exist_ok=True)
    ways = [_write_plain, _copy_files]
    if prepares_alike(place, source.library) and not _is_for_version_5(place):
        ways.reverse()
    found: str | None = None
    for write in ways:
        write(place, save_dir, source)
        difference = _difference_there(source, save_dir)
        if difference is None:
            return
        found = found or difference
        _remove_files(save_dir)
    raise UserError(f"{place.folder}: its tokenizer would be another one beside the exported config.json: {found}")


def _is_for_version_5(place: TokenizerPlace) -> bool:
    return settings_in(place.folder / "tokenizer_config.json").get("tokenizer_class") == "TokenizersBackend"


def _difference_there(source: _Reading, save_dir: Path) -> str | None:
    try:
        written = _read(find_tokenizer(save_dir))
    except UserError:
        return "the class that transformers picks there reads other ids, or nothing"
    return _difference(source, written, NASTY_TEXTS)


def compare_tokenizers(place: TokenizerPlace, save_dir: Path, texts: Iterable[str]) -> dict[str, str]:
    """Check that `AutoTokenizer` reads an export's folder as the tokenizer it comes from; returns the rendered chats.

    For every text the same ids and the same decoded text; the same vocabulary, special tokens, padding side and chat
    templates, and what these make of some conversations. Raises UserError: they differ; names the first difference."""
    if place.kind == SENTENCEPIECE:
        verify_tokenizer(place.vocabulary, save_dir, texts)
        return {}
    source, exported = _read(place), _read(find_tokenizer(save_dir))
    found = _difference(source, exported, texts)
    chats = render_chats(source.library, source.templates)
    if found is None and chats != render_chats(exported.library, exported.templates):
        found = "its chat templates render other text"
    if found is not None:
        raise UserError(f"{save_dir}: its tokenizer is another one than {place.path}'s: {found}")
    return chats


def _read(place: TokenizerPlace) -> _Reading:
    library = load_library(place)
    return _Reading(library, chat_templates(place.folder, library))


# Writing --------------------------------------------------------------------------------------------------------------


def _copy_files(place: TokenizerPlace, save_dir: Path, source: _Reading) -> None:
    """The files as they are; a chat template that lies where no tokenizer looks goes into tokenizer_config.json."""
    for name in COPIED:
        file = place.folder / name
        if name == TOKENIZER_MODEL and file.is_file() and not belongs(file, source.library):
            logger.warning(
                "%s: holds other tokens than %s, which is the model's; left out", file, place.vocabulary.name
            )
        elif file.is_dir():
            (save_dir / name).mkdir(exist_ok=True)
            for template in sorted(file.glob("*.jinja")):
                shutil.copyfile(template, save_dir / name / template.name)
        elif file.is_file():
            shutil.copyfile(file, save_dir / name)
    if place.vocabulary.name not in COPIED:
        shutil.copyfile(place.vocabulary, save_dir / TOKENIZER_JSON)
    if source.templates and not source.library.chat_template:
        config = settings_in(save_dir / "tokenizer_config.json") | {"chat_template": as_setting(source.templates)}
        _write_json(save_dir / "tokenizer_config.json", config)
        (save_dir / "chat_template.json").unlink(missing_ok=True)


def _remove_files(save_dir: Path) -> None:
    for name in COPIED:
        if (save_dir / name).is_dir():
            shutil.rmtree(save_dir / name)
        else:
            (save_dir / name).unlink(missing_ok=True)


def _write_plain(place: TokenizerPlace, save_dir: Path, source: _Reading) -> None:
    """tokenizer.json as transformers built it, and all settings in one tokenizer_config.json."""
    library = source.library
    content = json.loads(library.backend_tokenizer.to_str())
    _write_json(save_dir / TOKENIZER_JSON, content)
    stated = settings_in(place.folder / "tokenizer_config.json")
    names = {name: str(getattr(library, name)) for name in _NAMED if getattr(library, name) is not None}
    config = {key: value for key, value in stated.items() if key not in _OF_ANOTHER_FORM and key not in _NAMED}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "padding_side": library.padding_side,
        "truncation_side": library.truncation_side,
        "clean_up_tokenization_spaces": bool(library.clean_up_tokenization_spaces),
        "split_special_tokens": bool(library.split_special_tokens),
        "model_input_names": list(library.model_input_names),
    }
    others = [token for token in library.all_special_tokens if token not in names.values()]
    if others:
        config["additional_special_tokens"] = others
    # transformers 4 would set the pre-tokenizer's to what is stated here, or to False.
    prefixed = (content.get("pre_tokenizer") or {}).get("add_prefix_space")
    if prefixed is not None:
        config["add_prefix_space"] = prefixed
    if source.templates:
        config["chat_template"] = as_setting(source.templates)
    _write_json(save_dir / "tokenizer_config.json", config)
    model = place.folder / TOKENIZER_MODEL
    if model.is_file() and belongs(model, library):
        shutil.copyfile(model, save_dir / TOKENIZER_MODEL)


def _write_json(file: Path, content: Any) -> None:
    try:
        write_file(file, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode(), lasting=False)
    except UnicodeEncodeError as error:
        raise UserError(f"the source's {file.name} holds text that is no valid Unicode ({error.reason})") from error


# Comparing ------------------------------------------------------------------------------------------------------------


def _difference(ours: _Reading, theirs: _Reading, texts: Iterable[str]) -> str | None:
    """The first thing in which two readings differ, in words; None where they are the same tokenizer."""
    a, b = ours.library, theirs.library
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "padding_side", "truncation_side"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(b, name)} instead of {getattr(a, name)}"
    if a.get_vocab() != b.get_vocab():
        return f"its vocabulary has {len(b.get_vocab())} tokens, or other ones, instead of {len(a.get_vocab())}"
    if set(a.all_special_ids) != set(b.all_special_ids):
        return "other tokens are special"
    if ours.templates != theirs.templates:
        return "its chat templates differ"
    return _text_difference(a, b, texts)


def _text_difference(a: Any, b: Any, texts: Iterable[str]) -> str | None:
    added = [token.content for token in added_tokens(a).values()]
    if len(added) > _MOST_ADDED:
        added = [*added[: _MOST_ADDED // 2], *added[-_MOST_ADDED // 2 :]]
    marked = [text for token in added for text in (f"time{token}was", f" {token} a\n{token}")]
    for text in (*texts, *marked):
        expected, got = (library(text, add_special_tokens=False, verbose=False)["input_ids"] for library in (a, b))
        if got != expected:
            return f"for the text {text[:100]!a} its ids are {got[:8]} instead of {expected[:8]}"
        for skip in (False, True):
            decoded = [library.decode(expected, skip_special_tokens=skip) for library in (a, b)]
            if decoded[0] != decoded[1]:
                return f"{expected[:8]} is {decoded[1][:100]!a} instead of {decoded[0][:100]!a}"
    framed = [library("a", verbose=False)["input_ids"] for library in (a, b)]
    if framed[0] != framed[1]:
        return f"it begins or ends texts in another way ({framed[1]} instead of {framed[0]})"
    return None
