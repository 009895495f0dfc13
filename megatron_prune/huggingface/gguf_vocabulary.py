"""The tokenizer of a GGUF file as files of a Hugging Face folder: what `gguf_tokenizer` does, the other way.

    write_tokenizer   metadata -> tokenizer.json, tokenizer_config.json (and tokenizer.model, if it is SentencePiece's)

llama.cpp's tokenizers are known by names; the few whose splitting is known are written, others refused. transformers'
own conversion leaves out how text is split before merging (SmolLM's digits one by one): other ids than the model was
trained with. What is written is read back as a GGUF file's vocabulary and compared with what this file holds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.data.leftovers import scratch_folder
from megatron_prune.errors import UserError
from megatron_prune.huggingface.chat import DEFAULT, as_setting
from megatron_prune.huggingface.gguf_tokenizer import (
    CONTROL,
    FURTHER_ENDS,
    KNOWN_ENDS,
    SPLITS,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
)
from megatron_prune.huggingface.sentencepiece_model import PieceKind, SentencePieceModel, SpmPiece, write_model
from megatron_prune.huggingface.tokenizer_export import export_tokenizer
from megatron_prune.model.shape import LlamaShape
from megatron_prune.runtime.folders import write_file

_KEY = "tokenizer.ggml."
# Our word (a Vocabulary's) -> GGUF's.
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_TOKEN_TYPES = range(1, 7)
_SENTENCEPIECE = {"llama": "bpe", "t5": "unigram"}


def write_tokenizer(fields: Mapping[str, Any], folder: Path, shape: LlamaShape, where: str) -> list[int]:
    """Write the tokenizer that a GGUF file's metadata describes into `folder`, beside its config.json.

    Args:
        fields: the metadata by GGUF's names. where: begins complaints.

    Returns:
        Ids that llama.cpp ends a text at, the tokenizer's own first.

    Raises:
        UserError: it is of a kind that is not known, damaged, or what was written would give other ids.
    """
    stored = _Stored(fields, shape.vocab_size, where)
    if stored.model == "gpt2":
        _write_byte_level(stored, folder, shape.max_position_embeddings)
    elif stored.model in _SENTENCEPIECE:
        _write_sentencepiece(stored, folder, shape.max_position_embeddings)
    else:
        raise stored.refuse("model", f"{stored.model!r} is not read ({', '.join(_SENTENCEPIECE)} and gpt2 are)")
    _compare(stored, folder)
    return stored.ends


class _Stored:
    """The metadata, checked: as many tokens as the model has rows, types and special ids that exist."""

    def __init__(self, fields: Mapping[str, Any], rows: int, where: str) -> None:
        self._fields, self.where = fields, where
        self.model, self.pre = self.get("model"), self.get("pre", "default")
        self.tokens, self.types = self._list("tokens", str), self._list("token_type", int)
        if not len(self.tokens) == len(self.types) == rows:
            raise self.refuse("tokens", f"{len(self.tokens)} with {len(self.types)} types; the model has {rows} rows")
        if not set(self.types) <= set(_TOKEN_TYPES):
            raise self.refuse("token_type", "holds types that are unknown")
        self.special: dict[str, int] = {}
        for name, theirs in _SPECIAL.items():
            number = self.get(theirs)
            if number is not None and not (isinstance(number, int) and 0 <= number < rows):
                raise self.refuse(theirs, f"{number!r} is none of the model's {rows} ids")
            if number is not None:
                self.special[name] = number
        self.add_bos = bool(self.get("add_bos_token", self.model == "llama"))
        if self.get("add_eos_token", self.model == "t5"):  # what llama.cpp does where a file does not say
            raise self.refuse("add_eos_token", "texts that get an end by themselves are not supported")
        self.chat_template = _templates(fields)
        normalization = self.get("precompiled_charsmap", []) if self.model == "t5" else []  # no other is normalized
        self.charsmap = bytes(number & 0xFF for number in normalization)

    def get(self, name: str, default: Any = None) -> Any:
        """The field after "tokenizer.ggml."."""
        return self._fields.get(f"{_KEY}{name}", default)

    def refuse(self, name: str, complaint: str) -> UserError:
        """The UserError to raise about a field."""
        return UserError(f"{self.where}: {_KEY}{name}: {complaint}")

    def _list(self, name: str, kind: type) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(one, kind) for one in value):
            raise self.refuse(name, "is missing or no list")
        return value

    @property
    def named(self) -> dict[str, str]:
        """Special tokens as tokenizer_config.json names them."""
        return {f"{name}_token": self.tokens[number] for name, number in self.special.items()}

    @property
    def ends(self) -> list[int]:
        """Ids that llama.cpp ends a text at: those that the file names, and those that it knows by their texts."""
        named = [self.get(f"{name}_token_id") for name in ("eos", *FURTHER_ENDS)]
        known = [number for number, text in enumerate(self.tokens) if text in KNOWN_ENDS]
        return [n for n in dict.fromkeys([*named, *known]) if isinstance(n, int) and 0 <= n < len(self.tokens)]

    def ids(self, *types: int) -> list[int]:
        """Ids of the tokens of these types."""
        return [number for number, kind in enumerate(self.types) if kind in types]


# Byte-level BPE -------------------------------------------------------------------------------------------------------


def _pre_tokenizer(stored: _Stored) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if stored.pre == "gpt-2":
        return level
    if stored.pre == "smollm":
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    for pattern, name in SPLITS.items():
        if stored.pre == name:
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            return {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}
    raise stored.refuse("pre", f"{stored.pre!r} is not read (gpt-2, smollm, {', '.join(SPLITS.values())} are)")


def _write_byte_level(stored: _Stored, folder: Path, context: int) -> None:
    merges = stored.get("merges")
    if not isinstance(merges, list):
        raise stored.refuse("merges", "is missing")
    own = set(stored.ids(CONTROL, USER_DEFINED))
    last = max((number for number, kind in enumerate(stored.types) if kind not in (CONTROL, USER_DEFINED, UNUSED)))
    # What is added after the vocabulary gets its id by its place; what lies inside must be in it.
    vocabulary = {text: n for n, text in enumerate(stored.tokens[: last + 1]) if stored.types[n] != UNUSED}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = stored.special.get("bos")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": n, "content": stored.tokens[n], **flags, "special": stored.types[n] == CONTROL} for n in sorted(own)
        ],
        "normalizer": {"type": "NFC"} if stored.pre == "qwen2" else None,
        "pre_tokenizer": _pre_tokenizer(stored),
        "post_processor": _begin_with(stored.tokens[bos], bos) if stored.add_bos and bos is not None else None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": stored.pre == "llama-bpe",
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    _write(folder / "tokenizer.json", content)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **stored.named,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    _write(folder / "tokenizer_config.json", config | _chat(stored))


def _begin_with(text: str, number: int) -> dict[str, Any]:
    """A post-processor that puts one token before a text."""
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": text, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {text: {"id": text, "ids": [number], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _templates(fields: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or all with their names where there are named ones, as tokenizer_config.json holds them."""
    first = "tokenizer.chat_template"
    names = {name: name.removeprefix(f"{first}.") for name in fields if name.startswith(f"{first}.")}
    names |= {first: DEFAULT} if first in fields else {}
    return as_setting({ours: fields[theirs] for theirs, ours in names.items() if isinstance(fields[theirs], str)})


def _chat(stored: _Stored) -> dict[str, Any]:
    return {} if stored.chat_template is None else {"chat_template": stored.chat_template}


# SentencePiece --------------------------------------------------------------------------------------------------------


def _write_sentencepiece(stored: _Stored, folder: Path, context: int) -> None:
    scores, unknown = stored.get("scores"), stored.ids(PieceKind.UNKNOWN)
    if not isinstance(scores, list) or len(scores) != len(stored.tokens):
        raise stored.refuse("scores", "is missing or of another length than the tokens")
    if len(unknown) != 1:
        raise stored.refuse("token_type", f"names {len(unknown)} unknown tokens instead of 1")
    size = max(number for number, kind in enumerate(stored.types) if kind != UNUSED) + 1  # rows without a token follow
    unigram = stored.model == "t5"
    control = {name: stored.tokens[n] for name, n in stored.special.items() if stored.types[n] == CONTROL}
    model = SentencePieceModel(
        pieces=tuple(
            SpmPiece(text, float(score), PieceKind(kind))
            for text, score, kind in zip(stored.tokens[:size], scores, stored.types)
        ),
        model_type=_SENTENCEPIECE[stored.model],
        byte_fallback=bool(stored.ids(PieceKind.BYTE)),
        treat_whitespace_as_suffix=False,
        unk_surface=" \u2047 ",
        **{name: control.get(name) for name in ("bos", "eos", "pad")},
        normalizer_name="" if stored.charsmap else "identity",
        charsmap=stored.charsmap,
        add_dummy_prefix=bool(stored.get("add_space_prefix", not unigram)),
        remove_extra_whitespaces=unigram and bool(stored.get("remove_extra_whitespaces", False)),
        escape_whitespaces=True,
        has_denormalizer=False,
    )
    with scratch_folder() as place:
        file = place / "tokenizer.model"
        write_file(file, write_model(model), lasting=False)
        export_tokenizer(file, folder, context, add_bos=stored.add_bos)
    if stored.chat_template is not None:  # whose special tokens are meant, not spelled
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        _write(folder / "tokenizer_config.json", settings | _chat(stored) | {"split_special_tokens": False})


# ----------------------------------------------------------------------------------------------------------------------


def _compare(stored: _Stored, folder: Path) -> None:
    """Raise UserError unless a GGUF file of `folder` would hold the same vocabulary."""
    again = read_vocabulary(folder, len(stored.tokens))
    # Special ids without a token of their own in the files are the configuration's.
    pairs = {
        "model": (again.model, stored.model),
        "pre": (again.pre, stored.pre if stored.model == "gpt2" else again.pre),
        "merges": (again.merges, stored.get("merges") if stored.model == "gpt2" else None),
        "precompiled_charsmap": (again.charsmap, stored.charsmap),
        "add_bos_token": (again.add_bos, stored.add_bos and "bos" in stored.special),
        **{theirs: (again.special.get(name), stored.special.get(name)) for name, theirs in _SPECIAL.items()},
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise stored.refuse(name, "a tokenizer that does the same cannot be written")
    for number, kind in enumerate(stored.types):
        if kind != UNUSED and again.tokens[number] != stored.tokens[number]:
            raise stored.refuse("tokens", f"{stored.tokens[number]!a} would become {again.tokens[number]!a}")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    write_file(file, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode(), lasting=False)
