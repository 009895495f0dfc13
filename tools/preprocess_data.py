"""Turn text into a data set to train on: documents -> token ids -> PREFIX.bin, PREFIX.idx and PREFIX.json.

    python tools/preprocess_data.py --input corpus.txt more.jsonl.gz --output-prefix data/corpus \\
        --tokenizer-model model_folder --append-eod --workers 8

The names are exactly those: nothing is appended to the prefix. Train on it with --data-path PREFIX. PREFIX.json holds
what was done (tokenizer, options, documents, tokens). A mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from megatron_prune.data.documents import AUTO, INPUT_FORMATS, SEPARATORS
from megatron_prune.data.preprocess import Options, Progress, Summary, preprocess
from megatron_prune.data.tokenizer import TOKENIZER_TYPES
from megatron_prune.errors import UserError, one_line

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="UTF-8 text or JSON lines, seen from the content; packed (gzip, bzip2, xz) or not; or a pipe: <(zcat F)",
    )
    add("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    add(
        "--tokenizer-model", required=True, metavar="PATH", help="tokenizer.model, tokenizer.json, or a folder with one"
    )
    add("--tokenizer-type", choices=TOKENIZER_TYPES, help="seen from --tokenizer-model unless given")
    add("--append-eod", action="store_true", help="end every document with the end-of-sequence id")
    add("--prepend-bos", action="store_true", help="begin every document with the begin-of-sequence id")
    add("--workers", type=int, default=1, metavar="N", help="processes that encode; the output does not depend on it")
    add("--input-format", choices=INPUT_FORMATS, default=AUTO, help="what all inputs are, where it is not to be seen")
    add("--json-key", default="text", metavar="KEY", help="where a JSON line holds its text")
    add("--document-separator", choices=SEPARATORS, default=SEPARATORS[0], help="what ends a document of a text file")
    add("--overwrite", action="store_true", help="replace a data set that stands at the prefix")
    return parser.parse_args(argv)


class ProgressDisplay:
    """A bar on a terminal, a plain line every ten seconds elsewhere; both on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._terminal = sys.stderr.isatty()
        self._last_line = time.monotonic()

    def __call__(self, progress: Progress) -> None:
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
            print(
                f"{share}{progress.documents:,} documents, {progress.tokens:,} tokens, {rate:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()


def report(summary: Summary, prefix: str) -> None:
    """Say what was written."""
    facts = summary.metadata
    print(
        f"{one_line(prefix)}.bin: {facts.documents:,} documents, {facts.tokens:,} tokens, {summary.bin_bytes:,} bytes "
        f"({facts.dtype}), {facts.text_bytes / facts.tokens:.2f} bytes of text per token, "
        f"{facts.tokens / max(summary.seconds, 1e-9):,.0f} tokens/s"
    )
    if facts.empty_documents:
        print(f"{facts.empty_documents:,} empty documents were left out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    arguments = parse(argv)
    options = Options(
        tokenizer_model=arguments.tokenizer_model,
        tokenizer_type=arguments.tokenizer_type,
        append_eod=arguments.append_eod,
        prepend_bos=arguments.prepend_bos,
        document_separator=arguments.document_separator,
        json_key=arguments.json_key,
        input_format=arguments.input_format,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("megatron_prune").setLevel(logging.INFO)
    display = ProgressDisplay()
    try:
        summary = preprocess(arguments.input, arguments.output_prefix, options, display)
    except UserError as error:
        display.close()
        print(f"preprocess_data: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        display.close()
        print("preprocess_data: interrupted; nothing was written", file=sys.stderr)
        return 130
    display.close()
    report(summary, arguments.output_prefix)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    sys.exit(main())
