"""Folders laid out as real models' are, small: a SentencePiece file with the files beside it, byte-level tokenizers.

LAYOUTS   name -> a function that writes such a folder's tokenizer files, from stories260K's model and a text
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}"
    "{% endif %}{{ m.role.upper() + ': ' + m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}"
    "{% endif %}"
)
TOOLS = "{% for m in messages %}[{{ m.content }}]{% endfor %}"

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def token(text: str, special: bool = True, normalized: bool = False) -> dict[str, Any]:
    """An added token as tokenizer_config.json holds it."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": text, "special": special, "normalized": normalized, **flags}


def write(folder: Path, files: dict[str, Any]) -> None:
    """Files by name: text as it is, all else as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def vicuna(folder: Path, model: Path, text: Path) -> None:
    """A padding token of its own, settings in three files, a template that refuses system messages."""
    shutil.copyfile(model, folder / "tokenizer.model")
    named = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>"), "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 4096, "padding_side": "left",
        "bos_token": {"__type": "AddedToken", **token("<s>")}, "eos_token": {"__type": "AddedToken", **token("</s>")},
        "unk_token": {"__type": "AddedToken", **token("<unk>")}, "pad_token": "<pad>", "sp_model_kwargs": {},
        "chat_template": VICUNA,
    }  # fmt: skip
    write(
        folder, {"tokenizer_config.json": config, "special_tokens_map.json": named, "added_tokens.json": {"<pad>": 512}}
    )


def zephyr(folder: Path, model: Path, text: Path) -> None:
    """Roles as added tokens, one of them no special one; the end of text pads, on the left."""
    shutil.copyfile(model, folder / "tokenizer.model")
    added = ["<unk>", "<s>", "</s>", *[""] * 509, "<|user|>", "<|assistant|>", "<|system|>"]
    decoder = {str(number): token(one, special=number != 514) for number, one in enumerate(added) if one}
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, "use_default_system_prompt": True,
        "added_tokens_decoder": decoder, "additional_special_tokens": ["<|user|>", "<|assistant|>"],
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "truncation_side": "left",
        "padding_side": "left", "model_max_length": 1000000000000000019884624838656, "chat_template": ZEPHYR,
    }  # fmt: skip
    write(folder, {"tokenizer_config.json": config})


def chatml(folder: Path, model: Path, text: Path) -> None:
    """Documents end with an added token; named templates, none of them in a file of its own."""
    shutil.copyfile(model, folder / "tokenizer.model")
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<unk>"}
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    config = {"tokenizer_class": "LlamaTokenizer", **named, "padding_side": "right", "chat_template": templates}
    added = {"<|im_end|>": 512, "<|im_start|>": 513}
    write(folder, {"tokenizer_config.json": config, "special_tokens_map.json": named, "added_tokens.json": added})


def llama2(folder: Path, model: Path, text: Path) -> None:
    """Llama 2's own: tokenizer.model, and tokenizer.json as transformers 4 converts it."""
    shutil.copyfile(model, folder / "tokenizer.model")
    from megatron_prune.huggingface.sentencepiece_model import read_model
    from megatron_prune.huggingface.sentencepiece_to_json import tokenizer_json

    content = tokenizer_json(read_model(model), add_bos=True)
    content["normalizer"]["normalizers"] = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(
        folder,
        {"tokenizer.json": content, "tokenizer_config.json": config, "chat_template.json": {"chat_template": ZEPHYR}},
    )


def byte_level(text: Path, special: list[str], split: str | None, vocab_size: int = 500) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on the spot, its special tokens last."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated"), level] if split else [level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if split else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = text.read_text(encoding="utf-8").split("\n")[:2000]
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(one, normalized=False) for one in special])
    return tokenizer


def llama3(folder: Path, model: Path, text: Path) -> None:
    """Three ends of text, told in three files that disagree."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ]
    tokenizer = byte_level(text, special, LLAMA3_SPLIT)
    begin = tokenizer.token_to_id(special[0])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], begin)]),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": "<|eot_id|>",
        "added_tokens_decoder": {str(begin + i): token(one) for i, one in enumerate(special)},
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": True,
    }  # fmt: skip
    ends = [tokenizer.token_to_id(one) for one in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    write(
        folder,
        {
            "tokenizer_config.json": config,
            "chat_template.jinja": LLAMA3,
            "additional_chat_templates/rag.jinja": TOOLS,
            "generation_config.json": {"eos_token_id": ends, "bos_token_id": begin},
        },
    )


def stale(folder: Path, model: Path, text: Path) -> None:
    """Another model's tokenizer.model beside tokenizer.json, as conversions leave it."""
    llama3(folder, model, text)
    shutil.copyfile(model, folder / "tokenizer.model")


def qwen(folder: Path, model: Path, text: Path) -> None:
    """vocab.json and merges.txt, more tokens in tokenizer_config.json."""
    tokenizer = byte_level(text, [], None)
    tokenizer.model.save(str(folder))
    size = tokenizer.get_vocab_size()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "errors": "replace",
        "added_tokens_decoder": {str(size + i): token(one, one != "<think>") for i, one in enumerate(names)},
        "chat_template": CHATML, "split_special_tokens": False,
    }  # fmt: skip
    write(folder, {"tokenizer_config.json": config})


def resaved(folder: Path, model: Path, text: Path) -> None:
    """Our own export after transformers saved it again, without tokenizer.model."""
    from transformers import AutoTokenizer

    from megatron_prune.huggingface.tokenizer_export import export_tokenizer

    export_tokenizer(model, folder / "first", 512)
    AutoTokenizer.from_pretrained(str(folder / "first")).save_pretrained(str(folder))
    shutil.rmtree(folder / "first")
    (folder / "tokenizer.model").unlink(missing_ok=True)


LAYOUTS: dict[str, Callable[[Path, Path, Path], None]] = {
    maker.__name__: maker for maker in (vicuna, zephyr, chatml, llama2, llama3, stale, qwen, resaved)
}
