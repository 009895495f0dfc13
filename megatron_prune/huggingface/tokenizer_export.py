"""The tokenizer of an exported model: files that give stock `transformers` the ids the model was trained with.

- `export_tokenizer`: from the SentencePiece `.model` file a model was trained with. What
  `AutoTokenizer` makes of the bare file depends on its version: for a Llama's, 5.23 gives other ids without a word,
  4.48, 4.57 and 5.24 do so only for texts that spell control pieces (docs/huggingface.md). See sentencepiece_to_json
  for how the files written here avoid that, and for what is refused.
  (From a Hugging Face folder, when its tokenizer was trained with: tokenizer_copy.)
- `verify_tokenizer`: compares the two on any texts, as `AutoTokenizer` loads the folder. Every export runs it on
  `NASTY_TEXTS` before a file reaches its place.

The files are of the plainest form (`PreTrainedTokenizerFast`), so that transformers 4.45 to 5 read them alike.
"""

import json
import logging
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_prune.data.leftovers import scratch_folder
from megatron_prune.errors import UserError
from megatron_prune.reading import read_content
from megatron_prune.runtime.folders import write_file

from .sentencepiece_model import SentencePieceModel, processor_of, read_model
from .sentencepiece_to_json import tokenizer_json

logger = logging.getLogger(__name__)

NASTY_TEXTS = (
    "",
    " ",
    "   ",
    "a",
    "Hello, world! It's 12,345.67% of what they'd said.",
    " one leading space",
    "   three leading spaces",
    "one trailing space ",
    "three trailing spaces   ",
    "many   spaces  in    between",
    "line\nfeed\n\nand\r\nreturn\rreturn\n",
    "\n",
    "\n\n  \n",
    "\ttab\t\ttabs",
    "non\u00a0breaking, em\u2003space, zero\u200bwidth, ideographic\u3000space, \ufeffmark",
    "emoji \U0001f600\U0001f44d\U0001f3fd\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u6f22\u5b57\u3068\u304b\u306a\u3002\ud55c\uad6d\uc5b4 \u4e2d\u6587",
    "composed \u00e9\u1ed9\uac00\u304c, apart e\u0301 o\u0323\u0302 \u1100\u1161\u11a8 \u304b\u3099",
    "\u0301leading accent, a\u0301\u0323\u0302\u0308 piled",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940",
    "compatible \ufb01 \u2460 \uff21 \u33a5 \u2026 \u00bd",
    "control \x01\x02\x1b[0m\x7f\x85",
    "\x01\x02",
    "noncharacters \ufdd0\uffff, private \ue000, fences \ufff9\ufffa|~!",
    "\U00010000\U0010ffff\ufffd",
    "\u2581",
    "\u2581\u2581 literal \u2581signs\u2581 ",
    "<s>",
    "</s> <unk> <pad> <s>and</s>",
    "<0x41>",
    "a<0x0A><0x41>b <0xFF",
    "[INST] <<SYS>> <|im_start|> <|endoftext|> [MASK]",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(3)]}  # comment\n",
    'https://example.org/?q=a%20b&c=d#e \\n \\\\ "quoted" `code`',
)
"""Texts on which conversions of tokenizers go wrong."""

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that do what tokenizer.json says and nothing else; the second is version 5's name of the first."""


def export_tokenizer(
    tokenizer_model: Path, save_dir: Path, model_max_length: int | None, *, add_bos: bool = False
) -> None:
    """Write the Hugging Face form of a SentencePiece model into a folder, checked against SentencePiece itself.

    Arguments:
        tokenizer_model: the `.model` file, BPE or unigram.
        save_dir: the folder of the exported model; made if absent. It gets tokenizer.json, tokenizer_config.json,
            special_tokens_map.json and tokenizer.model (a copy; llama.cpp's converter reads it).
        model_max_length: tokens the model takes, a hint in tokenizer_config.json; None leaves it out.
        add_bos: whether calling the tokenizer puts the bos piece first. True is what Llama's own tokenizers do; False,
            the default, is what training on packed text without bos saw, so that evaluation equals training.

    Texts of special pieces in the text ("<s>") are text, as for SentencePiece: `split_special_tokens` is on in
    tokenizer_config.json, and can be turned off per call.

    Raises UserError if the file is no SentencePiece model, has an option that cannot be reproduced exactly (the message
    names it), or if transformers is not installed, and writes nothing then.
    """
    if find_spec("transformers") is None:
        raise UserError("exporting a tokenizer needs transformers to check it: install megatron-prune[hf]")
    model = read_model(tokenizer_model)
    files = {
        "tokenizer.json": tokenizer_json(model, add_bos),
        "tokenizer_config.json": _config(model, model_max_length, add_bos),
        "special_tokens_map.json": _special_tokens(model),
    }
    if model.model_type == "unigram":
        logger.warning(
            "%s: a unigram model; SentencePiece adds scores in 32 bits, tokenizer.json in 64, so where segmentations "
            'score the same but for rounding (runs such as "0000", and now and then in texts of 100,000 characters) '
            "the exported tokenizer may choose another one",
            tokenizer_model,
        )
    with scratch_folder() as staged:
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=2)
            write_file(staged / name, (text + "\n").encode(), lasting=False)
        shutil.copyfile(tokenizer_model, staged / "tokenizer.model")
        config = save_dir / "config.json"
        # A stock model_type may change the class AutoTokenizer picks; with code of its own, a folder's says nothing,
        # and transformers would ask whether to run that code.
        if config.exists() and "auto_map" not in json.loads(config.read_text(encoding="utf-8")):
            shutil.copyfile(config, staged / "config.json")
        verify_tokenizer(tokenizer_model, staged, NASTY_TEXTS)
        save_dir.mkdir(parents=True, exist_ok=True)
        for name in (*files, "tokenizer.model"):
            shutil.copyfile(staged / name, save_dir / name)
    logger.info("%s: tokenizer of %d pieces written to %s", tokenizer_model, len(model.pieces), save_dir)


def verify_tokenizer(tokenizer_model: Path, save_dir: Path, texts: Iterable[str]) -> None:
    """Check that the folder's tokenizer, as `AutoTokenizer` loads it, does what SentencePiece does.

    For each text: the same ids without special tokens, and the same text from decoding them. Besides: the same
    vocabulary size, and the same begin, end and unknown ids where the model has them.

    Raises UserError with the first text for which that does not hold.
    """
    from transformers import AutoTokenizer

    ours = processor_of(read_content(tokenizer_model), str(tokenizer_model))
    theirs = AutoTokenizer.from_pretrained(str(save_dir), trust_remote_code=False)
    if type(theirs).__name__ not in PLAIN_CLASSES:
        raise UserError(
            f"{save_dir / 'config.json'}: transformers loads {type(theirs).__name__} for its model_type, whatever the "
            "tokenizer's files say, and that is no SentencePiece tokenizer; use the tokenizer of the source model"
        )
    if len(theirs) != ours.get_piece_size():
        raise UserError(f"{save_dir}: its tokenizer has {len(theirs)} tokens, {tokenizer_model} has {len(ours)}")
    for name, number in (("bos", ours.bos_id()), ("eos", ours.eos_id()), ("unk", ours.unk_id())):
        found = getattr(theirs, f"{name}_token_id")
        if number >= 0 and found != number:
            raise UserError(f"{save_dir}: its tokenizer's {name}_token_id is {found}, {tokenizer_model} has {number}")
    for text in texts:
        expected = ours.encode(text)
        got = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
        if got != expected:
            raise UserError(
                f"{save_dir}: its tokenizer gives other ids than {tokenizer_model} "
                f"{_differ(got, expected)}, {_where(text)}"
            )
        decoded = theirs.decode(got, clean_up_tokenization_spaces=False)
        if decoded != ours.decode(expected):
            raise UserError(
                f"{save_dir}: its tokenizer decodes to {_short(decoded)}, {tokenizer_model} to "
                f"{_short(ours.decode(expected))}, {_where(text)}"
            )


def _differ(got: list[int], expected: list[int]) -> str:
    first = next((i for i, pair in enumerate(zip(got, expected)) if pair[0] != pair[1]), min(len(got), len(expected)))
    return f"({got[first : first + 8]} instead of {expected[first : first + 8]} from position {first} on)"


def _where(text: str) -> str:
    return f"for the text {_short(text)}"


def _short(text: str) -> str:
    return ascii(text if len(text) <= 200 else text[:200] + "...")


def _special_tokens(model: SentencePieceModel) -> dict[str, str]:
    named = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unknown, "pad_token": model.pad}
    return {name: text for name, text in named.items() if text is not None}


def _config(model: SentencePieceModel, model_max_length: int | None, add_bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_tokens(model),
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        # Without token_type_ids, which Llama's generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    return config
