"""Documents -> token ids -> an indexed data set `P.bin`, `P.idx` with its facts in `P.json`.

    preprocess   the whole job: read, encode with any number of processes, write, put in place
    Options, EncodingProgress, Summary   what goes in, what is reported on the way, what comes out

The output is the same byte for byte whatever the number of processes: documents are cut into chunks by the one process
that reads, and chunks are written in the order they were read. Only a few chunks per process are alive at a time, so
memory does not grow with the input. Files are written beside their place under temporary names and renamed when all is
done, the index last: where `P.idx` stands, the data set is whole. What a killed run left there is removed by the next.

Workers are spawned and load the tokenizer only; scripts that call `preprocess` with more than one of them need an
`if __name__ == "__main__"` guard.
"""

import functools
import glob
import itertools
import multiprocessing
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_prune.data.documents import AUTO, Document, check_inputs, read_documents
from megatron_prune.data.indexed import Metadata, bin_path, holds_metadata, idx_path, metadata_path, token_dtype
from megatron_prune.data.leftovers import claim, clear_unowned, sole_writer
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.runtime.compat import start_all_workers, stop_feeding
from megatron_prune.runtime.signals import begin_worker

_CHUNK_CHARACTERS = 1 << 18
_CHUNK_DOCUMENTS = 1024
_SECONDS_TO_RENAME = 60
_CHUNKS_PER_WORKER = 4  # in flight: enough to keep every worker busy, few enough to bound memory


@dataclass(frozen=True)
class Options:
    """How documents become tokens.

    Attributes:
        tokenizer_model, tokenizer_type: see `build_tokenizer`.
        append_eod: end every document with the end-of-document id.
        prepend_bos: begin every document with the begin-of-sequence id.
        document_separator, json_key, input_format: see `read_documents`.
        workers: processes that encode; 1 encodes in the calling process.
        overwrite: replace a data set that stands at the output prefix.
    """

    tokenizer_model: str
    tokenizer_type: str | None = None
    append_eod: bool = False
    prepend_bos: bool = False
    document_separator: str = "blank-line"
    json_key: str = "text"
    input_format: str = AUTO
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class EncodingProgress:
    """How far the job is: `disk_bytes` of `total_bytes` of the input files, as they lie on disk, are encoded; of pipes
    `total_bytes` is 0."""

    documents: int
    tokens: int
    disk_bytes: int
    total_bytes: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What was written: the data set's facts, the size of its `.bin` in bytes, and the time it took."""

    metadata: Metadata
    bin_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Chunk:
    """Encoded documents: all ids [sum of lengths], and each document's length; 0 for one without a token."""

    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int
    disk_bytes: int


@dataclass
class _Totals:
    """Running sums, under the names of `Metadata`."""

    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    max_token_id: int = 0
    text_bytes: int = 0

    def count(self, chunk: _Chunk) -> None:
        empty = chunk.lengths.count(0)
        self.documents += len(chunk.lengths) - empty
        self.tokens += chunk.tokens.size
        self.empty_documents += empty
        self.max_token_id = max(self.max_token_id, int(chunk.tokens.max(initial=0)))
        self.text_bytes += chunk.text_bytes


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    options: Options,
    on_progress: Callable[[EncodingProgress], None] = lambda _: None,
) -> Summary:
    """Write the data set `output_prefix`.{bin,idx,json} from text and JSON-lines files.

    Documents without a token are left out and counted.

    Args:
        inputs: files, see `documents`.
        output_prefix: path without a suffix; its folder is made where it is missing.
        options: how documents become tokens.
        on_progress: called after every chunk.

    Raises:
        UserError: a wrong option or file; an output that already stands there, without `overwrite`; no document in
            the input. Nothing is left under the output's names then.
    """
    if options.workers < 1:
        raise UserError(f"--workers: expected at least 1, got {options.workers}")
    total_bytes = check_inputs(inputs)
    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model)
    if options.prepend_bos and tokenizer.bos is None:
        raise UserError(f"--prepend-bos: the tokenizer {tokenizer.path} has no begin-of-sequence id")
    documents = read_documents(inputs, options.document_separator, options.json_key, options.input_format)
    dtype = token_dtype(tokenizer.vocab_size)
    with _output(output_prefix, inputs, options.overwrite) as files:
        builder = _indexed_dataset_builder(str(files.bin), dtype)
        started = time.monotonic()
        totals = _Totals()
        try:
            for chunk in _encode_all(documents, tokenizer, options):
                _add(builder, chunk)
                totals.count(chunk)
                seconds = time.monotonic() - started
                on_progress(EncodingProgress(totals.documents, totals.tokens, chunk.disk_bytes, total_bytes, seconds))
            if totals.documents == 0:
                raise UserError(f"--input: no text in {', '.join(inputs)}")
            builder.finalize(str(files.idx))
        finally:
            builder.data_file.close()
        metadata = Metadata(
            tokenizer_type=tokenizer.kind,
            tokenizer_path=tokenizer.path,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            **vars(totals),
            dtype=np.dtype(dtype).name,
            prepend_bos=options.prepend_bos,
            append_eod=options.append_eod,
            document_separator=options.document_separator,
            json_key=options.json_key,
            inputs=tuple(inputs),
        )
        files.metadata.write_text(metadata.to_json(), encoding="utf-8")
    return Summary(metadata, bin_path(output_prefix).stat().st_size, time.monotonic() - started)


# Encoding -------------------------------------------------------------------------------------------------------------


def _chunks(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """Group documents into (texts, bytes read from disk when the last was complete)."""
    texts: list[str] = []
    characters = 0
    disk_bytes = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        disk_bytes = document.disk_bytes
        if characters >= _CHUNK_CHARACTERS or len(texts) >= _CHUNK_DOCUMENTS:
            yield texts, disk_bytes
            texts, characters = [], 0
    if texts:
        yield texts, disk_bytes


def _encode(tokenizer: Tokenizer, texts: list[str], disk_bytes: int, append_eod: bool, prepend_bos: bool) -> _Chunk:
    first = [tokenizer.bos] if prepend_bos and tokenizer.bos is not None else []
    last = [tokenizer.eod] if append_eod else []
    documents = [[*first, *ids, *last] if ids else [] for ids in tokenizer.tokenize_all(texts)]
    lengths = [len(ids) for ids in documents]
    tokens = np.fromiter(itertools.chain.from_iterable(documents), token_dtype(tokenizer.vocab_size), sum(lengths))
    return _Chunk(tokens, lengths, sum(len(text.encode()) for text in texts), disk_bytes)


@functools.cache
def _tokenizer_of_worker(tokenizer_type: str, tokenizer_model: str) -> Tokenizer:
    """Built once per worker process."""
    return build_tokenizer(tokenizer_type, tokenizer_model)


def _encode_in_worker(
    kind: str, path: str, texts: list[str], disk_bytes: int, append_eod: bool, prepend_bos: bool
) -> _Chunk:
    return _encode(_tokenizer_of_worker(kind, path), texts, disk_bytes, append_eod, prepend_bos)


def _encode_all(documents: Iterable[Document], tokenizer: Tokenizer, options: Options) -> Iterator[_Chunk]:
    """Encode all chunks, in the order they were read, with a bounded number of them in flight."""
    extra = (options.append_eod, options.prepend_bos)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are what runs side by side
    if options.workers == 1:
        for texts, disk_bytes in _chunks(documents):
            yield _encode(tokenizer, texts, disk_bytes, *extra)
        return
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[_Chunk]] = deque()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(options.workers, context, initializer=begin_worker)
    start_all_workers(pool)
    try:
        for texts, disk_bytes in _chunks(documents):
            pending.append(pool.submit(_encode_in_worker, tokenizer.kind, tokenizer.path, texts, disk_bytes, *extra))
            if len(pending) >= options.workers * _CHUNKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except (BrokenProcessPool, MemoryError) as error:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        stop_feeding(pool)
        raise UserError(
            f"--workers {options.workers}: a process was killed or ran out of memory; nothing was written; give fewer "
            "workers or more memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# Writing --------------------------------------------------------------------------------------------------------------


def _add(builder: Any, chunk: _Chunk) -> None:
    """Append every document of a chunk that has a token."""
    end = 0
    for length in chunk.lengths:
        start, end = end, end + length
        if length:
            builder.add_document(chunk.tokens[start:end], [length])


def _indexed_dataset_builder(path: str, dtype: type[np.integer[Any]]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core announces absent accelerators, which nobody needs here
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(path, dtype=dtype)


class _Files(NamedTuple):
    bin: Path
    idx: Path
    metadata: Path


@contextmanager
def _output(prefix: str, inputs: Sequence[str], overwrite: bool) -> Iterator[_Files]:
    """Temporary files beside the three output files; put in place at the end, removed if anything goes wrong."""
    final = _Files(bin_path(prefix), idx_path(prefix), metadata_path(prefix))
    _check_output(prefix, final, inputs, overwrite)
    ending = f".tmp{os.getpid()}"
    files = _Files(*(Path(f"{path}{ending}") for path in final))
    try:
        with sole_writer(Path(prefix), "--output-prefix"):
            _clear_leftovers(final)
            try:
                with claim(files.bin):
                    yield files
                    _check_output(prefix, final, inputs, overwrite)  # something may have come meanwhile
                    final.idx.unlink(missing_ok=True)  # from here to the last line nothing passes for a whole data set
                    files.bin.replace(final.bin)
                    files.metadata.replace(final.metadata)
                    files.idx.replace(final.idx)
            finally:
                for path in files:
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: cannot be written: {error.strerror or error}") from error


def _clear_leftovers(final: _Files) -> None:
    """Remove what runs that were killed left here: a .bin that nobody has a claim on, with what belongs to it."""
    claimed = {path.name.removeprefix(final.bin.name): path for path in _temporaries(final.bin)}
    clear_unowned(claimed.values())
    for path in (final.idx, final.metadata):
        for left in _temporaries(path):
            owner = claimed.get(left.name.removeprefix(path.name))
            with suppress(OSError):
                if not owner.exists() if owner is not None else _is_settled(left):
                    left.unlink()


def _temporaries(path: Path) -> list[Path]:
    return sorted(path.parent.glob(glob.escape(path.name) + ".tmp[0-9]*"))


def _is_settled(path: Path) -> bool:
    """Whether nobody is just about to put this file in place, which takes no time once it is written."""
    return time.time() - path.stat().st_mtime > _SECONDS_TO_RENAME


def _check_output(prefix: str, final: _Files, inputs: Sequence[str], overwrite: bool) -> None:
    if "\0" in prefix:
        raise UserError(f"--output-prefix {prefix}: no file can have a NUL in its name")
    if os.path.isdir(prefix) or prefix.endswith(("/", os.sep)):
        raise UserError(f"--output-prefix {prefix}: is a folder; add a name, which becomes NAME.bin and NAME.idx")
    if prefix.endswith((".bin", ".idx")):
        raise UserError(f"--output-prefix {prefix}: give it without {prefix[-4:]}")
    for path in final:
        if not os.path.exists(path):  # which is False for a name that is too long, too
            continue
        if any(path.samefile(source) for source in inputs):
            raise UserError(f"--output-prefix {prefix}: {path} is an input file; choose another prefix")
        if path == final.metadata and not holds_metadata(prefix):
            raise UserError(f"--output-prefix {prefix}: {path} is no data set's; choose another prefix")
        if not overwrite:
            raise UserError(f"--output-prefix {prefix}: {path} exists; choose another prefix or give --overwrite")
