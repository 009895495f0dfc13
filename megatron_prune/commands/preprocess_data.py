"""Turn text into a data set to train on: documents -> token ids -> PREFIX.bin, PREFIX.idx and PREFIX.json.

    megatron-prune preprocess --input corpus.txt more.jsonl.gz --output-prefix data/corpus \\
        --tokenizer-model model_folder --append-eod --workers 8

The names are exactly those: nothing is appended to the prefix. Train on it with --data-path PREFIX. PREFIX.json holds
what was done (tokenizer, options, documents, tokens).
"""

import contextlib
import logging
import sys
import time
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from megatron_prune.commands.running import NOTHING_WRITTEN, run_command, say
from megatron_prune.config.options import filled, option
from megatron_prune.data.documents import AUTO, INPUT_FORMATS, SEPARATORS
from megatron_prune.data.preprocess import EncodingProgress, Options, Summary, preprocess
from megatron_prune.data.tokenizer_files import TOKENIZER_TYPES
from megatron_prune.errors import one_line

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


@dataclass(frozen=True)
class PreprocessOptions:
    """The command's options."""

    input: tuple[str, ...] = option(
        (),
        "UTF-8 text or JSON lines, seen from the content; packed (gzip, bzip2, xz) or not; or a pipe: <(zcat F)",
        metavar="FILE",
        required=True,
    )
    output_prefix: str = option(None, "writes P.bin, P.idx and P.json", metavar="P", required=True)
    tokenizer_model: str = option(
        None, "tokenizer.model, tokenizer.json, or a folder with one", metavar="PATH", required=True
    )
    tokenizer_type: str | None = option(None, "seen from --tokenizer-model unless given", choices=TOKENIZER_TYPES)
    append_eod: bool = option(False, "end every document with the end-of-sequence id")
    prepend_bos: bool = option(False, "begin every document with the begin-of-sequence id")
    workers: int = option(1, "processes that encode; the output does not depend on it")
    input_format: str = option(AUTO, "what all inputs are, where it is not to be seen", choices=INPUT_FORMATS)
    json_key: str = option("text", "where a JSON line holds its text", metavar="KEY")
    document_separator: str = option(SEPARATORS[0], "what ends a document of a text file", choices=SEPARATORS)
    overwrite: bool = option(False, "replace a data set that stands at the prefix")


class ProgressDisplay:
    """A bar on a terminal, a plain line every ten seconds elsewhere; both on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._terminal = sys.stderr.isatty()
        self._last_line = time.monotonic()

    def __call__(self, progress: EncodingProgress) -> None:
        """Show where the job is."""
        rate = progress.tokens / max(progress.seconds, 1e-9)
        if self._terminal:
            if self._bar is None:
                self._bar = tqdm(total=progress.total_bytes or None, unit="B", unit_scale=True, desc="encoding")
            self._bar.set_postfix_str(f"{progress.tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            self._bar.update(progress.disk_bytes - self._bar.n)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            known = progress.total_bytes > 0  # of a pipe it is not
            share = f"{progress.disk_bytes / progress.total_bytes:4.0%} of the input, " if known else ""
            say(
                f"{share}{progress.documents:,} documents, {progress.tokens:,} tokens, {rate:,.0f} tokens/s", sys.stderr
            )

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()


def report(summary: Summary, prefix: str) -> None:
    """Say what was written."""
    facts = summary.metadata
    say(
        f"{one_line(prefix)}.bin: {facts.documents:,} documents, {facts.tokens:,} tokens, {summary.bin_bytes:,} bytes "
        f"({facts.dtype}), {facts.text_bytes / facts.tokens:.2f} bytes of text per token, "
        f"{facts.tokens / max(summary.seconds, 1e-9):,.0f} tokens/s"
    )
    if facts.empty_documents:
        say(f"{facts.empty_documents:,} empty documents were left out")


def encode(arguments: PreprocessOptions) -> int:
    """Encode and say what was written; the exit status. Raises UserError."""
    logging.getLogger("megatron_prune").setLevel(logging.INFO)
    with contextlib.closing(ProgressDisplay()) as display:
        summary = preprocess(arguments.input, arguments.output_prefix, filled(Options, arguments), display)
    report(summary, arguments.output_prefix)
    return 0


main = partial(run_command, "preprocess", PreprocessOptions, encode, interrupted=NOTHING_WRITTEN)
