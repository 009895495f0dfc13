"""A SentencePiece tokenizer (BPE, bytes for what it does not know) trained on a sample of a JSON-lines corpus.

    python examples/demo/train_tokenizer.py --corpus build/demo/corpus.jsonl --output build/demo/tokenizer.model

Spaces and indentation are kept as they are, since half of the corpus is Python: no normalization, no prefix, and pieces
of spaces only. Ids: unknown 0, begin 1, end 2, the 256 bytes, then pieces.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError


def sample_lines(corpus: Path, megabytes: float) -> Iterator[str]:
    """Lines of text from the front of the corpus, whose order is mixed, until there is enough."""
    left = megabytes * 1e6
    with corpus.open(encoding="utf-8") as file:
        for entry in file:
            for line in json.loads(entry)["text"].split("\n"):
                left -= len(line) + 1
                if left < 0:
                    return
                if line.strip():
                    yield line


def train(lines: Iterator[str], vocab_size: int) -> bytes:
    """The content of a `tokenizer.model` with `vocab_size` ids. Raises RuntimeError where the text is too little."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


@dataclass(frozen=True)
class TokenizerOptions:
    """Its options."""

    corpus: str = option(None, "JSON lines with a key text", metavar="FILE", required=True)
    output: str = option(None, "tokenizer.model to write", metavar="FILE", required=True)
    vocab_size: int = option(2048, "ids")
    megabytes: float = option(2.0, "text to train on, which bounds the time")


def write(arguments: TokenizerOptions) -> int:
    """Train and write; the exit status. Raises UserError."""
    try:
        content = train(sample_lines(Path(arguments.corpus), arguments.megabytes), arguments.vocab_size)
    except RuntimeError as error:
        raise UserError(f"--corpus {arguments.corpus}: {error}") from error
    Path(arguments.output).write_bytes(content)
    print(f"{arguments.output}: {arguments.vocab_size:,} ids, trained on {arguments.megabytes:g} MB of text")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command("train_tokenizer.py", TokenizerOptions, write, argv, about="A tokenizer of the corpus's own.")


if __name__ == "__main__":
    sys.exit(main())
